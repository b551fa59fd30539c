"""The kept photos themselves: every layout, whole or absent, skipped where they are there, and never beside TARGET."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset
from commands import invoke
from exports import collection_of, exported, files_below, photos_of
from jobs import run_on
from killerphotos import killer_env
from killing import killed_before
from machine import small_disk
from PIL import ExifTags, Image
from shardjobs import run_of
from tarfiles import write_tars
from waiting import wait_for

import reducer.outputs.export.export
from reducer import ClusterSpec, InputError, Job, ReducerError, cut, reduce_images
from reducer.formatting import format_bytes
from reducer.outputs.export.layout import IMAGE_FOLDER, into_shards, size_in_shard


def kept(run: Path) -> pd.DataFrame:
    frame = pd.read_parquet(run / "reduced.parquet")
    return frame.rename(columns={"landmark_id": "label"})


def image_folder(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """What torchvision's ``ImageFolder`` finds, by the rule that its documentation gives.

    ``find_classes``: the folders right in ``root``, sorted by name; a class's number is its place among them.
    ``make_dataset``: of each class all files below it, in sorted folders and sorted by name, whose extension is known;
    a class without any is an error.
    """
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    samples = []
    for number, name in enumerate(classes):
        own = [
            os.path.join(folder, file)
            for folder, _, files in sorted(os.walk(root / name, followlinks=True))
            for file in sorted(files)
            if file.lower().endswith(IMAGE_FOLDER)
        ]
        assert own, f"no valid file for class {name}"
        samples += [(path, number) for path in own]
    return classes, samples


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "run"
    run_on(tiny, folder, keep=15)  # some labels have fewer: their photos were not read
    return folder


@pytest.fixture(scope="module")
def ranked(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose photos all have ranks."""
    folder = tmp_path_factory.mktemp("ranked") / "run"
    run_on(tiny, folder, keep=15, rank_all=True)
    return folder


# Layouts


def test_as_the_manifest_has_them(tiny: Path, run: Path, tmp_path: Path) -> None:
    assert {"kept", "kept-small-label"} <= set(json.loads((run / "summary.json").read_text())["reasons"])
    code, out, err = invoke("export", run, tmp_path / "out")
    assert (code, err.count("Error")) == (0, 0)
    rows = kept(run)
    assert f"Exported {len(rows)} photos of 12 labels\n" in out
    own = ["export.json", "export.parquet", "train.csv"]
    below = {os.path.relpath(path, tiny / "train"): Path(path).read_bytes() for path in rows["path"]}
    found = files_below(tmp_path / "out")
    assert {name: content for name, content in found.items() if name not in own} == below
    assert sorted(found) == sorted([*below, *own])
    # The list drops in, and says the same as the run's.
    assert (tmp_path / "out" / "train.csv").read_bytes() == (run / "reduced.csv").read_bytes()
    job = Job(
        str(tmp_path / "out"), str(tmp_path / "again"), manifest=str(tmp_path / "out" / "train.csv"), report=False
    )
    again = reduce_images(job, ClusterSpec(workers=0), progress=False)
    assert again.summary["failures"] == {}
    table = pq.read_table(tmp_path / "out" / "export.parquet").to_pandas()
    assert list(table["id"]) == list(rows["id"])
    assert [len(below[path]) for path in table["path"]] == list(table["bytes"])
    assert table["error"].isna().all()


def test_a_folder_per_label_as_image_folder_reads_it(run: Path, tmp_path: Path) -> None:
    result = exported(run, tmp_path / "out", layout="by-label")
    rows = kept(run)
    classes, samples = image_folder(tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "labels.csv", dtype=str)
    assert list(table.columns) == ["label", "folder", "class"]
    assert list(table["folder"]) == classes
    assert list(table["class"].astype(int)) == list(range(12))
    assert set(table["label"]) == set(rows["label"])
    label_of = dict(zip(table["class"].astype(int), table["label"], strict=True))
    assert {(Path(path).stem, label_of[number]) for path, number in samples} == set(
        zip(rows["id"], rows["label"], strict=True)
    )
    assert sorted(Path(path).read_bytes() for path, _ in samples) == sorted(Path(p).read_bytes() for p in rows["path"])
    assert (result.photos, result.labels, result.passed_over) == (len(rows), 12, [])


