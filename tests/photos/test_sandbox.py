"""Photos looked at in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from killerphotos import KILLER
from machine import ROOT
from waiting import wait_for

from reducer import Job
from reducer.config.resolved import resolve
from reducer.config.settings import Source
from reducer.photos.process import PhotoResult, process_photos
from reducer.photos.sandbox import CannotStart, may_be_innocent, process_in_sandbox, process_one_in_sandbox

SETTINGS = resolve(Job("-", "-")).photo_settings
WATCH = """
import sys
from reducer import Job
from reducer.config.resolved import resolve
from reducer.config.settings import Source
from reducer.photos.sandbox import process_one_in_sandbox

settings = resolve(Job("-", "-")).photo_settings
process_one_in_sandbox(sys.argv[1], settings, Source(), memory=None, patience=60, beat=lambda: None)
"""


def no_beat() -> None:
    pass


def test_it_sees_what_this_process_sees(collection: Path) -> None:
    paths = [str(path) for path in sorted((collection / "train").rglob("*.jpg"))[:6]]
    paths[2:2] = [str(collection / "train.csv"), "nowhere"]
    apart = list(process_in_sandbox(paths, SETTINGS, Source(), memory=2**30, patience=60, beat=no_beat))
    assert apart == list(process_photos(paths, SETTINGS))
    assert sum(look.error is not None for look in apart) == 2


def test_a_process_that_cannot_start_blames_no_photo(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = str(next((collection / "train").rglob("*.jpg")))
    (tmp_path / "numpy.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CannotStart, match="ended with exit code 3"):
        process_one_in_sandbox(photo, SETTINGS, Source(), memory=None, patience=60, beat=no_beat)


def test_it_ends_with_its_worker(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"KILLER hang")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([KILLER, str(ROOT)]), "KILLER_LOG": str(tmp_path / "log")}
    worker = subprocess.Popen([sys.executable, "-c", WATCH, str(tmp_path / "photo.jpg")], env=env)
    wait_for((tmp_path / "log").read_text, "the photo to be opened")
    (child,) = psutil.Process(worker.pid).children()
    worker.kill()
    worker.wait()
    child.wait(20)
    assert not child.is_running()


def test_who_may_be_innocent() -> None:
    assert may_be_innocent(PhotoResult(error="out of memory: decoding it takes more than there is"))
    assert not may_be_innocent(PhotoResult(error="missing: no such file"))
    assert not may_be_innocent(PhotoResult(error="broken: OSError"))  # memory was never short here
    assert not may_be_innocent(PhotoResult())
