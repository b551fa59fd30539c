"""The run folder: the client is its only writer. Each file is whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from reducer.errors import InputError, ReducerError
from reducer.places import Place, explained, persistently
from reducer.types import LEDGER_SCHEMA, REDUCED_COLUMNS, reduced_schema

FORMAT = "reducer-run"
FORMAT_VERSION = 1
#: Rows of a Parquet row group; fixed, so that the bytes of a file depend on its rows only.
ROW_GROUP = 100_000
SUMMARY, CSV, PARQUET, IMAGES = "summary.json", "reduced.csv", "reduced.parquet", "images"


class RunFolder:
    """A run folder.

    Parameters
    ----------
    place : Place or str
        Where it is, or will be.
    """

    def __init__(self, place: Place | str) -> None:
        self.place = Place(place) if isinstance(place, str) else place
        #: Paths or URLs, to show.
        self.path = self.place.path
        self.images = self.place.below(IMAGES).path

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds something, unless it is a run folder that may be replaced.

        Raises
        ------
        InputError
            If it may not be written.
        """
        with explained(self.place, f"--output {self.path} cannot be used"):
            if not self.place.remote:
                self._check_local()
            if not self.place.holds_something() or not self._names():
                return
            if not self.is_run():
                raise InputError(
                    f"--output {self.path} is not empty and is no run folder (it has no summary.json of ours): nothing "
                    "in it was touched; give another folder"
                )
            if not overwrite:
                raise InputError(f"--output {self.path} holds a run already: give another folder, or --overwrite")

    def _check_local(self) -> None:
        path = Path(self.path)
        if not path.exists():
            parent = next(folder for folder in path.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise InputError(f"--output {path} cannot be made: {parent} is no folder that may be written")
        elif not path.is_dir():
            raise InputError(f"--output {path} is a file: give a folder")

    def is_run(self) -> bool:
        """Whether this is a folder that a run has written, finished or not."""
        try:
            found = self.read_summary()
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and found.get("format") == FORMAT

    def start(self, summary: dict[str, Any]) -> None:
        """Make the folder, take out what an earlier run left (nothing else), and write a first summary.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        system, root = self.place.open()
        try:
            folders = not self.place.on_s3
            if folders:
                system.makedirs(root, exist_ok=True)
            # The first summary marks the folder as ours before anything else is taken out or put in.
            self.write_summary(summary)
            if folders:
                system.makedirs(f"{root}/{IMAGES}", exist_ok=True)
            old = [name for name in (CSV, PARQUET) if name in self._names()]
            for name in [*old, *(f"{IMAGES}/{part}" for part in self._parts())]:
                system.rm_file(f"{root}/{name}")
        except (OSError, ReducerError) as error:
            raise InputError(f"--output {self.path} cannot be used: {error}") from None

    def write_part(self, index: int, ledger: pa.Table) -> None:
        """Write the ledger rows of one partition."""
        self._write(f"{IMAGES}/part-{index:05d}.parquet", _parquet(ledger))

    def ledger(self, columns: list[str] | None = None) -> pa.Table:
        """The ledger, in manifest order.

        Parameters
        ----------
        columns : list of str, optional
            Only these columns.
        """
        wanted = columns or LEDGER_SCHEMA.names
        system, root = self.place.open()
        parts = [f"{root}/{IMAGES}/{part}" for part in self._parts()]
        if not parts:
            return LEDGER_SCHEMA.empty_table().select(wanted)
        where = {"filesystem": system} if self.place.remote else {}
        dataset = pa.dataset.dataset(parts, schema=LEDGER_SCHEMA, format="parquet", **where)
        table = dataset.to_table(columns=list(dict.fromkeys([*wanted, "row"])))
        return table.sort_by("row").select(wanted)

    def reduced(self, id_column: str, label_column: str) -> pa.Table:
        """The kept rows of the ledger, in manifest order, in the columns of `reducer.types.reduced_schema`."""
        ledger = self.ledger(["id", "label", *REDUCED_COLUMNS, "kept"])
        schema = reduced_schema(id_column, label_column)
        return ledger.filter(ledger["kept"]).drop_columns(["kept"]).rename_columns(schema.names).cast(schema)

    def write_reduced(self, id_column: str, label_column: str, formats: str) -> None:
        """Write the reduced list from the ledger, in one pass.

        Parameters
        ----------
        id_column, label_column : str
            What the manifest calls its two columns.
        formats : {"csv", "parquet", "both"}
            Which files.
        """
        reduced = self.reduced(id_column, label_column)
        if formats in ("parquet", "both"):
            self._write(PARQUET, _parquet(reduced))
        if formats in ("csv", "both"):
            frame = reduced.select([id_column, label_column]).to_pandas()
            self._write(CSV, frame.to_csv(index=False, lineterminator="\n").encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **summary}
        self._write(SUMMARY, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def read_summary(self) -> dict[str, Any]:
        """Read ``summary.json``."""
        system, root = self.place.open()
        found: dict[str, Any] = json.loads(system.cat_file(f"{root}/{SUMMARY}").decode())
        return found

    def _names(self, folder: str = "") -> list[str]:
        """Names of what is in the folder now, or in one below it."""
        system, root = self.place.open()
        where = f"{root}/{folder}" if folder else root
        system.invalidate_cache(where)
        try:
            return sorted(path.rstrip("/").rpartition("/")[2] for path in system.ls(where, detail=False))
        except FileNotFoundError:
            return []

    def _parts(self) -> list[str]:
        return [name for name in self._names(IMAGES) if name.startswith("part-") and name.endswith(".parquet")]

    def _write(self, name: str, content: bytes) -> None:
        """Write a file so that it is whole or absent, whenever this is cut off."""
        try:
            if self.place.remote:
                # One put, or an upload of parts that shows when it is completed.
                system, root = self.place.open()
                persistently(lambda: system.pipe_file(f"{root}/{name}", content))
            else:
                _replace(Path(self.path, name), content)
        except Exception as error:
            reason = self.place.safe(error) if self.place.remote else getattr(error, "strerror", None) or error
            raise ReducerError(f"{self.place.below(name).path} cannot be written: {reason}") from None


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _replace(path: Path, content: bytes) -> None:
    """Put a file in the place of another once it is written and synced."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
