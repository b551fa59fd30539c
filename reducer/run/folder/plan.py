"""The plan in a run folder: which photos, which shards, which hashes to avoid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from reducer.errors import InputError
from reducer.run.folder.files import AVOID, PLAN, SHARDS, RunFiles, note_of
from reducer.storage.codecs import Hashes
from reducer.storage.location import Shard
from reducer.storage.schemas import PLAN_SCHEMA, SHARDS_SCHEMA


class PlanFiles:
    """The plan, from which the run can be resumed.

    Parameters
    ----------
    files : RunFiles
        The run folder.
    """

    def __init__(self, files: RunFiles) -> None:
        self._files = files

    def write(self, rows: pa.Table, terms: dict[str, Any], avoid: Hashes | None = None) -> None:
        """Write the plan.

        Parameters
        ----------
        rows : pyarrow.Table
            `PLAN_SCHEMA`, with partitions.
        terms : dict
            What goes with the plan, for JSON: all that decides hashes and ranks.
        avoid : ndarray of uint8, shape (m, hash bytes), optional
            Packed hashes to avoid.
        """
        if avoid is not None:  # first: the plan is what tells that they are there
            self._files.write(AVOID, pa.table({"packed_hash": pa.array(list(map(bytes, avoid)), pa.binary())}))
        self._files.write(PLAN, rows, note=terms)

    def read(self) -> tuple[pa.Table, dict[str, Any]] | None:
        """Read the rows of the plan and its terms; None where there is no plan.

        Raises
        ------
        InputError
            If it cannot be read.
        """
        if not self._files.has(PLAN):
            return None
        rows, terms = self._files.read_table(PLAN)
        terms = self._checked(terms, rows.column_names)
        return rows.cast(PLAN_SCHEMA), terms

    def read_terms(self) -> dict[str, Any] | None:
        """Read the terms of the plan, and no row of it; None where there is no plan.

        Raises
        ------
        InputError
            If it cannot be read.
        """
        if not self._files.has(PLAN):
            return None
        footer = self._files.read_footer(PLAN)
        return self._checked(note_of(footer.metadata), footer.schema.to_arrow_schema().names)

    def _checked(self, terms: dict[str, Any] | None, columns: list[str]) -> dict[str, Any]:
        if terms is None or not set(PLAN_SCHEMA.names) <= set(columns):
            path = self._files.location.below(PLAN).path
            raise InputError(f"{path} is no plan of ours: begin again with --overwrite")
        return terms

    def read_avoid(self) -> Hashes | None:
        """Read the packed hashes to avoid, shape (m, hash bytes); None where there are none."""
        if not self._files.has(AVOID):
            return None
        packed: list[bytes] = self._files.read_table(AVOID)[0]["packed_hash"].to_pylist()
        return np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(len(packed), -1)

    def write_shards(self, shards: Sequence[Shard]) -> None:
        """Write which shards there are, and how they are now."""
        self._files.write(SHARDS, pa.Table.from_pylist([asdict(shard) for shard in shards], schema=SHARDS_SCHEMA))

    def read_shards(self) -> tuple[Shard, ...] | None:
        """Read the shards of the plan; None where the photos are single files."""
        if not self._files.has(SHARDS):
            return None
        return tuple(Shard(**row) for row in self._files.read_table(SHARDS)[0].to_pylist())
