from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from jobs import run_on
from PIL import Image

from reducer import InputError
from reducer.api.sample import CHANGES, GLDV2_QUANTILES, HEIGHT, WIDTH, label_sizes, write_sample


def test_the_layout_is_gldv2_s_and_the_truth_is_told(collection: Path) -> None:
    train = pd.read_csv(collection / "train.csv", dtype=str)
    truth = pd.read_csv(collection / "truth.csv", dtype=str)
    assert list(train.columns) == ["id", "landmark_id"]
    assert list(truth.columns) == ["id", "view", "change"]
    assert truth["id"].tolist() == train["id"].tolist()
    assert len(train) == train["id"].nunique() == 240
    assert train["landmark_id"].nunique() == 12
    assert set(truth["change"]) == {"original", *CHANGES}
    for photo, change in zip(truth["id"], truth["change"], strict=True):
        path = collection / "train" / photo[0] / photo[1] / photo[2] / f"{photo}.jpg"
        assert 60_000 <= path.stat().st_size <= 150_000
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert (image.size == (WIDTH, HEIGHT)) == (change != "resize")
    assert len(list((collection / "train").rglob("*.jpg"))) == 240
    originals = truth[truth["change"] == "original"]
    assert originals["view"].nunique() == len(originals) == truth["view"].nunique()


def test_near_copies_are_near_to_dhash_and_crops_and_flips_are_not(collection: Path, tmp_path: Path) -> None:
    images = run_on(collection, tmp_path / "run", rank_all=True).images.merge(pd.read_csv(collection / "truth.csv"))
    originals = images[images["change"] == "original"].set_index("view")["hash"]
    apart: dict[str, list[int]] = {change: [] for change in CHANGES}
    for row in images[images["change"] != "original"].itertuples():
        apart[row.change].append((int(row.hash, 16) ^ int(originals[row.view], 16)).bit_count())
    median = {change: float(np.median(found)) for change, found in apart.items()}
    assert max(median[change] for change in ("brightness", "quality", "resize")) <= 3
    assert min(median[change] for change in ("crop", "flip")) > 6


def test_reducing_removes_the_copies(collection: Path, tmp_path: Path) -> None:
    near = {}
    for strategy in ("farthest-first", "pairs"):
        quality = run_on(collection, tmp_path / strategy, strategy=strategy).summary["quality"]
        near[strategy] = quality["selection"]["near_copy_pairs"]
        near["random"] = quality["random"]["near_copy_pairs"]
    assert near["farthest-first"] < near["random"] / 2
    assert near["random"] < near["pairs"]


@pytest.mark.parametrize(("labels", "images"), [(1, 2), (1, 500), (60, 2000), (60, 120), (1000, 19_400)])
def test_label_sizes_have_the_shape_of_the_histogram(labels: int, images: int) -> None:
    sizes = label_sizes(labels, images)
    assert sizes.sum() == images
    assert len(sizes) == labels
    assert sizes.min() >= 2
    if labels == 1000:  # GLDv2's own mean: its quantiles come out again
        for share, size in GLDV2_QUANTILES[1:13]:
            assert sizes[int(share * labels)] == pytest.approx(size, rel=0.15, abs=1.5)


def test_the_same_seed_draws_the_same_files(tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        write_sample(str(tmp_path / name), labels=3, images=12, seed=seed, progress=False)
        found = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in found}

    one = files("one", 0)
    assert len(one) == 14
    assert files("again", 0) == one
    assert Counter(len(name) for name in files("other", 1)) == Counter(len(name) for name in one)
    assert not set(files("third", 2)) & {name for name in one if name.endswith(".jpg")}


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    for options, message in [
        ({"labels": 0}, "--labels is 0"),
        ({"labels": 60, "images": 119}, "need at least 120, two each"),
    ]:
        with pytest.raises(InputError, match=message):
            write_sample(str(tmp_path / "x"), **options)
    (tmp_path / "mine").touch()
    for target, message in [
        (tmp_path, "not empty"),
        (tmp_path / "mine", "cannot be used"),
        (tmp_path / "mine" / "x", "cannot be used"),
    ]:
        with pytest.raises(InputError, match=message):
            write_sample(str(target))
