"""Which answers of a store are worth another request."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from reducer.config.settings import Source
from reducer.photos.hashing import PhotoError
from reducer.photos.requests import _S3fsClient, fetch
from reducer.storage.remote import Transient


def answering(error: Exception) -> Any:
    """Return an `open` of s3fs's client that gets this answer only."""

    async def nothing() -> None:
        return None

    async def get_object(**_: str) -> None:
        raise error

    async def get_s3(_: str) -> SimpleNamespace:
        return SimpleNamespace(get_object=get_object)

    system = SimpleNamespace(split_path=lambda path: ("b", path, None), set_session=nothing, get_s3=get_s3)
    return lambda _, location: (system, location.path)


@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [
        (503, "SlowDown", "again"),
        (500, "InternalError", "again"),
        (502, "BadGateway", "again"),
        (429, "TooManyRequests", "again"),
        (408, "Timeout", "again"),
        (400, "RequestTimeout", "again"),
        (404, "NoSuchKey", "missing: no such object"),
        (403, "AccessDenied", "unreadable: access is refused"),
        (400, "InvalidArgument", "unreadable: "),
    ],
)
def test_what_may_pass_is_asked_again_and_nothing_else(
    status: int, code: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    monkeypatch.setattr(_S3fsClient, "open", answering(ClientError(response, "GetObject")))

    async def room(_: int) -> None:
        return None

    with pytest.raises((Transient, PhotoError)) as caught:
        asyncio.run(fetch("s3://b/k", Source(), room))
    assert isinstance(caught.value, Transient) == (outcome == "again")
    if outcome != "again":
        assert str(caught.value).startswith(outcome)
    monkeypatch.setattr(_S3fsClient, "open", answering(EndpointConnectionError(endpoint_url="http://x")))
    with pytest.raises(Transient):
        asyncio.run(fetch("s3://b/k", Source(), room))