def test_web_datasets_shards(run: Path, tmp_path: Path) -> None:
    options = ["--layout", "tar", "--shard-bytes", "200kB"]
    assert invoke("export", run, tmp_path / "out", *options)[0] == 0
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert shards == [f"photos-{number:06d}.tar" for number in range(len(shards))]
    assert len(shards) > 2
    assert all((tmp_path / "out" / name).stat().st_size <= 200_000 for name in shards)
    rows = kept(run).set_index("id")
    urls = f"{tmp_path}/out/photos-{{000000..{len(shards) - 1:06d}}}.tar"
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in found] == list(rows.index)  # in the order of the manifest
    for sample in found:
        told = json.loads(sample["json"])
        row = rows.loc[told["id"]]
        assert sample["jpg"] == Path(row["path"]).read_bytes()
        assert told["label"] == row["label"] == sample["cls"].decode()
        assert sample["__key__"] == f"{row['label']}/{told['id']}"
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls"))
    assert [number for _, number in decoded] == [int(label) for label in rows["label"]]
    assert all(isinstance(image, Image.Image) for image, _ in decoded)
    # The same bytes however they are made; and we read them too.
    exported(run, tmp_path / "again", layout="tar", shard_bytes=200_000, cluster=ClusterSpec(threads=1))
    for name in shards:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    run_of(f"{tmp_path}/out/*.tar", tmp_path / "read", None, keep=4)
    read = pd.read_parquet(tmp_path / "read" / "images")
    assert set(zip(read["id"].str.rpartition("/")[2], read["label"], strict=True)) == set(rows["label"].items())


def test_labels_that_are_no_numbers_are_numbered(some: list[bytes], tmp_path: Path) -> None:
    photos = [(f"{number}.v1", label, some[number]) for number, label in enumerate(["Rome", "paris", "Paris", "Rome"])]
    run = collection_of(tmp_path, photos)
    exported(run, tmp_path / "out", layout="tar")
    samples = list(webdataset.WebDataset(f"{tmp_path}/out/photos-000000.tar", shardshuffle=False).decode("pil"))
    assert len(samples) == 4
    table = pd.read_csv(tmp_path / "out" / "labels.csv")
    number_of = dict(zip(table["label"], table["class"], strict=True))
    assert sorted(number_of.values()) == [0, 1, 2]
    assert len({folder.casefold() for folder in table["folder"]}) == 3
    for sample in samples:
        assert sample["cls"] == number_of[sample["json"]["label"]]
        assert "." not in sample["__key__"].rpartition("/")[2]


def test_the_photos_of_a_list(ranked: Path, tmp_path: Path) -> None:
    for name in ("few.csv", "few.parquet"):
        result = cut(ranked, tmp_path / name, keep=3)
        code, out, _ = invoke("export", ranked, tmp_path / name[4:], "--list", tmp_path / name)
        assert code == 0
        assert f"Exported {result.photos} photos" in out
    assert (tmp_path / "csv" / "train.csv").read_bytes() == (tmp_path / "few.csv").read_bytes()
    # One that the run has not kept may stand on a list; one that it does not know may not.
    left_out = pd.read_parquet(ranked / "images").query("not kept").iloc[:2]
    left_out[["id", "label"]].set_axis(["id", "landmark_id"], axis=1).to_csv(tmp_path / "others.csv", index=False)
    assert exported(ranked, tmp_path / "others", list_file=tmp_path / "others.csv").photos == 2
    (tmp_path / "bad.csv").write_text("id,landmark_id\nnobody,1\n")
    code, _, err = invoke("export", ranked, tmp_path / "bad", "--list", tmp_path / "bad.csv")
    assert (code, "1 of 1 photos are not of this run: nobody (1)" in err) == (2, True)
    (tmp_path / "bad.csv").write_text("photo\nx\n")
    code, _, err = invoke("export", ranked, tmp_path / "bad", "--list", tmp_path / "bad.csv")
    assert (code, "no column 'id'" in err) == (2, True)
    assert not (tmp_path / "bad").exists()


def test_photos_under_two_labels(some: list[bytes], tmp_path: Path) -> None:
    run = collection_of(tmp_path, [("a", "1", some[0]), ("a", "2", some[0]), ("b", "2", some[1])])
    frame = pd.read_parquet(tmp_path / "manifest.parquet").assign(file=["0.jpg", "0.jpg", "2.jpg"])
    frame.to_parquet(tmp_path / "manifest.parquet")
    run = tmp_path / "two"
    job = Job(str(tmp_path / "images"), str(run), manifest=str(tmp_path / "manifest.parquet"), path_column="file")
    reduce_images(job, ClusterSpec(workers=0), progress=False)
    result = exported(run, tmp_path / "same")
    assert (result.photos, result.written) == (3, 3)
    assert result.bytes == result.bytes_before == len(some[0]) + len(some[1])
    assert sorted(photos_of(tmp_path / "same")) == ["0.jpg", "2.jpg"]
    lines = (tmp_path / "same" / "train.csv").read_text().splitlines()
    assert lines == ["id,landmark_id,file", "a,1,0.jpg", "a,2,0.jpg", "b,2,2.jpg"]
    assert pq.read_table(tmp_path / "same" / "export.parquet")["bytes"].null_count == 0
    for layout, count in (("by-label", 3), ("tar", 0)):
        assert exported(run, tmp_path / layout, layout=layout).photos == 3
        assert len(photos_of(tmp_path / layout)) == count
    with tarfile.open(tmp_path / "tar" / "photos-000000.tar") as tar:
        assert len(tar.getnames()) == len(set(tar.getnames())) == 9


