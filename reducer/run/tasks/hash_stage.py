"""Hash, but do not rank, the photos of a tar shard, or of a piece of a label that is too large for a partition."""

from __future__ import annotations

import hashlib
import json
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from reducer.config.settings import PhotoSettings, Source
from reducer.photos.disk import DISK_BLOCK, too_large
from reducer.photos.formats import REMEDIES, is_extension, why_unreadable
from reducer.photos.hashing import OUT_OF_MEMORY, PhotoError, pillow_settings
from reducer.photos.process import PhotoResult, embedded, process_photo, process_photos, with_vectors
from reducer.photos.reader import Shards
from reducer.photos.requests import PhotoFile
from reducer.photos.tar import Member, ShardFile, TarScan
from reducer.run.tasks.messages import PartitionTask, Piece, PieceReport, PiecesResult, ShardTask, WantedKeys, is_wanted
from reducer.run.tasks.photo_results import (
    first_failure,
    peak_memory,
    photo_paths,
    photo_refs,
    photo_results,
    seen_columns,
    tally_of,
)
from reducer.storage.codecs import to_hex
from reducer.storage.location import ByteRange, MemberKeys, PhotoRef, Shard, is_url, stem_of
from reducer.storage.schemas import HASHES_SCHEMA, from_ipc, to_ipc

#: Kind of the failure of photos whose shard is not the one that was published.
WRONG_MD5 = "wrong md5"
#: Photos of more bytes are read apart when the shard is at its end, as they may take more memory than there is.
MOST_AT_ONCE = 64 * 2**20
#: Most bytes that a label in a shard has.
MOST_LABEL_BYTES = 2**20


class PhotoProcessor(Protocol):
    """A way to read and hash photos."""

    def at_all(self, refs: Sequence[PhotoRef], settings: PhotoSettings, source: Source) -> Iterator[PhotoResult]:
        """Read and hash photos in turn, wherever they lie."""

    def at_content(self, ref: ByteRange, content: Callable[[], bytes], settings: PhotoSettings) -> PhotoResult | None:
        """Hash a photo whose bytes have just come by; None if it is to be processed later, with `at_all`."""

    def alive(self) -> None:
        """Note that the work goes on; called often."""


class InProcessProcessor:
    """Reads and hashes photos in this very process."""

    def at_all(self, refs: Sequence[PhotoRef], settings: PhotoSettings, source: Source) -> Iterator[PhotoResult]:
        """Read and hash photos in turn, wherever they lie."""
        return process_photos(refs, settings, source)

    def at_content(self, ref: ByteRange, content: Callable[[], bytes], settings: PhotoSettings) -> PhotoResult | None:
        """Hash a photo whose bytes have just come by."""
        try:
            return process_photo(PhotoFile(content(), None), settings)
        except PhotoError as error:
            return PhotoResult(error=str(error))

    def alive(self) -> None:
        """Do nothing: nobody waits for a sign."""


def run_piece(task: PartitionTask, processor: PhotoProcessor | None = None) -> PiecesResult:
    """Hash the photos of a piece of a large label.

    Parameters
    ----------
    task : PartitionTask
        The piece.
    processor : PhotoProcessor, optional
        Reads and hashes the photos.
    """
    started = time.perf_counter()
    processor = processor or InProcessProcessor()
    table = from_ipc(task.rows)
    refs = photo_refs(task, table)
    results, tried = photo_results(task, table, refs, processor.at_all)
    paths = photo_paths(task, table)
    reused = [not by_us for by_us in tried]
    columns = {"key": paths, "path": paths, "reused": reused, **_hash_columns(results, task.settings)}
    report = PieceReport(tally_of(results, tried))
    piece = Piece(task.index, _packed(columns, len(results)), report, first_failure(refs, results))
    return PiecesResult(task.index, (piece,), time.perf_counter() - started, peak_memory())


def run_shards(task: ShardTask, wanted: WantedKeys | None, processor: PhotoProcessor | None = None) -> PiecesResult:
    """Read shards from end to end and hash the photos that are wanted.

    Parameters
    ----------
    task : ShardTask
        The shards.
    wanted : ndarray of uint64, optional
        From `wanted_keys`; None for every photo.
    processor : PhotoProcessor, optional
        Reads and hashes the photos.

    Returns
    -------
    PiecesResult
        One piece per shard.
    """
    started = time.perf_counter()
    settings = task.settings
    with (
        closing(Shards(task.shards, task.source, max_pixels=settings.max_pixels)) as shards,
        pillow_settings(settings.max_pixels),
    ):
        pieces = tuple(
            _Reading(task, shards, number, wanted, processor or InProcessProcessor()).piece()
            for number in range(len(task.shards))
        )
    return PiecesResult(task.index, pieces, time.perf_counter() - started, peak_memory())


