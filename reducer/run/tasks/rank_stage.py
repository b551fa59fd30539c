"""One partition from start to end: read, hash, rank, table. Knows no Dask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import groupby

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reducer.config.cut_rules import CutRules
from reducer.config.settings import PhotoSettings
from reducer.photos.process import PhotoResult, ProcessPhotos, process_photos
from reducer.run.tasks.messages import PartitionResult, PartitionTask
from reducer.run.tasks.photo_results import (
    first_failure,
    given_vectors,
    peak_memory,
    photo_refs,
    photo_results,
    seen_columns,
    tally_of,
)
from reducer.selection.distance import near_any
from reducer.selection.facility_location import NearCopies
from reducer.selection.quality import LabelChoice, evaluate, points_of
from reducer.selection.quality_sums import Quality
from reducer.selection.rules import select
from reducer.selection.strategies import Candidates, rank
from reducer.storage.codecs import Hashes, Positions, to_hex
from reducer.storage.schemas import (
    AVOIDED,
    FAILED,
    FLAT,
    KEPT,
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
        rows=to_ipc(_result_table(results, ranked, settings)),
        tally=tally,
        first_failure=first_failure(refs, results),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )


def _result_table(results: Sequence[PhotoResult], ranked: pa.Table, settings: PhotoSettings) -> pa.Table:
    """Return the rows of `PartitionResult`: facts about the photos beside their ranks."""
    seen = seen_columns(results)
    # Of photos that were not read the plan may know the size.
    fields = [field for field in RESULT_SCHEMA if settings.hashed or field.name not in seen]
    columns = [pa.array(seen[field.name], field.type) if field.name in seen else ranked[field.name] for field in fields]
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    if settings.by_vectors:
        table = table.append_column("vector", pa.array([result.vector for result in results], pa.binary()))
    return table
