"""The whole job, on every executor: serial is the reference, all others must equal it to the byte."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import dask.bag
import pandas as pd
import pyarrow.parquet as pq
import pytest
from jobs import job_on, ledger_of, reduced_files, run_on
from PIL import Image

import reducer.run.dask.dispatch
from reducer import ClusterError, ClusterSpec, InputError, Job, TooManyFailuresError, WorkerRules, reduce_images
from reducer.config.settings import STRATEGY_NAMES
from reducer.run.dask.messages import WorkItem
from reducer.run.folder.parts import LedgerParts
from reducer.run.tasks.tasks import WINDOW
from reducer.storage.schemas import LEDGER_SCHEMA

SIZES = (None, 7, 100)
#: Fewer candidates than the larger labels have photos: the draw is compared too.
DRAWN = {"candidates": 30}


@pytest.fixture(scope="module")
def hurt_collection(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection with bad photos, duplicate rows and an id under two labels, in a manifest of its own."""
    folder = tmp_path_factory.mktemp("hurt")
    (folder / "train").symlink_to(collection / "train")
    lines = (collection / "train.csv").read_text().splitlines()
    first = lines[1].split(",")
    label = Counter(line.split(",")[1] for line in lines[1:]).most_common(1)[0][0]
    extra = [lines[1], lines[2], f"{first[0]},other", *(f"{i:016x},{label}" for i in range(9))]
    (folder / "train.csv").write_text("\n".join([*lines, *extra]) + "\n")
    return folder


