"""New reduced lists from a ledger: the same as those of a fresh run, to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import invoke
from jobs import reduced_files, run_on

from reducer import ClusterSpec, InputError, cut, resume
from reducer.config.settings import STRATEGY_NAMES
from reducer.run.folder import RunFolder
from reducer.run.folder.parts import LedgerParts

KEEP = 8
SERIAL = ClusterSpec(workers=0)


@pytest.fixture(scope="module")
def ranked(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that ranks all labels, for each strategy."""
    folder = tmp_path_factory.mktemp("ranked")
    for strategy in STRATEGY_NAMES:
        run_on(collection, folder / strategy, keep=KEEP, strategy=strategy, rank_all=True, candidates=30)
    return {strategy: folder / strategy for strategy in STRATEGY_NAMES}


@pytest.fixture
def unread(collection: Path, tmp_path: Path) -> Path:
    """A run that leaves small labels unread."""
    run_on(collection, tmp_path / "unread", keep=KEEP)
    return tmp_path / "unread"


def cut_files(run: Path, folder: Path, **rules: Any) -> dict[str, bytes]:
    for kind in ("csv", "parquet"):
        cut(run, folder / f"cut.{kind}", **rules)
    return {f"reduced.{kind}": (folder / f"cut.{kind}").read_bytes() for kind in ("csv", "parquet")}


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_a_cut_is_a_fresh_run_with_that_keep(
    collection: Path, ranked: dict[str, Path], tmp_path: Path, strategy: str
) -> None:
    for keep in range(1, KEEP + 1):
        run_on(collection, tmp_path / str(keep), keep=keep, strategy=strategy, rank_all=True, candidates=30)
        assert cut_files(ranked[strategy], tmp_path, keep=keep) == reduced_files(tmp_path / str(keep))


@pytest.mark.parametrize("strategy", ["farthest-first", "random"])
@pytest.mark.parametrize(
    "rules",
    [
        {"min_distance": 20},
        {"min_distance": 20, "keep": 3},
        {"total": 60},
        {"total": 60, "keep": 4, "min_per_label": 3},
        {"max_bytes": "9MB"},
        {"max_bytes": 9_000_000, "min_distance": 24, "min_per_label": 2},
    ],
)
def test_a_run_with_the_rules_does_both_at_once(
    collection: Path, ranked: dict[str, Path], tmp_path: Path, strategy: str, rules: dict[str, Any]
) -> None:
    before = reduced_files(ranked[strategy])
    # --keep 25 is the default of a run, but for one with a budget.
    asked = rules if "keep" in rules or set(rules) & {"total", "max_bytes"} else rules | {"keep": 25}
    result = run_on(
        collection, tmp_path / "run", strategy=strategy, candidates=30, partition_images=50, **{"keep": None, **rules}
    )
    found = cut(ranked[strategy], **asked)
    assert cut_files(ranked[strategy], tmp_path, **asked) == reduced_files(tmp_path / "run")
    assert result.summary["reasons"] == found.reasons
    assert result.summary["photos_kept"] == found.photos == len(result.reduced)
    assert result.summary["job"]["rank_all"]
    assert reduced_files(ranked[strategy]) == before
    images = result.images.set_index("id")
    for photo, row in images[images["rank"].notna()].iterrows():
        kept = images[images["kept"] & (images["label"] == row["label"])]
        apart = [(int(row["hash"], 16) ^ int(other, 16)).bit_count() for other in kept["hash"]]
        assert row["nearest_kept_distance"] == min(apart)
        assert row["kept"] == (row["nearest_kept"] == photo)
    assert (images["reason"] == "kept").equals(images["kept"])


def test_rules_that_leave_all_as_it_is_change_nothing(
    collection: Path, ranked: dict[str, Path], tmp_path: Path
) -> None:
    """What is told anew of the chosen photos is what workers tell of them."""
    for strategy, run in ranked.items():
        result = run_on(collection, tmp_path / strategy, keep=KEEP, strategy=strategy, min_distance=0, candidates=30)
        assert reduced_files(tmp_path / strategy) == reduced_files(run)
        assert RunFolder(str(tmp_path / strategy)).parts.ledger().equals(RunFolder(str(run)).parts.ledger())
        assert result.summary["quality"] == json.loads((run / "summary.json").read_text())["quality"]


