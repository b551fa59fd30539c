"""Labels of single files that are larger than a partition: hashed in pieces, ranked whole."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from commands import invoke
from jobs import SERIAL, reduced_files, run_on
from killing import killed_before
from shardjobs import csv_of, hashed, manifest_of, rows_of, summary_of

from reducer import ClusterSpec, resume


@pytest.fixture(scope="session")
def giant(tiny: Path, labels: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("giant")
    (folder / "train").symlink_to(tiny / "train")
    manifest_of(folder / "train.csv", [(name, "rest" if n % 6 == 0 else "giant") for n, name in enumerate(labels)])
    return folder


@pytest.fixture(scope="session")
def in_one_piece(giant: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    run_on(giant, run, partition_images=2000)
    assert hashed(run) == []
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_a_giant_label_is_hashed_in_pieces(giant: Path, in_one_piece: Path, tmp_path: Path, workers: int) -> None:
    run_on(giant, tmp_path / "run", ClusterSpec(workers=workers), partition_images=60)
    assert hashed(tmp_path / "run") == [f"part-0000{number}.parquet" for number in range(4)]
    assert reduced_files(tmp_path / "run") == reduced_files(in_one_piece)
    pd.testing.assert_frame_equal(rows_of(tmp_path / "run"), rows_of(in_one_piece))
    for what in ("quality", "reasons", "photos_read", "bytes_read", "photos_failed"):
        assert summary_of(tmp_path / "run")[what] == summary_of(in_one_piece)[what], what


def test_a_giant_label_goes_on_by_the_piece(giant: Path, in_one_piece: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [giant / "train", "--manifest", giant / "train.csv", "--output", run, "--keep", 8, "--workers", 0]
    assert killed_before("hashes/part-00002.parquet", 1, "run", *arguments, "--partition-images", 60, "--quiet")
    done = len(hashed(run))
    assert 0 < done < 4
    before = {part: (run / "hashes" / part).stat().st_mtime_ns for part in hashed(run)}
    code, out, _ = invoke("status", run)
    assert code == 0
    hashed_so_far = done * 50
    assert f"done:       {hashed_so_far} of 240 photos, " in out
    assert "shards" not in out
    result = resume(run, ClusterSpec(workers=0), progress=False)
    assert before.items() <= {part: (run / "hashes" / part).stat().st_mtime_ns for part in hashed(run)}.items()
    assert result.summary["photos_read_this_time"] == 240 - hashed_so_far
    assert reduced_files(run) == reduced_files(in_one_piece)
    pd.testing.assert_frame_equal(rows_of(run), rows_of(in_one_piece))


def test_a_giant_label_of_an_earlier_run(giant: Path, in_one_piece: Path, tmp_path: Path) -> None:
    run_on(giant, tmp_path / "fresh", keep=5, partition_images=60)
    for name, earlier in (("one", in_one_piece), ("pieces", tmp_path / "fresh")):
        run = tmp_path / name
        result = run_on(giant, run, keep=5, partition_images=60, reuse=str(earlier))
        assert (result.summary["photos_read"], result.summary["photos_reused"]) == (0, 240)
        assert reduced_files(run) == reduced_files(tmp_path / "fresh")


def test_failures_of_a_giant_label_are_tried_again(
    giant: Path, tiny: Path, in_one_piece: Path, photos: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "torn"
    for path in (tiny / "train").rglob("*.jpg"):
        (folder / path.relative_to(tiny)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(tiny)).symlink_to(path)
    (folder / "train.csv").write_bytes((giant / "train.csv").read_bytes())
    bad = sorted((folder / "train").rglob("*.jpg"))[::10]
    for path in bad:
        path.unlink()
        path.write_bytes(b"broken")
    run_on(folder, tmp_path / "run", partition_images=60, max_failures=1.0)
    assert summary_of(tmp_path / "run")["photos_failed"] == 24
    for path in bad:
        path.write_bytes(photos[path.stem])
    result = resume(tmp_path / "run", SERIAL, retry_failed=True, progress=False)
    assert result.summary["photos_read_this_time"] == 24
    assert result.summary["photos_failed"] == 0
    assert csv_of(tmp_path / "run") == csv_of(in_one_piece)
    for name in ("quality", "reasons", "photos_read"):
        assert result.summary[name] == summary_of(in_one_piece)[name], name
