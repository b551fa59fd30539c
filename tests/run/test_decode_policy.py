"""Runs of an earlier decode policy: read as they are, and never mixed with hashes of this one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import ledger_of, reduced_files, shorten
from PIL import Image

import reducer.photos.hashing
import reducer.run.fingerprint
from reducer import ClusterSpec, InputError, Job, cut, reduce_images, resume
from reducer.run.folder import RunFolder

SERIAL = ClusterSpec(workers=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label of JPEGs, one of 16-bit PNGs, one of both."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        coarse = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        drawn = Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)
        deep = Image.fromarray(np.asarray(drawn.convert("L")).astype(np.uint16) * 257)
        for label, is_deep in (("jpeg", False), ("deep", True), ("mixed", number % 2 == 0)):
            (folder / label).mkdir(exist_ok=True)
            (deep if is_deep else drawn).save(folder / label / f"p{number}.{'png' if is_deep else 'jpg'}")
    return folder


@contextmanager
def first_policy() -> Iterator[None]:
    """Hash as the version before `decode_policy` did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reducer.photos.hashing, "as_seen", lambda image: image)
        patch.setattr(reducer.run.fingerprint, "DECODE_POLICY", 1)
        yield


def reduced(photos: Path, output: Path, **options: Any) -> Any:
    options = {"keep": 3, "report": False, "partition_images": 8, **options}
    return reduce_images(Job(str(photos), str(output), **options), SERIAL, progress=False)


def earlier(photos: Path, output: Path, **options: Any) -> None:
    with first_policy():
        reduced(photos, output, **options)
    summary = json.loads((output / "summary.json").read_text())
    assert summary.pop("decode_policy") == 1  # that version did not write it
    (output / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the photos that are read in this process."""
    paths: list[str] = []
    real = reducer.photos.process.read_all

    def read_all(some: list[str], *rest: Any, **options: Any) -> Any:
        paths.extend("/".join(Path(path).parts[-2:]) for path in some)
        return real(some, *rest, **options)

    monkeypatch.setattr("reducer.photos.process.read_all", read_all)
    return paths


def same(run: Path, whole: Path) -> bool:
    return reduced_files(run) == reduced_files(whole) and ledger_of(run).equals(ledger_of(whole))


DEEP = sorted([f"deep/p{n}.png" for n in range(8)] + [f"mixed/p{n}.png" for n in range(0, 8, 2)])


@pytest.mark.parametrize("left", [None, 1, 0])
def test_resume_reads_what_was_decoded_otherwise_again(
    photos: Path, tmp_path: Path, read: list[str], left: int | None
) -> None:
    earlier(photos, tmp_path / "run")
    if left is not None:
        shorten(tmp_path / "run", left)
    read.clear()
    result = resume(tmp_path / "run", SERIAL, progress=False)
    if left is None:
        assert sorted(read) == DEEP
    reduced(photos, tmp_path / "whole")
    assert same(tmp_path / "run", tmp_path / "whole")
    assert result.summary["decode_policy"] == 2
    read.clear()
    resume(tmp_path / "run", SERIAL, progress=False)
    assert read == []


def test_resume_of_a_label_hashed_in_pieces(photos: Path, tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "photos/all").mkdir(parents=True)
    for copy in range(8):
        for photo in (*(photos / "deep").iterdir(), *(photos / "jpeg").iterdir()):
            shutil.copy(photo, tmp_path / "photos/all" / f"{copy}{photo.name}")
    earlier(tmp_path / "photos", tmp_path / "run", partition_images=50)
    assert len(RunFolder(str(tmp_path / "run")).pieces.done()) > 1
    shorten(tmp_path / "run", 0)
    read.clear()
    resume(tmp_path / "run", SERIAL, progress=False)
    assert sorted(read) == [f"all/{copy}p{n}.png" for copy in range(8) for n in range(8)]
    reduced(tmp_path / "photos", tmp_path / "whole", partition_images=50)
    assert same(tmp_path / "run", tmp_path / "whole")


def test_reuse_takes_only_what_is_the_same(photos: Path, tmp_path: Path, read: list[str]) -> None:
    earlier(photos, tmp_path / "old")
    read.clear()
    result = reduced(photos, tmp_path / "run", reuse=str(tmp_path / "old"))
    assert sorted(read) == DEEP
    assert result.summary["photos_reused"] == 12
    reduced(photos, tmp_path / "whole")
    assert same(tmp_path / "run", tmp_path / "whole")


def test_hashes_of_an_earlier_policy_are_not_avoided(photos: Path, tmp_path: Path) -> None:
    earlier(photos, tmp_path / "old", labels=["deep"])
    for path in (tmp_path / "old", tmp_path / "old/reduced.parquet"):
        with pytest.raises(InputError, match=f"8 photos of that run .* --reuse {tmp_path / 'old'}"):
            reduced(photos, tmp_path / "run", avoid=str(path))
    earlier(photos, tmp_path / "jpegs", labels=["jpeg"])
    reduced(photos, tmp_path / "run", avoid=str(tmp_path / "jpegs"), max_failures=1)
    earlier(photos, tmp_path / "exact", labels=["deep"], decode="exact")
    reduced(photos, tmp_path / "second", avoid=str(tmp_path / "exact"), decode="exact")


def test_a_run_of_an_earlier_policy_is_cut_as_it_is(photos: Path, tmp_path: Path) -> None:
    earlier(photos, tmp_path / "run")
    before = (tmp_path / "run/reduced.csv").read_text()
    assert cut(tmp_path / "run", keep=3, output=tmp_path / "cut.csv") is not None
    assert (tmp_path / "cut.csv").read_text() == before


def test_labels_of_one_hash_are_named(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reduced(photos, tmp_path / "seen")
    assert "same hash" not in caplog.text
    result = reduced(photos, tmp_path / "exact", decode="exact")
    assert result.summary["labels_of_one_hash"] == ["deep"]
    assert "in 1 labels most photos have the same hash ('deep')" in caplog.text
