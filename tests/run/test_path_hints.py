"""Paths that are wrong in a way that can be told: the message says which change finds the photos."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from commands import invoke
from PIL import Image

from reducer.run.path_hints import path_hint

WRONG = {
    "with / in the place of \\": ("sub/p{}.jpg", "sub\\p{}.jpg"),
    "with %20 and the like decoded": ("sub/a photo {}.jpg", "sub/a%20photo%20{}.jpg"),
    "in the Unicode form NFD": (unicodedata.normalize("NFD", "é{}.jpg"), "é{}.jpg"),
    "in the Unicode form NFC": ("é{}.jpg", unicodedata.normalize("NFD", "é{}.jpg")),
    "with an extension that stands twice only once": ("p{}.jpg", "p{}.jpg.jpg"),
    "with folders that stand twice only once": ("sub/p{}.jpg", "sub/sub/p{}.jpg"),
    "with .jpg behind": ("p{}.jpg", "p{}"),
    "with .JPG for an ending": ("p{}.JPG", "p{}.jpg"),
    "with .jpg for an ending": ("p{}.jpg", "p{}.JPG"),
    "with numbers of 6 digits, zeros before them": ("00001{}.jpg", "1{}.jpg"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("keep", [2, 20], ids=["read", "looked for"])
def test_the_change_that_finds_the_photos_is_told(what: str, keep: int, tmp_path: Path) -> None:
    there, said = WRONG[what]
    for number in range(6):
        path = tmp_path / "photos" / there.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number * 40, 0, 0)).save(path, "JPEG")
    rows = [f"{number},x,{said.format(number)}" for number in range(6)]
    (tmp_path / "list.csv").write_text("id,landmark_id,file\n" + "\n".join(rows) + "\n")
    arguments = ["run", tmp_path / "photos", "--manifest", tmp_path / "list.csv", "--path-column", "file"]
    code, out, err = invoke(*arguments, "--output", tmp_path / "run", "--keep", keep, "--workers", 0)
    assert code == 3
    told = f"Perhaps the first 6 missing photos are found {what}: {tmp_path / 'photos' / there.format(0)}"
    assert told in out
    assert told in err


def test_several_folders_may_stand_twice(tmp_path: Path) -> None:
    there = tmp_path / "data/train/a/1.jpg"
    there.parent.mkdir(parents=True)
    there.touch()
    hint = path_hint([str(tmp_path / "data/train/data/train/a/1.jpg")])
    assert hint == f"the missing photo is found with folders that stand twice only once: {there}"


def test_nothing_is_told_where_no_one_change_finds_all(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").touch()
    assert path_hint([str(tmp_path / "a%20b.jpg"), str(tmp_path / "c%20d.jpg")]) is None
    assert path_hint([str(tmp_path / "a%20b.jpg"), "s3://bucket/c.jpg"]) is not None
    assert path_hint([]) is None
    assert path_hint(["s3://bucket/a%20b.jpg"]) is None
