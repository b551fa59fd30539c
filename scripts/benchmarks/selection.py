"""Choosing: what each strategy keeps, and what it takes."""

from __future__ import annotations

import functools
import random
import sys
import tracemalloc
from collections import defaultdict

import numpy as np
from benchmarks.common import KEEP, looks_at, machine, measured, photos_by_label, say, table, timed
from benchmarks.notebook import notebook_choice

from reducer.config.settings import near_copy_bits
from reducer.selection.distance import Hamming
from reducer.selection.quality import certificate, quality_summary, spread
from reducer.selection.quality_sums import Certificate, Quality, Spread
from reducer.selection.strategies import STRATEGIES, Candidates, nearest_kept


def quality(photos: str) -> None:
    """What each strategy keeps of the labels of a folder with more photos than are kept; averages over labels."""
    keep = KEEP
    worth: dict[str, list[Spread]] = defaultdict(list)
    certificates = []
    random.seed(0)
    for label, members in photos_by_label(photos).items():
        looks = looks_at([path for _, path in members])
        hashed = [(photo, look.hash.bits) for (photo, _), look in zip(members, looks, strict=True) if look.hash]
        if len(hashed) <= keep:
            continue
        ids = [photo for photo, _ in hashed]
        hashes = np.array([list(bits) for _, bits in hashed], dtype=np.uint8)
        points = Hamming(hashes)
        chosen = {"the notebook as it stands": notebook_choice(hashes)}
        for name, strategy in STRATEGIES.items():
            ranking = strategy(Candidates(points, ids, keep=keep, label=label))
            chosen[name] = ranking.order[:keep]
            if name == "farthest-first":
                certificates.append(certificate(hashes, 64, ranking.insertion_distance[:keep]))
        for name, kept in chosen.items():
            worth[name].append(spread(points, kept, nearest_kept(points, ids, kept)[1], near_copy_bits(64)))
    if not certificates:
        sys.exit(f"no label of {photos} has more than {keep} photos: nothing to choose")
    rows = []
    for name, labels in worth.items():
        columns = [
            [found.smallest_sum for found in labels],
            [found.distance_sum / found.pairs for found in labels],
            [found.near_copies for found in labels],
            [found.radius_sum for found in labels],
            [found.nearest_sum / found.candidates for found in labels],
        ]
        rows.append([name, *(f"{np.mean(column):.1f}" for column in columns)])
    say(f"{len(certificates)} labels of {photos} with more than {keep} photos, K = {keep}, dHash-64, {machine()}")
    header = ["smallest pair distance", "mean pair distance", f"near-copy pairs (<= {near_copy_bits(64)} bits)"]
    table(["strategy", *header, "coverage radius", "mean distance to nearest kept"], rows)
    worst = quality_summary(Quality(certificate=sum(certificates, Certificate())), 64)["certificate"]
    say(
        f"farthest-first's smallest pair distance is at least {worst['mean']:.1%} of what any choice could reach "
        f"(mean over labels; the worst {worst['worst']:.1%})."
    )


def ranking(candidates: list[int], repetitions: int) -> None:
    """Time and peak memory of ranking one label: clustered hashes, about 20 near copies a view."""
    rows = []
    for count in candidates:
        generator = np.random.default_rng(0)
        views = generator.integers(0, 256, (max(1, count // 20), 8), dtype=np.uint8)
        noise = np.packbits(generator.random((count, 64)) < 0.04, axis=1)
        hashes = views[generator.integers(0, len(views), count)] ^ noise
        ids = [f"{i:07}" for i in range(count)]
        ways = {
            name: functools.partial(strategy, Candidates(Hamming(hashes), ids, keep=25))
            for name, strategy in STRATEGIES.items()
        }
        found = measured({name: (lambda way=way: timed(way)) for name, way in ways.items()}, repetitions)
        for name, way in ways.items():
            tracemalloc.start()
            way()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            rows.append([count, name, found[name], peak / 2**20])
    say(f"dHash-64, one core, median of {repetitions} rounds, {machine()}")
    table(["candidates", "strategy", "seconds", "peak memory, MiB"], rows)
