"""Locations of files and folders: a local path, or a URL with the options that open it.

Options may hold secrets: they are never shown and never stored.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import stat
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any

from reducer.errors import InputError
from reducer.storage.remote import fsspec_options, is_access_refused, secret_values

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def is_url(path: str) -> bool:
    """Tell whether a path is a URL, for fsspec to open, and not a local path."""
    return "://" in path


#: URLs that hold what nobody may read: a user or password before the host, or a signature or token behind ``?``.
SECRET_URL = (
    r"(?i)^[a-z][a-z0-9+.-]*://([^/?#]*@|.*[?&](x-amz-[a-z-]+|x-goog-[a-z-]+|sig|signature|token|access_token|expires|"
    r"awsaccesskeyid|googleaccessid|key-pair-id|policy)=)"
)


def refuse_secret(what: str, url: str, remedy: str) -> None:
    """Refuse a URL that holds a secret, which would stand in the ledger, in ``summary.json`` and in messages.

    Parameters
    ----------
    what : str
        What the message calls it; nothing of the URL is shown.
    url : str
        A URL, or a local path.
    remedy : str
        Where the secret belongs.

    Raises
    ------
    InputError
        If it does.
    """
    if re.match(SECRET_URL, url):
        raise InputError(
            f"{what} is a URL with a secret (a user or password before the host, or a signature or token behind the "
            f"question mark), which would stand in the files of the run: give the plain URL, and {remedy}"
        )


def absolute(path: str) -> str:
    """Return a path that means the same from every working directory, as a URL does already."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def resolved(path: str) -> str:
    """Return the one path or URL that all spellings of it share, links followed."""
    local = path.removeprefix("file://")
    return absolute(local) if is_url(local) else os.path.realpath(local)


def lies_in(path: str, whole: str) -> bool:
    """Tell whether a path or URL, however it is spelled, is a certain file or folder or lies in that folder."""
    inner, outer = resolved(path), resolved(whole)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


@dataclass(frozen=True)
class Location:
    """Location of a folder or file.

    Attributes
    ----------
    path : str
        A local path, or a URL such as ``s3://bucket/prefix``.
    options : mapping
        Options for fsspec to open the URL with; may hold secrets.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def remote(self) -> bool:
        """True for a URL."""
        return is_url(self.path)

    @property
    def on_s3(self) -> bool:
        """True for an object store that speaks S3."""
        return self.path.startswith(("s3://", "s3a://"))

    @property
    def _is_chain(self) -> bool:
        """True for a URL within another file system, such as ``zip://a.jpg::s3://bucket/photos.zip``."""
        first, *others = self.path.split("::")
        return self.remote and bool(others) and ("://" not in first or any("://" in other for other in others))

    def below(self, name: str) -> Location:
        """Return the location of a name in this folder."""
        return Location(
            f"{self.path.rstrip('/')}/{name}" if self.remote else os.path.join(self.path, name), self.options
        )

    def open(self, attempts: int = 5) -> tuple[AbstractFileSystem, str]:
        """Return the fsspec file system, one per process, and the path in it.

        Parameters
        ----------
        attempts : int
            Most attempts at a request to S3, where the client makes it again by itself.

        Raises
        ------
        InputError
            If nothing that is installed opens such a URL, or it does not know the options.
        """
        import fsspec

        options = fsspec_options(self.options, self.on_s3, attempts)
        try:
            if self._is_chain:
                system, path = fsspec.core.url_to_fs(self.path, **options)
            else:  # fsspec would take `::` in a name for a chain
                kind = fsspec.get_filesystem_class(self.path.partition("://")[0] if self.remote else "file")
                system, path = kind(**kind._get_kwargs_from_urls(self.path) | options), kind._strip_protocol(self.path)
        except (ImportError, ValueError, TypeError) as error:
            raise InputError(f"{self.path} cannot be opened: {self.safe(error)}") from None
        return system, path

    def holds_something(self) -> bool:
        """Tell whether there is anything at or below it: one name is asked for; fails where asking is not allowed."""
        system, path = self.open()
        if not self.on_s3:
            return bool(system.exists(path))
        bucket, prefix, _ = system.split_path(path)
        answer = system.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix and f"{prefix}/", MaxKeys=1)
        return bool(answer.get("Contents"))

    def open_file(self) -> IO[bytes]:
        """Open the file for reading; what a pipe holds is read once."""
        if not self.remote:
            status = os.stat(self.path)
            return _opened_pipe(self.path, status.st_ino) if stat.S_ISFIFO(status.st_mode) else open(self.path, "rb")
        system, path = self.open()
        file: IO[bytes] = system.open(path, "rb")
        return file

    def safe(self, error: BaseException) -> str:
        """Return an error as one line, without the values of options that may be secrets."""
        # Behind the message obstore shows the answer, which has a number of its own, and its innards.
        text = str(error).partition("Debug source")[0].partition("<?xml")[0].rstrip(": \n")
        line = " ".join(f"{type(error).__name__}: {text}".split())
        # Nothing that differs from one attempt to the next: the same photo has the same error.
        line = re.sub(r" in \d+(\.\d+)?(ns|µs|us|ms|s)\b| at 0x[0-9a-f]+", "", line)
        for secret in secret_values(self.options):
            line = line.replace(secret, "***")
        return line[:300]


def _opened_pipe(path: str, inode: int) -> IO[bytes]:
    return io.BytesIO(_content_of_pipe(path, inode))


