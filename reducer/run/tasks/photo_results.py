"""Results of the photos of a task: those known from earlier runs, and those of reading the others. Knows no Dask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from reducer.config.settings import Source
from reducer.photos.hashing import PhotoHash
from reducer.photos.process import PhotoResult, ProcessPhotos, embedded
from reducer.photos.reader import are_unchanged
from reducer.photos.requests import FileState
from reducer.run.tasks.messages import PartitionTask, Tally
from reducer.storage.codecs import from_hex
from reducer.storage.location import ByteRange, PhotoRef, file_of
from reducer.storage.paths import paths_by_rule
from reducer.storage.schemas import GIVEN_SCHEMA, KNOWN_SCHEMA


def photo_results(
    task: PartitionTask,
    table: pa.Table,
    refs: Sequence[PhotoRef],
    process: ProcessPhotos,
    vectors: Sequence[bytes | str] | None = None,
) -> tuple[list[PhotoResult], list[bool]]:
    """Return what is known of the photos of a task, and read and hash the others.

    Parameters
    ----------
    task : PartitionTask
        The task.
    table : pyarrow.Table
        Rows of the task.
    refs : sequence of str or ByteRange
        Where the photos lie.
    process : callable
        Reads and hashes photos.
    vectors : sequence of bytes or str, optional
        Vectors of the photos, where these are given, or what is wrong with each; those are not read.

    Returns
    -------
    list of PhotoResult
        One per row.
    list of bool
        Whether this run has tried each photo; the others are known from an earlier run, or not to be read.
    """
    settings = task.settings
    known = _usable_results(task, table, refs)
    if vectors is not None:
        failed = [PhotoResult(error=vector) if isinstance(vector, str) else None for vector in vectors]
        known = [old if old is not None and old.error else bad or old for old, bad in zip(known, failed, strict=True)]
    unknown = [ref for ref, result in zip(refs, known, strict=True) if result is None]
    new = embedded(process(unknown, settings, task.source), settings) if unknown else iter(())
    results = [result or next(new) for result in known]
    for _ in new:  # run to its end, so that it releases what it holds
        pass
    if vectors is not None:
        results = [
            replace(result, vector=vector) if result.error is None and isinstance(vector, bytes) else result
            for result, vector in zip(results, vectors, strict=True)
        ]
    reused = [False] * len(results)
    if KNOWN_SCHEMA.names[0] in table.column_names:
        reused = table["known_reused"].to_pylist()
    tried = [settings.hashed and (old is None or not before) for old, before in zip(known, reused, strict=True)]
    if vectors is not None:  # a photo without a vector was not tried
        tried = [by_us and not isinstance(vector, str) for by_us, vector in zip(tried, vectors, strict=True)]
    return results, tried


def _usable_results(task: PartitionTask, table: pa.Table, refs: Sequence[PhotoRef]) -> list[PhotoResult | None]:
    """Return the known results that hold for this task; None for each photo that is to be read."""
    settings = task.settings
    known = known_results(table, settings.bits)
    if not settings.hashed:
        known = [old if old is not None and old.error else PhotoResult() for old in known]
    elif not task.trusted:
        known = _unchanged_since(known, [file_of(ref) for ref in refs], task.source)
    if settings.embed is not None:  # a photo whose hash alone is known is read all the same
        known = [old if old is None or old.error or old.vector is not None else None for old in known]
    return known


def tally_of(results: Sequence[PhotoResult], tried: Sequence[bool]) -> Tally:
    """Count results, of which this run has made those that it has tried."""
    new = [result for result, by_us in zip(results, tried, strict=True) if by_us]
    return Tally(
        read=len(new),
        failed=sum(result.error is not None for result in results),
        reused=len(results) - len(new),
        bytes_read=sum(result.bytes or 0 for result in new),
    )


def first_failure(refs: Sequence[PhotoRef], results: Sequence[PhotoResult]) -> str | None:
    """Return the first photo that has failed, and why, as ``path: error``; None if none has."""
    failures = (f"{ref}: {result.error}" for ref, result in zip(refs, results, strict=True) if result.error is not None)
    return next(failures, None)


def known_results(table: pa.Table, bits: int) -> list[PhotoResult | None]:
    """Return the results of earlier runs, from the columns of `KNOWN_SCHEMA`; None for each photo without one."""
    if KNOWN_SCHEMA.names[0] not in table.column_names:
        return [None] * table.num_rows
    known = table.select(KNOWN_SCHEMA.names)
    mtime = known.schema.get_field_index("known_mtime")
    known = known.set_column(mtime, "known_mtime", known["known_mtime"].cast(pa.int64()))
    results: list[PhotoResult | None] = []
    for text, flat, width, height, kind, size, mtime_ns, etag, error, vector, _ in zip(
        *(column.to_pylist() for column in known.columns), strict=True
    ):
        photo_hash = None if text is None else PhotoHash(from_hex(text, bits), width, height, kind, flat)
        result = PhotoResult(photo_hash, size, mtime_ns, etag, error, vector=vector)
        results.append(result if photo_hash or error else None)
    return results


def _unchanged_since(
    results: Sequence[PhotoResult | None], paths: Sequence[str], source: Source
) -> list[PhotoResult | None]:
    """Return the known results of photos whose files have not changed; None for the others."""
    rows = [row for row, result in enumerate(results) if result is not None]
    states = [FileState(result.bytes, result.mtime_ns, result.etag) for result in results if result is not None]
    unchanged = dict(zip(rows, are_unchanged([paths[row] for row in rows], states, source), strict=True))
    return [result if unchanged.get(row) else None for row, result in enumerate(results)]


def photo_refs(task: PartitionTask, table: pa.Table) -> list[PhotoRef]:
    """Return where the photos of a task lie, some perhaps in shards; parameters as for `photo_paths`."""
    paths: list[PhotoRef] = photo_paths(task, table).to_pylist()
    if "shard" not in table.column_names:
        return paths
    mtime = table["known_mtime"].cast(pa.int64())
    columns = (*(table[name] for name in ("shard", "offset", "bytes")), mtime, table["known_etag"])
    ranges = zip(*(column.to_pylist() for column in columns), strict=True)
    return [path if fields[0] is None else ByteRange(*fields) for path, fields in zip(paths, ranges, strict=True)]


def photo_paths(task: PartitionTask, table: pa.Table) -> pa.ChunkedArray:
    """Return the paths of the photos of a task.

    Parameters
    ----------
    task : PartitionTask
        The task.
    table : pyarrow.Table
        Rows of the task.
    """
    if task.path_rule is None:
        return table["path"]
    return paths_by_rule(task.path_rule, table["id"], table["label"])


def seen_columns(results: Sequence[PhotoResult]) -> dict[str, list[Any]]:
    """Return the facts about photos beside their hashes, by the names of the ledger's columns."""
    return {
        "bytes": [result.bytes for result in results],
        "mtime": [result.mtime_ns for result in results],
        "etag": [result.etag for result in results],
        "width": [result.hash and result.hash.width for result in results],
        "height": [result.hash and result.hash.height for result in results],
        "format": [result.hash and result.hash.format for result in results],
    }


def peak_memory() -> int:
    """Return the highest resident memory of this process so far, in bytes; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(peak[1]) if peak else 0


def given_vectors(table: pa.Table) -> list[bytes | str] | None:
    """Return the vectors that `--vectors` files give the rows of a task, or why there is none; None without files."""
    if GIVEN_SCHEMA.names[0] not in table.column_names:
        return None
    vectors, errors = (table[name].to_pylist() for name in GIVEN_SCHEMA.names)
    return [error or vector for vector, error in zip(vectors, errors, strict=True)]
