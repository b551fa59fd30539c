"""Runs that are made up: cutting them, comparing their labels, drawing their reports."""

from __future__ import annotations

import csv
import functools
import itertools
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from benchmarks.common import LAUNCHER, PROCESSES, kibibytes, machine, measured, say, sizes_of, table, timed

from reducer import Job
from reducer.api.sample import write_sample
from reducer.config.job import path_rule
from reducer.config.resolved import resolve
from reducer.config.settings import STORAGE_OPTIONS
from reducer.run.folder import RunFolder
from reducer.run.plan.partitions import assign, partition_count
from reducer.run.summary import failure_kinds
from reducer.run.tasks.environment import versions
from reducer.run.tasks.messages import Tally
from reducer.run.tasks.photo_results import peak_memory
from reducer.selection.cross_label import cross_label_table
from reducer.selection.quality import quality_summary, reevaluate_ledger
from reducer.selection.quality_sums import Quality
from reducer.storage.paths import paths_by_rule
from reducer.storage.schemas import BEYOND_KEEP, FAILED, KEPT, LEDGER_SCHEMA, NOT_SAMPLED
from reducer.storage.tables import counts, with_column

PROGRAM = [sys.executable, "-m", "reducer"]


def write_run(folder: Path, summary: dict[str, object], parts: Iterator[pa.Table]) -> None:
    """Write a finished run: all that is known here of how a run folder is written."""
    run = RunFolder(str(folder))
    run.start(summary | {"status": "running"})
    for index, part in enumerate(parts):
        run.parts.write(index, part, Tally(), "bits")
    run.write_summary(summary | {"status": "done"})


def hex_digits(packed: np.ndarray) -> np.ndarray:
    """Rows of 8 bytes as 16 hex digits."""
    return np.frombuffer(packed.tobytes().hex().encode(), dtype="S16")


