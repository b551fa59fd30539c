"""Ranking by vectors: what each strategy keeps of a known mixture, what a million takes, how fast a model goes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks.common import KEEP, PROCESSES, linked_collection, machine, measured, run_job, say, table, timed
from benchmarks.planning import alone
from numpy.typing import NDArray

from reducer import ClusterSpec, Job, reduce_images
from reducer.api.sample import label_sizes
from reducer.config.resolved import resolve
from reducer.photos.hashing import hash_photo
from reducer.photos.model import PATHS, picture_of, vectors_of
from reducer.run.tasks.photo_results import peak_memory
from reducer.selection.distance import Cosine
from reducer.selection.strategies import STRATEGIES, Candidates
from reducer.storage.codecs import as_units

STRATEGIES_BY_VECTORS = ("facility-location", "farthest-first", "random")
#: Of a mixture: photos that are no copies, copies, and of all of them the share that is under a wrong label.
VIEWS, COPIES, WRONG = 300, 150, 0.1
#: Rows of a row group of the vectors that are ranked.
ROW_GROUP = 20_000


@dataclass(frozen=True)
class Mixture:
    """Vectors of a label of which all is known: the mode of each photo, and which are of another label."""

    units: NDArray[np.float16]
    mode: NDArray[np.int64]
    wrong: NDArray[np.bool_]


def mixture_of(seed: int, modes: int, dimensions: int, noise: float) -> Mixture:
    """Draw one: modes of unequal sizes, a third of the photos copies, strays from 40 modes of other labels.

    Parameters
    ----------
    seed, modes, dimensions : int
    noise : float
        Deviation of a photo from its mode in each dimension, of which modes themselves have a deviation of 1.
    """
    generator = np.random.default_rng(seed)
    centres, others = generator.normal(size=(modes, dimensions)), generator.normal(size=(40, dimensions))
    mode = generator.choice(modes, VIEWS, p=generator.dirichlet(np.ones(modes)))
    views = centres[mode] + noise * generator.normal(size=(VIEWS, dimensions))
    copied = generator.integers(0, VIEWS, COPIES)
    vectors = np.concatenate([views, views[copied] + 0.02 * generator.normal(size=(COPIES, dimensions))])
    wrong = generator.random(len(vectors)) < WRONG
    strays = int(wrong.sum())
    vectors[wrong] = others[generator.integers(0, 40, strays)] + noise * generator.normal(size=(strays, dimensions))
    return Mixture(as_units(vectors)[0], np.concatenate([mode, mode[copied]]), wrong)


def mixture(repetitions: int) -> None:
    """Modes covered and wrong labels kept of a mixture of which all is known, per strategy; means over draws."""
    rows = []
    for dimensions, modes, noise in ((64, 20, 0.5), (64, 20, 1.0), (64, 40, 1.0), (512, 20, 1.0), (512, 20, 2.0)):
        drawn = [mixture_of(seed, modes, dimensions, noise) for seed in range(repetitions)]
        for name in STRATEGIES_BY_VECTORS:
            covered, wrong = [], []
            for seed, one in enumerate(drawn):
                ids = [f"{i:04}" for i in range(len(one.units))]
                kept = STRATEGIES[name](Candidates(Cosine(one.units), ids, keep=KEEP, seed=seed)).order[:KEEP]
                right = ~one.wrong
                covered.append(len(np.unique(one.mode[kept][right[kept]])) / len(np.unique(one.mode[right])))
                wrong.append(one.wrong[kept].mean())
            error = np.std(wrong) / np.sqrt(len(wrong))
            own = [f"{dimensions}", modes, noise, name, f"{np.mean(covered):.0%}"]
            rows.append([*own, f"{np.mean(wrong):.1%} ± {error:.1%}"])
    say(
        f"{VIEWS} photos and {COPIES} copies of one label, {WRONG:.0%} of them strays of other labels, K = {KEEP}, "
        f"mean of {repetitions} draws"
    )
    table(["dimensions", "modes", "noise", "strategy", "modes covered", "wrong labels among the kept"], rows)


def write_vectors(folder: Path, photos: int, dimensions: int, labels: int) -> None:
    """A manifest and vectors in another order, in clusters of 8 a label."""
    generator = np.random.default_rng(0)
    sizes = KEEP + 1 + label_sizes(labels, photos - (KEEP + 1) * labels)
    label = np.repeat(np.arange(labels), sizes)
    ids = np.array([f"{i:016x}" for i in generator.permutation(photos)])
    rows = pa.table({"id": ids, "landmark_id": label}).take(pa.array(generator.permutation(photos)))
    pa.csv.write_csv(rows, folder / "train.csv", pa.csv.WriteOptions(quoting_style="none"))
    schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), dimensions))])
    order = generator.permutation(photos)
    with pq.ParquetWriter(folder / "vectors.parquet", schema, use_dictionary=False) as writer:
        for start in range(0, photos, ROW_GROUP):
            own = order[start : start + ROW_GROUP]
            # A mode's centre depends on the label and on which of its modes it is, not on when it is drawn.
            modes = label[own] * 8 + generator.integers(0, 8, len(own))
            centres = np.stack([np.random.default_rng(mode).standard_normal(dimensions, np.float32) for mode in modes])
            found = centres + generator.standard_normal((len(own), dimensions), np.float32) / 2
            lists = pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), dimensions)
            writer.write_table(pa.Table.from_arrays([pa.array(ids[own]), lists], schema=schema))


def rank_vectors(folder: str, strategy: str) -> dict[str, float]:
    """A run by vectors alone on two workers of a LocalCluster."""
    shutil.rmtree(f"{folder}/run", ignore_errors=True)
    job = Job(
        f"{folder}/nowhere",
        f"{folder}/run",
        manifest=f"{folder}/train.csv",
        vectors=f"{folder}/vectors.parquet",
        strategy=strategy,
        candidates=None,
        report=False,
    )
    summary = reduce_images(job, ClusterSpec(workers=PROCESSES), progress=False).summary
    return {
        "client": peak_memory() / 2**30,
        "worker": summary["worker_peak_memory_bytes"] / 2**30,
        **summary["timings"],
        **{name: summary[name] for name in ("photos_kept", "labels_ranked", "photos")},
    }


def vectors(photos: int, dimensions: int, labels: int, strategies: list[str], repetitions: int) -> None:
    """Whole runs by vectors that are given, from the files to ``reduced.csv``: minutes and peak memory."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        print(f"writing {photos} x {dimensions} vectors ...", file=sys.stderr)
        write_vectors(Path(temporary), photos, dimensions, labels)
        size = os.path.getsize(f"{temporary}/vectors.parquet") / 1e9
        for name in strategies:
            found: list[dict[str, float]] = []

            def run(name: str = name, found: list[dict[str, float]] = found) -> float:
                found.append(alone("rank_vectors", temporary, name, module="benchmarks.vectors"))
                return found[-1]["total_seconds"]

            seconds = measured({name: run}, repetitions, warm_up=False)[name]
            last = found[-1]
            steps = [last[f"{step}_seconds"] for step in ("plan", "hash", "write")]
            peaks = [max(one[who] for one in found) for who in ("worker", "client")]
            rows.append([name, f"{last['photos_kept']:,}", seconds, seconds * (1 / 60), *steps, *peaks])
    say(
        f"{photos:,} vectors of {dimensions} float32 numbers ({size:.1f} GB) in {labels:,} labels, K = {KEEP}, "
        f"{PROCESSES} workers of a LocalCluster, {machine()}"
    )
    header = ["strategy", "kept", "seconds", "minutes", "planning", "reading and ranking", "writing"]
    table([*header, "a worker's peak memory, GiB", "the client's, GiB"], rows)