@dataclass(slots=True)
class _Seen:
    """A photo that is wanted, found in a shard."""

    key: str
    path: str
    ref: ByteRange
    #: None where the photo is only to be found.
    result: PhotoResult | None = None
    label: str | None = None


@dataclass
class _Reading:
    """The reading of one shard, from end to end."""

    task: ShardTask
    shards: Shards
    number: int
    wanted: WantedKeys | None
    processor: PhotoProcessor
    seen: list[_Seen] = field(default_factory=list)
    #: Photos to process when the shard is at its end.
    later: list[_Seen] = field(default_factory=list)
    #: Photos whose pictures wait for a batch to be full.
    pictured: list[_Seen] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    members: int = 0
    example: str | None = None
    damage: str | None = None
    #: Why the shard could not be read to its end.
    unreadable: str | None = None

    @property
    def shard(self) -> Shard:
        """The shard."""
        return self.task.shards[self.number]

    def piece(self) -> Piece:
        """Read the shard and return its photos."""
        digest = None if self.shard.md5 is None else hashlib.md5(usedforsecurity=False)
        # Blocks of a store are under way already: leaving some out would gain nothing.
        skip = 2**63 if is_url(self.shard.path) else DISK_BLOCK
        with closing(ShardFile(self._blocks_from, self.shard.bytes, digest, skip=skip)) as file:
            self._scan(TarScan(file), file)
        self._process_later()
        seen = self._labelled() if self.task.keys is MemberKeys.SAMPLE else self.seen
        md5 = None if digest is None or self.unreadable is not None else digest.hexdigest()
        wrong_md5 = self.shard.md5 not in (None, md5)
        if wrong_md5 and self.task.md5_fails:
            what = "it cannot be read to its end" if md5 is None else f"it has {md5}"
            error = str(PhotoError(WRONG_MD5, f"of its shard {self.shard.path}: {what}, not {self.shard.md5}"))
            for photo in seen:
                photo.result = PhotoResult(error=error)
        processed = [(photo.ref, photo.result) for photo in seen if photo.result is not None]
        results = [result for _, result in processed]
        return Piece(
            self.shard.number,
            self._rows(seen),
            PieceReport(
                tally=tally_of(results, [True] * len(results)),
                members=self.members,
                skipped=dict(sorted(self.skipped.items())),
                example=self.example,
                damage=self.damage,
                md5=md5,
                wrong_md5=wrong_md5,
            ),
            first_failure([ref for ref, _ in processed], results),
        )

    def _blocks_from(self, offset: int) -> Iterator[bytes]:
        try:
            yield from self.shards.blocks_from(self.number, offset)
        except PhotoError as error:
            if str(error).startswith(OUT_OF_MEMORY):
                raise MemoryError from None  # of this worker: it says nothing of the shard
            self.unreadable = str(error)
            raise

    def _scan(self, scan: TarScan, file: ShardFile) -> None:
        try:
            for member in scan:
                self.processor.alive()
                self.members += 1
                self._consider(member, scan)
            file.finish()
        except PhotoError as error:
            self.damage = str(error)
        self.damage = scan.damage or self.damage
        self.damage = self.unreadable or self.damage
        if scan.odd_names:
            self.skipped["member whose name is not UTF-8 text"] += scan.odd_names

    def _consider(self, member: Member, scan: TarScan) -> None:
        if self.task.keys is MemberKeys.SAMPLE:
            self._consider_sample(member, scan)
            return
        key = member.path
        if self.task.keys is MemberKeys.STEM:
            extension = posixpath.splitext(member.path)[1]
            if extension and not is_extension(extension):
                return
            key = stem_of(member.path)
        self.example = self.example or member.path
        hash_it = True if self.wanted is None else is_wanted(self.wanted, key)
        if hash_it is not None:
            self._take(key, member, scan, hash_it)

    def _consider_sample(self, member: Member, scan: TarScan) -> None:
        """Consider a file of a WebDataset sample: all files of one key lie one after the other."""
        folder, name = posixpath.split(member.path)
        stem, _, extension = name.partition(".")
        key, extension = posixpath.join(folder, stem), f".{extension.lower()}"
        label_in = ".cls" if self.task.label_field is None else ".json"
        if extension == label_in:
            if member.problem is None and not member.link and member.bytes <= MOST_LABEL_BYTES:
                label = _label(scan.content(), self.task.label_field)
                if label is not None:
                    self.labels[key] = label
        elif is_extension(extension):
            if self.seen and self.seen[-1].key == key:
                self.skipped["further photo of a sample"] += 1
            else:
                self._take(key, member, scan, self.task.settings.hashed)
        elif is_extension(last := posixpath.splitext(name)[1].lower()):
            self.skipped["photo with a dot in its name (the key of a sample ends at the first one)"] += 1
        elif last in REMEDIES:
            self.skipped[why_unreadable(last)] += 1

    def _take(self, key: str, member: Member, scan: TarScan, hash_it: bool) -> None:
        shard = self.shard
        ref = ByteRange(shard.path, member.offset, member.bytes, shard.mtime_ns, shard.etag)
        photo = _Seen(key, member.path, ref)
        self.seen.append(photo)
        if member.problem is not None:
            photo.result = PhotoResult(error=member.problem)
        elif hash_it and member.link:
            self.later.append(photo)
        elif hash_it:
            error = too_large(member.bytes, self.task.settings.max_pixels)
            if error is not None:
                photo.result = PhotoResult(bytes=member.bytes, error=str(error))
                return
            if member.bytes <= MOST_AT_ONCE:
                photo.result = self.processor.at_content(photo.ref, scan.content, self.task.settings)
            if photo.result is None:
                self.later.append(photo)
            if self.unreadable is not None:  # no fault of the photo
                self.seen.pop()
                raise PhotoError("unreadable", self.unreadable)
            self._embed_full_batches(photo)

    def _embed_full_batches(self, photo: _Seen) -> None:
        settings = self.task.settings.embed
        if settings is None or photo.result is None or photo.result.picture is None:
            return
        self.pictured.append(photo)
        if len(self.pictured) == settings.batch:
            self._embed()

    def _embed(self) -> None:
        """Put vectors in the place of the pictures collected so far."""
        settings, photos = self.task.settings.embed, self.pictured
        if settings is None or not photos:
            return
        results = with_vectors([photo.result for photo in photos if photo.result is not None], settings)
        for photo, result in zip(photos, results, strict=True):
            photo.result = result
        self.pictured = []

    def _process_later(self) -> None:
        self._embed()
        # A link leads to where another photo lies, which may have been processed.
        results_of = {photo.ref: photo.result for photo in self.seen if photo.result is not None}
        refs = [ref for ref in dict.fromkeys(photo.ref for photo in self.later) if ref not in results_of]
        results = self.processor.at_all(refs, self.task.settings, self.task.source)
        results_of |= zip(refs, embedded(results, self.task.settings), strict=True)
        for photo in self.later:
            photo.result = results_of[photo.ref]

    def _labelled(self) -> list[_Seen]:
        for photo in self.seen:
            photo.label = self.labels.get(photo.key)
        labelled = [photo for photo in self.seen if photo.label is not None]
        if len(labelled) < len(self.seen):
            field = self.task.label_field
            beside = (
                "a .cls beside it"
                if field is None
                else f"a .json beside it whose field {field!r} is text or a whole number (or give a --manifest)"
            )
            self.skipped[f"photo without {beside}"] += len(self.seen) - len(labelled)
        return labelled

    def _rows(self, seen: Sequence[_Seen]) -> bytes:
        # A photo counts as changed where its shard has changed.
        state: dict[str, Any] = {"mtime_ns": self.shard.mtime_ns, "etag": self.shard.etag}
        results = [replace(photo.result or PhotoResult(), bytes=photo.ref.bytes, **state) for photo in seen]
        columns = {
            "key": [photo.key for photo in seen],
            "label": [photo.label for photo in seen],
            "path": [photo.path for photo in seen],
            "shard": [self.shard.path] * len(seen),
            "offset": [photo.ref.offset for photo in seen],
            "reused": [False] * len(seen),
        }
        return _packed(columns | _hash_columns(results, self.task.settings), len(seen))


