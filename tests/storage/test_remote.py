"""Retries: errors that may pass are tried again, refusals and bugs are raised at once."""

from __future__ import annotations

import asyncio

import pytest

from reducer.storage.remote import Transient, with_async_retries, with_retries


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
