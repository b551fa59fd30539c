"""The folder that an export writes: what it holds, and what it may be written over."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reducer.errors import InputError
from reducer.outputs.export.layout import OWN_FILES, PLAN, STATE, index_name
from reducer.photos.hashing import PhotoError
from reducer.photos.reader import read_photo
from reducer.photos.requests import FileState
from reducer.run.folder.files import parquet_file
from reducer.storage.atomic import Files, temporary_name
from reducer.storage.location import Location, PhotoRef, explaining_errors, file_of, is_url
from reducer.storage.remote import nanoseconds, with_retries
from reducer.storage.schemas import EXPORT_SCHEMA

FORMAT, FORMAT_VERSION = "reducer-export", 1
#: Columns that tell which photo lies where.
IDENTITY = ["id", "label", "path", "shard", "source", "source_shard"]
#: Under which key the index of a shard says how the shard is.
METADATA = b"reducer"
#: Objects that a store takes out with one request.
REMOVED_AT_A_TIME = 1000

#: Nanoseconds to which disks keep times: FAT, HFS+, exFAT, and NTFS.
TIME_GRAINS = (2 * 10**9, 10**9, 10**7, 100)
#: Digits of an MD5 sum, which is what the etag of an object is that was put in one piece.
MD5_DIGITS = 32

#: How a file of the folder is; None where there is none.
Listing = Callable[[str], FileState | None]


class Exported(Files):
    """The folder that an export writes.

    Parameters
    ----------
    place : Location
        Where it is, or will be.
    """

    def state(self) -> dict[str, Any] | None:
        """``export.json`` of an earlier export; None where the folder is empty or not there.

        Raises
        ------
        InputError
            If it holds something else.
        """
        with explaining_errors(self.place, f"TARGET {self.path} cannot be used"):
            if not self.place.remote:
                self._check_local()
            if not self.place.holds_something():
                return None
            names = self._names()
            if STATE in names:
                with suppress(ValueError):
                    found = json.loads(self._read(STATE))
                    if isinstance(found, dict) and found.get("format") == FORMAT:
                        if found.get("format_version") != FORMAT_VERSION:
                            raise InputError(f"TARGET {self.path} was written by another version: give another folder")
                        return found
            elif all(name in map(temporary_name, OWN_FILES) for name in names):
                return None
        raise InputError(
            f"TARGET {self.path} is not empty and is no export (it has no {STATE} of ours): nothing in it was touched; "
            "give another folder"
        )

    def _check_local(self) -> None:
        path = Path(self.path)
        if path.exists() and not path.is_dir():
            raise InputError(f"TARGET {path} is a file: give a folder")

    def plan(self) -> pa.Table:
        """``export.parquet`` of the earlier export; empty where it is not there."""
        if PLAN not in self._names():
            return EXPORT_SCHEMA.empty_table()
        with explaining_errors(self.place, f"{self.place.below(PLAN).path} cannot be read"):
            return self._read_parquet(PLAN).replace_schema_metadata(None).cast(EXPORT_SCHEMA)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other exports of this machine out of it meanwhile.

        Raises
        ------
        InputError
            If another one is at work there, or the folder cannot be made.
        """
        if self.place.remote:
            yield
            return
        path = Path(self.path)
        new = not path.exists()
        with explaining_errors(self.place, f"TARGET {self.path} cannot be made"):
            path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDONLY) if os.name == "posix" else None
        try:
            if handle is not None:
                import fcntl

                try:
                    # It ends with the process, however that ends.
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise InputError(f"another export is at work in TARGET {self.path}: wait for it") from None
                except OSError:  # not every file system knows locks
                    pass
            yield
        finally:
            if handle is not None:
                os.close(handle)
            if new:
                with suppress(OSError):  # it is not empty
                    path.rmdir()

    def listing(self) -> Listing:
        """How the files of the folder are now."""
        if not self.place.remote:
            return self._state_here
        system, root = self.place.open()
        system.invalidate_cache(root)
        with explaining_errors(self.place, f"TARGET {self.path} cannot be listed"):
            found = system.find(root, detail=True)
        start = len(root.rstrip("/")) + 1
        states = {path[start:]: _state_there(details) for path, details in found.items()}
        return states.get

    def _state_here(self, name: str) -> FileState | None:
        try:
            found = os.stat(self.place.below(name).path)
        except (OSError, ValueError):
            return None
        return FileState(found.st_size, found.st_mtime_ns, None)

    def remove(self, names: list[str]) -> None:
        """Take out files of an earlier export, and folders that are empty then. What is not there is no matter.

        A name that leads out of the folder is left alone: the list it stands on is a file that anyone may have written.

        Raises
        ------
        InputError
            If they cannot be taken out.
        """
        names = [name for name in names if "\0" not in name and not {"", ".", ".."} & set(name.split("/"))]
        if not names:
            return
        with explaining_errors(self.place, f"TARGET {self.path} cannot be cleared"):
            if self.place.remote:
                self._remove_there(names)
            else:
                self._remove_here(names)

    def _remove_there(self, names: list[str]) -> None:
        system, root = self.place.open()
        there = self.listing()
        paths = [f"{root}/{name}" for name in names if there(name) is not None]
        if self.place.on_s3:
            # Not s3fs's own, which takes brackets for patterns and passes over what is refused.
            keys = [system.split_path(path)[1] for path in paths]
            for start in range(0, len(keys), REMOVED_AT_A_TIME):
                objects = [{"Key": key} for key in keys[start : start + REMOVED_AT_A_TIME]]
                delete = partial(
                    system.call_s3, "delete_objects", Bucket=system.split_path(root)[0], Delete={"Objects": objects}
                )
                with_retries(delete)
        else:
            for path in paths:
                system.rm_file(path)
        there = self.listing()
        left = [name for name in names if there(name) is not None]
        if left:
            raise InputError(
                f"TARGET {self.path} cannot be cleared: {len(left):,} of {len(names):,} files are still there, such as "
                f"{left[0]}. Check that the credentials may delete, or give another folder"
            )

    def _remove_here(self, names: list[str]) -> None:
        top = Path(self.path)
        folders: set[Path] = set()
        for name in names:
            for file in (top / name, (top / name).with_name(temporary_name(Path(name).name))):
                with suppress(FileNotFoundError, NotADirectoryError):
                    file.unlink()
            folders.update(Path(name).parents)
        for folder in sorted(folders - {Path()}, reverse=True):
            with suppress(OSError):  # it is not empty
                (top / folder).rmdir()

    def remove_own(self, names: list[str]) -> None:
        """Take out files of ours at the top, where they are."""
        there = self._names()
        self._remove([name for name in names if name in there])

    def write_state(self, state: dict[str, Any]) -> None:
        """Write ``export.json``."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **state}
        self.write(STATE, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def write_plan(self, rows: pa.Table) -> None:
        """Write ``export.parquet``."""
        self.write(PLAN, parquet_file(rows))

    def write(self, name: str, content: bytes) -> None:
        """Write a file of ours at the top."""
        assert name in OWN_FILES
        self._write(name, content)

    def write_index(self, shard: str, rows: pa.Table) -> None:
        """Write which photos a shard holds, which is whole: from then on it is done."""
        with explaining_errors(self.place, f"{self.place.below(shard).path} cannot be looked at"):
            state = with_retries(lambda: self._state_of(shard))
        told = {"bytes": state.bytes, "mtime_ns": state.mtime_ns, "etag": state.etag}
        self._write(index_name(shard), parquet_file(rows.replace_schema_metadata({METADATA: json.dumps(told)})))

    def _state_of(self, name: str) -> FileState:
        found = self._state_here(name) if not self.place.remote else None
        if found is None:
            system, root = self.place.open()
            found = _state_there(system.info(f"{root}/{name}"))
        return found

    def read_index(self, shard: str, listing: Listing) -> pa.Table | None:
        """Which photos a shard holds; None where it is not there, or not as it was when that was written."""
        there = listing(shard)
        if there is None or listing(index_name(shard)) is None:
            return None
        try:
            rows = pq.read_table(pa.BufferReader(self._read(index_name(shard))))
            told = FileState(**json.loads(rows.schema.metadata[METADATA]))
            return rows.replace_schema_metadata(None).cast(EXPORT_SCHEMA) if there.is_as(told) else None
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError):
            return None


def _state_there(details: dict[str, Any]) -> FileState:
    modified, etag = details.get("LastModified"), details.get("ETag")
    return FileState(details.get("size"), modified and nanoseconds(modified), etag and etag.strip('"'))


def same_photos(rows: pa.Table, others: pa.Table) -> bool:
    """Whether all photos of a plan lie in another one too, at the same place."""
    if not rows.num_rows:
        return True
    own, theirs = (table.select(IDENTITY).group_by(IDENTITY).aggregate([]) for table in (rows, others))
    # Null is equal to nothing in a join.
    own, theirs = (_filled(table) for table in (own, theirs))
    return bool(own.join(theirs, IDENTITY, join_type="left anti").num_rows == 0)


def _filled(table: pa.Table) -> pa.Table:
    return pa.table({name: pc.fill_null(table[name], "") for name in table.column_names})


def is_equal(there: FileState, source: FileState | None, ref: PhotoRef, target: Location, *, resized: bool) -> bool:
    """Whether a file in TARGET is what a photo was made into.

    On a disk a copy has the time of its photo. A store tells the MD5 sum of what was put in one piece; where the
    photo's own is not known, the object must not be older than the photo, as for ``aws s3 sync``.
    """
    if source is None or (there.bytes != source.bytes and not (resized and there.bytes)):
        return False
    if not target.remote:
        return _same_time(source.mtime_ns, there.mtime_ns)
    if not resized and there.etag is not None and len(there.etag) == MD5_DIGITS:
        digest = _md5(ref, source)
        if digest is not None:
            return digest == there.etag
    return None not in (there.mtime_ns, source.mtime_ns) and (there.mtime_ns or 0) >= (source.mtime_ns or 0)


def _same_time(time: int | None, kept: int | None) -> bool:
    """Whether a disk has kept a time, which some do only roughly: in nanoseconds."""
    if time is None or kept is None:
        return False
    return time == kept or any(kept % grain == 0 and abs(time - kept) < grain for grain in TIME_GRAINS)


def _md5(ref: PhotoRef, state: FileState) -> str | None:
    """A photo's MD5 sum, where it takes no request."""
    if not is_url(file_of(ref)):
        try:
            return hashlib.md5(read_photo(ref, max_pixels=0).content, usedforsecurity=False).hexdigest()
        except PhotoError:
            return None
    return state.etag if state.etag is not None and len(state.etag) == MD5_DIGITS else None
