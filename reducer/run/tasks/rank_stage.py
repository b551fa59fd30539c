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

from reducer.config.cut_rules import CutRules
from reducer.config.settings import PhotoSettings, Source
from reducer.photos.hashing import PhotoHash
from reducer.photos.process import PhotoResult, ProcessPhotos, embedded, process_photos
from reducer.photos.reader import are_unchanged
from reducer.photos.requests import FileState
from reducer.run.tasks.messages import PartitionResult, PartitionTask, Tally
from reducer.selection.distance import near_any
from reducer.selection.facility_location import NearCopies
from reducer.selection.quality import LabelChoice, evaluate, points_of
from reducer.selection.quality_sums import Quality
from reducer.selection.rules import select
from reducer.selection.strategies import Candidates, rank
from reducer.storage.codecs import Hashes, Positions, from_hex, to_hex
from reducer.storage.location import ByteRange, PhotoRef, file_of
from reducer.storage.paths import paths_by_rule
from reducer.storage.schemas import (
    AVOIDED,
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
    ids: list[str],
    results: Sequence[PhotoResult],
    candidates: Positions,
    always_keep: NDArray[np.bool_],
    settings: PhotoSettings,
) -> LabelChoice:
    """Rank the candidates of one label; all of them are chosen, by rank.

    Parameters
    ----------
    label : str
        The label.
    ids : list of str, shape (photos,)
        Id of each photo that can be compared.
    results : sequence of PhotoResult, shape (photos,)
        Hash or vector of each photo.
    candidates : ndarray of int64, shape (c,)
        Positions of the photos that may be kept, c >= 1.
    always_keep : ndarray of bool, shape (photos,)
        Which photos are ranked before all others.
    settings : PhotoSettings
        Strategy, number to keep, seed.
    """
    hashes = units = copies = None
    if settings.hashed:
        bits = b"".join(result.hash.bits for result in results if result.hash is not None)
        hashes = np.frombuffer(bits, dtype=np.uint8).reshape(len(results), -1)
        copies = None if settings.near_copy is None else NearCopies(hashes, settings.near_copy)
    if settings.by_vectors:
        numbers = b"".join(result.vector for result in results if result.vector is not None)
        units = np.frombuffer(numbers, dtype=np.float16).reshape(len(results), -1)
    points = points_of(hashes, units)
    photos = Candidates(points, ids, None, settings.keep or 1, label, settings.seed, copies)
    ranking = rank(settings.strategy, photos.among(candidates), always_keep[candidates])
    return LabelChoice(
        label,
        points,
        hashes,
        ids,
        candidates,
        chosen=candidates[ranking.order],
        insertion_distance=ranking.insertion_distance,
        some_always_kept=bool(always_keep.any()),
    )


def _reasons(
    results: Sequence[PhotoResult], always_keep: NDArray[np.bool_], near_avoided: NDArray[np.bool_]
) -> list[str]:
    """Return why each photo can be kept or not before any is chosen."""
    reasons = []
    for result, always, avoided in zip(results, always_keep.tolist(), near_avoided.tolist(), strict=True):
        if result.error is not None:
            reasons.append(FAILED)
        elif always:
            reasons.append(KEPT)
        elif result.hash is not None and result.hash.flat:
            reasons.append(FLAT)
        else:
            reasons.append(AVOIDED if avoided else KEPT)
    return reasons


def rank_partition(
    table: pa.Table,
    results: Sequence[PhotoResult],
    near_avoided: NDArray[np.bool_],
    settings: PhotoSettings,
) -> tuple[pa.Table, Quality, Quality]:
    """Rank the labels of a partition and choose from each.

    Parameters
    ----------
    table : pyarrow.Table
        The rows of the task: whole labels, sorted by (label, id).
    results : sequence of PhotoResult, shape (rows,)
        Hash, vector or error of each photo.
    near_avoided : ndarray of bool, shape (rows,)
        Which photos are near a photo to avoid.
    settings : PhotoSettings
        Strategy, number to keep, seed.

    Returns
    -------
    pyarrow.Table
        `RANKED_SCHEMA`, a row per row of the task.
    Quality
        Quality of the kept photos, against a random choice of the same size from the same candidates.
    Quality
        Quality by hashes, as in `reducer.selection.quality.Evaluation`.
    """
    ids: list[str] = table["id"].to_pylist()
    always_keep = np.zeros(len(ids), dtype=bool)
    if "always_keep" in table.column_names:
        always_keep = table["always_keep"].to_numpy()
    reasons = _reasons(results, always_keep, near_avoided)
    choices = _rank_labels(table["label"].to_pylist(), ids, results, reasons, always_keep, settings)
    ranks, insertion = np.full(len(ids), -1), np.full(len(ids), np.nan)
    for rows, choice in choices:
        ranks[rows[choice.chosen]] = np.arange(len(choice.chosen))
        insertion[rows[choice.chosen]] = choice.insertion_distance
    ranked = {
        "rank": pa.array(ranks, pa.int32(), mask=ranks < 0),
        "insertion_distance": pa.array(insertion, mask=ranks <= 0),
    }
    sizes = pa.array([result.bytes for result in results], pa.int64())
    deciding = pa.table(ranked | {"label": table["label"], "bytes": sizes, "reason": pa.array(reasons, pa.string())})
    selection = select(deciding, CutRules(keep=settings.keep), always_keep)
    distances, quality, by_hash = _evaluate_labels(choices, selection.kept, settings)
    columns = {
        **ranked,
        **distances,
        "hash": pa.array([_hash_text(result, settings) for result in results], pa.string()),
        "kept": pa.array(selection.kept),
        "reason": selection.reason,
        "error": pa.array([result.error for result in results], pa.string()),
    }
    arrays = [columns[name] for name in RANKED_SCHEMA.names]
    return pa.Table.from_arrays(arrays, schema=RANKED_SCHEMA), quality, by_hash


