"""One partition, start to end: read, hash, rank, table. Knows no Dask."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reducer.config.settings import PhotoSettings, Source
from reducer.photos.hashing import PhotoHash
from reducer.photos.process import PhotoResult, ProcessPhotos, embedded, process_photos
from reducer.photos.reader import are_unchanged
from reducer.photos.requests import FileState
from reducer.run.tasks.messages import PartitionResult, PartitionTask, Tally
from reducer.selection.distance import near_any
from reducer.selection.facility_location import NearCopies
from reducer.selection.quality import evaluate, points_of
from reducer.selection.quality_sums import Quality
from reducer.selection.strategies import rank
from reducer.storage.codecs import Hashes, from_hex, to_hex
from reducer.storage.location import ByteRange, PhotoRef, file_of
from reducer.storage.paths import paths_by_rule
from reducer.storage.schemas import (
    AVOIDED,
    BEYOND_KEEP,
    FAILED,
    FLAT,
    GIVEN_SCHEMA,
    KEPT,
    KNOWN_SCHEMA,
    LEDGER_SCHEMA,
    RESULT_SCHEMA,
    from_ipc,
    to_ipc,
)

#: The ledger's columns that ranking fills.
RANKED_SCHEMA = pa.schema(list(LEDGER_SCHEMA)[LEDGER_SCHEMA.get_field_index("hash") :])


def rank_label(
    label: str,
    ids: Sequence[str],
    looks: Sequence[PhotoResult],
    settings: PhotoSettings,
    always_keep: NDArray[np.bool_],
    near_avoided: NDArray[np.bool_],
) -> tuple[pa.RecordBatch, Quality, Quality]:
    """Rank the photos of one label.

    Parameters
    ----------
    label : str
        The label.
    ids : sequence of str
        Ids of its candidates.
    looks : sequence of PhotoResult
        What was seen of each.
    settings : PhotoSettings
        Strategy, number to keep, seed.
    always_keep : ndarray of bool, shape (candidates,)
        Which of them are ranked before all others, flat or to be avoided as they may be.
    near_avoided : ndarray of bool, shape (candidates,)
        Which of them are near a photo to avoid.

    Returns
    -------
    pyarrow.RecordBatch
        `RANKED_SCHEMA`, a row a candidate, in the order of ``ids``.
    Quality
        Of the kept photos, against a random choice of as many from the same candidates.
    Quality
        The same by hashes, as for `reducer.selection.quality.Evaluation`.
    """
    rows: list[dict[str, Any]] = [{"kept": False, "reason": FAILED, "error": look.error} for look in looks]
    row_of = [i for i, look in enumerate(looks) if look.error is None]
    if not row_of:
        return pa.RecordBatch.from_pylist(rows, schema=RANKED_SCHEMA), Quality(), Quality()
    names, seen = [ids[i] for i in row_of], [looks[i] for i in row_of]
    hashes = units = None
    if settings.hashed:
        bits = b"".join(look.hash.bits for look in seen if look.hash is not None)
        hashes = np.frombuffer(bits, dtype=np.uint8).reshape(len(seen), -1)
    if settings.by_vectors:
        numbers = b"".join([look.vector for look in seen if look.vector is not None])
        units = np.frombuffer(numbers, dtype=np.float16).reshape(len(seen), -1)
    always = always_keep[row_of]
    flat = np.array([look.hash is not None and look.hash.flat for look in seen]) & ~always
    avoided = near_avoided[row_of] & ~flat & ~always
    for position, row in enumerate(row_of):
        rows[row] = {
            "hash": None if hashes is None else to_hex(hashes[position].tobytes(), settings.bits),
            "kept": False,
            "reason": FLAT if flat[position] else AVOIDED,
        }
    candidates = np.flatnonzero(~flat & ~avoided)
    if not len(candidates):
        return pa.RecordBatch.from_pylist(rows, schema=RANKED_SCHEMA), Quality(), Quality()

    points = points_of(hashes, units)
    copies = (
        None if hashes is None or settings.near_copy is None else NearCopies(hashes[candidates], settings.near_copy)
    )
    ranking = rank(
        settings.strategy,
        points.take(candidates),
        [names[i] for i in candidates.tolist()],
        always_keep=always[candidates],
        keep=settings.keep or 1,
        label=label,
        seed=settings.seed,
        copies=copies,
    )
    ranked = candidates[ranking.order]
    kept = ranked[: settings.keep]
    for place, (position, insertion) in enumerate(
        zip(ranked.tolist(), ranking.insertion_distance.tolist(), strict=True)
    ):
        keep = place < len(kept)
        rows[row_of[position]] |= {
            "rank": place,
            "insertion_distance": insertion if place else None,
            "kept": keep,
            "reason": KEPT if keep else BEYOND_KEEP,
        }
    insertion = ranking.insertion_distance[: len(kept)]
    found = evaluate(label, points, hashes, names, candidates, kept, insertion, bool(always.any()), settings)
    for row, position, apart in zip(row_of, found.nearest.tolist(), found.distance.tolist(), strict=True):
        rows[row] |= {"nearest_kept": names[position], "nearest_kept_distance": apart}
    return pa.RecordBatch.from_pylist(rows, schema=RANKED_SCHEMA), found.quality, found.by_hash


def run_partition(
    task: PartitionTask,
    avoid: Hashes | None = None,
    look: ProcessPhotos = process_photos,
    while_ranking: AbstractContextManager[object] | None = None,
) -> PartitionResult:
    """Hash and rank the photos of one partition.

    Parameters
    ----------
    task : PartitionTask
        Whole labels, rows sorted by (label, id).
    avoid : ndarray of uint8, shape (m, hash bytes), optional
        Packed hashes; photos near one of them are not kept.
    look : callable
        What reads and hashes the photos.
    while_ranking : context manager, optional
        Entered while labels are ranked: a large one takes minutes.

    Returns
    -------
    PartitionResult
        A row for every row of the task, in the same order.
    """
    started = time.perf_counter()
    settings = task.settings
    table = from_ipc(task.rows)
    ids: list[str] = table["id"].to_pylist()
    labels: list[str] = table["label"].to_pylist()
    always_keep = np.zeros(len(ids), dtype=bool)
    if "always_keep" in table.column_names:
        always_keep = table["always_keep"].to_numpy()
    refs = photo_refs(task, table)
    vectors = given_vectors(table)
    looks, now = photo_results(task, table, refs, look, vectors)

    near_avoided = np.zeros(len(looks), dtype=bool)
    if avoid is not None:
        hashed = [(i, np.frombuffer(look.hash.bits, np.uint8)) for i, look in enumerate(looks) if look.hash]
        if hashed:
            places, hashes = zip(*hashed, strict=True)
            near_avoided[list(places)] = near_any(np.array(hashes), avoid, settings.avoid_distance)

    batches = []
    quality, by_hash = Quality(), Quality()
    start = 0
    with while_ranking or nullcontext():
        for label, group in groupby(labels):
            stop = start + sum(1 for _ in group)
            own = slice(start, stop)
            batch, worth, its = rank_label(label, ids[own], looks[own], settings, always_keep[own], near_avoided[own])
            batches.append(batch)
            quality, by_hash = quality + worth, by_hash + its
            start = stop

    tally = replace(tally_of(looks, now), quality=quality, by_hash=by_hash)
    if vectors is not None:
        known = sum(look.hash is not None for look, by_us in zip(looks, now, strict=True) if not by_us)
        tally = replace(tally, reused=known, looked_up=len(looks))
    return PartitionResult(
        index=task.index,
        found=to_ipc(_result_table(looks, pa.Table.from_batches(batches, RANKED_SCHEMA), settings)),
        tally=tally,
        first_failure=first_failure(refs, looks),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )


def photo_results(
    task: PartitionTask,
    table: pa.Table,
    refs: Sequence[PhotoRef],
    look: ProcessPhotos,
    vectors: Sequence[bytes | str] | None = None,
) -> tuple[list[PhotoResult], list[bool]]:
    """What is known of the photos of a task, and of the others what a look at them gives.

    Parameters
    ----------
    task : PartitionTask
        The task.
    table : pyarrow.Table
        Its rows.
    refs : sequence of str or ByteRange
        Where its photos lie.
    look : callable
        What reads and hashes them.
    vectors : sequence of bytes or str, optional
        Their vectors, where these are given, or what is wrong with each; those are not looked at.

    Returns
    -------
    list of Look
        One a row.
    list of bool
        Which of them this run has looked at; the others are known from an earlier one, or not to be looked at.
    """
    settings = task.settings
    known = known_results(table, settings.bits)
    if not settings.hashed:
        known = [look if look is not None and look.error else PhotoResult() for look in known]
    elif not task.trusted:
        known = _unchanged_since(known, [file_of(ref) for ref in refs], task.source)
    if settings.embed is not None:  # a hash alone is no reason not to look
        known = [old if old is None or old.error or old.vector is not None else None for old in known]
    if vectors is not None:
        failed = [PhotoResult(error=found) if isinstance(found, str) else None for found in vectors]
        known = [old if old is not None and old.error else bad or old for old, bad in zip(known, failed, strict=True)]
    unknown = [ref for ref, already in zip(refs, known, strict=True) if already is None]
    new = embedded(look(unknown, settings, task.source), settings) if unknown else iter(())
    looks = [already or next(new) for already in known]
    for _ in new:  # to its end, lest what it holds is held on to
        pass
    if vectors is not None:
        looks = [
            replace(look, vector=found) if look.error is None and isinstance(found, bytes) else look
            for look, found in zip(looks, vectors, strict=True)
        ]
    earlier = [False] * len(looks)
    if KNOWN_SCHEMA.names[0] in table.column_names:
        earlier = table["known_reused"].to_pylist()
    own = [settings.hashed and (already is None or not before) for already, before in zip(known, earlier, strict=True)]
    if vectors is not None:  # what has no vector was not looked at
        own = [by_us and not isinstance(found, str) for by_us, found in zip(own, vectors, strict=True)]
    return looks, own


def tally_of(looks: Sequence[PhotoResult], now: Sequence[bool]) -> Tally:
    """Count looks, of which some were made by this run."""
    own = [look for look, by_us in zip(looks, now, strict=True) if by_us]
    return Tally(
        read=len(own),
        failed=sum(look.error is not None for look in looks),
        reused=len(looks) - len(own),
        bytes_read=sum(look.bytes or 0 for look in own),
    )


def first_failure(refs: Sequence[PhotoRef], looks: Sequence[PhotoResult]) -> str | None:
    """The first photo that has failed, and why."""
    failures = (f"{ref}: {look.error}" for ref, look in zip(refs, looks, strict=True) if look.error is not None)
    return next(failures, None)


def known_results(table: pa.Table, bits: int) -> list[PhotoResult | None]:
    """What earlier looks at photos gave, from the columns of `KNOWN_SCHEMA`; None for each that is not known."""
    if KNOWN_SCHEMA.names[0] not in table.column_names:
        return [None] * table.num_rows
    known = table.select(KNOWN_SCHEMA.names)
    mtime = known.schema.get_field_index("known_mtime")
    known = known.set_column(mtime, "known_mtime", known["known_mtime"].cast(pa.int64()))
    looks: list[PhotoResult | None] = []
    for text, flat, width, height, kind, size, mtime_ns, etag, error, vector, _ in zip(
        *(column.to_pylist() for column in known.columns), strict=True
    ):
        found = None if text is None else PhotoHash(from_hex(text, bits), width, height, kind, flat)
        looks.append(PhotoResult(found, size, mtime_ns, etag, error, vector=vector) if found or error else None)
    return looks


def given_vectors(table: pa.Table) -> list[bytes | str] | None:
    """Return the vectors that `--vectors` files give the rows of a task, or why there is none; None without files."""
    if GIVEN_SCHEMA.names[0] not in table.column_names:
        return None
    vectors, errors = (table[name].to_pylist() for name in GIVEN_SCHEMA.names)
    return [error or vector for vector, error in zip(vectors, errors, strict=True)]


def _unchanged_since(
    looks: Sequence[PhotoResult | None], paths: Sequence[str], source: Source
) -> list[PhotoResult | None]:
    """What is known of photos whose files are as they were then."""
    asked = [i for i, look in enumerate(looks) if look is not None]
    states = [FileState(look.bytes, look.mtime_ns, look.etag) for look in looks if look is not None]
    found = dict(zip(asked, are_unchanged([paths[i] for i in asked], states, source), strict=True))
    return [look if found.get(i) else None for i, look in enumerate(looks)]


def photo_refs(task: PartitionTask, table: pa.Table) -> list[PhotoRef]:
    """Where the photos of a task lie, some perhaps in shards; parameters as for `photo_paths`."""
    paths: list[PhotoRef] = photo_paths(task, table).to_pylist()
    if "shard" not in table.column_names:
        return paths
    mtime = table["known_mtime"].cast(pa.int64())
    places = (*(table[name] for name in ("shard", "offset", "bytes")), mtime, table["known_etag"])
    return [
        path if place[0] is None else ByteRange(*place)
        for path, place in zip(paths, zip(*(column.to_pylist() for column in places), strict=True), strict=True)
    ]


def photo_paths(task: PartitionTask, table: pa.Table) -> pa.ChunkedArray:
    """Where the photos of a task lie.

    Parameters
    ----------
    task : PartitionTask
        The task.
    table : pyarrow.Table
        Its rows.
    """
    if task.path_rule is None:
        return table["path"]
    return paths_by_rule(task.path_rule, table["id"], table["label"])


def seen_columns(looks: Sequence[PhotoResult]) -> dict[str, list[Any]]:
    """What looks at photos gave beside their hashes, by the names of the ledger's columns."""
    return {
        "bytes": [look.bytes for look in looks],
        "mtime": [look.mtime_ns for look in looks],
        "etag": [look.etag for look in looks],
        "width": [look.hash and look.hash.width for look in looks],
        "height": [look.hash and look.hash.height for look in looks],
        "format": [look.hash and look.hash.format for look in looks],
    }


def _result_table(looks: Sequence[PhotoResult], ranked: pa.Table, settings: PhotoSettings) -> pa.Table:
    seen = seen_columns(looks)
    # Of photos that were not read the plan may know the size.
    fields = [field for field in RESULT_SCHEMA if settings.hashed or field.name not in seen]
    columns = [pa.array(seen[field.name], field.type) if field.name in seen else ranked[field.name] for field in fields]
    found = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    if settings.by_vectors:
        found = found.append_column("vector", pa.array([look.vector for look in looks], pa.binary()))
    return found


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