def _label(content: bytes, name: str | None) -> str | None:
    """Return the label that a ``.cls`` holds, or a field of a JSON object; None if that is no label."""
    try:
        text = content.decode("utf-8-sig")
        label = text if name is None else json.loads(text)[name]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if isinstance(label, bool) or not isinstance(label, str | int):
        return None
    return str(label).strip() or None


def _hash_columns(results: Sequence[PhotoResult], settings: PhotoSettings) -> dict[str, Any]:
    """Return the columns of `HASHES_SCHEMA` that tell of results."""
    return {
        **seen_columns(results),
        "hash": [result.hash and to_hex(result.hash.bits, settings.bits) for result in results],
        "flat": [result.hash and result.hash.flat for result in results],
        "error": [result.error for result in results],
        "vector": [result.vector for result in results],
    }


def _packed(columns: dict[str, Any], rows: int) -> bytes:
    """Pack columns as a table of `HASHES_SCHEMA`; those not given are null."""
    arrays = [
        pa.nulls(rows, f.type)
        if f.name not in columns
        else columns[f.name]
        if isinstance(columns[f.name], pa.ChunkedArray)
        else pa.array(columns[f.name], f.type)
        for f in HASHES_SCHEMA
    ]
    return to_ipc(pa.Table.from_arrays(arrays, schema=HASHES_SCHEMA))