def test_photos_of_a_folder_without_a_manifest(some: list[bytes], tmp_path: Path) -> None:
    for name, content in (("a/x/1.jpg", some[0]), ("a/x/1.png", some[1]), ("a/2.JPG", some[2]), ("3.jpg", some[3])):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
    reduce_images(
        Job(str(tmp_path / "images"), str(tmp_path / "run"), report=False), ClusterSpec(workers=0), progress=False
    )
    exported(tmp_path / "run", tmp_path / "same")
    assert photos_of(tmp_path / "same") | {"a/2.JPG": some[2]} == files_below(tmp_path / "images")
    exported(tmp_path / "run", tmp_path / "by", layout="by-label")
    classes, samples = image_folder(tmp_path / "by")
    assert len(classes) == 3
    assert sorted(Path(path).read_bytes() for path, _ in samples) == sorted(some[:4])
    assert pd.read_csv(tmp_path / "by" / "labels.csv").set_index("label")["folder"]["a"] == "a"


def test_photos_of_shards(whole: Path, photos: dict[str, bytes], tmp_path: Path) -> None:
    rows = kept(whole)
    exported(whole, tmp_path / "same")
    assert photos_of(tmp_path / "same") == {f"{i[0]}/{i[1]}/{i[2]}/{i}.jpg": photos[i] for i in rows["id"]}
    exported(whole, tmp_path / "tar", layout="tar", shard_bytes="300kB")
    table = pd.read_parquet(tmp_path / "tar" / "export.parquet")
    order = []
    for shard in sorted(set(table["shard"])):
        with tarfile.open(tmp_path / "tar" / shard) as tar:
            for name in tar.getnames():
                if name.endswith(".jpg"):
                    file = tar.extractfile(name)
                    assert file is not None
                    assert file.read() == photos[Path(name).stem]
                    order.append(Path(name).stem)
    # Each shard is read once, from its beginning to its end.
    ledger = pd.read_parquet(whole / "images").query("kept").sort_values(["shard", "offset"])
    assert order == list(ledger["id"])


def test_members_of_one_name_in_two_shards(some: list[bytes], tmp_path: Path) -> None:
    tars = write_tars(
        tmp_path / "tars",
        {"0.tar": [("x/1.jpg", some[0]), ("x/1.cls", b"a")], "1.tar": [("x/1.jpg", some[1]), ("x/1.cls", b"b")]},
    )
    run_of(tars, tmp_path / "run", None, keep=2)
    result = exported(tmp_path / "run", tmp_path / "out")
    assert (result.photos, result.renamed) == (2, 1)
    assert sorted(photos_of(tmp_path / "out").values()) == sorted(some[:2])


# Made smaller


def test_made_smaller(collection: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "run")
    code, out, _ = invoke("export", tmp_path / "run", tmp_path / "out", "--resize", 200)
    assert code == 0
    before = {os.path.relpath(path, collection / "train"): Path(path) for path in kept(tmp_path / "run")["path"]}
    after = photos_of(tmp_path / "out")
    assert set(after) == set(before)
    for name, content in after.items():
        with Image.open(io.BytesIO(content)) as image, Image.open(before[name]) as whole:
            assert max(image.size) == 200
            assert abs(image.width / image.height - whole.width / whole.height) < 0.02
            assert image.getexif().get(ExifTags.Base.Orientation) == whole.getexif().get(ExifTags.Base.Orientation)
    sizes = [sum(len(path.read_bytes()) for path in before.values()), sum(map(len, after.values()))]
    assert f"Before: {format_bytes(sizes[0])}, after: {format_bytes(sizes[1])}" in out
    # Again: all are there. With another size: they are not what is wanted.
    code, out, _ = invoke("export", tmp_path / "run", tmp_path / "out", "--resize", 200)
    assert f"; {len(before)} of them were there already" in out
    assert f"Before: {format_bytes(sizes[0])}, after: {format_bytes(sizes[1])}" in out
    code, _, err = invoke("export", tmp_path / "run", tmp_path / "out", "--resize", 100)
    assert (code, "holds another export (layout same, resize 200)" in err) == (2, True)
    code, out, _ = invoke("export", tmp_path / "run", tmp_path / "out", "--resize", 100, "--overwrite")
    assert (code, "already" in out) == (0, False)
    assert all(max(Image.open(io.BytesIO(content)).size) == 100 for content in photos_of(tmp_path / "out").values())


