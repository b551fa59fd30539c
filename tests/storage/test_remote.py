"""Retries: errors that may pass are tried again, refusals and bugs are raised at once."""

from __future__ import annotations

import asyncio

import pytest
from botocore.exceptions import ClientError

from reducer import InputError, Job
from reducer.storage import remote
from reducer.storage.remote import Transient, with_async_retries, with_retries, with_truths


class Flaky:
    """A request that fails a number of times."""

    def __init__(self, error: Exception, failures: int) -> None:
        self.error, self.failures, self.calls = error, failures, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "answer"

    async def later(self) -> str:
        """Make the request in an event loop."""
        return self()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reducer.storage.remote.FIRST_PAUSE", 0.001)


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), RuntimeError("odd")], ids=repr)
def test_an_error_that_may_pass_is_tried_again(error: Exception) -> None:
    request = Flaky(error, 2)
    assert with_retries(request) == "answer"
    assert request.calls == 3


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("refused"),
        FileNotFoundError("gone"),
        ValueError("wrong"),
        AttributeError("a bug"),
        TypeError("a bug"),
        NotImplementedError("read-only"),
        KeyError("a bug"),
        NameError("a bug"),
    ],
    ids=repr,
)
def test_a_refusal_or_a_bug_is_raised_at_once(error: Exception) -> None:
    request = Flaky(error, 1)
    with pytest.raises(type(error)) as raised:
        with_retries(request)
    assert raised.value is error
    assert request.calls == 1


def test_in_an_event_loop_transient_errors_are_tried_again_and_no_others() -> None:
    request = Flaky(Transient("busy"), 2)
    assert asyncio.run(with_async_retries(request.later)) == "answer"
    assert request.calls == 3
    request = Flaky(OSError("reset"), 1)
    with pytest.raises(OSError, match="reset"):
        asyncio.run(with_async_retries(request.later))
    assert request.calls == 1


@pytest.mark.parametrize("error", [OSError("down"), Transient("down")], ids=repr)
def test_the_last_error_is_raised_when_time_is_up(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reducer.storage.remote.RETRY_SECONDS", 0.02)
    request = Flaky(error, 10**9)
    with pytest.raises(type(error), match="down"):
        with_retries(request)
    assert request.calls > 1


def test_true_and_false_in_any_spelling_wherever_they_stand() -> None:
    given = {"anon": "False", "client_kwargs": {"use_ssl": "no", "region_name": "no"}, "requester_pays": 1, "key": "no"}
    assert with_truths(given) == {
        "anon": False,
        "client_kwargs": {"use_ssl": False, "region_name": "no"},
        "requester_pays": True,
        "key": "no",
    }
    with pytest.raises(InputError, match="storage option anon: expected true or false"):
        with_truths({"anon": "perhaps"})
    with pytest.raises(InputError, match="storage option use_ssl: expected true or false"):
        Job("s3://bucket", "run", storage_options={"client_kwargs": {"use_ssl": "perhaps"}})


@pytest.mark.parametrize(
    ("status", "code", "passes"),
    [
        *(
            (500, "InternalError", True),
            (503, "SlowDown", True),
            (429, None, True),
            (425, None, True),
            (408, None, True),
        ),
        *((400, "RequestTimeout", True), (400, "BadDigest", False), (404, "NoSuchKey", False), (409, "Other", False)),
        *((409, "OperationAborted", True), (409, "ConditionalRequestConflict", True)),
    ],
)
def test_writes_are_tried_again_where_that_may_help(
    status: int, code: str, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    answer = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}
    asked = []

    def request() -> None:
        asked.append(1)
        try:
            raise ClientError(answer, "PutObject")
        except ClientError as error:
            raise OSError("as s3fs translates it") from error

    with pytest.raises(OSError, match="as s3fs"):
        remote.with_retries(request)
    assert (len(asked) > 1) == passes
