"""Equal rows that stand together."""

from __future__ import annotations

import numpy as np
import pytest

from reducer.storage.sorting import in_groups, is_new, position_in_group


@pytest.mark.parametrize("rows", [0, 1, 2, 50])
@pytest.mark.parametrize("columns", [1, 3])
def test_groups_are_those_of_a_row_by_row_look(rows: int, columns: int) -> None:
    table = np.sort(np.random.default_rng(rows).integers(0, 2, (columns, rows)).astype(np.uint64), axis=1)
    keys = [tuple(row) for row in table.T.tolist()]
    new = is_new(*table)
    assert new.tolist() == [i == 0 or keys[i] != keys[i - 1] for i in range(rows)]
    alone = [keys.count(key) == 1 for key in keys]
    assert in_groups(new).tolist() == [i for i in range(rows) if not alone[i]]
    group = np.cumsum(new)
    assert position_in_group(group).tolist() == [i - keys.index(key) for i, key in enumerate(keys)]
