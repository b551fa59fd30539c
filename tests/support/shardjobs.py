"""Jobs on tar shards, and what they leave, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from jobs import SERIAL
from tarfiles import packed, write_tars

from reducer import ClusterSpec, Job, reduce_images
from reducer.run.folder import RunFolder

SHARDS = 6


def run_of(images: Path | str, output: Path, manifest: Path | str | None, spec: ClusterSpec = SERIAL, **others: Any):
    settings: dict[str, Any] = {"keep": 8, "manifest": None if manifest is None else str(manifest), "report": False}
    settings |= others
    return reduce_images(Job(str(images), str(output), **settings), spec, progress=False)


def rows_of(run: Path) -> pd.DataFrame:
    """The ledger by id."""
    return RunFolder(str(run)).parts.ledger().to_pandas().set_index("id")


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def hashed(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "hashes").glob("part-*.parquet"))


def csv_of(run: Path) -> bytes:
    return (run / "reduced.csv").read_bytes()


def manifest_of(path: Path, rows: list[tuple[str, str]], *more: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["id,landmark_id", *(f"{name},{label}" for name, label in rows), *more]) + "\n")
    return path


def but_for_the_place(run: Path) -> pd.DataFrame:
    rows = rows_of(run).drop(columns=["mtime", "etag"])
    return rows.assign(shard=rows["shard"].str.rpartition("/")[2])


def assert_same_rows(run: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(but_for_the_place(run), but_for_the_place(other))


def small_job(
    tmp_path: Path, shards: dict[str, list[tuple[str, Any]]], rows: list[tuple[str, str]], **given: Any
) -> pd.DataFrame:
    """The ledger of a job on a few photos; all failures allowed."""
    tars = write_tars(tmp_path / "tars", shards)
    manifest = manifest_of(tmp_path / "m.csv", rows)
    run_of(tars, tmp_path / "run", manifest, **{"keep": 2, "max_failures": 1.0, **given})
    frame: pd.DataFrame = RunFolder(str(tmp_path / "run")).parts.ledger().to_pandas()
    return frame


def content_at(row: pd.Series) -> bytes:
    with open(row["shard"], "rb") as file:
        file.seek(int(row["offset"]))
        return file.read(int(row["bytes"]))


def samples_of(photos: dict[str, bytes], labels: dict[str, str], form: str, shards: int, seed: int = 0) -> Any:
    found = {}
    for name, members in packed(photos, shards, seed, lambda key: f"{key}.jpg").items():
        files = []
        for path, content in members:
            key = path.removesuffix(".jpg")
            beside = (f"{key}.cls", f"{labels[key]}\n".encode())
            if form == "json":
                beside = (f"{key}.json", json.dumps({"x": [1], "place": labels[key], "caption": "é"}).encode())
            files += [beside, (path, content)] if seed % 2 else [(path, content), beside]
        found[name] = files
    return found


def lines_of(run: Path) -> list[str]:
    return sorted(csv_of(run).decode().splitlines())
