"""Tar shards that are damaged, or hold what is not expected: the job goes on, and nothing is lost."""

from __future__ import annotations

import gzip
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import invoke
from jobs import SERIAL, reduced_files
from killerphotos import killer_env
from shardjobs import SHARDS, assert_same_rows, content_at, csv_of, rows_of, run_of, small_job, summary_of
from tarfiles import BLOCK, link_to, md5, packed, shards_read, tar_of, write_tars

import reducer.photos.reader
from reducer import ClusterSpec, resume
from reducer.errors import TooManyFailuresError
from reducer.photos.hashing import PhotoError
from reducer.run.folder import RunFolder
from reducer.run.folder.plan import PlanFiles
from reducer.storage.location import Shard

# Damaged shards

#: The shard that is damaged, and the member at which that happens: the 20th of its 40.
BAD, AT = "images_002.tar", 20


def cut_in_a_photo(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: offset + size // 2]


def cut_at_a_member(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: offset - BLOCK]


def header_garbage(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: offset - BLOCK] + b"\x5a" * BLOCK + shard[offset:]


def empty(shard: bytes, offset: int, size: int) -> bytes:
    return b""


def not_a_tar(shard: bytes, offset: int, size: int) -> bytes:
    return b"id,landmark_id\n" * 10_000


def gzipped(shard: bytes, offset: int, size: int) -> bytes:
    return gzip.compress(shard)


def zeros_in_the_middle(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: offset - BLOCK] + bytes(8 * BLOCK) + shard[offset + 7 * BLOCK :]


def bits_of_one_photo(shard: bytes, offset: int, size: int) -> bytes:
    return shard[:offset] + bytes(byte ^ 0xFF for byte in shard[offset : offset + size]) + shard[offset + size :]


def no_end_marker(shard: bytes, offset: int, size: int) -> bytes:
    return shard[: -(-len(shard.rstrip(b"\0")) // BLOCK) * BLOCK]


#: The damage; what is said; whether photos before it, the photo at it and those behind it are had; how these fail.
DAMAGE: dict[str, tuple[Callable[[bytes, int, int], bytes] | None, str, str, str]] = {
    "cut in a photo": (cut_in_a_photo, "it is cut off at byte ", "+--", "cut off"),
    "cut at a member": (cut_at_a_member, "without an end-of-archive marker (cut off?)", "+--", "missing"),
    "header garbage": (header_garbage, "the header at byte ", "+--", "missing"),
    "empty": (empty, "it is empty", "---", "missing"),
    "not a tar": (not_a_tar, "it is no tar: there is no sound header at byte 0", "---", "missing"),
    "gzip": (gzipped, "it is compressed (gzip): unpack it first", "---", "missing"),
    "zeros in the middle": (zeros_in_the_middle, "there are more data behind the end-of-archive", "+--", "missing"),
    "bits of one photo": (bits_of_one_photo, "", "+-+", "not an image"),
    "no end marker": (no_end_marker, "without an end-of-archive marker (cut off?)", "+++", ""),
    "gone": (None, "missing: no such file", "---", "missing"),
    "replaced": (None, "is not what it was when the run began", "---", "missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_gives_what_it_holds_and_the_job_goes_on(
    tars: Path,
    tiny: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    run, path = tmp_path / "run", tars / BAD
    good = rows_of(whole)
    own = good[good["shard"].str.endswith(BAD)].sort_values("offset")
    shard, state = path.read_bytes(), path.stat()
    damage, said, had, how = DAMAGE[kind]
    if damage is not None:
        path.write_bytes(damage(shard, *own[["offset", "bytes"]].iloc[AT].tolist()))
    else:  # when it was listed, and before it is read
        real = PlanFiles.write

        def write_plan(*arguments: Any) -> None:
            real(*arguments)
            if kind == "gone":
                path.unlink()
            else:
                path.write_bytes(tar_of([("other.jpg", b"another tar")]))

        monkeypatch.setattr(PlanFiles, "write", write_plan)
    result = run_of(tars, run, tiny / "train.csv", max_failures=1.0)
    monkeypatch.undo()

    damaged = result.summary["shards"]["damaged"]
    if said:
        assert list(damaged) == [str(path)]
        assert said in damaged[str(path)]
        assert f"shard {path}: {damaged[str(path)]}" in caplog.text
    else:
        assert damaged == {}
    rows = rows_of(run)
    others = good.index[~good.index.isin(own.index)]
    for part, names in zip(had, (own.index[:AT], own.index[AT : AT + 1], own.index[AT + 1 :]), strict=True):
        if part == "+":
            others = others.append(names)
        else:
            # Also those of labels that are kept whole, but for what is wrong with a photo that nobody has read.
            lost = rows.loc[names][(kind != "bits of one photo") | good.loc[names, "hash"].notna()]
            assert (lost["reason"] == "failed").all()
            assert not lost["kept"].any()
            assert lost["error"].str.startswith(("missing: no shard holds it", f"{how}: ")).all()
    same = ["hash", "offset", "bytes"]
    pd.testing.assert_frame_equal(rows.loc[others, same], good.loc[others, same], check_dtype=False)
    failed = int((rows["reason"] == "failed").sum())
    assert failed == 240 - len(others)
    if damage is cut_in_a_photo:
        assert rows.loc[own.index[AT], "error"].startswith("cut off: the shard ends at byte ")
    # Whether that is too much is asked of all that was looked for, and of what was to be hashed.
    code, _, err = invoke("resume", run, "--workers", 0, "--max-failures", 0, "--quiet")
    assert code == (3 if failed else 0)
    hashless = int((rows["reason"] == "failed")[good["hash"].notna()].sum())
    told = f"{failed} of 240 " if failed / 240 > hashless / 216 else f"{hashless} of 216 "
    assert (told in err) == bool(failed)

    path.write_bytes(shard)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    result = resume(run, SERIAL, retry_failed=True, max_failures=0.0, progress=False)
    assert reduced_files(run) == reduced_files(whole)
    assert_same_rows(run, whole)
    assert result.summary["shards"]["damaged"] == {}
    assert result.summary["photos_failed"] == 0
    for name in ("reasons", "quality", "failures", "photos_kept", "bytes_kept"):
        assert result.summary[name] == summary_of(whole)[name], name


def test_damage_is_told_at_the_end_and_by_exit_codes(tars: Path, tiny: Path, tmp_path: Path) -> None:
    for name in ("images_001.tar", "images_004.tar"):
        content = (tars / name).read_bytes()
        (tars / name).write_bytes(content[: len(content) // 2])
    arguments = [tars, "--manifest", tiny / "train.csv", "--keep", 8, "--workers", 0, "--output"]
    code, out, err = invoke("run", *arguments, tmp_path / "run")
    assert code == 3
    assert f"Damaged shards, whose photos up to the damage are taken: 2: {tars}/images_001.tar: it is cut off" in out
    assert f"reducer resume {tmp_path / 'run'} --retry-failed" in out
    assert "over --max-failures 0.1" in err
    assert "2 of the shards are damaged" in rows_of(tmp_path / "run")["error"].dropna().iloc[-1]
    assert invoke("run", *arguments, tmp_path / "other", "--max-failures", 0.5, "--quiet")[0] == 0
    assert reduced_files(tmp_path / "other") == reduced_files(tmp_path / "run")


def test_a_job_goes_on_when_no_shard_is_sound(tiny: Path, tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", {f"{n}.tar": b"no tar" for n in range(3)})
    code, _, err = invoke("run", tars, "--manifest", tiny / "train.csv", "--output", tmp_path / "run", "--workers", 0)
    assert code == 3
    assert "missing: no shard holds it; 3 of the shards are damaged" in err
    assert (rows_of(tmp_path / "run")["reason"] == "failed").all()


# What is in a shard, and what is not


def test_a_photo_that_no_shard_holds_fails(some: list[bytes], tmp_path: Path) -> None:
    shard = [(f"{name}.jpg", some[number]) for number, name in enumerate("abcdw")]
    rows = [*((name, "ranked") for name in ("a", "b", "c", "d", "gone")), ("w", "whole"), ("away", "whole")]
    found = small_job(tmp_path, {"0.tar": shard}, rows).set_index("id")
    for name in ("gone", "away"):
        assert found.loc[name, "reason"] == "failed"
        assert found.loc[name, "error"] == "missing: no shard holds it"
        assert not found.loc[name, "kept"]
        assert pd.isna(found.loc[name, "nearest_kept"])
        assert pd.isna(found.loc[name, "shard"])
    assert found.loc["w", ["reason", "kept"]].tolist() == ["kept-small-label", True]
    summary = summary_of(tmp_path / "run")
    assert summary["failures"] == {"missing": 2}
    assert b"gone" not in csv_of(tmp_path / "run")
    assert b"away" not in csv_of(tmp_path / "run")
    # It comes, and is looked for again.
    (tmp_path / "tars" / "0.tar").write_bytes(tar_of([*shard, ("gone.jpg", some[7]), ("away.jpg", some[8])]))
    run_of(tmp_path / "tars", tmp_path / "again", tmp_path / "m.csv", keep=2, reuse=str(tmp_path / "run"))
    run_of(tmp_path / "tars", tmp_path / "fresh", tmp_path / "m.csv", keep=2)
    assert reduced_files(tmp_path / "again") == reduced_files(tmp_path / "fresh")
    assert (rows_of(tmp_path / "again")["reason"] == "failed").sum() == 0


@pytest.mark.parametrize("keep", [2, 20])
def test_of_a_photo_in_two_places_the_last_holds(some: list[bytes], tmp_path: Path, keep: int) -> None:
    shards = {
        "0.tar": [("x/a.jpg", some[0]), ("a.jpg", some[1]), ("b.jpg", some[2]), ("b.jpg", some[3]), ("c.jpg", some[4])],
        "1.tar": [("d.jpg", some[5]), ("y/a.jpg", some[6])],
        "10.tar": [("d.jpg", b"this one is broken")],
    }
    found = small_job(tmp_path, shards, [(name, "label") for name in "abcd"], keep=keep).set_index("id")
    assert content_at(found.loc["a"]) == some[6]
    assert content_at(found.loc["b"]) == some[3]
    assert content_at(found.loc["c"]) == some[4]
    # By their paths: 0.tar, 1.tar, 10.tar.
    assert content_at(found.loc["d"]) == b"this one is broken"
    assert (found["path"] == ["y/a.jpg", "b.jpg", "c.jpg", "d.jpg"]).all()
    if keep == 2:
        assert found.loc["d", "error"].startswith("not an image")
    assert len(found) == 4


def test_one_photo_under_two_labels(some: list[bytes], tmp_path: Path) -> None:
    shard = [(f"{name}.jpg", some[number]) for number, name in enumerate("abcdef")]
    rows = [*((name, "one") for name in "abcd"), *((name, "two") for name in "def"), ("d", "small"), ("a", "small")]
    found = small_job(tmp_path, {"0.tar": shard[:3], "1.tar": shard[3:]}, rows)
    assert len(found) == 9
    own = found[found["id"] == "d"]
    assert own["shard"].nunique() == own["offset"].nunique() == 1
    assert own.set_index("label")["hash"].isna().to_dict() == {"one": False, "small": True, "two": False}
    assert found["error"].isna().all()
    assert all(content_at(row) == some["abcdef".index(row["id"])] for _, row in found.iterrows())
    assert summary_of(tmp_path / "run")["manifest"]["ids_under_several_labels"] == 2


def test_links_and_sparse_files(some: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "sparse.jpg").write_bytes(b"")
    with open(tmp_path / "sparse.jpg", "r+b") as file:
        file.truncate(1_000_000)
        file.write(some[9])
    tar = ["tar", "--sparse", "--format=gnu", "-cf", str(tmp_path / "s.tar"), "-C", str(tmp_path), "sparse.jpg"]
    subprocess.run(tar, check=True)
    sparse = (tmp_path / "s.tar").read_bytes()
    assert len(sparse) < 100_000
    members = [
        ("soft.jpg", link_to("deep/a.jpg")),
        ("deep/a.jpg", some[0]),
        ("b.jpg", some[1]),
        ("hard.jpg", link_to("b.jpg", b"1")),
        ("lost.jpg", link_to("nowhere.jpg")),
        ("out.jpg", link_to("../../etc/passwd")),
    ]
    rows = [(name, "label") for name in ("a", "b", "soft", "hard", "lost", "out", "sparse")]
    found = small_job(tmp_path, {"0.tar": members, "1.tar": sparse}, rows).set_index("id")
    for link, target in (("soft", "a"), ("hard", "b")):
        same = ["hash", "shard", "offset", "bytes", "width"]
        assert found.loc[link, same].tolist() == found.loc[target, same].tolist()
        assert found.loc[link, "path"] == f"{link}.jpg"
    for name, error in (("lost", "link: it leads to nowhere.jpg"), ("out", "link: "), ("sparse", "sparse: ")):
        assert found.loc[name, "reason"] == "failed"
        assert found.loc[name, "error"].startswith(error)
    assert summary_of(tmp_path / "run")["shards"]["damaged"] == {}


def test_links_and_sparse_files_of_labels_that_are_kept_whole(some: list[bytes], tmp_path: Path) -> None:
    members = [("a.jpg", some[0]), ("soft.jpg", link_to("a.jpg")), ("lost.jpg", link_to("nowhere.jpg"))]
    rows = [(name, "label") for name in ("a", "soft", "lost")]
    found = small_job(tmp_path, {"0.tar": members}, rows, keep=5).set_index("id")
    assert found["hash"].isna().all()
    assert content_at(found.loc["soft"]) == some[0]
    assert found["reason"].to_dict() == {"a": "kept-small-label", "soft": "kept-small-label", "lost": "failed"}


def test_other_files_with_a_photos_name_are_not_taken_for_it(some: list[bytes], tmp_path: Path) -> None:
    members = [
        ("a.json", b"{}"),
        ("a.JPG", some[0]),
        ("a.txt", b"text"),
        ("b.jpeg", some[1]),
        ("b.cls", b"3"),
        ("b.jpg.md5", b"0"),
        ("c.PNG", some[2]),
        ("d.csv", b"only this"),
        ("e.f.jpg", some[3]),
        (".jpg", some[4]),
        ("no extension", some[5]),
    ]
    rows = [(name, "label") for name in ("a", "b", "c", "d", "e.f", "no extension")]
    found = small_job(tmp_path, {"0.tar": members}, rows).set_index("id")
    assert found["path"].to_dict() == {
        "a": "a.JPG",
        "b": "b.jpeg",
        "c": "c.PNG",
        "d": "d",
        "e.f": "e.f.jpg",
        "no extension": "no extension",
    }
    assert found["error"].dropna().to_dict() == {"d": "missing: no shard holds it"}


def test_members_that_are_not_wanted_are_not_decoded(some: list[bytes], tmp_path: Path) -> None:
    bad = [(f"other{number}.jpg", b"this is broken") for number in range(300)]
    shard = [*bad, *((f"{name}.jpg", some[n]) for n, name in enumerate("abc")), *bad]
    found = small_job(tmp_path, {"0.tar": shard}, [(name, "label") for name in "abc"], max_failures=0.0)
    assert (found["reason"] == "failed").sum() == 0
    summary = summary_of(tmp_path / "run")
    assert (summary["photos_read"], summary["shards"]["members"]) == (3, 603)
    assert summary["bytes_read"] == sum(map(len, some[:3]))


@pytest.mark.parametrize("how", ["template", "column"])
def test_paths_may_tell_photos_and_lead_nowhere(some: list[bytes], tmp_path: Path, how: str) -> None:
    paths = ["../up.jpg", "a/../../b.jpg", "/etc/abs.jpg", "x/1.jpg", "y/1.jpg", "sp ace/é.jpg", "dots/./c.jpg"]
    members = [(path, some[number]) for number, path in enumerate(paths)]
    shards = {"0.tar": members[:3], "1.tar": members[3:]}
    tars = write_tars(tmp_path / "tars", shards)
    if how == "template":
        rows = ["id,landmark_id", *(f"{path},label" for path in paths)]
        given = {"path_template": "{id}"}
    else:
        rows = ["id,landmark_id,path", *(f"n{number},label,{path}" for number, path in enumerate(paths))]
        given = {"path_column": "path"}
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    run_of(tars, tmp_path / "run", tmp_path / "m.csv", keep=3, max_failures=0.0, **given)
    found = RunFolder(str(tmp_path / "run")).parts.ledger().to_pandas()
    assert found["path"].tolist() == paths
    assert found["hash"].notna().all()
    assert [content_at(row) for _, row in found.iterrows()] == some[: len(paths)]
    # The same where they are read by range, later, and from an earlier run.
    run_of(tars, tmp_path / "few", tmp_path / "m.csv", keep=20, **given)
    assert resume(tmp_path / "few", SERIAL, rank_all=True, progress=False).summary["photos_failed"] == 0
    with shards_read() as read:
        run_of(tars, tmp_path / "again", tmp_path / "m.csv", keep=3, reuse=str(tmp_path / "run"), **given)
    assert (read, csv_of(tmp_path / "again")) == ([], csv_of(tmp_path / "run"))
    assert {path.name for path in tmp_path.iterdir()} == {"few", "again", "m.csv", "run", "tars"}
    assert not list(tmp_path.rglob("*.jpg"))
    assert not (tmp_path.parent / "up.jpg").exists()


def test_a_template_with_folders_looks_for_paths(tars: Path, tiny: Path, single: Path, tmp_path: Path) -> None:
    template = "{id[0]}/{id[1]}/{id[2]}/{id}.jpg"
    run_of(tars, tmp_path / "run", tiny / "train.csv", path_template=template)
    assert csv_of(tmp_path / "run") == csv_of(single)


@pytest.mark.parametrize("flag", ["--quiet", "--log-level=warning"], ids=["quiet", "with progress"])
def test_a_template_that_matches_nothing_is_told_early(tars: Path, tiny: Path, tmp_path: Path, flag: str) -> None:
    # 216 photos are looked for: when 200 of them should have come, none has. They may yet come, so the run goes on.
    arguments = [tars, "--manifest", tiny / "train.csv", "--output", tmp_path / "run", "--keep", 8, flag]
    code, _, err = invoke("run", *arguments, "--path-template", "train/{id}.jpg", "--workers", 0)
    assert code == 3
    assert "240 of 240 photos read have failed" in err
    assert "missing: no shard holds it" in err
    if flag != "--quiet":
        assert "WARNING: the shards read so far hold no photo of the manifest. They hold '" in err
        assert ".jpg', and the first photo is looked for by 'train/" in err
        assert "--path-template" in err


# A photo that ends whoever looks at it


def test_a_photo_in_a_shard_that_kills_its_worker_alone_fails(
    photos: dict[str, bytes], tiny: Path, labels: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = Counter(labels.values()).most_common(1)[0][0]
    ids = sorted(name for name in photos if labels[name] == largest)[3:5]
    bad = photos | {ids[0]: b"KILLER exit", ids[1]: b"KILLER signal"}
    tars = write_tars(tmp_path / "tars", packed(bad, SHARDS))
    run_of(tars, tmp_path / "reference", tiny / "train.csv")  # here it is just no image
    for variable, value in killer_env(tmp_path).items():
        monkeypatch.setenv(variable, value)
    run_of(tars, tmp_path / "run", tiny / "train.csv", ClusterSpec(workers=2))
    rows = rows_of(tmp_path / "run")
    assert rows["error"].dropna().to_dict() == {
        ids[0]: "killed its worker: the process that looked at it ended with exit code 7",
        ids[1]: "killed its worker: the process that looked at it was ended by SIGKILL",
    }
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")
    assert summary_of(tmp_path / "run")["shards"]["damaged"] == {}


def test_a_block_that_does_not_come_is_damage_of_the_shard_and_no_fault_of_a_photo(
    tars: Path, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reducer.photos.reader.disk_blocks

    def blocks(shard: Shard, offset: int) -> Iterator[bytes]:
        if not shard.path.endswith(BAD):
            yield from real(shard, offset)
            return
        content = Path(shard.path).read_bytes()
        yield content[: len(content) // 2]
        raise PhotoError("unreadable", "again and again for 60 s: the line is dead")

    monkeypatch.setattr(reducer.photos.reader, "disk_blocks", blocks)
    result = run_of(tars, tmp_path / "run", tiny / "train.csv", max_failures=1.0)
    monkeypatch.undo()
    said = "unreadable: again and again for 60 s: the line is dead"
    assert result.summary["shards"]["damaged"] == {str(tars / BAD): said}
    assert set(result.summary["failures"]) == {"missing"}
    resume(tmp_path / "run", SERIAL, retry_failed=True, progress=False)
    assert_same_rows(tmp_path / "run", whole)


def test_a_shard_with_another_sum_does_not_end_the_run(
    tars: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes first and holds more photos than may all fail at the beginning."""
    monkeypatch.setattr("reducer.run.monitor.ALL_FAILED", 10)
    sums = {shard.name: md5(shard.read_bytes()) for shard in tars.iterdir()} | {"images_000.tar": "0" * 32}
    (tmp_path / "sums").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    result = run_of(tars, tmp_path / "run", tiny / "train.csv", md5=str(tmp_path / "sums"), max_failures=1.0)
    assert result.summary["status"] == "done"
    assert result.summary["reasons"]["failed"] == 40


def test_one_missing_photo_of_many_labels_that_are_kept_whole_is_no_failure_of_the_run(
    some: list[bytes], tmp_path: Path
) -> None:
    rows = [(f"p{i}", f"label{i // 2}") for i in range(40)]
    members = [(f"p{i}.jpg", some[0]) for i in range(39)]
    frame = small_job(tmp_path, {"a.tar": members}, rows, max_failures=0.1)
    assert frame["reason"].value_counts().to_dict() == {"kept-small-label": 39, "failed": 1}
    with pytest.raises(TooManyFailuresError, match="1 of 40 photos"):
        resume(tmp_path / "run", SERIAL, max_failures=0.01, progress=False)


def test_a_large_photo_is_read_apart(
    tars: Path, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reducer.run.tasks.hash_stage.MOST_AT_ONCE", 3000)
    run_of(tars, tmp_path / "run", tiny / "train.csv")
    assert_same_rows(tmp_path / "run", whole)