@pytest.fixture(scope="module")
def reference(hurt_collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    run_on(hurt_collection, run, **DRAWN)
    return run


def assert_equal(run: Path, reference: Path) -> None:
    assert reduced_files(run) == reduced_files(reference)
    assert ledger_of(run).equals(ledger_of(reference), check_metadata=True)


def test_the_ledger_has_a_row_for_every_row_of_the_manifest(hurt_collection: Path, reference: Path) -> None:
    manifest = pd.read_csv(hurt_collection / "train.csv", dtype=str)
    ledger = ledger_of(reference)
    assert ledger.schema.equals(LEDGER_SCHEMA, check_metadata=True)
    assert ledger.num_rows == len(manifest) - 2
    rows = ledger.to_pylist()
    assert [row["id"] for row in rows] == [manifest["id"][row["row"]] for row in rows]
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["manifest"]["duplicate_rows"] == 2
    assert summary["manifest"]["ids_under_several_labels"] == 1
    assert summary["photos"] == 250
    assert 0 < summary["photos_failed"] == summary["failures"]["missing"] <= 9
    assert summary["photos_kept"] == sum(row["kept"] for row in rows)
    assert sum(summary["reasons"].values()) == 250
    sizes = Counter(row["label"] for row in rows)
    failed = Counter(row["label"] for row in rows if row["reason"] == "failed")
    for label, size in sizes.items():
        mine = [row for row in rows if row["label"] == label]
        assert sum(row["kept"] for row in mine) == min(8, size - failed[label])
        assert {row["reason"] for row in mine} <= (
            {"kept-small-label"} if size <= 8 else {"kept", "beyond-keep", "failed", "not-sampled"}
        )
    assert summary["reasons"]["not-sampled"] == sum(max(0, size - 30) for size in sizes.values()) > 0


def test_the_reduced_list_drops_in_for_the_manifest(hurt_collection: Path, reference: Path) -> None:
    reduced = pd.read_csv(reference / "reduced.csv", dtype=str)
    assert list(reduced.columns) == ["id", "landmark_id"]
    manifest = pd.read_csv(hurt_collection / "train.csv", dtype=str).drop_duplicates()
    kept = manifest.merge(reduced)
    assert kept.values.tolist() == reduced.values.tolist()  # the same rows in the manifest's order
    parquet = pq.read_table(reference / "reduced.parquet")
    expected = ["id", "landmark_id", "rank", "insertion_distance", "hash", "path", "bytes", "width", "height"]
    assert parquet.column_names == expected
    assert set(parquet.schema.metadata or {}) == set()


@pytest.mark.parametrize("size", SIZES)
def test_partition_sizes_and_threads(hurt_collection: Path, reference: Path, tmp_path: Path, size: int | None) -> None:
    threads = ClusterSpec(
        class_path="distributed.LocalCluster",
        kwargs={"n_workers": 1, "threads_per_worker": 4, "processes": False, "dashboard_address": None},
    )
    for name, spec in (("serial", None), ("threads", threads)):
        run_on(hurt_collection, tmp_path / name, spec, partition_images=size, **DRAWN)
        assert_equal(tmp_path / name, reference)


def test_worker_processes(hurt_collection: Path, reference: Path, tmp_path: Path) -> None:
    for size in SIZES:
        spec = ClusterSpec(workers=2, threads=2 if size == SIZES[0] else None)
        run_on(hurt_collection, tmp_path / str(size), spec, partition_images=size, **DRAWN)
        assert_equal(tmp_path / str(size), reference)


def test_a_running_scheduler(
    hurt_collection: Path, reference: Path, tmp_path: Path, standing_cluster: ClusterSpec
) -> None:
    for size in SIZES:
        # The scheduler stays: each run finds it as the one before has left it.
        run_on(hurt_collection, tmp_path / str(size), standing_cluster, partition_images=size, **DRAWN)
        assert_equal(tmp_path / str(size), reference)


def test_every_way_to_look_and_choose_on_every_executor(
    hurt_collection: Path, tmp_path: Path, standing_cluster: ClusterSpec
) -> None:
    """Each strategy with another hash; some photos are always kept, some to be avoided, some flat."""
    collection = tmp_path / "collection"
    collection.mkdir()
    (collection / "train").symlink_to(hurt_collection / "train")
    flat = collection / "flat.png"
    Image.new("L", (90, 60), 7).save(flat)
    lines = (hurt_collection / "train.csv").read_text().splitlines()
    label = lines[1].split(",")[1]
    found = [
        f"{line},{photo[0]}/{photo[1]}/{photo[2]}/{photo}.jpg" for line in lines[1:] if (photo := line.split(",")[0])
    ]
    (collection / "train.csv").write_text("\n".join([f"{lines[0]},file", f"flat,{label},{flat}", *found]) + "\n")
    kept = [line.split(",")[0] for line in lines[5:60:9]]
    (collection / "keep").write_text("\n".join(kept))
    threads = ClusterSpec(
        class_path="distributed.LocalCluster",
        kwargs={"n_workers": 1, "threads_per_worker": 3, "processes": False, "dashboard_address": None},
    )
    ways = {
        "farthest-first": {"hash": "dhash-vertical"},
        "facility-location": {"hash": "phash", "hash_size": 5, "decode": "exact"},
        "pairs": {"hash": "ahash", "exif_orientation": True},
        "random": {"hash": "whash", "hash_size": 4},
    }
    assert set(ways) == set(STRATEGY_NAMES)
    for strategy, way in ways.items():
        reference = run_on(collection, tmp_path / f"all-{strategy}", path_column="file", **way).images
        avoid = tmp_path / f"avoid-{strategy}.csv"
        reference[["id", "hash"]].dropna()[::15].to_csv(avoid, index=False)
        options = {
            "strategy": strategy,
            "path_column": "file",
            "always_keep": str(collection / "keep"),
            "avoid": str(avoid),
            "avoid_distance": 1,
            "drop_flat": True,
            **way,
            **DRAWN,
        }
        for name, spec, size in [("serial", None, None), ("address", standing_cluster, 7), ("threads", threads, 100)]:
            run = tmp_path / f"{strategy}-{name}"
            summary = run_on(collection, run, spec, partition_images=size, **options).summary
            assert_equal(run, tmp_path / f"{strategy}-serial")
            assert (
                summary["quality"]
                == json.loads((tmp_path / f"{strategy}-serial" / "summary.json").read_text())["quality"]
            )
        assert summary["reasons"]["flat"] == 1
        assert summary["reasons"]["avoided"] > 0
        assert set(kept) <= set(pd.read_csv(run / "reduced.csv", dtype=str)["id"])


def test_a_photo_that_changes_under_its_path_is_read_again(
    collection: Path, tmp_path: Path, standing_cluster: ClusterSpec
) -> None:
    """Dask remembers results by the names of tasks: a second run on the same scheduler must not get the first's."""
    photos = sorted((collection / "train").rglob("*.jpg"))
    folder = tmp_path / "photos" / "label"
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(photos[i].read_bytes())

    def hashes(name: str) -> list[str]:
        job = Job(str(tmp_path / "photos"), str(tmp_path / name), keep=2)
        return list(reduce_images(job, standing_cluster, progress=False).images["hash"])

    before = hashes("one")
    (folder / "0.jpg").write_bytes(photos[9].read_bytes())
    assert hashes("two") != before


def test_results_do_not_depend_on_the_manifest_s_order(collection: Path, tmp_path: Path) -> None:
    header, *lines = (collection / "train.csv").read_text().splitlines()
    (tmp_path / "train").symlink_to(collection / "train")
    (tmp_path / "train.csv").write_text("\n".join([header, *sorted(lines)]) + "\n")
    for strategy in STRATEGY_NAMES:
        one = run_on(collection, tmp_path / f"one-{strategy}", strategy=strategy, candidates=20).images
        other = run_on(tmp_path, tmp_path / f"other-{strategy}", strategy=strategy, candidates=20).images
        columns = [name for name in one.columns if name not in ("row", "path")]
        one, other = (frame.sort_values("id")[columns].reset_index(drop=True) for frame in (one, other))
        pd.testing.assert_frame_equal(one, other)


def test_every_smaller_keep_is_a_prefix_of_the_larger(collection: Path, tmp_path: Path) -> None:
    large = run_on(collection, tmp_path / "8", keep=8, rank_all=True).images
    small = run_on(collection, tmp_path / "3", keep=3, rank_all=True).images
    assert large["rank"].tolist() == small["rank"].tolist()
    assert set(large[large["rank"] < 3]["id"]) == set(small[small["kept"]]["id"])


def test_the_result_in_python(collection: Path, tmp_path: Path) -> None:
    result = run_on(collection, tmp_path / "run", format="csv")
    assert result.output == tmp_path / "run"
    assert not (tmp_path / "run" / "reduced.parquet").exists()
    assert result.reduced["id"].tolist() == pd.read_csv(tmp_path / "run" / "reduced.csv", dtype=str)["id"].tolist()
    assert len(result.images) == 240
    assert result.images["kept"].sum() == len(result.reduced) == result.summary["photos_kept"]
    assert "summary" not in repr(result)


def test_nothing_to_read_starts_no_cluster(collection: Path, tmp_path: Path) -> None:
    spec = ClusterSpec(class_path="no.such.Cluster")
    result = run_on(collection, tmp_path / "run", spec, keep=1000, check=False)
    assert result.summary["photos_read"] == 0
    assert len(result.reduced) == 240
    assert set(result.images["reason"]) == {"kept-small-label"}


def test_too_many_failures_write_everything_and_say_so(collection: Path, tmp_path: Path) -> None:
    header, *lines = (collection / "train.csv").read_text().splitlines()
    (tmp_path / "train").symlink_to(collection / "train")
    lines = [line if i % 3 else f"0{line[1:]}x" for i, line in enumerate(lines)]
    (tmp_path / "train.csv").write_text("\n".join([header, *lines]) + "\n")
    with pytest.raises(
        TooManyFailuresError, match=r"over --max-failures 0\.1\. Everything is written to .*: missing: no"
    ):
        run_on(tmp_path, tmp_path / "run", rank_all=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "done"
    assert (tmp_path / "run" / "reduced.csv").exists()
    assert summary["labels_without_photos"]
    reduced = pd.read_csv(tmp_path / "run" / "reduced.csv", dtype=str)
    labels = {line.split(",")[1] for line in lines}
    assert set(reduced["landmark_id"]) == labels - set(summary["labels_without_photos"])
    run_on(tmp_path, tmp_path / "run2", rank_all=True, max_failures=0.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wrong_path_ends_the_run_early(
    collection: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    with pytest.raises(
        TooManyFailuresError, match=r"the first \d+ photos have all failed.*first path tried: .*wrong.*jpeg"
    ):
        spec = ClusterSpec(workers=workers)
        run_on(collection, tmp_path / "run", spec, path_template="wrong/{id}.jpeg", partition_images=20, rank_all=True)
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert 200 <= summary["photos_read"] <= (240 if workers else 239)
    assert not (tmp_path / "run" / "reduced.csv").exists()


def test_a_window_never_holds_more_than_it_may(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[int] = []
    outstanding: list[int] = [0]
    real, real_write = reducer.run.dask.dispatch.as_bag, LedgerParts.write

    def watched(name: str, window: list[WorkItem], *shared: object):
        windows.append(len(window))
        outstanding.append(outstanding[-1] + len(window))
        return real(name, window, *shared)

    def written(files: LedgerParts, index: int, *rest: object) -> None:
        outstanding.append(outstanding[-1] - 1)
        real_write(files, index, *rest)

    monkeypatch.setattr(reducer.run.dask.dispatch, "as_bag", watched)
    monkeypatch.setattr(LedgerParts, "write", written)
    spec = ClusterSpec(
        class_path="distributed.LocalCluster",
        kwargs={"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None},
    )
    header, *lines = (collection / "train.csv").read_text().splitlines()
    many = [f"{line.split(',')[0]},{i // 3}" for i, line in enumerate(lines)]
    (tmp_path / "train").symlink_to(collection / "train")
    (tmp_path / "train.csv").write_text("\n".join([header, *many]) + "\n")
    run_on(tmp_path, tmp_path / "run", spec, keep=1, partition_images=3)
    assert sum(windows) == 80
    assert windows[0] == WINDOW
    assert len(windows) > 5
    assert max(outstanding) == WINDOW


def test_a_script_without_a_main_guard_gets_an_error(collection: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    paths = {"images": collection / "train", "output": tmp_path / "run", "manifest": collection / "train.csv"}
    script.write_text(
        "from reducer import ClusterSpec, Job, reduce_images\n"
        f"job = Job(**{ {name: str(path) for name, path in paths.items()} }, keep=8)\n"
        "reduce_images(job, ClusterSpec(workers=2))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "if __name__ == '__main__':" in done.stderr.splitlines()[-1]
    guarded = tmp_path / "guarded.py"
    source = script.read_text().replace("reduce_images(job,", "if __name__ == '__main__':\n    reduce_images(job,")
    guarded.write_text(source)
    subprocess.run([sys.executable, guarded], timeout=60, stderr=subprocess.DEVNULL, check=True)


def test_clusters_that_are_not_there(collection: Path, tmp_path: Path) -> None:
    for spec, message in [
        (ClusterSpec(address="tcp://127.0.0.1:1", timeout=2), r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"),
        (ClusterSpec(address="nonsense://x", timeout=2), r"no Dask scheduler answers at nonsense"),
        (ClusterSpec(class_path="no_such_module.Cluster"), r"cannot be imported: ModuleNotFoundError"),
        (ClusterSpec(class_path="distributed.NoCluster"), r"cannot be imported: AttributeError"),
        (ClusterSpec(class_path="distributed.LocalCluster", kwargs={"wrong": 1}), r"does not start: TypeError"),
    ]:
        with pytest.raises(InputError, match=message):
            reduce_images(job_on(collection, tmp_path / "run"), spec, progress=False)
        assert not (tmp_path / "run").exists()


def test_a_scheduler_without_workers(collection: Path, tmp_path: Path, dask_cluster: Callable[..., str]) -> None:
    spec = ClusterSpec(address=dask_cluster(0), rules=WorkerRules(wait=3))
    with pytest.raises(ClusterError, match=r"no worker has joined in 3 s \(workers: wait\).*dask worker tcp://"):
        run_on(collection, tmp_path / "run", spec)
    assert not (tmp_path / "run").exists()


def test_malformed_files_on_real_workers(trial_files: Path, tmp_path: Path) -> None:
    files = sorted(path for path in (trial_files / "malformed").rglob("*") if path.is_file())
    lines = [f"{i},{path.parent.name},{path}" for i, path in enumerate(files)]
    (tmp_path / "all.csv").write_text("id,landmark_id,file\n" + "\n".join(lines) + "\n")
    job = Job(
        str(trial_files),
        str(tmp_path / "run"),
        manifest=str(tmp_path / "all.csv"),
        path_column="file",
        keep=5,
        max_failures=0.5,
    )
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):  # a death shows at once
        result = reduce_images(job, ClusterSpec(workers=2), progress=False)
    ledger = result.images
    assert ledger["id"].tolist() == [str(i) for i in range(len(files))]
    failed = ledger[ledger["reason"] == "failed"]
    assert 50 < len(failed) < 200
    assert failed["error"].notna().all()
    assert not failed["error"].str.startswith("killed").any()
    assert not failed["kept"].any()
    assert result.summary["photos_read"] == len(files)
    assert (tmp_path / "run" / "report.html").exists()


def test_near_copies_among_real_photos(trial_files: Path, tmp_path: Path) -> None:
    smallest, nearest = {}, {}
    spread_out = 0
    for strategy in STRATEGY_NAMES:
        job = Job(str(trial_files / "photos"), str(tmp_path / strategy), strategy=strategy, report=False)
        result = reduce_images(job, ClusterSpec(workers=0), progress=False)
        images = result.images
        near = 0
        for _, label in images[images["reason"] == "kept"].groupby("label"):
            hashes = [int(text, 16) for text in label["hash"]]
            copies = sum((a ^ b).bit_count() <= 6 for i, a in enumerate(hashes) for b in hashes[:i])
            if strategy == "farthest-first" and label["insertion_distance"].min() > 6:
                assert copies == 0
                spread_out += 1
            near += copies
        quality = result.summary["quality"]
        assert quality["selection"]["near_copy_pairs"] == near
        assert quality["selection"]["labels"] == 18
        smallest[strategy] = quality["selection"]["mean_smallest_pair_distance"]
        nearest[strategy] = quality["selection"]["mean_nearest_kept_distance"]
    assert spread_out >= 10
    assert smallest["farthest-first"] > 1.5 * smallest["random"] > 1.5 * smallest["pairs"]
    assert nearest["facility-location"] < nearest["farthest-first"] < nearest["random"] < nearest["pairs"]
