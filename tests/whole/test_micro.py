"""The pure stages, each called once as a test; or measured, so that two commits can be compared.

    pytest tests/whole/test_micro.py --benchmark-enable --benchmark-save=before
    pytest tests/whole/test_micro.py --benchmark-enable --benchmark-save=after
    pytest-benchmark compare --group-by=name --columns=min,median,stddev,rounds

``pyproject.toml`` disables measuring; ``-n`` of pytest-xdist does too, whatever is asked for.
"""

from __future__ import annotations

import io
from pathlib import Path

import imagehash
import numpy as np
import pytest
from jobs import run_on
from numpy.typing import NDArray
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from reducer import Job, cut
from reducer.api.sample import label_sizes
from reducer.config.resolved import resolve
from reducer.config.settings import DECODE_NAMES, STRATEGY_NAMES
from reducer.photos.hashing import hash_photo
from reducer.run.plan.plan import Plan, make_plan
from reducer.selection.distance import Hamming
from reducer.selection.strategies import STRATEGIES, Candidates

#: Photos of the manifest that is planned, and its labels: as many a label as in GLDv2.
ROWS, LABELS = 100_000, 5_144
KEEP = 8


@pytest.fixture(scope="module")
def pictures(collection: Path) -> dict[str, bytes]:
    """The bytes of a drawn photo as an 800x600 and a 12-megapixel JPEG, and as a PNG."""
    found = {}
    with Image.open(min((collection / "train").rglob("*.jpg"))) as drawn:
        for name, size, kind in (
            ("jpeg", (800, 600), "JPEG"),
            ("jpeg-12mp", (4000, 3000), "JPEG"),
            ("png", (800, 600), "PNG"),
        ):
            content = io.BytesIO()
            drawn.resize(size).save(content, kind, quality=90)
            found[name] = content.getvalue()
    return found


@pytest.mark.parametrize("decode", DECODE_NAMES)
@pytest.mark.parametrize("picture", ["jpeg", "jpeg-12mp", "png"])
def test_hashing(benchmark: BenchmarkFixture, pictures: dict[str, bytes], picture: str, decode: str) -> None:
    settings = resolve(Job("-", "-", decode=decode)).photo_settings
    found = benchmark(hash_photo, pictures[picture], settings)
    assert len(found.bits) == 8
    with Image.open(io.BytesIO(pictures[picture])) as image:
        expected = imagehash.dhash(image).hash
    apart = np.count_nonzero(np.unpackbits(np.frombuffer(found.bits, np.uint8)) != expected.ravel())
    # Only the fast ways to decode a JPEG may differ from imagehash.
    assert apart <= (4 if decode != "exact" and picture != "png" else 0)


def clustered_hashes(count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Hashes with about 20 near copies of each view, and their ids."""
    generator = np.random.default_rng(0)
    views = generator.integers(0, 256, (max(1, count // 20), 8), dtype=np.uint8)
    noise = np.packbits(generator.random((count, 64)) < 0.04, axis=1)
    return views[generator.integers(0, len(views), count)] ^ noise, [f"{i:07}" for i in range(count)]


@pytest.mark.parametrize(
    ("strategy", "count"), [*((name, 1_000) for name in STRATEGY_NAMES), ("farthest-first", 6_272)]
)
def test_ranking(benchmark: BenchmarkFixture, strategy: str, count: int) -> None:
    hashes, ids = clustered_hashes(count)
    ranking = benchmark(STRATEGIES[strategy], Candidates(Hamming(hashes), ids, keep=25, label="label"))
    assert sorted(ranking.order.tolist()) == list(range(count))
    assert np.isnan(ranking.insertion_distance[0])
    first, second = np.unpackbits(hashes[ranking.order[:2]], axis=1)
    assert ranking.insertion_distance[1] == np.count_nonzero(first != second)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest in GLDv2's shape, in random order; no photo needs to exist."""
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "train").mkdir()
    label = np.repeat(np.arange(LABELS), label_sizes(LABELS, ROWS))
    order = np.random.default_rng(0).permutation(ROWS)
    rows = (f"{number:016x},{its}\n" for number, its in zip(order.tolist(), label[order].tolist(), strict=True))
    (folder / "train.csv").write_text("id,landmark_id\n" + "".join(rows))
    return folder / "train.csv"


def test_planning(benchmark: BenchmarkFixture, manifest: Path) -> None:
    job = Job(str(manifest.parent / "train"), str(manifest.parent / "run"), manifest=str(manifest))

    def planned() -> Plan:
        return make_plan(resolve(job)).numbered(2)

    plan = benchmark(planned)
    assert plan.rows.num_rows == ROWS
    sizes = [rows.num_rows for rows in plan.partitions().values()]
    assert sum(sizes) == np.count_nonzero(plan.is_read)
    assert len(sizes) > 2


def test_partitions(benchmark: BenchmarkFixture, manifest: Path) -> None:
    job = Job(str(manifest.parent / "train"), str(manifest.parent / "run"), manifest=str(manifest))
    plan = make_plan(resolve(job)).numbered(2)
    partitions = benchmark(plan.partitions)
    assert list(partitions) == sorted(partitions)
    labels = [set(rows["label"].to_pylist()) for rows in partitions.values()]
    assert sum(map(len, labels)) == len(set().union(*labels))  # no label in two of them


@pytest.fixture(scope="module")
def ranked(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ranks all labels of the collection."""
    run = tmp_path_factory.mktemp("ranked") / "run"
    run_on(collection, run, keep=KEEP, rank_all=True)
    return run


@pytest.mark.parametrize(
    "rules", [{"keep": 4}, {"min_distance": 12}, {"total": 60}], ids=lambda rules: next(iter(rules))
)
def test_cut(benchmark: BenchmarkFixture, ranked: Path, rules: dict[str, int]) -> None:
    found = benchmark(cut, ranked, **rules)
    sizes = found.reduced.groupby("landmark_id").size()
    assert len(sizes) == 12
    if "keep" in rules:
        assert sizes.max() == 4
    assert found.photos == len(found.reduced)
    assert "total" not in rules or found.photos == 60
