"""Folder that an export writes: what it holds, and what may be written over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reducer.config.settings import Source
from reducer.errors import InputError
from reducer.outputs.export.layout import OWN_FILES, STATE, TABLE, index_name
from reducer.photos.reader import states_of
from reducer.photos.requests import FileState
from reducer.run.folder.files import parquet_file
from reducer.storage.atomic import Files, temporary_name
from reducer.storage.location import Location, explaining_errors
from reducer.storage.lock import is_of_lock, locked
from reducer.storage.remote import nanoseconds, with_retries
from reducer.storage.schemas import EXPORT_SCHEMA

EXPORT_FORMAT, EXPORT_VERSION = "reducer-export", 1
#: Metadata key under which the index of a shard tells how the shard was when it was written.
SHARD_STATE = b"reducer"
#: Objects that a store deletes with one request.
DELETED_TOGETHER = 1000

#: From the name of a file in the folder to how it is; None where there is none.
Listing = Callable[[str], FileState | None]


class ExportFolder(Files):
    """Folder that an export writes.

    Parameters
    ----------
    location : Location or str
        Where it is, or will be.
    """

    def __init__(self, location: Location | str) -> None:
        super().__init__(location)
        self._check_lock: Callable[[], None] | None = None

    def state(self) -> dict[str, Any] | None:
        """Return ``export.json`` of an earlier export; None where the folder is empty or not there.

        Raises
        ------
        InputError
            If it holds something else.
        """
        with explaining_errors(self.location, f"TARGET {self.path} cannot be used"):
            if not self.location.remote:
                self._check_local()
            if not self.location.holds_something():
                return None
            names = self._names()
            if STATE in names:
                with suppress(ValueError):
                    state = json.loads(self._read(STATE))
                    if isinstance(state, dict) and state.get("format") == EXPORT_FORMAT:
                        if state.get("format_version") != EXPORT_VERSION:
                            raise InputError(f"TARGET {self.path} was written by another version: give another folder")
                        return state
            elif all(is_of_lock(name) or name in map(temporary_name, OWN_FILES) for name in names):
                return None
        raise InputError(
            f"TARGET {self.path} is not empty and is no export (it has no {STATE} of ours): nothing in it was touched; "
            "give another folder"
        )

    def _check_local(self) -> None:
        path = Path(self.path)
        if path.exists() and not path.is_dir():
            raise InputError(f"TARGET {path} is a file: give a folder")

    def table(self) -> pa.Table:
        """Return ``export.parquet`` of an earlier export; empty where there is none."""
        if TABLE not in self._names():
            return EXPORT_SCHEMA.empty_table()
        with explaining_errors(self.location, f"{self.location.below(TABLE).path} cannot be read"):
            return self._read_parquet(TABLE).replace_schema_metadata(None).cast(EXPORT_SCHEMA)

    def check_ours(self) -> None:
        """Raise LostLockError if this process holds the folder and another export has taken it meanwhile."""
        if self._check_lock is not None:
            self._check_lock()

    @contextmanager
    def held(self, *, break_lock: bool = False) -> Iterator[None]:
        """Make the folder, and keep other exports out of it meanwhile.

        Parameters
        ----------
        break_lock : bool
            Whether to take the folder from an export that seems to be at work there.

        Raises
        ------
        InputError
            If another export is at work there, or the folder cannot be made or written.
        """
        is_new = not self.location.remote and not os.path.exists(self.path)
        if is_new:
            with explaining_errors(self.location, f"TARGET {self.path} cannot be made"):
                os.makedirs(self.path, exist_ok=True)
        try:
            with locked(self.location, break_lock=break_lock, kind="export") as self._check_lock:
                yield
        finally:
            if is_new:
                with suppress(OSError):  # it is not empty
                    os.rmdir(self.path)

    def listing(self) -> Listing:
        """Return how the files of the folder are now, by name."""
        if not self.location.remote:
            return self._local_state
        system, root = self.location.open()
        system.invalidate_cache(root)
        with explaining_errors(self.location, f"TARGET {self.path} cannot be listed"):
            files = system.find(root, detail=True)
        start = len(root.rstrip("/")) + 1
        states = {path[start:]: _remote_state(details) for path, details in files.items()}
        return states.get

    def _local_state(self, name: str) -> FileState | None:
        return states_of([self.location.below(name).path], Source())[0]

    def remove(self, names: list[str]) -> None:
        """Remove files of an earlier export, those that are not whole too, and folders that are empty then.

        A name that leads out of the folder is left alone: the list that has it may have been written by anyone.

        Parameters
        ----------
        names : list of str
            Names in the folder; those that are not there are passed over.

        Raises
        ------
        InputError
            If they cannot be removed.
        """
        names = [name for name in names if "\0" not in name and not {"", ".", ".."} & set(name.split("/"))]
        if not names:
            return
        with explaining_errors(self.location, f"TARGET {self.path} cannot be cleared"):
            if self.location.remote:
                self._remove_remote(names)
            else:
                _remove_local(Path(self.path), names)

    def _remove_remote(self, names: list[str]) -> None:
        there = self.listing()
        _remove_objects(self.location, [name for name in names if there(name) is not None])
        there = self.listing()
        left = [name for name in names if there(name) is not None]
        if left:
            raise InputError(
                f"TARGET {self.path} cannot be cleared: {len(left):,} of {len(names):,} files are still there, such as "
                f"{left[0]}. Check that the credentials may delete, or give another folder"
            )

    def write_state(self, state: dict[str, Any]) -> None:
        """Write ``export.json``."""
        content = {"format": EXPORT_FORMAT, "format_version": EXPORT_VERSION, **state}
        self.write(STATE, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def write_table(self, rows: pa.Table) -> None:
        """Write ``export.parquet``."""
        self.write(TABLE, parquet_file(rows))

    def write(self, name: str, content: bytes) -> None:
        """Write one of `OWN_FILES`."""
        assert name in OWN_FILES
        self._write(name, content)

    def remove_own(self, names: list[str]) -> None:
        """Remove those of `OWN_FILES` that are there."""
        there = self._names()
        self._remove([name for name in names if name in there])

    def write_index(self, shard: str, rows: pa.Table) -> None:
        """Write which photos a shard holds, which is whole: from then on it is done.

        Parameters
        ----------
        shard : str
            Name of the shard.
        rows : pyarrow.Table
            `EXPORT_SCHEMA` rows of its photos.
        """
        with explaining_errors(self.location, f"{self.location.below(shard).path} cannot be looked at"):
            state = with_retries(lambda: self._state_of(shard))
        metadata = {SHARD_STATE: json.dumps({"bytes": state.bytes, "mtime_ns": state.mtime_ns, "etag": state.etag})}
        self._write(index_name(shard), parquet_file(rows.replace_schema_metadata(metadata)))

    def _state_of(self, name: str) -> FileState:
        state = self._local_state(name) if not self.location.remote else None
        if state is None:
            system, root = self.location.open()
            state = _remote_state(system.info(f"{root}/{name}"))
        return state

    def read_index(self, shard: str, listing: Listing) -> pa.Table | None:
        """Return which photos a shard holds; None where it is not there, or not as it was when that was written.

        Parameters
        ----------
        shard : str
            Name of the shard.
        listing : callable
            From `listing`.
        """
        there = listing(shard)
        if there is None or listing(index_name(shard)) is None:
            return None
        try:
            rows = pq.read_table(pa.BufferReader(self._read(index_name(shard))))
            written = FileState(**json.loads(rows.schema.metadata[SHARD_STATE]))
            return rows.replace_schema_metadata(None).cast(EXPORT_SCHEMA) if there.is_as(written) else None
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError):
            return None


def _remote_state(details: dict[str, Any]) -> FileState:
    modified, etag = details.get("LastModified"), details.get("ETag")
    return FileState(details.get("size"), modified and nanoseconds(modified), etag and etag.strip('"'))


def _remove_objects(location: Location, names: list[str]) -> None:
    """Delete objects of a store, or files of another file system that fsspec opens."""
    system, root = location.open()
    if not location.on_s3:
        for name in names:
            system.rm_file(f"{root}/{name}")
        return
    # Not s3fs's own, which takes brackets for patterns and passes over what is refused.
    keys = [system.split_path(f"{root}/{name}")[1] for name in names]
    for start in range(0, len(keys), DELETED_TOGETHER):
        objects = [{"Key": key} for key in keys[start : start + DELETED_TOGETHER]]
        bucket = system.split_path(root)[0]
        with_retries(partial(system.call_s3, "delete_objects", Bucket=bucket, Delete={"Objects": objects}))


def _remove_local(top: Path, names: list[str]) -> None:
    """Delete files below a folder, those of the same names that are not whole, and folders that are empty then."""
    folders: set[Path] = set()
    for name in names:
        for file in (top / name, (top / name).with_name(temporary_name(Path(name).name))):
            with suppress(FileNotFoundError, NotADirectoryError):
                file.unlink()
        folders.update(Path(name).parents)
    for folder in sorted(folders - {Path()}, reverse=True):
        with suppress(OSError):  # it is not empty
            (top / folder).rmdir()