def generated_hashes(generator: np.random.Generator, label: np.ndarray, read: np.ndarray) -> np.ndarray:
    """64-bit hashes, as words: of each label some views with about 20 near copies each, and what goes wrong.

    One photo in 500 has the hash of a photo of another label, or one that is within 2 bits of it, and one in 5,000 is
    flat: no bit is set.
    """
    views = np.maximum(1, np.bincount(label, weights=read).astype(np.int64) // 20)
    view = (np.cumsum(views) - views)[label] + (generator.random(len(label)) * views[label]).astype(np.int64)
    # In whole numbers, since 64 floats a photo would take a gigabyte.
    noise = np.packbits(generator.integers(0, 25, (len(label), 64), dtype=np.uint8) == 0, axis=1)
    words = generator.integers(0, 2**64, int(views.sum()), dtype=np.uint64)[view] ^ noise.view(np.uint64)[:, 0]

    places = np.flatnonzero(read)
    wrong = -(-len(places) // 500)
    original, copy = generator.choice(places, (2, wrong), replace=False)
    original, copy = (side[label[original] != label[copy]] for side in (original, copy))
    words[copy] = words[original]
    for _ in range(2):
        bit = np.uint64(1) << generator.integers(0, 64, len(copy), dtype=np.uint64)
        words[copy] ^= bit * generator.integers(0, 2, len(copy), dtype=np.uint64)
    words[generator.choice(places, -(-len(places) // 5000), replace=False)] = 0
    return words


def generate_run(folder: Path, sizes: np.ndarray) -> None:
    """Write the folder of a run with ``--rank-all`` over labels of these sizes, without any photo.

    The ledger is as large and as varied as a real one, and no more: ranks are drawn, and insertion distances only fall
    with them as they would, whatever the hashes say; the nearest kept photo is just one of those kept.
    """
    job = Job("/photos/train", str(folder), manifest="/photos/train.csv", keep=25, candidates=1000, rank_all=True)
    generator = np.random.default_rng(0)
    labels, photos = len(sizes), int(sizes.sum())
    names = np.sort(generator.permutation(5 * labels)[:labels].astype(str))
    sizes = generator.permutation(sizes)
    drawn = np.minimum(sizes, job.candidates)
    partition = assign(drawn, partition_count(int(drawn.sum()), PROCESSES))
    # Labels in the order of the parts, so that each part is a slice.
    order = np.argsort(partition, kind="stable")
    names, sizes, drawn, partition = names[order], sizes[order], drawn[order], partition[order]

    label = np.repeat(np.arange(labels), sizes)
    # An odd number times different ones gives different ones, modulo any power of two.
    ids = generator.permutation(np.arange(1, photos + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    ids = ids[np.lexsort((ids, label))]
    by_rank = np.lexsort((generator.random(photos), label))
    starts = (np.cumsum(sizes) - sizes)[label]
    rank = np.empty(photos, dtype=np.int64)
    rank[by_rank] = np.arange(photos) - starts
    read = rank < job.candidates
    kept = rank < job.keep
    height = generator.uniform(30, 36, labels)[label]
    insertion = np.rint(height * (1 - rank / drawn[label]) ** 2)
    nearest = by_rank[starts + np.where(kept, rank, generator.integers(0, job.keep, photos) % drawn[label])]
    words = generated_hashes(generator, label, read)

    # Only of photos that were read.
    found = {
        "bytes": generator.lognormal(np.log(142_000) - 0.5**2 / 2, 0.5, photos).astype(np.int64),
        "width": np.full(photos, 800),
        "height": np.full(photos, 600),
        "format": np.full(photos, "JPEG"),
        "mtime": 1_600_000_000 * 10**9 + generator.integers(0, 10**16, photos),
        "hash": hex_digits(words),
        "rank": rank,
        "nearest_kept": hex_digits(ids.astype(">u8"))[nearest],
        "nearest_kept_distance": np.where(kept, 0, insertion),
    }
    columns = {name: pa.array(values, LEDGER_SCHEMA.field(name).type, mask=~read) for name, values in found.items()}
    columns["insertion_distance"] = pa.array(insertion, pa.float64(), mask=~read | (rank == 0))
    columns["row"] = pa.array(generator.permutation(photos))
    columns["id"] = pa.array(hex_digits(ids.astype(">u8")), pa.string())
    columns["label"] = pa.array(names.tolist(), pa.string()).take(pa.array(label))
    columns["path"] = paths_by_rule(path_rule(job), columns["id"], columns["label"])
    columns["kept"] = pa.array(kept)
    columns["reason"] = pa.array([KEPT, BEYOND_KEEP, NOT_SAMPLED]).take(pa.array(np.select([kept, read], [0, 1], 2)))
    ledger = pa.table([columns.get(f.name, pa.nulls(photos, f.type)) for f in LEDGER_SCHEMA], schema=LEDGER_SCHEMA)

    def parts() -> Iterator[pa.Table]:
        ranked, unread = ledger.filter(pa.array(read)), ledger.filter(pa.array(~read))
        ends = np.cumsum(np.bincount(partition, weights=drawn)).astype(np.int64).tolist()
        for start, end in itertools.pairwise([0, *ends]):
            yield ranked.slice(start, end - start)
        for start in range(0, unread.num_rows, 100_000):
            yield unread.slice(start, 100_000)

    reasons = pc.value_counts(ledger["reason"]).to_pylist()
    summary = {
        "run": "generated",
        "resumed": 0,
        "job": resolve(job).as_asked() | {name: [] for name in STORAGE_OPTIONS},
        "manifest": {"rows": photos, "duplicate_rows": 0, "ids_under_several_labels": 0},
        "labels": labels,
        "photos": photos,
        "photos_to_read": int(read.sum()),
        "photos_read": int(read.sum()),
        "photos_failed": 0,
        "photos_kept": int(kept.sum()),
        "reasons": {pair["values"]: pair["counts"] for pair in reasons},
    }
    write_run(folder, summary, parts())


def complete_run(folder: Path, photos: list[str]) -> None:
    """Give a generated run what a report shows: quality, failures, near copies across labels, photos behind the paths.

    Parameters
    ----------
    folder : Path
        The run, from `generate_run`.
    photos : list of str
        Paths of photos; the photos of the run are these, in turn.
    """
    run = RunFolder(str(folder))
    summary = run.read_summary()
    settings = resolve(Job("-", "-", keep=summary["job"]["keep"])).photo_settings
    total = Quality()
    for name in run.parts.names():
        rows, tally = run.parts.read(name)
        paths = pa.array(photos).take(pa.array(rows["row"].to_numpy() % len(photos)))
        rows = with_column(rows, "path", paths)
        if rows["hash"].null_count == rows.num_rows:
            broken = pc.equal(pc.bit_wise_and(rows["row"], 7), 0)  # one in eight of those that were not drawn
            rows = with_column(rows, "reason", pc.if_else(broken, FAILED, rows["reason"]))
            rows = with_column(rows, "error", pc.if_else(broken, "broken: OSError: image file is truncated", None))
        else:
            rows, found, _ = reevaluate_ledger(rows, None, np.zeros(rows.num_rows, dtype=bool), settings)
            total += found
        run.parts.replace(name, rows, tally, "bits")
    run.lists.write_cross_label(cross_label_table(run.parts.ledger(["id", "label", "path", "hash"]), settings.bits))
    ledger = run.parts.ledger(["kept", "bytes", "rank", "reason", "error", "label"])
    pairs = run.lists.read_cross_label()
    run.write_summary(
        summary
        | {
            "started": "2026-01-01T00:00:00+00:00",
            "labels_ranked": pc.count_distinct(ledger.filter(pc.is_valid(ledger["rank"]))["label"]).as_py(),
            "labels_without_photos": [],
            "labels_short": [],
            "labels_partitioned": [],
            "always_keep_failed": [],
            "reasons": counts(ledger["reason"]),
            "failures": failure_kinds(ledger["error"]),
            "bytes_read": pc.sum(ledger["bytes"]).as_py() or 0,
            "photos_per_second": None,
            "photos_reused": 0,
            "quality": quality_summary(total, settings.bits),
            "cross_label_pairs": 0 if pairs is None else pairs.num_rows,
            "timings": {"cross_label_seconds": 0.0},
            "versions": versions(),
            "manifest": summary["manifest"] | {"skipped_files": {}},
        }
    )


def cut(sizes: str, keep_in: str | None, repetitions: int) -> None:
    """Time and peak memory of `reducer cut`, and of comparing all photos across labels, on a run made for it."""
    of_label = sizes_of(sizes)
    if keep_in and Path(keep_in).exists() and any(Path(keep_in).iterdir()):
        sys.exit(f"--keep-in {keep_in} is not empty: give another folder")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(keep_in) if keep_in else Path(temporary) / "run"
        print(f"generating a run of {of_label.sum()} photos ...", file=sys.stderr)
        print(f"generated in {timed(lambda: generate_run(run, of_label)):.1f} s", file=sys.stderr)
        ways, peaks = {}, {}
        for name, rules in [
            ("keep.csv", "--keep 25"),
            ("distance.csv", "--min-distance 12"),
            ("bytes.csv", "--max-bytes 20GB"),
            ("total.csv", "--total 500000 --min-per-label 2"),
            ("keep.parquet", "--keep 25"),
        ]:
            shown = f"`reducer cut RUN --output {name} {rules}`"
            command = [*PROGRAM, "cut", str(run), "--output", str(Path(temporary) / name), *rules.split()]
            ways[shown] = functools.partial(launched, shown, command, peaks)
        for shown, seconds in measured(ways, repetitions).items():
            output = Path(temporary) / shown.split()[4]
            rows.append([shown, photos_listed(output), seconds, round(peaks[shown])])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            compared = pool.apply(compare_across_labels, (str(run),))
    photos = f"{of_label.sum()} photos of {len(of_label)} labels"
    say(f"{photos}, without photos behind them, in the page cache, median of {repetitions} rounds, {machine()}")
    table(["command", "photos kept", "seconds", "peak memory, MiB"], rows)
    table(["in one process", "pairs", "seconds", "peak memory, MiB"], compared)


def report(sizes: str, repetitions: int) -> None:
    """Time, peak memory and size of `reducer report`, on a run made for it."""
    of_label = sizes_of(sizes)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        print(f"generating a run of {of_label.sum()} photos ...", file=sys.stderr)
        write_sample(str(Path(temporary) / "sample"), labels=20, images=500)
        photos = sorted(map(str, (Path(temporary) / "sample" / "train").rglob("*.jpg")))
        generate_run(run, of_label)
        complete_run(run, photos)
        ways, peaks, pages = {}, {}, {}
        for given in ("", "--gallery-photos 0", "--gallery-photos 2000"):
            shown = f"`reducer report RUN {given}`".replace(" `", "`")
            command = [*PROGRAM, "report", str(run), "--quiet", *given.split()]

            def draw(shown: str = shown, command: list[str] = command) -> float:
                seconds = launched(shown, command, peaks)
                pages[shown] = (run / "report.html").read_text()
                return seconds

            ways[shown] = draw
        for shown, seconds in measured(ways, repetitions).items():
            page = pages[shown]
            rows.append([shown, page.count("<img"), seconds, round(peaks[shown]), len(page.encode()) / 1e6])
    say(
        f"{of_label.sum()} photos of {len(of_label)} labels, in the page cache, median of {repetitions} rounds, "
        f"{machine()}"
    )
    table(["command", "pictures", "seconds", "peak memory, MiB", "MB"], rows)


def launched(name: str, command: list[str], peaks: dict[str, float]) -> float:
    """Seconds of a command; its peak memory in MiB goes to ``peaks``."""
    seconds, peak = subprocess.check_output([sys.executable, "-c", LAUNCHER, *command], text=True).split()
    peaks[name] = max(peaks.get(name, 0.0), kibibytes(peak) / 2**10)
    return float(seconds)


def photos_listed(path: Path) -> int:
    """Photos of a reduced list."""
    if path.suffix == ".parquet":
        return pa.parquet.read_metadata(path).num_rows
    with open(path, newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def compare_across_labels(folder: str) -> list[list[object]]:
    start = time.perf_counter()
    ledger = RunFolder(folder).parts.ledger(["id", "label", "path", "hash"])
    rows = [["reading the ledger", "", time.perf_counter() - start, round(peak_memory() / 2**20)]]
    start = time.perf_counter()
    pairs = cross_label_table(ledger, 64).num_rows
    return [*rows, ["`cross_label_table`", pairs, time.perf_counter() - start, round(peak_memory() / 2**20)]]
