"""One partition, start to end: read, hash, rank, table. Knows no Dask."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
from reducer.selection.distance import Points, near_any
from reducer.selection.facility_location import NearCopies
from reducer.selection.quality import Evaluation, evaluate, points_of
from reducer.selection.quality_sums import Quality
from reducer.selection.rules import DECIDING, select
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


@dataclass(frozen=True)
class RankedLabel:
    """The photos of one label that could be compared, n of them, and the order of the candidates among them.

    Attributes
    ----------
    label : str
        The label.
    rows : ndarray of int64, shape (n,)
        Row of each photo in the task.
    ids : list of str
        Id of each photo.
    points : Points
        Each photo by its vector, else by its hash.
    hashes : ndarray of uint8, shape (n, hash bytes), or None
        Packed hash of each photo; None where they have none.
    candidates : ndarray of int64, shape (c,)
        Positions of the photos that may be kept.
    order : ndarray of int64, shape (c,)
        Positions of the candidates, the first rank first.
    insertion_distance : ndarray of float64, shape (c,)
        Distance of each in that order to the nearest candidate of a smaller rank, in bits or cosine.
    some_always_kept : bool
        Whether any photo was ranked before the others because it is always kept.
    """

    label: str
    rows: Positions
    ids: list[str]
    points: Points
    hashes: Hashes | None
    candidates: Positions
    order: Positions
    insertion_distance: NDArray[np.float64]
    some_always_kept: bool


def rank_label(
    label: str,
    ids: Sequence[str],
    results: Sequence[PhotoResult],
    settings: PhotoSettings,
    always_keep: NDArray[np.bool_],
    near_avoided: NDArray[np.bool_],
    columns: dict[str, list[Any]],
    start: int,
) -> RankedLabel | None:
    """Rank the photos of one label.

    Parameters
    ----------
    label : str
        The label.
    ids : sequence of str, shape (photos,)
        Id of each photo.
    results : sequence of PhotoResult, shape (photos,)
        Hash, vector or error of each photo.
    settings : PhotoSettings
        Strategy, number to keep, seed.
    always_keep : ndarray of bool, shape (photos,)
        Which photos are ranked before all others, be they flat or near a photo to avoid.
    near_avoided : ndarray of bool, shape (photos,)
        Which photos are near a photo to avoid.
    columns : dict of str to list
        Columns of `RANKED_SCHEMA` over the whole task; those that ranking decides are filled in.
    start : int
        Row of the first photo in the task.

    Returns
    -------
    RankedLabel or None
        None where no photo of the label can be kept.
    """
    compared = [i for i, result in enumerate(results) if result.error is None]
    if not compared:
        return None
    names, seen = [ids[i] for i in compared], [results[i] for i in compared]
    rows = start + np.array(compared)
    hashes = units = None
    if settings.hashed:
        bits = b"".join(result.hash.bits for result in seen if result.hash is not None)
        hashes = np.frombuffer(bits, dtype=np.uint8).reshape(len(seen), -1)
        for row, packed in zip(rows.tolist(), hashes, strict=True):
            columns["hash"][row] = to_hex(packed.tobytes(), settings.bits)
    if settings.by_vectors:
        numbers = b"".join([result.vector for result in seen if result.vector is not None])
        units = np.frombuffer(numbers, dtype=np.float16).reshape(len(seen), -1)
    always = always_keep[compared]
    flat = np.array([result.hash is not None and result.hash.flat for result in seen]) & ~always
    left_out = flat | (near_avoided[compared] & ~always)
    for row, is_flat in zip(rows[left_out].tolist(), flat[left_out].tolist(), strict=True):
        columns["reason"][row] = FLAT if is_flat else AVOIDED
    candidates = np.flatnonzero(~left_out)
    if not len(candidates):
        return None

    points = points_of(hashes, units)
    copies = None if hashes is None or settings.near_copy is None else NearCopies(hashes, settings.near_copy)
    everyone = Candidates(points, names, None, settings.keep or 1, label, settings.seed, copies)
    ranking = rank(settings.strategy, everyone.among(candidates), always[candidates])
    order = candidates[ranking.order]
    for number, (row, distance) in enumerate(
        zip(rows[order].tolist(), ranking.insertion_distance.tolist(), strict=True)
    ):
        columns["rank"][row] = number
        columns["insertion_distance"][row] = distance if number else None
    return RankedLabel(
        label, rows, names, points, hashes, candidates, order, ranking.insertion_distance, bool(always.any())
    )


def evaluate_label(
    ranked: RankedLabel, kept: NDArray[np.bool_], settings: PhotoSettings, columns: dict[str, list[Any]]
) -> Evaluation:
    """Return what the choice of a label's photos is worth, and fill in which kept photo is nearest to each.

    Parameters
    ----------
    ranked : RankedLabel
        The label; at least one of its photos is kept.
    kept : ndarray of bool, shape (rows of the task,)
        Which photos of the task are kept.
    settings : PhotoSettings
        Strategy, hash, seed.
    columns : dict of str to list
        As for `rank_label`.
    """
    chosen = kept[ranked.rows[ranked.order]]
    evaluation = evaluate(
        ranked.label,
        ranked.points,
        ranked.hashes,
        ranked.ids,
        ranked.candidates,
        ranked.order[chosen],
        ranked.insertion_distance[chosen],
        ranked.some_always_kept,
        settings,
    )
    for row, nearest, distance in zip(
        ranked.rows.tolist(), evaluation.nearest.tolist(), evaluation.distance.tolist(), strict=True
    ):
        columns["nearest_kept"][row] = ranked.ids[nearest]
        columns["nearest_kept_distance"][row] = distance
    return evaluation


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
        Of the kept photos, against a random choice of the same size from the same candidates.
    Quality
        By hashes, as for `reducer.selection.quality.Evaluation`.
    """
    ids: list[str] = table["id"].to_pylist()
    always_keep = np.zeros(len(ids), dtype=bool)
    if "always_keep" in table.column_names:
        always_keep = table["always_keep"].to_numpy()
    columns: dict[str, list[Any]] = {name: [None] * len(ids) for name in RANKED_SCHEMA.names}
    columns["error"] = [result.error for result in results]
    columns["reason"] = [FAILED if result.error is not None else KEPT for result in results]
    labels = []
    start = 0
    for label, group in groupby(table["label"].to_pylist()):
        rows = slice(start, start + sum(1 for _ in group))
        ranked = rank_label(
            label, ids[rows], results[rows], settings, always_keep[rows], near_avoided[rows], columns, start
        )
        labels += [] if ranked is None else [ranked]
        start = rows.stop

    deciding = {name: pa.array(columns[name], RANKED_SCHEMA.field(name).type) for name in DECIDING if name in columns}
    sizes = pa.array([result.bytes for result in results], pa.int64())
    selection = select(
        pa.table(deciding | {"label": table["label"], "bytes": sizes}), CutRules(keep=settings.keep), always_keep
    )
    quality, by_hash = Quality(), Quality()
    for ranked in labels:
        evaluation = evaluate_label(ranked, selection.kept, settings, columns)
        quality, by_hash = quality + evaluation.quality, by_hash + evaluation.by_hash
    decided = columns | {"kept": selection.kept, "reason": selection.reason}
    arrays = [pa.array(decided[field.name], field.type) for field in RANKED_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=RANKED_SCHEMA), quality, by_hash


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
