"""Reach stores: the options of fsspec and of obstore, and retries of requests."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from reducer.errors import InputError

if TYPE_CHECKING:
    from obstore.store import ClientConfig


#: Options whose values are not secret and may be shown.
SHOWN_OPTIONS = ("anon", "endpoint_url", "region")
#: Names of the options in obstore.
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
#: Connections of a client: never the limit, which is reading ahead. Photos that wait for room keep theirs.
CONNECTIONS = 10_000
#: Seconds for which a request that fails for a reason that may pass is made again.
RETRY_SECONDS = 60.0
#: The pause before the second attempt at most, in seconds; it doubles each time, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
#: Errors that no further attempt mends: wrong arguments and mistakes in code.
BUGS = (AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError, ValueError)
T = TypeVar("T")


#: Options of s3fs and obstore that are true or false: any other text would count as true.
BOOLEAN_OPTIONS = ("anon", "requester_pays", "use_ssl", "version_aware", "skip_signature", "allow_http")
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_options(flag: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Read options from the command line.

    Parameters
    ----------
    flag : str
        Flag that gave them.
    pairs : iterable of str
        ``KEY=VALUE``; true and false, in capitals or not, are no text, nor are yes, no, on, off, 1 and 0 where the
        option is one of `BOOLEAN_OPTIONS`; ``{...}`` is read as JSON; all else is text.

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
        truth = BOOLEANS.get(value.lower())
        if key in BOOLEAN_OPTIONS and truth is None:
            raise InputError(f"{flag} {key}: expected true or false")
        if key in BOOLEAN_OPTIONS or value.lower() in ("true", "false"):
            options[key] = truth
        elif value.startswith("{"):
            try:
                options[key] = json.loads(value)
            except ValueError as error:
                raise InputError(f"{flag} {key}: the value begins like JSON and is none ({error})") from None
        else:
            options[key] = value
    return options


def with_truths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return storage options in which `BOOLEAN_OPTIONS`, nested ones too, are true or false, however they are spelled.

    Raises
    ------
    InputError
        If one is neither.
    """
    found: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            found[key] = with_truths(value)
        elif key in BOOLEAN_OPTIONS and not isinstance(value, bool):
            if str(value).lower() not in BOOLEANS:
                raise InputError(f"storage option {key}: expected true or false")
            found[key] = BOOLEANS[str(value).lower()]
        else:
            found[key] = value
    return found


def fsspec_options(given: Mapping[str, Any], on_s3: bool, attempts: int) -> dict[str, Any]:
    """Return storage options as fsspec's own file system for the URL takes them.

    Parameters
    ----------
    given : mapping
        The options.
    on_s3 : bool
        Whether the store speaks S3.
    attempts : int
        Most attempts at a request, where the client makes it again by itself.
    """
    options = with_truths(given)
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
    # A cached listing would hide files that are written meanwhile.
    return {"use_listings_cache": False} | options | {"client_kwargs": client, "config_kwargs": config}


def check_obstore(options: Mapping[str, Any]) -> None:
    """Refuse options that obstore does not know.

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
    """Return obstore's store for a bucket, one per process."""
    given = sorted(with_truths(options).items())
    return _obstore(bucket, json.dumps({OBSTORE_OPTIONS[key]: value for key, value in given}))


@lru_cache(maxsize=8)
def _obstore(bucket: str, options: str) -> Any:
    from obstore.store import S3Store

    given: dict[str, Any] = json.loads(options)
    profile = given.pop("profile", None)
    # obstore knows nothing of profiles and of ~/.aws, nor of AWS_ENDPOINT_URL: the usual chain is botocore's.
    given = _botocore_place(profile) | given
    client: ClientConfig = {
        "allow_http": str(given.get("endpoint", "")).startswith("http://"),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "timeout": timedelta(seconds=ANSWER_SECONDS),
    }
    if "access_key_id" not in given and not given.get("skip_signature"):
        given["credential_provider"] = _botocore_credentials(profile)
    return S3Store(bucket, **given, client_options=client, retry_config={"max_retries": 0})