def test_photos_that_are_always_kept_stay_in_every_budget(collection: Path, tmp_path: Path) -> None:
    lines = (collection / "train.csv").read_text().splitlines()[1:]
    label = lines[0].split(",")[1]
    ids = [line.split(",")[0] for line in lines if line.endswith(f",{label}")][:4]
    (tmp_path / "ids").write_text("\n".join(ids))
    options = {"always_keep": str(tmp_path / "ids"), "keep": None}
    run_on(collection, tmp_path / "all", rank_all=True, **options | {"keep": 8})
    # One of each of 12 labels, and three more that are always kept.
    for total in (15, 20):
        run_on(collection, tmp_path / str(total), total=total, **options)
        assert cut_files(tmp_path / "all", tmp_path, total=total) == reduced_files(tmp_path / str(total))
        assert set(ids) <= set(pd.read_csv(tmp_path / str(total) / "reduced.csv", dtype=str)["id"])
    with pytest.raises(InputError, match=r"--min-per-label.* and --always-keep: give at least --total 15$"):
        run_on(collection, tmp_path / "none", total=14, **options)
    assert not (tmp_path / "none").exists()  # told before any photo is read
    with pytest.raises(InputError, match=r"and 4 photos that are always kept: give at least --total 15$"):
        cut(tmp_path / "all", total=14)
    assert set(cut(tmp_path / "all", min_distance=64).reduced["id"]) > set(ids)
    # --keep is the one thing that limits them.
    assert len(set(cut(tmp_path / "all", keep=2).reduced["id"]) & set(ids)) == 2


def test_labels_that_were_not_read(unread: Path, tmp_path: Path) -> None:
    sizes = RunFolder(str(unread)).parts.ledger(["label", "reason"]).to_pandas().query("reason == 'kept-small-label'")
    small = sizes["label"].value_counts()
    largest = int(small.max())
    # Without a need for their ranks they stay whole.
    assert len(cut(unread).reduced) == 240
    found = cut(unread, keep=largest).reduced
    assert found[found["rank"].isna()].groupby("landmark_id").size().to_dict() == small.to_dict()
    code, out, err = invoke("cut", unread, "--output", tmp_path / "x.csv", "--keep", largest - 1)
    needed = small[small > largest - 1]
    assert (code, out) == (2, "")
    assert f"{len(needed)} labels ({needed.sum()} photos) were kept whole and not read" in err
    assert f"First: reducer resume {unread} --rank-all (it ranks the {small.sum()} photos of labels" in err
    assert not (tmp_path / "x.csv").exists()
    for rules in (["--min-distance", 3], ["--total", 100], ["--max-bytes", "20GB"]):
        assert invoke("cut", unread, "--output", tmp_path / "x.csv", *rules)[0] == 2
    resumed = resume(unread, SERIAL, rank_all=True, progress=False)
    assert resumed.summary["photos_read_this_time"] == small.sum()
    assert invoke("cut", unread, "--output", tmp_path / "x.csv", "--keep", largest - 1, "--quiet") == (0, "", "")


def test_a_cut_tells_what_it_reached(ranked: dict[str, Path], tmp_path: Path) -> None:
    run = ranked["farthest-first"]
    code, out, _ = invoke("cut", run, "--output", tmp_path / "x.parquet", "--max-bytes", "9MB", "--min-distance", 10)
    assert code == 0
    table = pd.read_parquet(tmp_path / "x.parquet")
    assert f"Kept {len(table)} photos of 12 labels, {table['bytes'].sum() / 1e6:.1f} MB\n" in out
    share = table["bytes"].sum() / 9e6
    assert f"Of the budget of 9.0 MB, {int(share * 100)} % is used; it went down to an effective distance of" in out
    assert f"The smallest insertion distance kept is {table['insertion_distance'].min():g} bits\n" in out
    assert "min-distance" in out
    assert " budget" in out
    assert table["bytes"].sum() <= 9_000_000