@lru_cache(maxsize=4)
def _content_of_pipe(path: str, inode: int) -> bytes:
    """Read a pipe, such as a shell's ``<(...)``, to its end; each only once."""
    with open(path, "rb") as file:
        return file.read()


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Location of a photo within another file, a tar shard.

    Attributes
    ----------
    path : str
        Path or URL of the file.
    offset : int
        Start of the photo in the file, in bytes.
    bytes : int
        Size of the photo.
    mtime_ns : int, optional
        Time of the last change of the file, nanoseconds since 1970 UTC, when the photo was found in it.
    etag : str, optional
        Entity tag of an object in a store, at that time.
    """

    path: str
    offset: int
    bytes: int
    mtime_ns: int | None = None
    etag: str | None = None

    def __str__(self) -> str:
        return f"{self.path} (bytes {self.offset} to {self.offset + self.bytes})"


#: Location of a photo: the path or URL of its file, or a part of another file.
PhotoRef = str | ByteRange


def file_of(ref: PhotoRef) -> str:
    """Return the path or URL of the file in which a photo lies."""
    return ref if isinstance(ref, str) else ref.path


def ref_of(row: Mapping[str, Any]) -> PhotoRef:
    """Return the location of a photo by its row of the ledger, times as of `storage.tables.in_nanoseconds`."""
    if row["shard"] is not None and row["offset"] is not None:
        return ByteRange(row["shard"], row["offset"], row["bytes"], row["mtime"], row["etag"])
    path: str = row["path"]
    return path


@contextmanager
def explaining_errors(location: Location, what: str) -> Iterator[None]:
    """Turn any error at a location into an InputError that says what to look at.

    Parameters
    ----------
    location : Location
        Location that is used within the block.
    what : str
        The beginning of the message, such as ``IMAGES s3://bucket/photos cannot be listed``.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not location.remote:
            if not isinstance(error, OSError):
                raise
            raise InputError(f"{what}: {error.strerror or error}") from None
        raise InputError(f"{what}: {location.safe(error).rstrip('.')}{_advice(error, location)}") from None


def _advice(error: Exception, location: Location) -> str:
    """Return the remedy to try when a remote location cannot be used."""
    if isinstance(error, TypeError):
        return ". Check the names of the storage options"
    if is_access_refused(error):
        return (
            ". Access is refused: check the credentials (key and secret, profile, or the usual AWS chain; anon=true "
            "for a public bucket), and that they may use this bucket"
        )
    if isinstance(error, FileNotFoundError):
        return ". Check the bucket's name, the region and the endpoint_url"
    if location.on_s3:
        return ". Check the endpoint_url and the region, and that the server is up"
    return ""


@dataclass(frozen=True)
class PathRule:
    """Rule that tells the paths of photos from id and label.

    Attributes
    ----------
    root : str
        Absolute path or URL of the folder that holds them; empty for paths in a shard.
    template : str
        Path below the root, with ``{id}``, ``{label}`` and single characters of them.
    """

    root: str
    template: str


@dataclass(frozen=True)
class Shard:
    """A tar shard, in the state of the time when the run began or was resumed.

    Attributes
    ----------
    number : int
        Place in the order of the shards' paths; names the file of hashes.
    path : str
        Path or URL of the shard.
    bytes : int
        Size of the shard.
    mtime_ns : int or None
        Time of the last change, nanoseconds since 1970 UTC.
    etag : str or None
        Entity tag of an object in a store.
    md5 : str or None
        Published MD5 sum in hex, where it is to be checked.
    """

    number: int
    path: str
    bytes: int
    mtime_ns: int | None = None
    etag: str | None = None
    md5: str | None = None


class MemberKeys(StrEnum):
    """Ways to tell the photos in a shard apart."""

    STEM = "stem"
    """The file name without the folders and the extension."""
    PATH = "path"
    """The path in the shard."""
    SAMPLE = "sample"
    """WebDataset's key: the path up to the first dot of the file name; other files of the key tell the label."""


def stem_of(path: str) -> str:
    """Return the name of a file without the folders and the extension."""
    return posixpath.splitext(posixpath.basename(path))[0]


def template_fields(template: str) -> list[tuple[str, str | None, int | None]]:
    """Take a path template apart.

    Parameters
    ----------
    template : str
        Such as ``{id[0]}/{id}.jpg``.

    Returns
    -------
    list of (str, str or None, int or None)
        Literal text, then the field behind it (``id`` or ``label``) if any, then the index of one character of the
        field, None for all.

    Raises
    ------
    InputError
        If it uses anything but ``{id}``, ``{label}`` and single characters of them.
    """
    fields: list[tuple[str, str | None, int | None]] = []
    try:
        for text, name, spec, conversion in string.Formatter().parse(template):
            if name is None:
                fields.append((text, None, None))
                continue
            match = re.fullmatch(r"(id|label)(?:\[(\d+)\])?", name)
            if match is None or spec or conversion:
                raise ValueError(f"{{{name}}} is not known")
            fields.append((text, match[1], None if match[2] is None else int(match[2])))
    except ValueError as error:
        raise InputError(
            f"--path-template {template!r}: {error}; it may use {{id}}, {{label}} and single characters such as "
            "{id[0]}"
        ) from None
    if ("id", None) not in {field[1:] for field in fields}:
        raise InputError(f"--path-template {template!r} does not tell photos apart: it must use {{id}}")
    return fields
