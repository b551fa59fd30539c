"""Photos of an export that are in TARGET already, and equal to what would be written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.config.resolved import ResolvedJob
from reducer.outputs.export.layout import shard_name
from reducer.outputs.export.plan import IDENTITY
from reducer.outputs.export.target import ExportFolder, Listing
from reducer.outputs.export.transfer import Transfer
from reducer.photos.disk import read_photo
from reducer.photos.hashing import PhotoError
from reducer.photos.reader import states_of
from reducer.photos.requests import FileState
from reducer.storage.location import ByteRange, Location, PhotoRef, file_of, is_url, ref_of

#: Photos that are compared together.
COMPARED_TOGETHER = 5000
#: Nanoseconds to which disks keep times: FAT, HFS+, exFAT, and NTFS.
TIME_GRAINS = (2 * 10**9, 10**9, 10**7, 100)
#: Digits of an MD5 sum, which is the etag of an object that was put in one piece.
MD5_DIGITS = 32


def skip_present(transfer: Transfer, folder: ExportFolder, before: pa.Table, job: ResolvedJob) -> None:
    """Take photos off the list to be written that are in TARGET already, and equal.

    Parameters
    ----------
    transfer : Transfer
        The photos; changed in place.
    folder : ExportFolder
        TARGET.
    before : pyarrow.Table
        Its ``export.parquet`` of an earlier export, all of whose photos are of this one too. A file which that export
        wrote stays where its photo is gone, or has changed.
    job : ResolvedJob
        ResolvedJob of the run.
    """
    listing = folder.listing()
    if transfer.plan.shards is not None:
        _skip_shards(transfer, folder, listing)
        return
    done = before.filter(pc.is_valid(before["bytes"]))
    written = dict(zip(done["path"].to_pylist(), done["bytes"].to_pylist(), strict=True))
    paths = transfer.plan.layout.paths
    equal = partial(is_equal, target=folder.location, resized=transfer.plan.options.resize is not None)
    left = np.flatnonzero(transfer.is_left)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(left), COMPARED_TOGETHER):
            numbers = left[start : start + COMPARED_TOGETHER].tolist()
            there = {number: state for number in numbers if (state := listing(paths[number])) is not None}
            if not there:
                continue
            refs = [ref_of(row) for row in transfer.plan.rows.take(pa.array(list(there))).to_pylist()]
            sources = _source_states(refs, job)
            equals = pool.map(equal, there.values(), sources, refs)
            for (number, state), source, same in zip(there.items(), sources, equals, strict=True):
                changed = source is None or transfer.sizes[number] not in (-1, source.bytes)
                if same or (changed and written.get(paths[number]) == state.bytes):
                    transfer.is_left[number] = False
                    transfer.target_sizes[number] = state.bytes or 0
                    if same and source is not None and source.bytes is not None:
                        transfer.sizes[number] = source.bytes


def _skip_shards(transfer: Transfer, folder: ExportFolder, listing: Listing) -> None:
    assert transfer.plan.shards is not None
    for shard in np.unique(transfer.plan.shards).tolist():
        rows = transfer.plan.rows_of(shard)
        index = folder.read_index(shard_name(shard), listing)
        if index is None or index["error"].null_count < index.num_rows:
            continue
        if index.select(IDENTITY).equals(transfer.plan.places(rows)):
            transfer.is_left[rows] = False
            transfer.target_sizes[rows] = index["bytes"].to_numpy()


def _source_states(refs: Sequence[PhotoRef], job: ResolvedJob) -> list[FileState | None]:
    """Return how the photos are where they come from; None where that cannot be told."""
    paths = [ref for ref in refs if isinstance(ref, str)]
    single = iter(states_of(paths, job.source))
    return [FileState(ref.bytes, ref.mtime_ns, None) if isinstance(ref, ByteRange) else next(single) for ref in refs]


def is_equal(there: FileState, source: FileState | None, ref: PhotoRef, target: Location, *, resized: bool) -> bool:
    """Return whether a file in TARGET is what a photo would be made into.

    On a disk a copy has the time of its photo. A store tells the MD5 sum of what was put in one piece; where the
    photo's own is not known, the object must not be older than the photo, as for ``aws s3 sync``.

    Parameters
    ----------
    there : FileState
        The file in TARGET.
    source : FileState or None
        The photo's file.
    ref : str or ByteRange
        Where the photo lies.
    target : Location
        TARGET.
    resized : bool
        Whether photos are made smaller: then sizes and sums tell nothing.
    """
    if source is None or (there.bytes != source.bytes and not (resized and there.bytes)):
        return False
    if not target.remote:
        return _is_same_time(source.mtime_ns, there.mtime_ns)
    if not resized and there.etag is not None and len(there.etag) == MD5_DIGITS:
        digest = _md5(ref, source)
        if digest is not None:
            return digest == there.etag
    return None not in (there.mtime_ns, source.mtime_ns) and (there.mtime_ns or 0) >= (source.mtime_ns or 0)


def _is_same_time(time_ns: int | None, stored_ns: int | None) -> bool:
    """Return whether a disk has stored a time, which some do only roughly: in nanoseconds."""
    if time_ns is None or stored_ns is None:
        return False
    return time_ns == stored_ns or any(
        stored_ns % grain == 0 and abs(time_ns - stored_ns) < grain for grain in TIME_GRAINS
    )


def _md5(ref: PhotoRef, state: FileState) -> str | None:
    """Return a photo's MD5 sum in hex; None where that would take a request, or it cannot be read."""
    if not is_url(file_of(ref)):
        try:
            return hashlib.md5(read_photo(ref, max_pixels=0).content, usedforsecurity=False).hexdigest()
        except PhotoError:
            return None
    return state.etag if state.etag is not None and len(state.etag) == MD5_DIGITS else None
