"""Waiting for what another process or thread does."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    stop = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError):
            if condition():
                return
        assert time.monotonic() < stop, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def when_begun(run: Path, act: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a run has written its first parts."""

    def wait_and_act() -> None:
        wait_for(lambda: len(list((run / "images").glob("part-*"))) >= 2, "the first parts")
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread
