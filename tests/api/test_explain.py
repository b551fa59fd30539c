"""What `reducer explain` tells of a photo, for every reason there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import invoke
from jobs import run_on
from PIL import Image

from reducer import explain


@pytest.fixture(scope="module")
def odd(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection with a photo that is flat, one that is broken, and one under two labels."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(collection, folder, dirs_exist_ok=True)
    photos = sorted((folder / "train").rglob("*.jpg"))
    Image.new("RGB", (640, 480), (200, 30, 30)).save(photos[3])
    photos[9].write_bytes(b"")
    lines = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([*lines, f"{lines[1].split(',')[0]},other"]) + "\n")
    return folder


def told(run: Path, photo: str) -> str:
    code, out, err = invoke("explain", run, photo)
    assert (code, err) == (0, "")
    return out


WHY = {
    "kept": "yes, kept: it is among the first {keep} of its label",
    "beyond-keep": "no, beyond-keep: {keep} photos of its label come before it (--keep)",
    "not-sampled": "no, not-sampled: it is not among the 30 of {photos} photos of its label that were drawn",
    "kept-small-label": "yes, kept-small-label: a label of {photos} photos, at most --keep {keep}, is kept whole",
    "failed": "no, failed: it could not be read; reducer resume {run} --retry-failed tries again",
    "flat": "no, flat: it shows next to nothing (--drop-flat)",
    "avoided": "no, avoided: it is near a photo to avoid (--avoid)",
    "min-distance": "no, min-distance: it is nearer than --min-distance 12.0 to a photo before it",
    "budget": "no, budget: photos that differ more from others of their labels came first (--total 60)",
}


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"candidates": 30}, ["kept", "beyond-keep", "not-sampled", "kept-small-label"]),
        ({"rank_all": True, "drop_flat": True, "avoid": "one"}, ["failed", "flat", "avoided"]),
        ({"total": 60, "min_distance": 12.0}, ["min-distance", "budget", "failed"]),
    ],
)
def test_every_reason_is_explained(odd: Path, tmp_path: Path, options: dict[str, Any], reasons: list[str]) -> None:
    if "avoid" in options:
        hashes = run_on(odd, tmp_path / "first", rank_all=True).images["hash"].dropna()
        (tmp_path / "avoid").write_text(f"{hashes.iloc[40]}\n")
        options = options | {"avoid": str(tmp_path / "avoid")}
    images = run_on(odd, tmp_path / "run", **options).images
    for reason in reasons:
        row = images[images["reason"] == reason].iloc[0]
        label = images[images["label"] == row["label"]]
        out = told(tmp_path / "run", row["id"])
        ranked = label["rank"].notna().sum()
        why = WHY[reason].format(keep=8, ranked=ranked, photos=len(label), run=tmp_path / "run")
        assert f"kept:         {why}" in out
        assert f"photo:        {row['id']} ({row['path']})\n" in out
        assert f"label:        {row['label']}, {len(label)} photos, of which {label['kept'].sum()} are kept\n" in out
        if pd.notna(row["rank"]):
            assert f"rank:         {row['rank']:.0f} of {ranked} (the first is 0)" in out
        if row["kept"]:
            assert "nearest kept" not in out
        elif pd.notna(row["nearest_kept"]):
            path = label.set_index("id").loc[row["nearest_kept"], "path"]
            far = row["nearest_kept_distance"]
            near = " (a near copy)" if far <= 6 else ""
            assert f"nearest kept: {row['nearest_kept']} ({path}), {far:g} bits away{near}\n" in out
        assert ("error:" in out) == (reason == "failed")


def test_a_photo_under_two_labels_has_two_stories_and_is_like_itself(odd: Path, tmp_path: Path) -> None:
    run_on(odd, tmp_path / "run", rank_all=True, cross_label=True)
    photo, label = (odd / "train.csv").read_text().splitlines()[1].split(",")
    stories = explain(tmp_path / "run", photo)
    assert {story.row["label"] for story in stories} == {label, "other"}
    for story in stories:
        other = ({label, "other"} - {story.row["label"]}).pop()
        assert {"id": photo, "label": other, "distance": 0.0} in story.other_labels
    assert told(tmp_path / "run", photo).count(f"like:         {photo} of label ") == 2


def test_photos_that_are_not_there(odd: Path, tmp_path: Path) -> None:
    images = run_on(odd, tmp_path / "run", partition_images=30).images
    code, _, err = invoke("explain", tmp_path / "run", "nobody")
    assert (code, "has the id 'nobody': expected one as its manifest writes it" in err) == (2, True)
    part = sorted((tmp_path / "run" / "images").glob("part-0*"))[0]
    lost = set(pd.read_parquet(part)["id"])
    part.unlink()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"status": "stopped"}))
    code, _, err = invoke("explain", tmp_path / "run", sorted(lost)[0])
    assert (code, "is not in the ledger yet: the run is not finished" in err) == (2, True)
    there = next(photo for photo in images["id"] if photo not in lost)
    assert "photo:" in told(tmp_path / "run", there)
    assert invoke("explain", tmp_path, there)[0] == 2
