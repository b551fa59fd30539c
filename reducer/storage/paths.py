"""Paths of photos that a rule tells from id and label."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from reducer.storage.location import PathRule, template_fields
from reducer.storage.tables import with_column


def with_paths(rule: PathRule | None, rows: pa.Table) -> pa.Table:
    """Return rows of a manifest or plan with paths filled in, where a rule tells them.

    Parameters
    ----------
    rule : PathRule or None
        Where the photos lie; None where the rows have their paths.
    rows : pyarrow.Table
        With ``id``, ``label`` and ``path``. Better a few than all: a path takes as much memory as all else of a row.
    """
    if rule is None or not rows["path"].null_count:
        return rows
    return with_column(rows, "path", paths_by_rule(rule, rows["id"], rows["label"]))


def paths_by_rule(rule: PathRule, ids: pa.ChunkedArray, labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the paths of photos, told by a rule.

    Parameters
    ----------
    rule : PathRule
        Root and template of the paths.
    ids, labels : pyarrow.ChunkedArray of string, shape (photos,)
        Id and label of each photo; long enough for the single characters that the template uses.

    Returns
    -------
    pyarrow.ChunkedArray of string, shape (photos,)
        Absolute paths or URLs; relative ones where the rule has no root.
    """
    parts: list[pa.ChunkedArray | str] = [rule.root and f"{rule.root}/"]
    for text, name, character in template_fields(rule.template):
        parts.append(text)
        if name is not None:
            column = ids if name == "id" else labels
            parts.append(column if character is None else pc.utf8_slice_codeunits(column, character, character + 1))
    return pc.binary_join_element_wise(*parts, "")
