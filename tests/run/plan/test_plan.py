from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from distributed.protocol.pickle import dumps

from reducer import InputError, Job
from reducer.config.job import path_rule
from reducer.config.resolved import resolve
from reducer.draw import CANDIDATES, draw_order
from reducer.formatting import parse_labels
from reducer.run.dask.dispatch import as_bag
from reducer.run.dask.messages import RunContext, WorkItem
from reducer.run.plan.plan import as_unread, make_plan
from reducer.run.tasks.photo_results import photo_paths
from reducer.run.tasks.tasks import PartitionTasks
from reducer.storage.paths import with_paths
from reducer.storage.schemas import LEDGER_SCHEMA, TASK_SCHEMA, from_ipc


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A manifest of labels a to f with 1 to 32 photos; no photo needs to exist."""
    (tmp_path / "train").mkdir()
    lines = [f"{label}{i:02},{label}" for k, label in enumerate("abcdef") for i in range(2**k)]
    (tmp_path / "train.csv").write_text("id,landmark_id\n" + "\n".join(lines) + "\n")
    return tmp_path


def plan_of(folder: Path, **options: object):
    settings: dict[str, object] = {"keep": 4, "path_template": "{id}", "manifest": str(folder / "train.csv"), **options}
    return make_plan(resolve(Job(str(folder / "train"), str(folder / "run"), **settings)))


def test_small_labels_are_kept_whole_and_unread(listed: Path) -> None:
    plan = plan_of(listed)
    assert Counter(plan.read["label"].to_pylist()) == {"d": 8, "e": 16, "f": 32}
    ledger = as_unread(plan.unread)
    unread = ledger.to_pylist()
    assert Counter(row["label"] for row in unread) == {"a": 1, "b": 2, "c": 4}
    assert ledger.schema == LEDGER_SCHEMA
    for row in unread:
        assert (row["kept"], row["reason"]) == (True, "kept-small-label")
        assert row["nearest_kept"] == row["id"]
        assert row["rank"] is row["hash"] is row["insertion_distance"] is row["nearest_kept_distance"] is None
    assert Counter(plan_of(listed, rank_all=True).read["label"].to_pylist())["a"] == 1


def test_candidates_are_the_smallest_keys_and_a_larger_draw_holds_the_smaller(listed: Path) -> None:
    drawn = {}
    for count in (4, 10, 20):
        plan = plan_of(listed, candidates=count)
        drawn[count] = set(plan.read["id"].to_pylist())
        left_out = [row for row in as_unread(plan.unread).to_pylist() if row["reason"] == "not-sampled"]
        assert all(row["kept"] is False and row["nearest_kept"] is None for row in left_out)
        assert Counter(row["label"] for row in left_out)["f"] == 32 - count
    assert drawn[4] < drawn[10] < drawn[20]
    ids = [f"f{i:02}" for i in range(32)]
    expected = {ids[i] for i in draw_order(CANDIDATES, 0, "f", ids)[:10]}
    assert {photo for photo in drawn[10] if photo.startswith("f")} == expected
    assert set(plan_of(listed, candidates=10, seed=1).read["id"].to_pylist()) != drawn[10]
    assert plan_of(listed, candidates=None).read.num_rows == 56


def test_photos_that_are_always_kept_are_candidates(listed: Path) -> None:
    drawn = set(plan_of(listed, candidates=10).read["id"].to_pylist())
    left_out = sorted({f"f{i:02}" for i in range(32)} - drawn)[:3]
    (listed / "ids").write_text("\n".join([*left_out, "a00"]) + "\n")
    plan = plan_of(listed, candidates=10, always_keep=str(listed / "ids"))
    rows = [row for row in plan.read.to_pylist() if row["label"] == "f"]
    assert len(rows) == 10
    assert [row["id"] for row in rows if row["always_keep"]] == left_out
    assert {row["id"] for row in rows} - set(left_out) < drawn
    assert plan.read.schema == TASK_SCHEMA
    # Of a label that is not chosen: nothing to do, and no mistake.
    assert plan_of(listed, always_keep=str(listed / "ids"), labels=("d",)).read.num_rows == 8
    with pytest.raises(InputError, match=r"3 ids are of the label 'f', over --keep 2: raise --keep"):
        plan_of(listed, keep=2, always_keep=str(listed / "ids"))


@pytest.mark.parametrize("options", [{"drop_flat": True}, {"avoid": "some"}, {"rank_all": True}])
def test_all_labels_are_read_where_some_photos_may_have_to_go(listed: Path, options: dict[str, object]) -> None:
    assert plan_of(listed, **options).read.num_rows == 63


def test_tasks_hold_whole_labels_once_and_no_path_in_their_names(listed: Path) -> None:
    for threads, size in [(1, None), (2, 8), (64, 1)]:
        plan = plan_of(listed, partition_images=size, rank_all=True)
        partition_tasks = PartitionTasks(plan.job, plan.numbered(threads).partitions())
        assert list(partition_tasks.rows) == list(range(len(partition_tasks.rows)))
        tables = list(partition_tasks.rows.values())
        tasks = [partition_tasks.task(index) for index in partition_tasks.rows]
        assert [task.photos for task in tasks] == [table.num_rows for table in tables]
        for task, table in zip(tasks, tables, strict=True):
            sent = from_ipc(task.rows)
            assert sent.column_names == ["id", "label"]
            assert sent.equals(table.select(["id", "label"]))
            assert photo_paths(task, sent).equals(with_paths(path_rule(plan.job), table)["path"])
        assert sorted(row for table in tables for row in table["row"].to_pylist()) == list(range(63))
        homes = [label for table in tables for label in set(table["label"].to_pylist())]
        assert sorted(homes) == list("abcdef")
        for table in tables:
            keys = list(zip(table["label"].to_pylist(), table["id"].to_pylist(), strict=True))
            assert keys == sorted(keys)
        assert "/" not in repr(tasks[0])


def test_trial_labels(listed: Path) -> None:
    plan = plan_of(listed, labels=("f", "a", "f"))
    assert plan.labels.names == ["a", "f"]
    assert plan.labels.sizes.tolist() == [1, 32]
    assert plan.read.num_rows + plan.unread.num_rows == 33
    few, more = (set(plan_of(listed, limit_labels=n).labels.names) for n in (2, 4))
    assert len(few) == 2
    assert few < more
    assert plan_of(listed, limit_labels=99).labels.names == list("abcdef")
    with pytest.raises(InputError, match=r"--labels: no photo has the label 'g'"):
        plan_of(listed, labels=("a", "g"))
    assert parse_labels('x,"with, comma", 7') == ("x", "with, comma", " 7")


def test_tasks_travel_small(tmp_path: Path) -> None:
    """Under 20 bytes a photo and 5 KB a partition, all that Dask adds included."""
    (tmp_path / "train").mkdir()
    ids = [hashlib.blake2b(str(i).encode(), digest_size=8).hexdigest() for i in range(10_000)]
    lines = [f"{photo},{i // 1000}" for i, photo in enumerate(ids)]
    (tmp_path / "train.csv").write_text("id,landmark_id\n" + "\n".join(lines) + "\n")
    for size in (1000, 10_000):
        plan = plan_of(tmp_path, path_template=None, partition_images=size)
        context = RunContext(
            "f" * 32,
            "f" * 16,
            "3.11",
            "f" * 16,
            with_paths(path_rule(plan.job), plan.read)["path"][0].as_py(),
            10.0,
            600.0,
        )
        partition_tasks = PartitionTasks(plan.job, plan.numbered(1).partitions())
        works = [WorkItem(partition_tasks.task(index), context) for index in partition_tasks.rows]
        assert len(works) == 10_000 // size
        assert len(dumps(as_bag("run_item", works).__dask_graph__())) < 20 * 10_000 + 5_000 * len(works)