def test_a_budget_that_is_too_small(ranked: dict[str, Path], tmp_path: Path) -> None:
    code, _, err = invoke("cut", ranked["pairs"], "--output", tmp_path / "x.csv", "--total", 20, "--min-per-label", 2)
    assert code == 2
    assert "--total 20 is under what is guaranteed, 2 of each of 12 labels (--min-per-label): give at least" in err
    enough = int(err.split()[-1])
    assert (
        invoke(*f"cut {ranked['pairs']} --output {tmp_path}/x.csv --total {enough} --min-per-label 2".split())[0] == 0
    )
    assert (tmp_path / "x.csv").read_text().count("\n") == 1 + enough


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x.txt", "must end in .csv or .parquet"),
        ("nowhere/x.csv", "there is no folder"),
        ("folder.csv", "it is a folder"),
        ("run/reduced.csv", "is a file of the run in"),
        ("run/images/part-00000.parquet", "is a file of the run in"),
        ("run/../run/plan.parquet", "is a file of the run in"),
        ("run/vectors/part-00000.parquet", "is a file of the run in"),
        ("other/images/part-00000.parquet", "is a file of the run in"),
        ("other/reduced.csv", "is a file of the run in"),
        ("MANIFEST", "an input: give another name"),
    ],
)
def test_a_cut_never_hurts_what_is_there(
    collection: Path, ranked: dict[str, Path], tmp_path: Path, output: str, message: str
) -> None:
    for name in ("run", "other"):
        shutil.copytree(ranked["random"], tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    target = collection / "train.csv" if output == "MANIFEST" else tmp_path / output
    code, _, err = invoke("cut", tmp_path / "run", "--output", target)
    assert code == 2
    assert message in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # A name of one's own in a run folder is fine, and may be written again.
    for folder in ("run", "run", "other"):
        assert invoke("cut", tmp_path / "run", "--output", tmp_path / folder / "mine.csv", "--keep", 2)[0] == 0


def test_what_is_no_run_or_not_finished(ranked: dict[str, Path], tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "nowhere"):
        code, _, err = invoke("cut", run, "--output", tmp_path / "x.csv")
        assert (code, "is no run folder" in err) == (2, True)
    shutil.copytree(ranked["random"], tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"status": "stopped"}))
    code, _, err = invoke("cut", tmp_path / "run", "--output", tmp_path / "x.csv")
    assert code == 2
    assert f"First: reducer resume {tmp_path / 'run'}\n" in err


def test_filters_that_were_cut_off_are_applied_again(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"total": 60, "keep": None, "partition_images": 30}
    run_on(collection, tmp_path / "whole", **options)
    real = LedgerParts.replace
    calls: list[str] = []

    def stops(files: LedgerParts, name: str, *rest: Any) -> None:
        calls.append(name)
        if calls.count(name) == 2 and len(calls) > 10:  # in the second round, after some
            raise KeyboardInterrupt
        real(files, name, *rest)

    monkeypatch.setattr(LedgerParts, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        run_on(collection, tmp_path / "run", **options)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "reduced.csv").exists()
    result = resume(tmp_path / "run", SERIAL, progress=False)
    assert result.summary["photos_read_this_time"] == 0
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "whole")
    assert result.images.equals(RunFolder(str(tmp_path / "whole")).parts.ledger().to_pandas())


@pytest.mark.parametrize("distance", [64.5, 1000])
def test_a_distance_outside_the_scale_is_refused(ranked: dict[str, Path], tmp_path: Path, distance: float) -> None:
    code, _, err = invoke("cut", ranked["random"], "--output", tmp_path / "x.csv", "--min-distance", distance)
    assert code == 2
    assert f"--min-distance is {distance:g}, and the distances of this run are bits of a hash, from 0 to 64" in err
    assert not (tmp_path / "x.csv").exists()
