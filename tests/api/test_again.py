"""The same command again: it goes on, or shows what is there; nothing is lost by it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import invoke, reduce
from jobs import SERIAL, job_on, parts, reduced_files, run_on, shorten
from shardjobs import samples_of
from tarfiles import packed, write_tars

from reducer import InputError, Job, TooManyFailuresError, open_run, reduce_images
from reducer.run.folder import RunFolder


def state_of(run: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(run)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.rglob("*")
        if path.is_file()
    }


def test_a_run_that_was_stopped_goes_on(collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    assert reduce(collection, run, "--partition-images", 20)[0] == 0
    before, kept = reduced_files(run), parts(run)[:2]
    shorten(run, 2)
    times = {name: (run / "images" / name).stat().st_mtime_ns for name in kept}
    # What decides neither hash nor rank may differ.
    code, out, _ = reduce(collection, run, "--workers", 1, "--read-ahead", 5, "--max-failures", 0.2)
    assert code == 0
    assert f"{run} holds this run already, unfinished: it goes on (--overwrite begins anew)" in caplog.text
    assert f"Results: {run}" in out
    assert reduced_files(run) == before
    assert {name: (run / "images" / name).stat().st_mtime_ns for name in kept} == times
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["resumed"]) == ("done", 1)


def test_a_finished_run_shows_its_results_again(
    collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    first = run_on(collection, run)
    before = state_of(run)
    code, out, _ = reduce(collection, run)
    assert code == 0
    assert f"{run} holds this run already, finished: these are its results" in caplog.text
    assert "Kept " in out
    again = run_on(collection, run)  # as a notebook's cell that is run once more
    assert again.reduced.equals(first.reduced)
    assert open_run(run).reduced.equals(first.reduced)
    assert open_run(run).images.equals(first.images)
    assert state_of(run) == before


def test_it_ends_as_the_run_ended(collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(collection, tmp_path / "own")
    for path in sorted((tmp_path / "own" / "train").rglob("*.jpg"))[::3]:
        path.write_bytes(b"")
    run = tmp_path / "run"
    assert reduce(tmp_path / "own", run)[0] == 3
    before = state_of(run)
    assert reduce(tmp_path / "own", run)[0] == 3
    assert "holds this run already, finished" in caplog.text
    assert state_of(run) == before
    assert reduce(tmp_path / "own", run, "--max-failures", 0.9)[0] == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seed": 5}, "--seed was 0 and is 5"),
        ({"hash": "phash", "strategy": "random"}, "--strategy was farthest-first and is random; --hash was dhash"),
        ({"labels": ("1", "2")}, "--labels was None and is"),
        ({"format": "csv"}, "--format was both and is csv"),
        ({"cross_label": True}, "--cross-label was False and is True"),
        ({"keep": 5, "seed": 1}, "--keep was 8 and is 5; --seed was 0 and is 1"),
    ],
    ids=["seed", "two", "labels", "format", "cross-label", "keep too"],
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_other_settings_are_refused_by_name(
    collection: Path, tmp_path: Path, given: dict[str, object], told: str, finished: bool
) -> None:
    run = tmp_path / "run"
    run_on(collection, run, partition_images=20)
    if not finished:
        shorten(run, 2)
    before = state_of(run)
    with pytest.raises(InputError) as caught:
        run_on(collection, run, **given)
    assert told in str(caught.value)
    for remedy in (f"reducer resume {run}", "another folder", "--overwrite"):
        assert remedy in str(caught.value)
    assert state_of(run) == before


@pytest.mark.parametrize("given", [{"keep": 3}, {"keep": 8, "min_distance": 20}, {"total": 100}], ids=str)
def test_another_number_of_photos_is_a_cut(collection: Path, tmp_path: Path, given: dict[str, int]) -> None:
    run = tmp_path / "run"
    run_on(collection, run, rank_all=True)
    with pytest.raises(InputError) as caught:
        run_on(collection, run, rank_all=True, **{"keep": None, **given})
    command = str(caught.value).partition("read again: ")[2].partition(". Or give")[0]
    words = [word.replace("FILE.csv", str(tmp_path / "cut.csv")) for word in shlex.split(command)]
    assert words[:2] == ["reducer", "cut"]
    assert invoke(*words[1:])[0] == 0
    anew = run_on(collection, tmp_path / "anew", rank_all=True, **{"keep": None, **given})
    assert (tmp_path / "cut.csv").read_bytes() == (Path(anew.output) / "reduced.csv").read_bytes()
    shorten(run, 1)
    with pytest.raises(InputError, match=rf"reducer resume {run}, then reducer cut {run} --"):
        run_on(collection, run, rank_all=True, **{"keep": None, **given})


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """Photos in a folder per label, which may be changed."""
    names = sorted(path for path in (tiny / "train").rglob("*.jpg"))
    for number, name in enumerate(names[:30]):
        target = tmp_path / "photos" / f"label{number % 2}" / f"{number:02d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name, target)
    return tmp_path / "photos"


def run_folder(folder: Path, run: Path, **options: object) -> None:
    job = Job(str(folder), str(run), keep=4, partition_images=10, report=False, **options)  # type: ignore[arg-type]
    reduce_images(job, SERIAL, progress=False)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_photos_that_are_new_gone_or_changed_are_told(folder: Path, tmp_path: Path, finished: bool) -> None:
    run = tmp_path / "run"
    run_folder(folder, run)
    if not finished:
        reduce_images(
            Job(str(folder), str(run), keep=4, report=False, overwrite=True, partition_images=10),
            SERIAL,
            progress=False,
        )
        shorten(run, 1)
    shutil.copyfile(folder / "label0" / "00.jpg", folder / "label0" / "new.jpg")
    (folder / "label1" / "01.jpg").unlink()
    with open(folder / "label0" / "02.jpg", "ab") as file:
        file.write(b"more")
    before = state_of(run)
    with pytest.raises(InputError, match=r"other photos: 1 new, 1 gone, 1 changed since it began") as caught:
        run_folder(folder, run)
    assert f"--reuse {run}" in str(caught.value)
    assert state_of(run) == before
    reduce_images(
        Job(str(folder), str(tmp_path / "run2"), keep=4, reuse=str(run), report=False), SERIAL, progress=False
    )


@pytest.mark.parametrize("listed", [True, False], ids=["manifest", "WebDataset"])
def test_shards_that_are_new_or_changed_are_told(
    photos: dict[str, bytes], labels: dict[str, str], tiny: Path, tmp_path: Path, listed: bool
) -> None:
    tars = write_tars(tmp_path / "tars", packed(photos, 3) if listed else samples_of(photos, labels, "cls", 3))
    again = ["run", tars, "--output", tmp_path / "run", "--workers", 0, "--keep", 2]
    again += ["--manifest", tiny / "train.csv"] if listed else []
    for _ in range(2):
        assert invoke(*again)[0] == 0
    first = sorted(tars.glob("*.tar"))[0]
    shutil.copyfile(first, tars / "zzz.tar")
    first.touch()
    code, _, err = invoke(*again)
    assert code == 2
    assert "other photos or shards: 1 new, 0 gone, 1 changed" in err


def test_a_list_of_ids_to_keep_that_has_changed_is_told(collection: Path, tmp_path: Path) -> None:
    ids = [line.partition(",")[0] for line in (collection / "train.csv").read_text().split()[1:4]]
    always = tmp_path / "always.txt"
    always.write_text("\n".join(ids[:2]))
    run_on(collection, tmp_path / "run", always_keep=str(always))
    always.write_text("\n".join(ids[:3]))
    with pytest.raises(InputError, match="other photos in --always-keep"):
        run_on(collection, tmp_path / "run", always_keep=str(always))


def test_vectors_and_hashes_to_avoid_are_compared_by_content(collection: Path, tmp_path: Path) -> None:
    ids = [line.partition(",")[0] for line in (collection / "train.csv").read_text().split()[1:]]

    def write(seed: int) -> None:
        vectors = np.random.default_rng(seed).standard_normal((len(ids), 4)).astype(np.float32)
        pyarrow.parquet.write_table(pa.table({"id": ids, "vector": list(vectors)}), tmp_path / "vectors.parquet")

    write(0)
    given = {"vectors": str(tmp_path / "vectors.parquet")}
    first = run_on(collection, tmp_path / "run", **given)
    assert run_on(collection, tmp_path / "run", **given).reduced.equals(first.reduced)
    write(1)
    with pytest.raises(InputError, match="--vectors has another content"):
        run_on(collection, tmp_path / "run", **given)
    (tmp_path / "avoid.txt").write_text("0123456789abcdef\n")
    run_on(collection, tmp_path / "avoiding", avoid=str(tmp_path / "avoid.txt"))
    run_on(collection, tmp_path / "avoiding", avoid=str(tmp_path / "avoid.txt"))
    (tmp_path / "avoid.txt").write_text("0123456789abcde0\n")
    with pytest.raises(InputError, match="--avoid has another content"):
        run_on(collection, tmp_path / "avoiding", avoid=str(tmp_path / "avoid.txt"))


def nothing_yet(collection: Path, run: Path) -> None:
    run_on(collection, run, seed=3)
    shorten(run, 0)


def all_failed(collection: Path, run: Path) -> None:
    with pytest.raises(TooManyFailuresError):
        run_on(collection, run, path_template="{id}.gone", rank_all=True)


@pytest.mark.parametrize("earlier", [nothing_yet, all_failed])
def test_a_run_that_came_to_nothing_blocks_nothing(
    collection: Path, tmp_path: Path, earlier: Callable[[Path, Path], None]
) -> None:
    run = tmp_path / "run"
    earlier(collection, run)
    run_on(collection, run)
    assert reduced_files(run) == reduced_files(Path(run_on(collection, tmp_path / "other").output))


def test_a_run_that_kept_everything_unread_is_a_result(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "run", keep=1000)
    before = state_of(tmp_path / "run")
    with pytest.raises(InputError, match="holds a run with other settings"):
        run_on(collection, tmp_path / "run", seed=1)
    assert state_of(tmp_path / "run") == before


def test_a_default_that_has_changed_since_is_the_runs_own(
    collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    before = reduced_files(Path(run_on(collection, run, candidates=20).output))
    folder = RunFolder(str(run))
    summary = folder.read_summary()
    with pytest.raises(InputError, match="--candidates was 20 and is 1000"):
        run_on(collection, run)
    folder.write_summary(summary | {"given": [name for name in summary["given"] if name != "candidates"]})
    run_on(collection, run)
    assert "keeps settings of its own, which are no defaults any more: --candidates was 20 and is 1000" in caplog.text
    assert reduced_files(run) == before
    with pytest.raises(InputError, match="--candidates was 20 and is 30"):
        run_on(collection, run, candidates=30)


def test_more_labels_may_be_ranked_by_the_same_command(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "run")
    result = run_on(collection, tmp_path / "run", rank_all=True)
    assert "kept-small-label" not in result.summary["reasons"]
    run_on(collection, tmp_path / "run")  # which has more than is asked for
    job = job_on(collection, tmp_path / "run")
    assert job.rank_all is False


def test_open_run_refuses_what_is_not_finished(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "run", partition_images=20)
    shorten(tmp_path / "run", 1)
    with pytest.raises(InputError, match="not finished"):
        open_run(tmp_path / "run")
