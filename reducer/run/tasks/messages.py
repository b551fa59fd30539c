"""Messages between the client and its workers: frozen dataclasses. Tables: `reducer.storage.schemas`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reducer.config.settings import PhotoSettings, Source
from reducer.selection.quality_sums import Quality
from reducer.storage.codecs import digest_of
from reducer.storage.location import MemberKeys, PathRule, Shard

#: Digests of the keys that are wanted, ascending; the lowest bit tells whether the photo is to be hashed, too.
WantedKeys = NDArray[np.uint64]


@dataclass(frozen=True)
class PartitionTask:
    """The rows of one partition (whole labels) and what to do with them; travels inside the Dask task.

    Attributes
    ----------
    index : int
        Number of the partition, and of its part file.
    photos : int
        Rows in it.
    rows : bytes
        The columns ``id`` and ``label`` of `TASK_SCHEMA`, sorted by (label, id), packed by `to_ipc`; ``path`` where no
        rule gives it, ``always_keep`` where it is true of any, `KNOWN_SCHEMA` where anything is known, and ``shard``,
        ``offset`` and ``bytes`` where a photo is to be read from a shard.
    settings : PhotoSettings
        Settings of the run.
    source : Source
        How photos are read; may hold secrets.
    path_rule : PathRule or None
        Rule that gives the paths of the photos.
    trusted : bool
        Whether known results hold without checking that the files are unchanged.
    is_piece : bool
        Whether it is a piece of a label that is too large for a partition: its photos are hashed, and ranked elsewhere.
    """

    index: int
    photos: int
    rows: bytes
    settings: PhotoSettings
    source: Source
    path_rule: PathRule | None = None
    trusted: bool = False
    is_piece: bool = False

    def __repr__(self) -> str:
        # Dask prints tasks in its logs and on its dashboard: no path list there.
        return f"PartitionTask(index={self.index}, photos={self.photos})"


@dataclass(frozen=True)
class ShardTask:
    """Shards to read, and what to do with their photos; travels inside the Dask task.

    Attributes
    ----------
    index : int
        Number of the first shard.
    shards : tuple of Shard
        The shards, in the order of their numbers.
    settings : PhotoSettings
        Settings of the run.
    source : Source
        How shards are read; may hold secrets.
    keys : MemberKeys
        How photos are named in the shards.
    label_field : str or None
        Field of a sample's JSON that holds the label; None where labels stand in a ``.cls`` file.
    md5_fails : bool
        Whether the photos of a shard fail if its MD5 sum is not the published one.
    """

    index: int
    shards: tuple[Shard, ...]
    settings: PhotoSettings
    source: Source
    keys: MemberKeys
    label_field: str | None = None
    md5_fails: bool = True

    def __repr__(self) -> str:
        return f"ShardTask(index={self.index}, shards={len(self.shards)})"


@dataclass(frozen=True)
class Tally:
    """Counts of the photos of a part; they add up over parts.

    Attributes
    ----------
    read, failed : int
        Photos tried, and those that could not be hashed.
    reused : int
        Photos whose hashes were known from an earlier run.
    bytes_read : int
        Bytes of photos read.
    looked_up : int
        Photos whose vectors were looked for among the given ones.
    quality : Quality
        Quality of the choice, by what photos are compared by.
    by_hash : Quality
        Quality by hashes, where photos have some and are compared by vectors.
    """

    read: int = 0
    failed: int = 0
    reused: int = 0
    bytes_read: int = 0
    looked_up: int = 0
    quality: Quality = field(default_factory=Quality)
    by_hash: Quality = field(default_factory=Quality)

    @property
    def tried(self) -> int:
        """Photos that could have failed."""
        return max(self.read + self.reused, self.looked_up)

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as values of JSON; `from_dict` reads them."""
        return asdict(self) | {"quality": self.quality.as_dict(), "by_hash": self.by_hash.as_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        """Read the values made by `as_dict`."""
        return cls(**values | {name: Quality.from_dict(values[name]) for name in ("quality", "by_hash")})


@dataclass(frozen=True)
class PartitionResult:
    """The result of one partition, as a worker sends it back.

    Attributes
    ----------
    index : int
        Number of the partition.
    rows : bytes
        `RESULT_SCHEMA` rows, one for each of the task's and in their order, packed by `to_ipc`, with a column
        ``vector`` behind them where photos are compared by vectors.
    tally : Tally
        Counts of the photos.
    first_failure : str or None
        ``path: error`` of the first failed photo.
    seconds : float
        Wall time on the worker.
    peak_memory : int
        Highest resident memory of the worker process so far, in bytes; 0 where it is not known.
    """

    index: int
    rows: bytes
    tally: Tally
    first_failure: str | None
    seconds: float
    peak_memory: int

    def __repr__(self) -> str:
        return f"PartitionResult(index={self.index}, read={self.tally.read}, failed={self.tally.failed})"


@dataclass(frozen=True)
class Piece:
    """The hashes of the photos of a shard, or of a piece of a large label.

    Attributes
    ----------
    number : int
        Number of the shard, or of the piece; names its file of hashes.
    rows : bytes
        `HASHES_SCHEMA` rows, packed by `to_ipc`.
    report : PieceReport
        Counts, and what is wrong with the shard.
    first_failure : str or None
        ``photo: error`` of the first failed photo.
    """

    number: int
    rows: bytes = field(repr=False)
    report: PieceReport
    first_failure: str | None = None


@dataclass(frozen=True)
class PieceReport:
    """Report on a shard, or on a piece of a large label.

    Attributes
    ----------
    tally : Tally
        Counts of the photos.
    members : int
        Files that the shard holds, wanted or not.
    skipped : dict of str to int
        Members that were left out though they may have been meant, counted by reason.
    example : str or None
        Path of a file in the shard that might have been wanted.
    damage : str or None
        Why the shard may hold more photos than were found.
    md5 : str or None
        MD5 sum of the shard, in hex, where it was asked for.
    wrong_md5 : bool
        Whether the sum is not the published one.
    """

    tally: Tally = field(default_factory=Tally)
    members: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    example: str | None = None
    damage: str | None = None
    md5: str | None = None
    wrong_md5: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values of JSON; `from_dict` reads them."""
        return asdict(self) | {"tally": self.tally.as_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PieceReport:
        """Read the values made by `as_dict`."""
        return cls(**values | {"tally": Tally.from_dict(values["tally"])})


@dataclass(frozen=True)
class PiecesResult:
    """The result of a group of shards, or of a piece of a large label, as a worker sends it back.

    Attributes
    ----------
    index : int
        Number of the task.
    pieces : tuple of Piece
        One per shard, or the one piece.
    seconds, peak_memory
        As for `PartitionResult`.
    """

    index: int
    pieces: tuple[Piece, ...]
    seconds: float
    peak_memory: int

    def __repr__(self) -> str:
        return f"PiecesResult(index={self.index}, pieces={len(self.pieces)})"


def wanted_keys(keys: Iterable[str], hashed: NDArray[np.bool_]) -> WantedKeys:
    """Return the photos to look for in shards, in a form small enough to be sent to each worker.

    Parameters
    ----------
    keys : iterable of str
        Names of the photos in the shards (`MemberKeys`).
    hashed : ndarray of bool, shape (keys,)
        Whether each photo is to be hashed too, and not only to be found.

    Returns
    -------
    ndarray of uint64, shape (photos,)
        For `is_wanted`.
    """
    digests = np.fromiter(map(digest_of, keys), np.uint64)
    return np.unique(digests & ~np.uint64(1) | hashed.astype(np.uint64))


def is_wanted(wanted: WantedKeys, key: str) -> bool | None:
    """Return whether a photo is to be hashed; None if it is not wanted at all.

    Two keys may have the same digest: then one photo too many is hashed, which the client leaves out.
    """
    digest = digest_of(key) | 1
    place = int(np.searchsorted(wanted, np.uint64(digest), side="right")) - 1
    nearest = int(wanted[place]) if place >= 0 else -1
    return bool(nearest & 1) if nearest | 1 == digest else None
