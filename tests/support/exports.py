"""Exports, and what they leave, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from reducer import ClusterSpec, ExportResult, Job, export, reduce_images
from reducer.outputs.export.layout import IMAGE_FOLDER


def exported(run: Path, target: Path, **options: Any) -> ExportResult:
    return export(run, target, **options, progress=False)


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def photos_of(target: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_below(target).items() if name.endswith(IMAGE_FOLDER)}


def collection_of(folder: Path, photos: list[tuple[str, str, bytes]]) -> Path:
    """A collection of photos, by ids and labels that may be anything, and a run on it."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, (name, label, content) in enumerate(photos):
        (folder / "images" / f"{number}.jpg").write_bytes(content)
        rows.append({"id": name, "landmark_id": label, "file": f"{number}.jpg"})
    pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
    job = Job(
        str(folder / "images"),
        str(folder / "run"),
        manifest=str(folder / "manifest.parquet"),
        path_column="file",
        rank_all=True,
        keep=100,
        report=False,
    )
    reduce_images(job, ClusterSpec(workers=0), progress=False)
    return folder / "run"
