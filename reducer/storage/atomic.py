"""Files of a run folder: each is whole or absent, on a disk and in a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from reducer.errors import InputError, ReducerError
from reducer.storage.location import Location, refuse_secret
from reducer.storage.remote import with_retries

#: Bytes of a part of an object that is sent in parts; S3 takes 10,000 parts of 5 MiB or more.
PART = 32 * 2**20


class Files:
    """The files of a run folder, whatever they hold.

    Parameters
    ----------
    location : Location or str
        Where it is, or will be.
    """

    def __init__(self, location: Location | str) -> None:
        self.location = Location(location) if isinstance(location, str) else location
        refuse_secret("the folder", self.location.path, "what opens it by its storage options")
        #: Path or URL, to show.
        self.path = self.location.path

    def check_ours(self) -> None:
        """Raise before a write if others have taken the folder meanwhile; a folder without a lock is never taken."""

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return name in self._names()

    def _names(self, folder: str = "") -> list[str]:
        """Names of what is in the folder now, or in one below it."""
        system, root = self.location.open()
        where = f"{root}/{folder}" if folder else root
        system.invalidate_cache(where)
        try:
            return sorted(path.rstrip("/").rpartition("/")[2] for path in system.ls(where, detail=False))
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> bytes:
        system, root = self.location.open()
        content: bytes = system.cat_file(f"{root}/{name}")
        return content

    def _read_parquet(self, name: str) -> pa.Table:
        with self.explaining_damage(name):
            return pq.read_table(pa.BufferReader(self._read(name)))

    @contextmanager
    def explaining_damage(self, name: str) -> Iterator[None]:
        """Turn errors of reading a file into an InputError that says what to do."""
        try:
            yield
        except FileNotFoundError:
            raise InputError(
                f"{self.location.below(name).path} has changed meanwhile: a run is at work in {self.path}; try again "
                f"when it is done (reducer status {self.path})"
            ) from None
        except (pa.ArrowInvalid, OSError) as error:
            advice = (
                f"take it out, then reducer resume {self.path}"
                if name.startswith(("images", "hashes"))
                else "begin again"
            )
            path = self.location.below(name).path
            reason = self.location.safe(error)
            raise InputError(f"{path} cannot be read ({reason}). If it is damaged: {advice}") from None

    def _remove(self, names: list[str]) -> None:
        self.check_ours()
        system, root = self.location.open()
        for name in names:
            system.rm_file(f"{root}/{name}")

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file of any size to write; it shows once it is whole. Errors as of `write_file`."""
        self.check_ours()
        with writing(self.location.below(name)) as file:
            yield file

    def _write(self, name: str, content: bytes) -> None:
        """Write a file so that it is whole or absent, whenever this is cut off."""
        self.check_ours()
        write_file(self.location.below(name), content)


def write_file(location: Location, content: bytes) -> None:
    """Write a file so that it is whole, or as it was, whenever this is cut off.

    Raises
    ------
    ReducerError
        If it cannot be written.
    """
    try:
        if location.remote:
            # One put, or an upload of parts that shows when it is completed.
            system, path = location.open()
            with_retries(lambda: system.pipe_file(path, content))
        else:
            with whole_file(Path(location.path)) as file:
                file.write(content)
    except Exception as error:
        reason = location.safe(error) if location.remote else getattr(error, "strerror", None) or error
        raise ReducerError(f"{location.path} cannot be written: {reason}") from None


@contextmanager
def writing(location: Location) -> Iterator[IO[bytes]]:
    """Open a file or object of any size to write, which shows once it is whole.

    Raises
    ------
    ReducerError
        If it cannot be written.
    """
    try:
        with whole_object(location) if location.remote else whole_file(Path(location.path)) as file:
            yield file
    except OSError as error:
        reason = location.safe(error) if location.remote else error.strerror or error
        raise ReducerError(f"{location.path} cannot be written: {reason}") from None


def temporary_name(name: str) -> str:
    """Return the name of a file before it is whole."""
    return f".{name}.tmp"


@contextmanager
def whole_file(path: Path, *, synced: bool = True, mtime_ns: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of another once it is whole.

    Parameters
    ----------
    path : Path
        Where; its folder is there.
    synced : bool
        Whether it is on the disk then, and so outlives a crash of the machine.
    mtime_ns : int, optional
        Its time of the last change, nanoseconds since 1970 UTC; default now.

    Raises
    ------
    OSError
        If it cannot be written: then all is as it was.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        with open(temporary, "wb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        if mtime_ns is not None:
            os.utime(temporary, ns=(mtime_ns, mtime_ns))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if synced:
        _sync_folder(path.parent)


@contextmanager
def whole_object(location: Location) -> Iterator[IO[bytes]]:
    """An object of any size to write to a store, which shows there once it is whole; sent in parts meanwhile."""
    system, path = location.open()
    file = system.open(path, "wb", block_size=PART, autocommit=False)
    try:
        yield file
        file.close()
        file.commit()
    except BaseException:
        with suppress(Exception):
            file.closed = True  # or it would be sent when it is collected
            file.discard()
        raise


def _sync_folder(folder: Path) -> None:
    """Let the renaming outlive a crash of the machine too."""
    if os.name != "posix":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
