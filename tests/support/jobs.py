"""Jobs on collections, and what they leave, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reducer import ClusterSpec, Job, reduce_images
from reducer.api.result import Result
from reducer.run.folder import RunFolder
from reducer.storage.codecs import from_lists
from reducer.storage.location import Location

READERS = ("s3fs", "obstore")
SERIAL = ClusterSpec(workers=0)
IN_PROCESS = ClusterSpec(
    class_path="distributed.LocalCluster",
    kwargs={"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None},
)


def job_on(collection: Path, output: Path, **options: object) -> Job:
    """A job; its report, which takes a second to draw, is left to tests/outputs/test_report.py."""
    settings: dict[str, object] = {"keep": 8, "manifest": str(collection / "train.csv"), "report": False, **options}
    return Job(str(collection / "train"), str(output), **settings)  # type: ignore[arg-type]


def run_on(collection: Path, output: Path, spec: ClusterSpec | None = None, **options: object) -> Result:
    return reduce_images(job_on(collection, output, **options), spec or ClusterSpec(workers=0), progress=False)


def reduced_files(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("reduced.csv", "reduced.parquet")}


def ledger(run: Path | Location) -> pa.Table:
    return RunFolder(run if isinstance(run, Location) else str(run)).parts.ledger()


def ledger_of(run: Path):
    parts = sorted((run / "images").glob("part-*.parquet"))
    # What the parts add up to stands in their schemas: that is the run's, not the rows'.
    return pq.ParquetDataset([str(part) for part in parts]).read().sort_by("row").replace_schema_metadata(None)


def kept_vectors(run: Path) -> dict[str, bytes | None]:
    table = pq.read_table(run / "vectors")
    return dict(zip(table["id"].to_pylist(), from_lists(table["vector"]).to_pylist(), strict=True))


def parts(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "images").glob("part-*.parquet"))


def shorten(run: Path, left: int) -> None:
    """As if a run had been killed when so many of its partitions were done."""
    for name in parts(run)[left:]:
        (run / "images" / name).unlink()
    for name in ("reduced.csv", "reduced.parquet"):
        (run / name).unlink()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))