def embed_only(work: tuple[list[str], str, bool]) -> int:
    """A bare process: read, decode (and hash), and onnxruntime on one thread, 32 photos at a time, nothing else."""
    import onnxruntime

    paths, model, hashed = work
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    settings = resolve(Job("-", "-", embed=model)).with_model().photo_settings
    assert settings.embed is not None
    mean, std = (np.array(numbers, np.float32) for numbers in (settings.embed.mean, settings.embed.std))
    count = 0
    for start in range(0, len(paths), settings.embed.batch):
        contents = [Path(path).read_bytes() for path in paths[start : start + settings.embed.batch]]
        for content in contents if hashed else ():
            hash_photo(content, settings)
        pictures = np.stack([picture_of(content, settings) for content in contents])
        given = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32)
        given *= (1 / (255 * std))[:, None, None]
        given -= (mean / std)[:, None, None]
        count += len(session.run(None, {session.get_inputs()[0].name: given})[0])
    return count


def model_only(work: tuple[int, str]) -> int:
    """A bare process: onnxruntime on one thread, 32 photos at a time, of numbers that are there already."""
    import onnxruntime

    photos, model = work
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    given = np.random.default_rng(0).standard_normal((32, 3, 224, 224), np.float32)
    for _ in range(photos // 32):
        session.run(None, {session.get_inputs()[0].name: given})
    return photos


def embed(photos: int, model: str | None, repetitions: int) -> None:
    """`reducer run --embed` against as many bare processes with onnxruntime; by default a model like MobileNetV2."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest, by_label = linked_collection(folder, photos)
        paths = [path for its in by_label.values() for path in its.values()]
        if model is None:
            sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
            import models

            model = str(models.mobilenet(folder / "mobilenet.onnx"))
        settings = resolve(Job("-", "-", embed=model)).with_model().photo_settings
        assert settings.embed is not None
        PATHS.setdefault(settings.embed.model, []).append(model)
        vectors_of([picture_of(Path(paths[0]).read_bytes(), settings)], settings.embed)  # does it fit?
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            halves = [paths[start::PROCESSES] for start in range(PROCESSES)]
            # In the place of a round to warm up, which takes minutes.
            pool.map(embed_only, [(own[:100], model, True) for own in halves], chunksize=1)

            def bare(hashed: bool) -> float:
                return timed(lambda: pool.map(embed_only, [(own, model, hashed) for own in halves]))

            def job() -> float:
                timings = run_job(folder, manifest, "run", embed=model, rank_all=True)["timings"]
                return (
                    timings["total_seconds"]
                    - timings["cluster_start_seconds"]
                    - timings.get("cluster_close_seconds", 0)
                )

            ways = {
                "bare processes, the model alone": lambda: timed(
                    lambda: pool.map(model_only, [(len(own), model) for own in halves])
                ),
                "bare processes that read, decode and embed": lambda: bare(False),
                "bare processes that hash them too": lambda: bare(True),
                "`reducer run --embed`": job,
            }
            found = measured(ways, repetitions, warm_up=False)
    bases = [found["bare processes that read, decode and embed"], found["bare processes that hash them too"]]
    rows = [[name, photos / figure, *(base / figure for base in bases)] for name, figure in found.items()]
    size = os.path.getsize(model) / 1e6 if os.path.exists(model) else 8.8
    say(f"{photos} photos, a model of {size:.1f} MB, {PROCESSES} processes of one thread, {machine()}")
    table([f"{PROCESSES} processes", "photos/s", "of the bare processes' that embed", "of those' that hash too"], rows)
