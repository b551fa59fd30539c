"""This machine and this checkout: what is where, what is missing, a disk that is full."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def need(missing: Callable[[], str | None]) -> None:
    """Skip the test if something that it needs is missing here: ``need(Sshd.missing)``."""
    reason = missing()
    if reason:
        pytest.skip(reason)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], int]]:
    """A real disk of so many bytes, a file system in memory; gives what makes it larger."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield lambda more: subprocess.check_call(["mount", "-o", f"remount,size={more}", str(folder)])
    finally:
        subprocess.run(["umount", folder], check=True)
