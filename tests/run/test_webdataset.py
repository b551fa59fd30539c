"""WebDataset's shards, which tell their labels themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from jobs import SERIAL, reduced_files
from killing import killed_before
from shardjobs import assert_same_rows, content_at, hashed, lines_of, rows_of, run_of, samples_of, summary_of
from tarfiles import shards_read, spoil, write_tars

from reducer import ClusterSpec, resume
from reducer.run.folder import RunFolder


@pytest.mark.parametrize(("form", "shards", "workers"), [("cls", 6, 0), ("json", 1, 0), ("cls", 13, 2)])
def test_samples_tell_their_labels_however_packed(
    photos: dict[str, bytes],
    labels: dict[str, str],
    single: Path,
    tmp_path: Path,
    form: str,
    shards: int,
    workers: int,
) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, form, shards, shards))
    field = {"label_field": "place"} if form == "json" else {}
    run_of(tars, tmp_path / "run", None, ClusterSpec(workers=workers), **field)
    # In the order of the keys, not of a manifest.
    assert lines_of(tmp_path / "run") == lines_of(single)
    rows, files = rows_of(tmp_path / "run"), rows_of(single)
    assert list(rows.index) == sorted(photos)
    read = files.index[files["hash"].notna()]
    assert rows.loc[read, "rank"].equals(files.loc[read, "rank"])
    assert summary_of(tmp_path / "run")["labels"] == 12
    assert summary_of(tmp_path / "run")["shards"]["skipped"] == {}


def test_samples_of_every_kind(some: list[bytes], tmp_path: Path) -> None:
    shards = {
        "0.tar": [
            ("a/b.jpg", some[0]),
            ("a/b.cls", b"cat"),
            ("c/b.cls", b" cat\n"),
            ("c/b.JPG", some[1]),
            ("two.left.jpg", some[2]),
            ("two.right.jpg", some[3]),
            ("two.cls", b"dog"),
            ("twice.jpg", some[4]),
            ("twice.png", some[5]),
            ("twice.cls", b"dog"),
            ("lonely.jpg", some[6]),
            ("lonely.txt", b"no label"),
            ("blank.jpg", some[7]),
            ("blank.cls", b"  \n"),
            ("odd.jpg", some[8]),
            ("odd.cls", b"\xff\xfe\xfa"),
            ("README.md", b"hello"),
        ],
        "1.tar": [
            ("v.1/x.y.jpg", some[9]),
            ("v.1/x.cls", b"dog"),
            ("bom.jpg", some[10]),
            ("bom.cls", b"\xef\xbb\xbfdog"),
        ],
    }
    tars = write_tars(tmp_path / "tars", shards)
    result = run_of(tars, tmp_path / "run", None, keep=1, max_failures=0.0)
    rows = rows_of(tmp_path / "run")
    found = {"a/b": "cat", "bom": "dog", "c/b": "cat", "twice": "dog", "two": "dog", "v.1/x": "dog"}
    del found["two"], found["v.1/x"]  # .left.jpg, .y.jpg are extensions of their own, as WebDataset has it
    assert rows["label"].to_dict() == found
    assert content_at(rows.loc["twice"]) == some[4]
    skipped = result.summary["shards"]["skipped"]
    dotted = "photo with a dot in its name (the key of a sample ends at the first one)"
    assert skipped == {"further photo of a sample": 1, "photo without a .cls beside it": 3, dotted: 3}
    code, out, _ = invoke("resume", tmp_path / "run")
    assert code == 0
    assert "Skipped in the shards: 3 x photo without a .cls beside it" in out
    assert "Skipped in the shards: 1 x further photo of a sample" in out


def test_labels_in_json(some: list[bytes], tmp_path: Path) -> None:
    texts = [
        b'{"l": "cat"}',
        b'{"l": 7}',
        b'{"m": 1}',
        b"[1]",
        b"not json",
        b'{"l": null}',
        b'{"l": true}',
        b"[" * 99_999,
    ]
    members: list[tuple[str, Any]] = []
    for number, text in enumerate(texts):
        members += [(f"{number}.jpg", some[number]), (f"{number}.json", text)]
    tars = write_tars(tmp_path / "tars", {"0.tar": members})
    result = run_of(tars, tmp_path / "run", None, keep=1, label_field="l")
    assert rows_of(tmp_path / "run")["label"].to_dict() == {"0": "cat", "1": "7"}
    assert result.summary["shards"]["skipped"] == {
        "photo without a .json beside it whose field 'l' is text or a whole number (or give a --manifest)": 6
    }


def test_one_key_in_two_shards(some: list[bytes], tmp_path: Path) -> None:
    shards = {
        "0.tar": [("k.jpg", some[0]), ("k.cls", b"one"), ("o.jpg", some[1]), ("o.cls", b"one")],
        "1.tar": [("k.jpg", some[2]), ("k.cls", b"one"), ("o.jpg", some[3]), ("o.cls", b"two"), ("p.jpg", some[4])],
        "2.tar": [("q.jpg", some[5]), ("q.cls", b"one"), ("r.jpg", some[6]), ("r.cls", b"two")],
    }
    run_of(write_tars(tmp_path / "tars", shards), tmp_path / "run", None, keep=1)
    rows = RunFolder(str(tmp_path / "run")).parts.ledger().to_pandas()
    found = {(row["id"], row["label"]): content_at(row) for _, row in rows.iterrows()}
    assert found == {
        ("k", "one"): some[2],  # the later one's, as with a manifest
        ("o", "one"): some[1],
        ("o", "two"): some[3],
        ("q", "one"): some[5],
        ("r", "two"): some[6],
    }
    assert summary_of(tmp_path / "run")["manifest"]["duplicate_rows"] == 1


def test_shards_without_any_label_are_refused(tars: Path, tmp_path: Path) -> None:
    for given in ([], ["--label-field", "label"]):
        code, _, err = invoke("run", tars, "--output", tmp_path / "run", "--overwrite", "--workers", 0, *given)
        assert code == 2
        assert "the shards hold no photo with a label: expected WebDataset samples" in err


@pytest.mark.parametrize(("name", "time"), [("hashes/part-00002.parquet", 1), ("plan.parquet", 2)])
def test_samples_are_gone_on_with_before_all_labels_are_known(
    photos: dict[str, bytes], labels: dict[str, str], tmp_path: Path, name: str, time: int
) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, "cls", 4))
    run_of(tars, tmp_path / "whole", None)
    run = tmp_path / "run"
    assert killed_before(name, time, "run", tars, "--output", run, "--keep", 8, "--workers", 0, "--quiet")
    code, out, _ = invoke("status", run)
    assert code == 0
    done = len(hashed(run))
    assert f"{done} of 4 shards read" in out
    assert done == (2 if name.startswith("hashes") else 4)
    for shard in sorted(tars.iterdir())[:done]:
        spoil(shard)
    assert invoke("resume", run, "--workers", 0, "--quiet") == (0, "", "")
    assert reduced_files(run) == reduced_files(tmp_path / "whole")
    assert_same_rows(run, tmp_path / "whole")


def test_hashes_of_samples_are_taken_again(photos: dict[str, bytes], labels: dict[str, str], tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, "cls", 4))
    run_of(tars, tmp_path / "first", None)
    run_of(tars, tmp_path / "fresh", None, keep=4, strategy="pairs")
    with shards_read() as read:
        run_of(tars, tmp_path / "again", None, keep=4, strategy="pairs", reuse=str(tmp_path / "first"))
    assert read == []
    assert reduced_files(tmp_path / "again") == reduced_files(tmp_path / "fresh")
    changed = {key: photos[key] for key in sorted(photos)[::3]}
    write_tars(
        tars, {"images_002.tar": samples_of(changed, labels | {min(changed): "new"}, "cls", 1)["images_000.tar"]}
    )
    run_of(tars, tmp_path / "fresh2", None)
    with shards_read() as read:
        run_of(tars, tmp_path / "again2", None, reuse=str(tmp_path / "first"))
    assert read == ["images_002.tar"]
    assert reduced_files(tmp_path / "again2") == reduced_files(tmp_path / "fresh2")


def test_photos_of_a_shard_that_is_mended_are_there(
    photos: dict[str, bytes], labels: dict[str, str], tmp_path: Path
) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, "cls", 3))
    path = tars / "images_001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    run_of(tars, tmp_path / "run", None)
    assert summary_of(tmp_path / "run")["photos"] < 240
    path.write_bytes(content)
    resume(tmp_path / "run", SERIAL, retry_failed=True, progress=False)
    run_of(tars, tmp_path / "whole", None)
    assert_same_rows(tmp_path / "run", tmp_path / "whole")
    assert summary_of(tmp_path / "run")["photos"] == 240


@pytest.mark.parametrize("how", ["some labels", "a broken photo", "a damaged shard"])
def test_no_photo_is_lost_where_an_earlier_run_did_not_have_it(
    photos: dict[str, bytes], labels: dict[str, str], tmp_path: Path, how: str
) -> None:
    samples = samples_of(photos, labels, "cls", 3)
    if how == "a broken photo":
        samples["images_002.tar"][0] = (samples["images_002.tar"][0][0], b"broken")
    tars = write_tars(tmp_path / "tars", samples)
    whole = (tars / "images_000.tar").read_bytes()
    if how == "a damaged shard":
        (tars / "images_000.tar").write_bytes(whole[: len(whole) // 2])
    given = {"labels": (max(labels.values()),)} if how == "some labels" else {}
    run_of(tars, tmp_path / "first", None, **given)
    (tars / "images_000.tar").write_bytes(whole)
    run_of(tars, tmp_path / "again", None, reuse=str(tmp_path / "first"))
    run_of(tars, tmp_path / "fresh", None)
    assert len(rows_of(tmp_path / "again")) == 240
    assert reduced_files(tmp_path / "again") == reduced_files(tmp_path / "fresh")


def test_options_that_do_not_fit_the_samples_cost_no_second_reading(
    photos: dict[str, bytes], labels: dict[str, str], tmp_path: Path
) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, "cls", 2))
    arguments = ["run", tars, "--workers", 0, "--quiet", "--output"]
    code, _, err = invoke(*arguments, tmp_path / "run", "--labels", "nowhere")
    assert code == 2
    assert "--labels: no photo has the label 'nowhere'" in err
    assert f"run again with other options, another --output and --reuse {tmp_path / 'run'}" in err
    with shards_read() as read:
        assert invoke(*arguments, tmp_path / "again", "--reuse", tmp_path / "run")[0] == 0
    assert read == []
    assert summary_of(tmp_path / "again")["photos"] == 240


def test_samples_when_the_client_is_killed_at_every_file_that_it_writes(
    photos: dict[str, bytes], labels: dict[str, str], tmp_path: Path
) -> None:
    tars = write_tars(tmp_path / "tars", samples_of(photos, labels, "cls", 2))
    whole = run_of(tars, tmp_path / "whole", None)
    written = ["shards.parquet", "plan.parquet", "part-00000.parquet", "reduced.csv", "summary.json"]
    for name, time in [*((name, 1) for name in written[:-1]), ("plan.parquet", 2), ("summary.json", 2)]:
        run = tmp_path / f"{name}-{time}"
        assert killed_before(name, time, "run", tars, "--output", run, "--keep", 8, "--workers", 0, "--quiet")
        assert invoke("resume", run, "--workers", 0)[0] == 0
        assert_same_rows(run, tmp_path / "whole")
        for figure in ("photos", "labels", "photos_to_read", "shards", "reasons", "manifest"):
            assert summary_of(run)[figure] == whole.summary[figure], (name, figure)
