"""One partition, start to end: read, hash, rank, table. Knows no Dask."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from reducer.config import PhotoSettings
from reducer.draw import RANDOM_ORDER, draw_order
from reducer.hashing import PhotoError, PhotoHash, hash_photo, pillow_settings
from reducer.quality import spread
from reducer.ranking import STRATEGIES, nearest_kept
from reducer.sources import read_photo
from reducer.types import (
    BEYOND_KEEP,
    FAILED,
    KEPT,
    LEDGER_SCHEMA,
    PartitionResult,
    PartitionTask,
    Spread,
    from_ipc,
    to_ipc,
)

#: The ledger's columns that ranking fills.
RANKED_SCHEMA = pa.schema(list(LEDGER_SCHEMA)[LEDGER_SCHEMA.get_field_index("hash") :])


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a photo gave: its hash, or why there is none."""

    hash: PhotoHash | None = None
    bytes: int | None = None
    mtime_ns: int | None = None
    error: str | None = None


def look_at(path: str, settings: PhotoSettings) -> Look:
    """Read and hash one photo; whatever is wrong with it is in the result. Call inside `pillow_settings`."""
    size = mtime = None
    try:
        file = read_photo(path, max_pixels=settings.max_pixels)
        size, mtime = len(file.content), file.mtime_ns
        hashed = hash_photo(file.content, decode=settings.decode, max_pixels=settings.max_pixels)
    except PhotoError as error:
        return Look(bytes=size, mtime_ns=mtime, error=str(error))
    return Look(hashed, size, mtime)


def look_at_all(paths: Sequence[str], settings: PhotoSettings) -> Iterator[Look]:
    """`look_at` each in turn; one photo's bytes are in memory at a time."""
    with pillow_settings(settings.max_pixels):
        for path in paths:
            yield look_at(path, settings)


def rank_label(
    label: str, ids: Sequence[str], looks: Sequence[Look], settings: PhotoSettings
) -> tuple[pa.RecordBatch, Spread, Spread]:
    """Rank the photos of one label.

    Parameters
    ----------
    label : str
        The label.
    ids : sequence of str
        Ids of its candidates.
    looks : sequence of Look
        What was seen of each.
    settings : PhotoSettings
        Strategy, number to keep, seed.

    Returns
    -------
    pyarrow.RecordBatch
        `RANKED_SCHEMA`, a row a candidate, in the order of ``ids``.
    Spread, Spread
        Of the kept photos, and of a random choice of as many from the same hashed candidates.
    """
    rows: list[dict[str, Any]] = [{"kept": False, "reason": FAILED, "error": look.error} for look in looks]
    hashed = [i for i, look in enumerate(looks) if look.hash is not None]
    if not hashed:
        return pa.RecordBatch.from_pylist(rows, schema=RANKED_SCHEMA), Spread(), Spread()
    packed = b"".join(look.hash.bits for look in looks if look.hash is not None)
    hashes = np.frombuffer(packed, dtype=np.uint8).reshape(len(hashed), -1)
    names = [ids[i] for i in hashed]
    ranking = STRATEGIES[settings.strategy](hashes, names, label, settings.seed)
    kept = ranking.order[: settings.keep]
    nearest, distance = nearest_kept(hashes, names, kept)
    for rank, (position, insertion) in enumerate(
        zip(ranking.order.tolist(), ranking.insertion_distance.tolist(), strict=True)
    ):
        keep = rank < settings.keep
        rows[hashed[position]] = {
            "hash": hashes[position].tobytes().hex(),
            "rank": rank,
            "insertion_distance": insertion if rank else None,
            "nearest_kept": names[nearest[position]],
            "nearest_kept_distance": float(distance[position]),
            "kept": keep,
            "reason": KEPT if keep else BEYOND_KEEP,
            "error": None,
        }
    drawn = draw_order(RANDOM_ORDER, settings.seed, label, names)[: settings.keep]
    return pa.RecordBatch.from_pylist(rows, schema=RANKED_SCHEMA), spread(hashes[kept]), spread(hashes[drawn])


def run_partition(task: PartitionTask) -> PartitionResult:
    """Hash and rank the photos of one partition.

    Parameters
    ----------
    task : PartitionTask
        Whole labels, rows sorted by (label, id).

    Returns
    -------
    PartitionResult
        A ledger row for every row of the task, in the same order.
    """
    started = time.perf_counter()
    table = from_ipc(task.rows)
    ids: list[str] = table["id"].to_pylist()
    labels: list[str] = table["label"].to_pylist()
    paths: list[str] = table["path"].to_pylist()
    looks = list(look_at_all(paths, task.settings))

    batches = []
    selection = random = Spread()
    start = 0
    for label, group in groupby(labels):
        stop = start + sum(1 for _ in group)
        batch, chosen, drawn = rank_label(label, ids[start:stop], looks[start:stop], task.settings)
        batches.append(batch)
        selection += chosen
        random += drawn
        start = stop

    failures = [i for i, look in enumerate(looks) if look.hash is None]
    return PartitionResult(
        index=task.index,
        ledger=to_ipc(_ledger(table, looks, pa.Table.from_batches(batches, RANKED_SCHEMA))),
        read=len(looks),
        failed=len(failures),
        bytes_read=sum(look.bytes or 0 for look in looks),
        first_failure=f"{paths[failures[0]]}: {looks[failures[0]].error}" if failures else None,
        selection=selection,
        random=random,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )


def _ledger(table: pa.Table, looks: Sequence[Look], ranked: pa.Table) -> pa.Table:
    seen = {
        "bytes": [look.bytes for look in looks],
        "mtime": [look.mtime_ns for look in looks],
        "width": [look.hash and look.hash.width for look in looks],
        "height": [look.hash and look.hash.height for look in looks],
        "format": [look.hash and look.hash.format for look in looks],
    }
    columns = []
    for field in LEDGER_SCHEMA:
        if field.name in seen:
            columns.append(pa.array(seen[field.name], field.type))
        elif field.name in table.column_names:
            columns.append(table[field.name])
        elif field.name in ranked.column_names:
            columns.append(ranked[field.name])
        else:  # a local file has no etag, shard or offset
            columns.append(pa.nulls(table.num_rows, field.type))
    return pa.Table.from_arrays(columns, schema=LEDGER_SCHEMA)


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
