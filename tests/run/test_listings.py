"""Listings of a run folder: on S3 each is a request per 1,000 names, so their number may not grow with the parts."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from tarfiles import write_tars

from reducer import ClusterSpec, Job, reduce_images

LABELS, PHOTOS_PER_LABEL, DIMENSIONS = 24, 3, 8
SERIAL = ClusterSpec(workers=0)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Listings of folders, counted by the folder's name."""
    counts: Counter[str] = Counter()
    real = LocalFileSystem.ls

    def ls(system: LocalFileSystem, path: str, **options: Any) -> Any:
        counts[Path(path).name] += 1
        return real(system, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    return counts


def listings_of_a_budget(folder: Path, listed: Counter[str], partition_images: int) -> dict[str, int]:
    """Run by given vectors with a budget, so that all parts are read and written again."""
    generator = np.random.default_rng(0)
    ids = [f"p{number:03d}" for number in range(LABELS * PHOTOS_PER_LABEL)]
    values = generator.standard_normal((len(ids), DIMENSIONS)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), DIMENSIONS)
    folder.mkdir()
    pq.write_table(pa.table({"id": ids, "vector": vectors}), folder / "v.parquet")
    lines = [f"{name},{number // PHOTOS_PER_LABEL}" for number, name in enumerate(ids)]
    (folder / "m.csv").write_text("\n".join(["id,landmark_id", *lines]) + "\n")
    job = Job(
        *("nowhere", str(folder / "run")),
        manifest=str(folder / "m.csv"),
        path_template="{id}",
        vectors=str(folder / "v.parquet"),
        total=40,
        partition_images=partition_images,
        report=False,
    )
    listed.clear()
    reduce_images(job, SERIAL, progress=False)
    return dict(listed)


def test_a_budget_lists_vectors_once_however_many_parts_there_are(tmp_path: Path, listed: Counter[str]) -> None:
    few = listings_of_a_budget(tmp_path / "few", listed, partition_images=36)
    many = listings_of_a_budget(tmp_path / "many", listed, partition_images=3)
    assert len(list((tmp_path / "few" / "run" / "vectors").iterdir())) == 2
    assert len(list((tmp_path / "many" / "run" / "vectors").iterdir())) == LABELS
    assert many == few
    assert {"vectors", "images"} <= few.keys()


def listings_of_a_reuse(folder: Path, listed: Counter[str], shards: int) -> dict[str, int]:
    """Run on shards of two photos each, then anew with the hashes of the first run."""
    generator = np.random.default_rng(0)
    members: dict[str, list[tuple[str, bytes]]] = {}
    for number in range(2 * shards):
        png = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(png, "PNG")
        members.setdefault(f"{number // 2:02d}.tar", []).append((f"p{number:03d}.png", png.getvalue()))
    tars = write_tars(folder / "tars", members)
    lines = [f"p{number:03d},{number % 2}" for number in range(2 * shards)]
    (folder / "m.csv").write_text("\n".join(["id,landmark_id", *lines]) + "\n")
    job = Job(str(tars), str(folder / "old"), manifest=str(folder / "m.csv"), keep=1, report=False)
    reduce_images(job, SERIAL, progress=False)
    job = Job(
        *(str(tars), str(folder / "new")),
        manifest=str(folder / "m.csv"),
        keep=2,
        reuse=str(folder / "old"),
        report=False,
    )
    listed.clear()
    result = reduce_images(job, SERIAL, progress=False)
    assert result.summary["photos_read"] == 0
    assert result.summary["photos_reused"] == 2 * shards
    del listed["tars"]
    return dict(listed)


def test_shards_that_are_reused_are_listed_once(tmp_path: Path, listed: Counter[str]) -> None:
    few = listings_of_a_reuse(tmp_path / "few", listed, shards=3)
    many = listings_of_a_reuse(tmp_path / "many", listed, shards=12)
    assert many == few
    assert "hashes" in few
