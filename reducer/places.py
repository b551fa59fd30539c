"""Where things lie: a local path, or a URL with the options that open it.

Options may hold secrets: they are never shown and never stored.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, TypeVar

from reducer.errors import InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from obstore.store import ClientConfig

#: Options whose values are no secrets and may be shown.
SHOWN_OPTIONS = ("anon", "endpoint_url", "region")
#: What obstore calls the options.
OBSTORE_OPTIONS = {
    "endpoint_url": "endpoint",
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "region": "region",
    "anon": "skip_signature",
    "profile": "profile",
}
CONNECT_SECONDS, ANSWER_SECONDS = 10, 30
#: Never the limit (reading ahead is): photos that wait for room keep their connections, and the next one needs one too.
CONNECTIONS = 10_000
#: A request that fails for a reason that may pass is made again, for so many seconds.
RETRY_SECONDS = 60.0
#: The pause before the second attempt at most, in seconds; it doubles each time, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0

T = TypeVar("T")


def is_url(path: str) -> bool:
    """Whether a path is a URL, for fsspec to open, and not a local path."""
    return "://" in path


def absolute(path: str) -> str:
    """A path that means the same from every working directory; a URL does so already."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


@dataclass(frozen=True)
class Place:
    """A folder or file.

    Attributes
    ----------
    path : str
        A local path, or a URL such as ``s3://bucket/prefix``.
    options : mapping
        What fsspec is to open the URL with.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def remote(self) -> bool:
        """Whether it is a URL."""
        return is_url(self.path)

    @property
    def on_s3(self) -> bool:
        """Whether it is an object store that speaks S3."""
        return self.path.startswith(("s3://", "s3a://"))

    def below(self, name: str) -> Place:
        """A place in this folder."""
        return Place(f"{self.path.rstrip('/')}/{name}" if self.remote else os.path.join(self.path, name), self.options)

    def open(self, attempts: int = 5) -> tuple[AbstractFileSystem, str]:
        """The fsspec file system, one a process, and the path in it.

        Parameters
        ----------
        attempts : int
            How often a request to S3 is made at most, where its client makes it again by itself.

        Raises
        ------
        InputError
            If nothing that is installed opens such a URL, or the options are not its own.
        """
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.path, **fsspec_options(self.options, self.on_s3, attempts))
        except (ImportError, ValueError, TypeError) as error:
            raise InputError(f"{self.path} cannot be opened: {self.safe(error)}") from None
        return system, path

    def holds_something(self) -> bool:
        """Whether there is anything at or below it; asks for no more than one name, and fails where it may not ask."""
        system, path = self.open()
        if not self.on_s3:
            return bool(system.exists(path))
        bucket, prefix, _ = system.split_path(path)
        found = system.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix and f"{prefix}/", MaxKeys=1)
        return bool(found.get("Contents"))

    def open_file(self) -> IO[bytes]:
        """The file, to be read."""
        if not self.remote:
            return open(self.path, "rb")
        system, path = self.open()
        file: IO[bytes] = system.open(path, "rb")
        return file

    def safe(self, error: BaseException) -> str:
        """An error in one line, without the values of options that may be secrets."""
        # Behind the message obstore shows its innards.
        line = " ".join(f"{type(error).__name__}: {str(error).partition('Debug source')[0]}".split())
        for secret in _secrets(self.options):
            line = line.replace(secret, "***")
        return line[:300]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A photo that lies within another file: in a tar shard.

    Attributes
    ----------
    path : str
        The file's path or URL.
    offset : int
        Where the photo starts in it, in bytes.
    bytes : int
        Its size.
    mtime_ns : int, optional
        Time of the file's last change, nanoseconds since 1970 UTC, when the photo was found in it.
    etag : str, optional
        Entity tag of an object in a store, likewise.
    """

    path: str
    offset: int
    bytes: int
    mtime_ns: int | None = None
    etag: str | None = None

    def __str__(self) -> str:
        return f"{self.path} (bytes {self.offset} to {self.offset + self.bytes})"


#: Where a photo lies: the path or URL of a file of its own, or a part of another file.
PhotoRef = str | ByteRange


def file_of(ref: PhotoRef) -> str:
    """The file in which a photo lies."""
    return ref if isinstance(ref, str) else ref.path


def ref_of(row: Mapping[str, Any]) -> PhotoRef:
    """Where a photo lies, by its row of the ledger, whose times are from `reducer.tables.in_nanoseconds`."""
    if row["shard"] is not None and row["offset"] is not None:
        return ByteRange(row["shard"], row["offset"], row["bytes"], row["mtime"], row["etag"])
    path: str = row["path"]
    return path


@dataclass(frozen=True)
class Source:
    """How photos are read; travels to the workers.

    Attributes
    ----------
    options : mapping
        For URLs: what opens them; may hold secrets.
    reader : str
        One of `reducer.config.READER_NAMES`, for ``s3://``.
    read_ahead : int
        Photos of a URL that are under way at a time, for each worker thread; of shards a quarter as many blocks.
    """

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    reader: str = "s3fs"
    read_ahead: int = 32