def test_photos_that_would_kill_are_tried_apart(some: list[bytes], tmp_path: Path) -> None:
    photos = [(name, "small", content) for name, content in zip("abc", [some[0], b"KILLER exit", some[1]], strict=True)]
    (tmp_path / "images").mkdir()
    for name, _, content in photos:
        (tmp_path / "images" / f"{name}.jpg").write_bytes(content)
    (tmp_path / "m.csv").write_text("id,landmark_id\n" + "".join(f"{name},{label}\n" for name, label, _ in photos))
    arguments = [tmp_path / "images", "--manifest", tmp_path / "m.csv", "--path-template", "{id}.jpg"]
    assert invoke("run", *arguments, "--output", tmp_path / "run", "--workers", 0)[0] == 0  # kept unread
    command = [
        sys.executable,
        "-m",
        "reducer",
        "export",
        str(tmp_path / "run"),
        str(tmp_path / "out"),
        "--resize",
        "40",
    ]
    done = subprocess.run(command, env=os.environ | killer_env(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "killed its worker" in (tmp_path / "out" / "failures.csv").read_text()
    assert sorted(photos_of(tmp_path / "out")) == ["a.jpg", "c.jpg"]


# Whole or absent, and skipped where they are there


def test_what_is_there_and_equal_is_skipped(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = exported(run, out)
    before = files_below(out)
    inodes = {name: (out / name).stat().st_ino for name in photos_of(out)}
    assert (first.written, exported(run, out).written) == (first.photos, 0)
    names = sorted(photos_of(out))
    (out / names[0]).unlink()
    (out / names[1]).write_bytes(before[names[1]][:100])  # cut short
    (out / names[2]).write_bytes(b"x" * len(before[names[2]]))  # of the same size
    result = exported(run, out)
    assert (result.photos, result.written) == (first.photos, 3)
    assert files_below(out) == before
    assert all((out / name).stat().st_ino == inodes[name] for name in names[3:])
    # With shards alike.
    tars = tmp_path / "tars"
    options = {"layout": "tar", "shard_bytes": 200_000}
    assert exported(run, tars, **options).written == first.photos
    before = files_below(tars)
    assert exported(run, tars, **options).written == 0
    content = bytearray((tars / "photos-000001.tar").read_bytes())
    content[2000] ^= 1
    (tars / "photos-000001.tar").write_bytes(content)
    (tars / "photos-000002.tar").unlink()
    result = exported(run, tars, **options)
    table = pd.read_parquet(tars / "export.parquet")
    assert result.written == table["shard"].isin(["photos-000001.tar", "photos-000002.tar"]).sum()
    assert result.bytes == first.bytes
    assert {n: c for n, c in files_below(tars).items() if n.endswith(".tar")} == {
        name: content for name, content in before.items() if name.endswith(".tar")
    }


@pytest.mark.parametrize(
    "options", [("--layout", "same"), ("--layout", "tar", "--shard-bytes", "150kB")], ids=["same", "tar"]
)
def test_killed_half_way_and_gone_on_with(run: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    invoke("export", run, tmp_path / "whole", *options)
    whole = {name: content for name, content in files_below(tmp_path / "whole").items() if name != "export.json"}
    name, time_ = (".jpg", 60) if options[1] == "same" else (".tar", 3)
    assert killed_before(name, time_, "export", run, tmp_path / "out", *options)
    there = {n: c for n, c in files_below(tmp_path / "out").items() if n.endswith(name)}
    assert len(there) >= time_ - 10  # some of them at a time
    assert all(whole[n] == content for n, content in there.items())  # nothing is half there
    assert not (tmp_path / "out" / "train.csv").exists()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["status"] == "running"
    inodes = {n: (tmp_path / "out" / n).stat().st_ino for n in there}
    code, out, _ = invoke("export", run, tmp_path / "out", *options)
    assert code == 0
    assert "were there already" in out
    found = {n: c for n, c in files_below(tmp_path / "out").items() if n != "export.json"}
    if options[1] == "tar":  # they say when they were written
        found, whole = ({n: c for n, c in files.items() if n.endswith(".tar")} for files in (found, whole))
    assert found == whole
    assert all((tmp_path / "out" / n).stat().st_ino == inode for n, inode in inodes.items() if n in list(inodes)[:-1])


def test_ctrl_c(run: Path, tmp_path: Path) -> None:
    slow = (
        "import sys, time, reducer.outputs.export.write as c; from reducer.cli.main import main; real = c._put\n"
        "c._put = lambda *a: (time.sleep(0.2), real(*a)); main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", slow, "export", str(run), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: photos_of(tmp_path / "out"), "the first photos")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"Stopped. What is in {tmp_path}/out is whole; to go on, give the same command again." in err
    assert "Traceback" not in err
    assert exported(run, tmp_path / "out").photos == len(kept(run))


def test_a_longer_list_adds_and_a_shorter_one_is_refused(ranked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for keep in (3, 6):
        cut(ranked, tmp_path / f"{keep}.csv", keep=keep)
    few = exported(ranked, out, list_file=tmp_path / "3.csv", layout="by-label")
    more = exported(ranked, out, list_file=tmp_path / "6.csv", layout="by-label")
    assert (more.written, more.photos > few.photos) == (more.photos - few.photos, True)
    with pytest.raises(InputError, match="photos of an earlier export that this one does not have"):
        exported(ranked, out, list_file=tmp_path / "3.csv", layout="by-label")
    assert len(photos_of(out)) == more.photos
    (out / "mine.txt").write_text("mine")
    again = exported(ranked, out, list_file=tmp_path / "3.csv", layout="by-label", overwrite=True)
    assert len(photos_of(out)) == again.photos == few.photos
    assert (out / "mine.txt").read_text() == "mine"
    # From one layout to another nothing is left behind.
    exported(ranked, out, layout="tar", overwrite=True)
    assert sorted(files_below(out)) == [
        "export.json",
        "export.parquet",
        "labels.csv",
        "mine.txt",
        "photos-000000.parquet",
        "photos-000000.tar",
    ]
    exported(ranked, out, overwrite=True)
    assert not list(out.glob("photos-*"))


KILLED_CLEARING = """
import os, pathlib, signal, sys
left, real = int(sys.argv.pop(1)), pathlib.Path.unlink
def unlink(path, missing_ok=False):
    global left
    left -= path.suffix == ".jpg"
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, missing_ok)
pathlib.Path.unlink = unlink
from reducer.cli.main import main
main(sys.argv[1:])
"""


def test_killed_while_an_earlier_export_is_taken_out(ranked: Path, tmp_path: Path) -> None:
    out, few = tmp_path / "out", tmp_path / "few.csv"
    cut(ranked, few, keep=3)
    exported(ranked, out, layout="by-label", resize=60)
    command = ["export", ranked, out, "--layout", "by-label", "--resize", 40, "--list", few]
    killed = [sys.executable, "-c", KILLED_CLEARING, "20", *map(str, command), "--overwrite"]
    assert subprocess.run(killed, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len(photos_of(out)) > 50
    code, _, err = invoke(*command)  # it is still said what it takes
    assert (code, "holds another export (layout by-label, resize 60)" in err) == (2, True)
    assert invoke(*command, "--overwrite")[0] == 0
    found = photos_of(out)
    assert {max(Image.open(io.BytesIO(content)).size) for content in found.values()} == {40}
    assert len(found) == len(few.read_text().splitlines()) - 1


def test_leftovers_of_a_kill_go_with_what_they_were_of(ranked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut(ranked, tmp_path / "few.csv", keep=1)
    exported(ranked, out, layout="by-label")
    name = next(name for name in photos_of(out) if name not in (tmp_path / "few.csv").read_text())
    (out / name).with_name(f".{Path(name).name}.tmp").write_bytes(b"half")
    exported(ranked, out, layout="by-label", overwrite=True, list_file=tmp_path / "few.csv")
    assert not list(out.rglob(".*.tmp"))
    assert image_folder(out)[0] == list(pd.read_csv(out / "labels.csv", dtype=str)["folder"])


def test_long_names_are_taken_out_too(some: list[bytes], tmp_path: Path) -> None:
    run = collection_of(tmp_path, [(f"{number}" + "x" * 238, "1", some[number]) for number in range(3)])
    exported(run, tmp_path / "out", layout="by-label", resize=60)
    exported(run, tmp_path / "out", layout="by-label", resize=40, overwrite=True)
    sizes = {max(Image.open(io.BytesIO(content)).size) for content in photos_of(tmp_path / "out").values()}
    assert sizes == {40}


def test_photos_stay_when_those_they_came_from_are_gone(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    run_on(tmp_path / "tiny", tmp_path / "run")
    for layout in ("same", "by-label", "tar"):
        exported(tmp_path / "run", tmp_path / layout, layout=layout)
    before = {layout: files_below(tmp_path / layout) for layout in ("same", "by-label", "tar")}
    shutil.rmtree(tmp_path / "tiny" / "train")
    (tmp_path / "tiny" / "train").mkdir()
    for layout, files in before.items():
        code, out, _ = invoke("export", tmp_path / "run", tmp_path / layout, "--layout", layout)
        rows = len(kept(tmp_path / "run"))
        assert (code, f"Exported {rows} photos of 12 labels; {rows} of them were there already" in out) == (0, True)
        found = files_below(tmp_path / layout)
        assert found.pop("export.json")
        assert {name: content for name, content in files.items() if name != "export.json"} == found


def test_finished_shards_stay_when_a_photo_that_was_not_read_changes(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    run_on(tmp_path / "tiny", tmp_path / "run", keep=15)
    options = {"layout": "tar", "shard_bytes": 100_000}
    exported(tmp_path / "run", tmp_path / "out", **options)
    before = files_below(tmp_path / "out")
    rows = kept(tmp_path / "run")
    unread = Path(rows["path"][rows["bytes"].isna()].iloc[0])
    unread.write_bytes(unread.read_bytes() + b"x" * 90_000)
    result = exported(tmp_path / "run", tmp_path / "out", **options)
    assert (result.written, len(result.failures)) == (0, 0)
    assert {n: c for n, c in files_below(tmp_path / "out").items() if n.endswith(".tar")} == {
        name: content for name, content in before.items() if name.endswith(".tar")
    }


@pytest.mark.parametrize("grain", [2 * 10**9, 10**7, 100])
def test_disks_that_keep_times_roughly(run: Path, tmp_path: Path, grain: int) -> None:
    exported(run, tmp_path / "out")
    for name in photos_of(tmp_path / "out"):
        time_ns = (tmp_path / "out" / name).stat().st_mtime_ns // grain * grain
        os.utime(tmp_path / "out" / name, ns=(time_ns, time_ns))
    assert exported(run, tmp_path / "out").written == 0


# What cannot be


def test_failures_are_listed_and_tried_again(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    run_on(tmp_path / "tiny", tmp_path / "run")
    rows = kept(tmp_path / "run")
    paths = [Path(path) for path in rows["path"]]
    read = rows["bytes"].notna().to_numpy().nonzero()[0]
    gone, changed = paths[read[0]], paths[read[1]]
    contents = [gone.read_bytes(), changed.read_bytes()]
    gone.unlink()
    changed.write_bytes(contents[1] + b"more")
    for layout in ("same", "by-label", "tar"):
        out = tmp_path / layout
        code, said, err = invoke("export", tmp_path / "run", out, "--layout", layout)
        assert code == 3
        assert f"Error: 2 photos are not in {out}: failures.csv there lists them" in err
        assert f"Failed: {gone.stem} ({gone}): missing: no such file" in said
        failures = pd.read_csv(out / "failures.csv", dtype=str).set_index("id")
        assert set(failures.index) == {gone.stem, changed.stem}
        assert failures["error"][gone.stem] == "missing: no such file"
        assert failures["error"][changed.stem].startswith(f"changed: it has {len(contents[1]) + 4:,} bytes, and had")
        if layout == "same":
            listed = set(pd.read_csv(out / "train.csv", dtype=str)["id"])
            assert listed == set(rows["id"]) - set(failures.index)
    gone.write_bytes(contents[0])
    changed.write_bytes(contents[1])
    for layout in ("same", "by-label", "tar"):
        code, said, _ = invoke("export", tmp_path / "run", tmp_path / layout, "--layout", layout)
        assert code == 0
        assert f"Exported {len(rows)} photos" in said
        assert not (tmp_path / layout / "failures.csv").exists()
        if layout != "tar":
            assert f"; {len(rows) - 2} of them were there already" in said


def test_no_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", "400k") as resize:
        target = tmp_path / "disk" / "out"
        for options in ((), ("--layout", "tar")):
            code, _, err = invoke("export", run, target, *options)
            assert code == 2
            assert "Error: TARGET" in err
            assert "free, and the" in err
            assert not target.exists()
        # Others may fill the disk after we looked.
        monkeypatch.setattr(reducer.outputs.export.export, "_check_room", lambda *_: None)
        for options in ((), ("--layout", "tar", "--shard-bytes", "100kB")):
            target = tmp_path / "disk" / ("tar" if options else "same")
            code, _, err = invoke("export", run, target, *options)
            assert code == 1
            assert f"Error: the disk of {target} is full: what is there is whole" in err
            whole = {Path(path).read_bytes() for path in kept(run)["path"]}
            assert set(photos_of(target).values()) <= whole
            assert not list(target.rglob(".*.tmp"))
            for tar in target.glob("*.tar"):
                with tarfile.open(tar) as opened:
                    assert opened.getnames()
            if not options:
                assert photos_of(target)
                resize("8m")
                code, out, _ = invoke("export", run, target)
                assert (code, "were there already" in out) == (0, True)
                assert set(photos_of(target).values()) == whole
                shutil.rmtree(target)
                resize("400k")


HOSTILE = [
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "a/../../../b",
        "NUL",
        "con.jpg",
        "a\0b",
        "\0",
        "C:\\x",
        "..\\..\\x",
    ),
    *(
        "a\nb",
        "\x1b[2J",
        "x" * 3000,
        "~/x",
        "-rf",
        "train.csv",
        "export.json",
        "é",
        "e\u0301",
        "A",
        "a",
        "b.",
        "b",
        " c",
        "c",
    ),
]


@pytest.mark.parametrize("layout", ["same", "by-label", "tar"])
def test_hostile_ids_and_labels_stay_in_target(some: list[bytes], tmp_path: Path, layout: str) -> None:
    photos = [
        (name, label, some[number % 4]) for number, name in enumerate(HOSTILE) for label in (HOSTILE[number - 1], "all")
    ]
    run = collection_of(tmp_path / "in", photos)
    sentinel = files_below(tmp_path / "in")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    target = tmp_path / "deep" / "er" / "out"
    result = exported(run, target, layout=layout)
    assert (result.photos, len(result.failures)) == (len(photos), 0)
    assert files_below(tmp_path / "in") == sentinel
    everything = {path for path in tmp_path.rglob("*") if (tmp_path / "in") not in (path, *path.parents)}
    assert all(
        target in (path, *path.parents) for path in everything - {tmp_path / "in", tmp_path / "deep", target.parent}
    )
    table = pd.read_parquet(target / "export.parquet")
    assert sorted(zip(table["id"], table["label"], strict=True)) == sorted((name, label) for name, label, _ in photos)
    if layout == "tar":
        samples = list(webdataset.WebDataset(f"{target}/photos-000000.tar", shardshuffle=False))
        found = {(json.loads(one["json"])["id"], json.loads(one["json"])["label"]): one["jpg"] for one in samples}
        (tmp_path / "unpacked").mkdir()
        with tarfile.open(target / "photos-000000.tar") as tar:
            for name in tar.getnames():
                assert (tmp_path / "unpacked" / name).resolve().is_relative_to(tmp_path / "unpacked")
            tar.extractall(tmp_path / "unpacked")
        assert len({name.casefold() for name in files_below(tmp_path / "unpacked")}) == 3 * len(photos)
    else:
        found = {(row.id, row.label): (target / row.path).read_bytes() for row in table.itertuples()}
    assert found == {(name, label): content for name, label, content in photos}
    if layout == "by-label":
        classes, images = image_folder(target)
        assert len(classes) == len({name.casefold() for name in classes}) == len(HOSTILE) + 1
        assert len(images) == len({path.casefold() for path, _ in images}) == len(photos)
        labels = pd.read_csv(target / "labels.csv", dtype=str, keep_default_na=False)
        assert list(labels["folder"]) == classes
    assert exported(run, target, layout=layout).written == 0


def test_paths_that_lead_out_stay_in_target(some: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "outside.jpg").write_bytes(some[0])
    (tmp_path / "images" / "sub" / "in.jpg").write_bytes(some[1])
    (tmp_path / "images" / "train.csv").write_bytes(some[2])
    rows = ["a,1,../outside.jpg", f"b,1,{tmp_path}/outside.jpg", "c,1,sub/../sub/./in.jpg", "d,1,train.csv"]
    (tmp_path / "m.csv").write_text("\n".join(["id,landmark_id,file", *rows]) + "\n")
    arguments = [tmp_path / "images", "--manifest", tmp_path / "m.csv", "--path-column", "file", "--rank-all"]
    assert invoke("run", *arguments, "--output", tmp_path / "run", "--workers", 0)[0] == 0
    before = files_below(tmp_path)
    code, out, _ = invoke("export", tmp_path / "run", tmp_path / "out")
    assert code == 0
    table = pd.read_csv(tmp_path / "out" / "train.csv", index_col="id")
    contents = [(tmp_path / "out" / path).read_bytes() for path in table["file"]]
    assert contents == [some[0], some[0], some[1], some[2]]
    assert table["file"]["c"] == "sub/in.jpg"
    assert table["file"]["d"] != "train.csv"
    assert "Elsewhere than the manifest says" in out
    assert {name: content for name, content in files_below(tmp_path).items() if not name.startswith("out/")} == before
    # The list of an earlier export may have been written by anyone.
    plan = pd.read_parquet(tmp_path / "out" / "export.parquet")
    plan.loc[0, "path"] = "../outside.jpg"
    plan.to_parquet(tmp_path / "out" / "export.parquet")
    assert invoke("export", tmp_path / "run", tmp_path / "out")[0] == 2
    assert invoke("export", tmp_path / "run", tmp_path / "out", "--overwrite")[0] == 0
    assert (tmp_path / "outside.jpg").read_bytes() == some[0]


def test_hard_links(run: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the photos lie in tar shards"):
        exported(whole, tmp_path / "shards", link=True)
    for layout in ("same", "by-label"):
        result = exported(run, tmp_path / layout, layout=layout, link=True)
        assert (result.photos, result.copied_not_linked) == (len(kept(run)), 0)
        inodes = {os.stat(path).st_ino for path in kept(run)["path"]}
        assert {(tmp_path / layout / name).stat().st_ino for name in photos_of(tmp_path / layout)} == inodes
        assert exported(run, tmp_path / layout, layout=layout, link=True).written == 0
    # A file that is no link any more is made one again.
    name = next(iter(photos_of(tmp_path / "same")))
    content = (tmp_path / "same" / name).read_bytes()
    (tmp_path / "same" / name).unlink()
    (tmp_path / "same" / name).write_bytes(b"x")
    assert exported(run, tmp_path / "same", link=True).written == 1
    assert (tmp_path / "same" / name).read_bytes() == content
    for options in (("--resize", 9), ("--layout", "tar")):
        code, _, err = invoke("export", run, tmp_path / "no", "--link", *options)
        assert (code, "Error: --link cannot be" in err) == (2, True)
    with small_disk(tmp_path / "disk", "100k") as resize:
        code, _, err = invoke("export", run, tmp_path / "disk" / "out", "--link")
        assert (code, "free, and the" in err) == (2, True)
        resize("8m")
        code, out, _ = invoke("export", run, tmp_path / "disk" / "out", "--link")
        assert code == 0
        assert f"Copied, since they cannot be linked here: {len(kept(run))} photos" in out
        assert sorted(photos_of(tmp_path / "disk" / "out").values()) == sorted(photos_of(tmp_path / "same").values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "flat"), "'flat' is not one of 'same', 'by-label', 'tar'"),
        (("--resize", 0), "--resize is 0: expected a whole number of 1 or more"),
        (("--shard-bytes", "1GB"), "--shard-bytes goes with --layout tar"),
        (("--shard-bytes", "big", "--layout", "tar"), "--shard-bytes is 'big': expected a number of bytes"),
        (("--workers", 2), "--cluster, --address and --workers are for photos of a URL that go to a URL"),
        (("--address", "tcp://127.0.0.1:1"), "--cluster, --address and --workers are for photos of a URL"),
        (("--target-storage-option", "key=a"), "says how a URL is opened, and TARGET is none"),
        (("--list", "nowhere.csv"), "--list nowhere.csv: No such file or directory"),
    ],
)
def test_wrong_options(run: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    code, _, err = invoke("export", run, tmp_path / "out", *options)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_an_export_takes_out_no_photo_that_it_reads(run: Path, tmp_path: Path) -> None:
    """Photos of an earlier export, reduced again, and exported to where they lie."""
    kept = tmp_path / "kept"
    assert invoke("export", run, kept, "--layout", "by-label")[0] == 0
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    folder = next(path for path in kept.iterdir() if path.is_dir())
    assert invoke("run", folder, "--output", tmp_path / "again", "--workers", 0, "--no-report", "--keep", 1)[0] == 0
    code, _, err = invoke("export", tmp_path / "again", kept, "--overwrite")
    assert (code, f"IMAGES {folder} is in TARGET {kept}" in err) == (2, True), err
    code, _, err = invoke("export", run, kept, "--overwrite", "--list", kept / "labels.csv")
    assert (code, f"--list {kept / 'labels.csv'} is a file that an export to TARGET" in err) == (2, True), err
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_wrong_targets(tiny: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "export.json").write_text("{}")
    for target, message in (
        (tmp_path / "file", "is a file: give a folder"),
        (tmp_path / "full", "is not empty and is no export"),
        (tmp_path / "other", "is not empty and is no export"),
        (tiny / "train", "is in IMAGES"),
        (tiny / "train" / "new", "is in IMAGES"),
        (run, "is not empty and is no export"),
        (tmp_path / "file" / "out", "cannot be made: Not a directory"),
    ):
        before = files_below(tmp_path)
        for options in ((), ("--overwrite",)):
            code, _, err = invoke("export", run, target, *options)
            assert (code, message in err) == (2, True), err
        assert files_below(tmp_path) == before
    assert not (tiny / "train" / "new").exists()
    code, _, err = invoke("export", tmp_path / "full", tmp_path / "out")
    assert (code, "is no run folder" in err) == (2, True)


def test_two_exports_into_one_folder(run: Path, tmp_path: Path) -> None:
    held = reducer.outputs.export.export.ExportFolder(reducer.storage.location.Location(str(tmp_path / "out")))
    locked = f"{tmp_path / 'out'} is locked by another export: host .*, process {os.getpid()}, .* give --break-lock"
    with held.held(), pytest.raises(InputError, match=locked):
        exported(run, tmp_path / "out")
    assert exported(run, tmp_path / "out").written > 0


def test_a_disk_that_fails_ends_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Iterator[None]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("reducer.outputs.export.write._put", fails)
    with pytest.raises(ReducerError, match="out cannot be written: Permission denied"):
        exported(run, tmp_path / "out")


def test_how_photos_go_into_shards() -> None:
    assert size_in_shard(("a", 1), ("b" * 100, 512), ("c", 513)) == 512 * (2 + 2 + 3)
    assert into_shards([4096] * 5, 10240) == [0, 0, 1, 1, 2]  # what ends a tar has room too
    assert into_shards([4096] * 5, 10239) == [0, 1, 2, 3, 4]
    assert into_shards([50_000, 1, 50_000, 50_000], 20_000) == [0, 1, 2, 3]
    assert into_shards([], 1) == []


def test_no_shard_is_larger_whatever_the_names(some: list[bytes], tmp_path: Path) -> None:
    photos = [
        (f"фото {number} " + "x" * (number % 3 * 60), "Санкт-Петербург", some[number % 4]) for number in range(60)
    ]
    run = collection_of(tmp_path, photos)
    for most in (40_960, 50_000, 123_456):
        exported(run, tmp_path / str(most), layout="tar", shard_bytes=most)
        sizes = [path.stat().st_size for path in (tmp_path / str(most)).glob("*.tar")]
        assert max(sizes) <= most
        assert len(sizes) <= 1.5 * sum(sizes) / most + 1
