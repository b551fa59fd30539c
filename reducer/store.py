"""The run folder: the client is its only writer. Each file is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from reducer.errors import InputError, ReducerError
from reducer.types import LEDGER_SCHEMA, REDUCED_COLUMNS, reduced_schema

FORMAT = "reducer-run"
FORMAT_VERSION = 1
#: Rows of a Parquet row group; fixed, so that the bytes of a file depend on its rows only.
ROW_GROUP = 100_000


class RunFolder:
    """A run folder.

    Parameters
    ----------
    path : str
        Where it is, or will be.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.images = self.path / "images"
        self.summary_path = self.path / "summary.json"
        self.csv_path = self.path / "reduced.csv"
        self.parquet_path = self.path / "reduced.parquet"

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds something, unless it is a run folder that may be replaced.

        Raises
        ------
        InputError
            If it may not be written.
        """
        try:
            self._check_free(overwrite=overwrite)
        except OSError as error:
            raise InputError(f"--output {self.path} cannot be used: {error.strerror or error}") from None

    def _check_free(self, *, overwrite: bool) -> None:
        if not self.path.exists():
            parent = next(folder for folder in self.path.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise InputError(f"--output {self.path} cannot be made: {parent} is no folder that may be written")
            return
        if not self.path.is_dir():
            raise InputError(f"--output {self.path} is a file: give a folder")
        if not any(self.path.iterdir()):
            return
        if not self.is_run():
            raise InputError(
                f"--output {self.path} is not empty and is no run folder (it has no summary.json of ours): nothing "
                "in it was touched; give another folder"
            )
        if not overwrite:
            raise InputError(f"--output {self.path} holds a run already: give another folder, or --overwrite")

    def is_run(self) -> bool:
        """Whether this is a folder that a run has written, finished or not."""
        try:
            found = json.loads(self.summary_path.read_text(encoding="utf-8"))
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The first summary marks the folder as ours before anything else is taken out or put in.
            self.write_summary(summary)
            self.images.mkdir(exist_ok=True)
            for old in (self.csv_path, self.parquet_path, *self.images.glob("part-*.parquet")):
                old.unlink(missing_ok=True)
        except (OSError, ReducerError) as error:
            raise InputError(f"--output {self.path} cannot be used: {error}") from None

    def write_part(self, index: int, ledger: pa.Table) -> None:
        """Write the ledger rows of one partition."""
        with _whole(self.images / f"part-{index:05d}.parquet") as path:
            _write_parquet(ledger, path)

    def ledger(self, columns: list[str] | None = None) -> pa.Table:
        """The ledger, in manifest order.

        Parameters
        ----------
        columns : list of str, optional
            Only these columns.
        """
        parts = sorted(str(part) for part in self.images.glob("part-*.parquet"))
        if not parts:
            return LEDGER_SCHEMA.empty_table().select(columns or LEDGER_SCHEMA.names)
        dataset = pa.dataset.dataset(parts, schema=LEDGER_SCHEMA, format="parquet")
        wanted = columns or LEDGER_SCHEMA.names
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
            with _whole(self.parquet_path) as path:
                _write_parquet(reduced, path)
        if formats in ("csv", "both"):
            frame = reduced.select([id_column, label_column]).to_pandas()
            with _whole(self.csv_path) as path:
                frame.to_csv(path, index=False, lineterminator="\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **summary}
        with _whole(self.summary_path) as path:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def read_summary(self) -> dict[str, Any]:
        """Read ``summary.json``."""
        found: dict[str, Any] = json.loads(self.summary_path.read_text(encoding="utf-8"))
        return found


def _write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=ROW_GROUP, compression="zstd")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` once it is written and synced."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ReducerError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