def _rank_labels(
    labels: list[str],
    ids: list[str],
    results: Sequence[PhotoResult],
    reasons: list[str],
    always_keep: NDArray[np.bool_],
    settings: PhotoSettings,
) -> list[tuple[Positions, LabelChoice]]:
    """Rank each label that has a candidate; return it with the rows of its photos that can be compared."""
    choices = []
    for label, group in groupby(range(len(labels)), key=labels.__getitem__):
        rows = [row for row in group if reasons[row] != FAILED]
        candidates = np.array([i for i, row in enumerate(rows) if reasons[row] == KEPT], dtype=np.int64)
        if len(candidates):
            photos = [results[row] for row in rows]
            choice = rank_label(label, [ids[row] for row in rows], photos, candidates, always_keep[rows], settings)
            choices.append((np.array(rows), choice))
    return choices


def _evaluate_labels(
    choices: list[tuple[Positions, LabelChoice]], kept: NDArray[np.bool_], settings: PhotoSettings
) -> tuple[dict[str, pa.Array], Quality, Quality]:
    """Return the columns of the ledger on the nearest kept photo, and the quality, also by hashes, over labels."""
    nearest: list[str | None] = [None] * len(kept)
    distances: list[float | None] = [None] * len(kept)
    quality, by_hash = Quality(), Quality()
    for rows, choice in choices:
        evaluation = evaluate(choice.only(kept[rows[choice.chosen]]), settings)
        quality, by_hash = quality + evaluation.quality, by_hash + evaluation.by_hash
        for row, position, distance in zip(
            rows.tolist(), evaluation.nearest.tolist(), evaluation.distance.tolist(), strict=True
        ):
            nearest[row], distances[row] = choice.ids[position], distance
    columns = {
        "nearest_kept": pa.array(nearest, pa.string()),
        "nearest_kept_distance": pa.array(distances, pa.float64()),
    }
    return columns, quality, by_hash


def _hash_text(result: PhotoResult, settings: PhotoSettings) -> str | None:
    """Return the hash of a photo as the ledger has it; None where photos are not hashed or this one has failed."""
    if not settings.hashed or result.hash is None or result.error is not None:
        return None
    return to_hex(result.hash.bits, settings.bits)


def run_partition(
    task: PartitionTask,
    avoid: Hashes | None = None,
    process: ProcessPhotos = process_photos,
    while_ranking: AbstractContextManager[object] | None = None,
) -> PartitionResult:
    """Hash and rank the photos of one partition.

    Parameters
    ----------
    task : PartitionTask
        Whole labels, rows sorted by (label, id).
    avoid : ndarray of uint8, shape (m, hash bytes), optional
        Packed hashes; photos near one of them are not kept.
    process : callable, optional
        Reads and hashes the photos.
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
    refs = photo_refs(task, table)
    vectors = given_vectors(table)
    results, now = photo_results(task, table, refs, process, vectors)

    near_avoided = np.zeros(len(results), dtype=bool)
    if avoid is not None:
        hashed = [(i, np.frombuffer(result.hash.bits, np.uint8)) for i, result in enumerate(results) if result.hash]
        if hashed:
            rows, hashes = zip(*hashed, strict=True)
            near_avoided[list(rows)] = near_any(np.array(hashes), avoid, settings.avoid_distance)
    with while_ranking or nullcontext():
        ranked, quality, by_hash = rank_partition(table, results, near_avoided, settings)

    tally = replace(tally_of(results, now), quality=quality, by_hash=by_hash)
    if vectors is not None:
        known = sum(result.hash is not None for result, by_us in zip(results, now, strict=True) if not by_us)
        tally = replace(tally, reused=known, looked_up=len(results))
    return PartitionResult(
        index=task.index,
        found=to_ipc(_result_table(results, ranked, settings)),
        tally=tally,
        first_failure=first_failure(refs, results),
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
