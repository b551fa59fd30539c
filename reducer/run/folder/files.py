"""Files of a run folder: their names, tables with a note in JSON, and the lock under which they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reducer.storage.atomic import Files
from reducer.storage.location import Location, lies_in, resolved
from reducer.storage.lock import locked

SUMMARY, CSV, PARQUET = "summary.json", "reduced.csv", "reduced.parquet"
#: Folders of part files: the ledger, hashes that are not ranked yet, and vectors.
IMAGES, HASHES, VECTORS = "images", "hashes", "vectors"
PLAN, SHARDS, AVOID, CROSS_LABEL = "plan.parquet", "shards.parquet", "avoid.parquet", "cross_label.parquet"
MANIFEST, REPORT = "manifest.parquet", "report.html"
#: Files that a run writes beside its summary and its part files.
OWN_FILES = (PLAN, SHARDS, AVOID, MANIFEST, CSV, PARQUET, CROSS_LABEL, REPORT)
#: Rows of a Parquet row group; fixed, so that the bytes of a file depend on its rows only.
ROW_GROUP = 100_000
#: Files that are read at the same time: on S3 each takes some requests.
READ_AT_A_TIME = 16
#: Metadata key of the note of a table.
NOTE = b"reducer"


class RunFiles(Files):
    """The files of a run folder.

    Parameters
    ----------
    location : Location or str
        Where the folder is, or will be.
    """

    def __init__(self, location: Location | str) -> None:
        super().__init__(location)
        self._check_lock: Callable[[], None] | None = None

    @contextmanager
    def locked(self, *, break_lock: bool = False) -> Iterator[None]:
        """Keep other runs out of the folder; every write from then on checks that the lock is still ours.

        Parameters
        ----------
        break_lock : bool
            Whether to take the lock whoever has it now.

        Raises
        ------
        InputError
            If another run has the lock, or the folder cannot be written.
        """
        with locked(self.location, break_lock=break_lock) as self._check_lock:
            yield

    def check_ours(self) -> None:
        """Raise LostLockError if this process has locked the folder and another run has taken the lock meanwhile."""
        if self._check_lock is not None:
            self._check_lock()

    def holds(self, path: str) -> bool:
        """Tell whether a path or URL is the folder itself, or a file that a run writes or removes here."""
        own = (self.location.below(name).path for name in (SUMMARY, *OWN_FILES, IMAGES, HASHES, VECTORS))
        return resolved(path) == resolved(self.path) or any(lies_in(path, name) for name in own)

    def part_names(self, folder: str) -> list[str]:
        """Return the names of the part files that are in a folder now, sorted; one listing."""
        return [name for name in self._names(folder) if name.startswith("part-") and name.endswith(".parquet")]

    def make_folder(self, name: str = "") -> None:
        """Make the run folder, or a folder for part files in it, where there are folders."""
        if not self.location.on_s3:
            system, root = self.location.open()
            system.makedirs(f"{root}/{name}" if name else root, exist_ok=True)

    def read_table(self, name: str) -> tuple[pa.Table, dict[str, Any] | None]:
        """Read a table, without its metadata, and its note.

        Raises
        ------
        InputError
            If it is not there, or cannot be read.
        """
        table = self._read_parquet(name)
        return table.replace_schema_metadata(None), note_of(table.schema.metadata)

    def read_footer(self, name: str) -> pq.FileMetaData:
        """Read the footer of a table, and no row; raises as `read_table` does."""
        with self.open_table(name) as file:
            return file.metadata

    @contextmanager
    def open_table(self, name: str) -> Iterator[pq.ParquetFile]:
        """Open a table, to read some of it; raises as `read_table` does."""
        system, root = self.location.open()
        with self.explaining_damage(name), system.open(f"{root}/{name}", "rb") as file:
            yield pq.ParquetFile(file)

    def write(self, name: str, content: bytes | pa.Table, note: dict[str, Any] | None = None) -> None:
        """Write a file so that it is whole or absent, if the folder is still ours.

        Parameters
        ----------
        name : str
            Name in the folder; the folders above it are there.
        content : bytes or pyarrow.Table
            The content.
        note : dict, optional
            What a table carries beside its rows, for JSON.

        Raises
        ------
        ReducerError
            If it cannot be written.
        LostLockError
            If another run has taken the lock.
        """
        if isinstance(content, pa.Table):
            if note is not None:
                content = content.replace_schema_metadata({NOTE: json.dumps(note, ensure_ascii=False)})
            content = parquet_file(content)
        self._write(name, content)

    def remove(self, names: Iterable[str], folder: str = "") -> None:
        """Remove files of the folder, or of one in it, if the folder is still ours."""
        self._remove([f"{folder}/{name}" if folder else name for name in names])


def note_of(metadata: dict[bytes, bytes] | None) -> dict[str, Any] | None:
    """Return the note in the metadata of a table; None where there is none."""
    note: dict[str, Any] | None = json.loads(metadata[NOTE]) if metadata and NOTE in metadata else None
    return note


def part_name(number: int) -> str:
    """Return the name of the part file of a partition, piece or shard."""
    return f"part-{number:05d}.parquet"


def part_number(name: str) -> int:
    """Return the number in the name of a part file."""
    return int(name.removeprefix("part-").removesuffix(".parquet"))


def parquet_file(table: pa.Table) -> bytes:
    """Return a table as the bytes of a file, which depend on its rows only."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content