def parse_options(flag: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Options from the command line.

    Parameters
    ----------
    flag : str
        Which flag gave them.
    pairs : iterable of str
        ``KEY=VALUE``; ``true``, ``false`` and ``{...}`` are read as JSON, all else is text.

    Raises
    ------
    InputError
        If one is not of the form, or given twice. Values are not repeated: they may be secrets.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InputError(f"{flag}: expected KEY=VALUE, such as endpoint_url=http://127.0.0.1:9000")
        if key in options:
            raise InputError(f"{flag} {key} is given twice")
        if value in ("true", "false") or value.startswith("{"):
            try:
                options[key] = json.loads(value)
            except ValueError as error:
                raise InputError(f"{flag} {key}: the value begins like JSON and is none ({error})") from None
        else:
            options[key] = value
    return options


def fsspec_options(given: Mapping[str, Any], on_s3: bool, attempts: int) -> dict[str, Any]:
    """Return storage options as fsspec's own file system for the URL takes them.

    Parameters
    ----------
    given : mapping
        The options.
    on_s3 : bool
        Whether the store speaks S3.
    attempts : int
        How often a request is made at most, where the client makes it again by itself.
    """
    options = dict(given)
    if not on_s3:
        return options
    client = dict(options.pop("client_kwargs", None) or {})
    if region := options.pop("region", None):
        client["region_name"] = region
    config = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": ANSWER_SECONDS,
        "max_pool_connections": CONNECTIONS,
        "retries": {"mode": "standard", "total_max_attempts": attempts},
    }
    config |= dict(options.pop("config_kwargs", None) or {})
    # A listing that is kept for later would hide what is written meanwhile.
    return {"use_listings_cache": False} | options | {"client_kwargs": client, "config_kwargs": config}


def check_obstore(options: Mapping[str, Any]) -> None:
    """Refuse what obstore cannot be told.

    Raises
    ------
    InputError
        If obstore is not installed, or has no such option.
    """
    if importlib.util.find_spec("obstore") is None:
        raise InputError("--reader obstore needs the package obstore: pip install 'reducer[obstore]'")
    for key in options:
        if key not in OBSTORE_OPTIONS:
            raise InputError(
                f"--reader obstore has no storage option {key!r}, only {', '.join(OBSTORE_OPTIONS)}: leave it out, or "
                "use --reader s3fs"
            )


def obstore_at(bucket: str, options: Mapping[str, Any]) -> Any:
    """obstore's store for a bucket, one a process."""
    return _obstore(bucket, json.dumps({OBSTORE_OPTIONS[key]: value for key, value in sorted(options.items())}))


@lru_cache(maxsize=8)
def _obstore(bucket: str, options: str) -> Any:
    from obstore.store import S3Store

    given: dict[str, Any] = json.loads(options)
    profile = given.pop("profile", None)
    client: ClientConfig = {
        "allow_http": str(given.get("endpoint", "")).startswith("http://"),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "timeout": timedelta(seconds=ANSWER_SECONDS),
    }
    if "access_key_id" not in given and not given.get("skip_signature"):
        # obstore knows nothing of profiles and of ~/.aws: the usual chain is botocore's.
        given["credential_provider"] = _botocore_credentials(profile)
    return S3Store(bucket, **given, client_options=client, retry_config={"max_retries": 0})


def _botocore_credentials(profile: str | None) -> Callable[[], dict[str, Any]]:
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        found = botocore.session.Session(profile=profile).get_credentials()
    except BotoCoreError as error:
        raise PermissionError(str(error)) from None
    if found is None:
        raise PermissionError("no AWS credentials were found")

    def credentials() -> dict[str, Any]:
        now = found.get_frozen_credentials()
        soon = datetime.now(UTC) + timedelta(minutes=5)
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": soon,  # asked again: botocore renews them where they end
        }

    return credentials


def is_refused(error: BaseException) -> bool:
    """Whether a store refuses access: asking again would not help."""
    kinds = ("PermissionDeniedError", "UnauthenticatedError", "NoCredentialsError")
    return isinstance(error, PermissionError) or type(error).__name__ in kinds


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif key not in SHOWN_OPTIONS and isinstance(value, str) and value:
            yield value


def pauses() -> Iterator[float]:
    """Seconds to wait before each further attempt at a request that may yet succeed; ends when that takes too long."""
    started, pause = time.monotonic(), FIRST_PAUSE
    while time.monotonic() - started < RETRY_SECONDS:
        # Random, so that the requests of all workers do not come back together.
        yield pause * (0.5 + random.random() / 2)
        pause = min(2 * pause, LONGEST_PAUSE)


def persistently(request: Callable[[], T]) -> T:
    """Make a request again while it fails for reasons that may pass."""
    for pause in pauses():
        try:
            return request()
        except Exception as error:
            if is_refused(error) or isinstance(error, FileNotFoundError | ValueError):
                raise
        time.sleep(pause)
    return request()


@contextmanager
def explained(place: Place, what: str) -> Iterator[None]:
    """Turn whatever goes wrong at a place into an InputError that says what to look at.

    Parameters
    ----------
    place : Place
        Where.
    what : str
        The beginning of the message, such as ``IMAGES s3://bucket/photos cannot be listed``.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not place.remote:
            if not isinstance(error, OSError):
                raise
            raise InputError(f"{what}: {error.strerror or error}") from None
        raise InputError(f"{what}: {place.safe(error).rstrip('.')}{_advice(error, place)}") from None


def _advice(error: Exception, place: Place) -> str:
    """What to look at when a remote place cannot be used."""
    if isinstance(error, TypeError):
        return ". Check the names of the storage options"
    if is_refused(error):
        return (
            ". Access is refused: check the credentials (key and secret, profile, or the usual AWS chain; anon=true "
            "for a public bucket), and that they may use this bucket"
        )
    if isinstance(error, FileNotFoundError):
        return ". Check the bucket's name, the region and the endpoint_url"
    if place.on_s3:
        return ". Check the endpoint_url and the region, and that the server is up"
    return ""
