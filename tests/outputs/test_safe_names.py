"""Names that are safe everywhere, and no two equal."""

from __future__ import annotations

import os
import random
import unicodedata

import pytest

from reducer.outputs.export.safe_names import MOST_BYTES, distinct_names, is_safe, made_safe, safe_path

HOSTILE = [
    *(
        "",
        ".",
        "..",
        "/",
        "//",
        "../..",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "C:\\x",
        "..\\x",
        "\\\\host\\x",
    ),
    *("NUL", "nul.jpg", "Con", "com1.txt", "LPT9", "aux .x", "conout$", "a\0b", "\0", "a\nb", "\x1b[31m", "a\u202eb"),
    *(" a", "a ", "a.", "a...", "?", "a*b", 'a"b', "a<b>", "a|b", "x" * 5000, "é" * 200, ".a.jpg.tmp", "\ud800"),
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names(name: str) -> None:
    assert not is_safe(name)
    made = made_safe(name)
    assert is_safe(made)
    assert len(made.encode()) < MOST_BYTES
    path = safe_path(name)
    assert all(map(is_safe, path.split("/")))
    assert os.path.normpath(os.path.join("/target", path)).startswith("/target/")


@pytest.mark.parametrize(
    "name", ["a", "a.b", "a-b_c", "été", "日本", "a b", "x" * 200, ".hidden", "console", "com", "a,b&c"]
)
def test_names_that_need_no_change(name: str) -> None:
    assert is_safe(name)
    assert distinct_names([name]) == {name: name}
    assert safe_path(f"{name}/{name}.jpg") == f"{name}/{name}.jpg"


def test_names_are_distinct_where_case_is_not_told() -> None:
    texts = [
        "Paris",
        "paris",
        "PARIS",
        "é",
        unicodedata.normalize("NFD", "é"),
        "a/b",
        "a?b",
        "a_b",
        "straße",
        "STRASSE",
    ]
    texts += [made_safe("a/b"), *HOSTILE]  # the name of one is another's own
    names = distinct_names(texts)
    assert list(names) == list(dict.fromkeys(texts))
    assert all(map(is_safe, names.values()))
    assert len({unicodedata.normalize("NFC", name.casefold()) for name in names.values()}) == len(set(texts))
    assert names["a_b"] == "a_b"
    random.Random(0).shuffle(texts)
    assert distinct_names(texts) == names  # whatever their order


def test_names_look_as_they_should() -> None:
    names = distinct_names(
        ["x/1.jpg", "y/1.jpg", "z/2.jpg", "v1.2"], lambda text: text.rpartition("/")[2], forbidden="."
    )
    assert all("." not in name for name in names.values())
    assert names["x/1.jpg"].startswith("1_jpg-")
    assert len(set(names.values())) == 4
    assert distinct_names(["Train.csv", "b"], reserved=["train.csv"])["Train.csv"] != "Train.csv"


def test_paths_of_the_top() -> None:
    assert safe_path("train.csv", ["train.csv"]) != "train.csv"
    assert safe_path("TRAIN.CSV/a.jpg", ["train.csv"]).lower().split("/")[0] != "train.csv"
    assert safe_path("a/train.csv", ["train.csv"]) == "a/train.csv"
    assert safe_path("../../etc/passwd.jpg").startswith("etc/passwd-")
    assert safe_path("../../etc/passwd.jpg").endswith(".jpg")
    assert safe_path("../a.jpg") != safe_path("./../a.jpg") != safe_path("../../a.jpg")