def _botocore_place(profile: str | None) -> dict[str, str]:
    """Return the region, and the endpoint if it is not Amazon's, as the environment and AWS's files tell them."""
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        session = botocore.session.Session(profile=profile)
        region = session.get_config_variable("region")
        # Any key: none is asked for here, and botocore would look for some.
        client = session.create_client(
            "s3", region_name=region or "us-east-1", aws_access_key_id="none", aws_secret_access_key="none"
        )
    except BotoCoreError as error:
        raise PermissionError(str(error)) from None
    place = {"region": region, "endpoint": client.meta.endpoint_url}
    if place["endpoint"].endswith((".amazonaws.com", ".amazonaws.com.cn")):
        del place["endpoint"]
    return {name: value for name, value in place.items() if value}


def _botocore_credentials(profile: str | None) -> Callable[[], dict[str, Any]]:
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        chain = botocore.session.Session(profile=profile).get_credentials()
    except BotoCoreError as error:
        raise PermissionError(str(error)) from None
    if chain is None:
        raise PermissionError("no AWS credentials were found")

    def credentials() -> dict[str, Any]:
        now = chain.get_frozen_credentials()
        soon = datetime.now(UTC) + timedelta(minutes=5)
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": soon,  # asked again: botocore renews them where they end
        }

    return credentials


def is_access_refused(error: BaseException) -> bool:
    """Tell whether a store refuses access, so that asking again would not help."""
    kinds = ("PermissionDeniedError", "UnauthenticatedError", "NoCredentialsError")
    return isinstance(error, PermissionError) or type(error).__name__ in kinds


def secret_values(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values of options that may be secret."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from secret_values(value)
        elif key not in SHOWN_OPTIONS and isinstance(value, str) and value:
            yield value


#: HTTP statuses, and codes of S3, of requests that may succeed later although the client is to blame by the number.
PASSING_STATUSES = (408, 425, 429)
PASSING_CODES = ("RequestTimeout", "SlowDown")
#: Codes of writes that came together.
CONFLICTS = ("OperationAborted", "ConditionalRequestConflict")
#: Codes by which S3 says that credentials are wrong, or have ended.
CREDENTIALS_ENDED = (
    *("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken"),
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"),
)


def may_pass(status: int, code: str | None) -> bool:
    """Tell whether a request may succeed later, by the HTTP status and S3's code of the answer."""
    return not 400 <= status < 500 or status in PASSING_STATUSES or code in PASSING_CODES


def answer_of(error: BaseException) -> tuple[int, str | None] | None:
    """Return the HTTP status and S3's code that an error of botocore, or one made of it, tells; else None."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping) and "ResponseMetadata" in response:
            status: int = response["ResponseMetadata"]["HTTPStatusCode"]
            return status, response.get("Error", {}).get("Code")
        cause = cause.__cause__ or cause.__context__
    return None


class Transient(Exception):
    """A request failed for a reason that may pass."""


def retry_pauses() -> Iterator[float]:
    """Yield seconds to wait before each further attempt at a request, for `RETRY_SECONDS`."""
    started, pause = time.monotonic(), FIRST_PAUSE
    while time.monotonic() - started < RETRY_SECONDS:
        # Random, so that the requests of all workers do not come back together.
        yield pause * (0.5 + random.random() / 2)
        pause = min(2 * pause, LONGEST_PAUSE)


def with_retries(request: Callable[[], T]) -> T:
    """Make a request again while it fails for reasons that may pass; refusals and bugs are raised at once."""
    for pause in retry_pauses():
        try:
            return request()
        except Exception as error:
            if is_access_refused(error) or isinstance(error, (FileNotFoundError, *BUGS)):
                raise
            answer = answer_of(error)
            if answer is not None and not may_pass(*answer) and answer[1] not in CONFLICTS:
                raise
        time.sleep(pause)
    return request()


async def with_async_retries(request: Callable[[], Awaitable[T]]) -> T:
    """Make a request again while it raises `Transient`."""
    import asyncio  # every command would wait for it, --help too

    for pause in retry_pauses():
        try:
            return await request()
        except Transient:
            await asyncio.sleep(pause)
    return await request()


def nanoseconds(moment: datetime) -> int:
    """Return nanoseconds since 1970 UTC; stores know whole seconds, or milliseconds."""
    return 1_000_000 * round(1000 * moment.timestamp())
