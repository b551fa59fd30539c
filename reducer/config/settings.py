"""The part of a job that workers need, and the names that its options may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STRATEGY_NAMES = ("farthest-first", "facility-location", "pairs", "random")
HASH_NAMES = ("dhash", "dhash-vertical", "phash", "ahash", "whash")
#: Bits of a hash are the square of its size.
SMALLEST_HASH, LARGEST_HASH = 2, 32
DECODE_NAMES = ("fast", "fastest", "exact")
FORMATS = ("csv", "parquet", "both")
STORAGE_OPTIONS = ("storage_options", "manifest_storage_options", "output_storage_options")
READER_NAMES = ("s3fs", "obstore")
#: How exported photos lie, and bytes of a shard of them.
LAYOUT_NAMES = ("same", "by-label", "tar")
SHARD_BYTES = "1GB"
#: Pictures of photos in a report.
GALLERY_PHOTOS = 400
#: Photos that a dry run reads to estimate the time.
SAMPLE_PHOTOS = 64
#: What an embedding model is given, unless it is said otherwise: the means and deviations of ImageNet's channels.
EMBED_SIZE, EMBED_BATCH = 224, 32
EMBED_MEAN, EMBED_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """How photos are read; travels to the workers.

    Attributes
    ----------
    options : mapping
        For URLs: what opens them; may hold secrets.
    reader : str
        One of `reducer.config.settings.READER_NAMES`, for ``s3://``.
    read_ahead : int
        Photos of a URL that are under way at a time, for each worker thread; of shards a quarter as many blocks.
    """

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    reader: str = "s3fs"
    read_ahead: int = 32


@dataclass(frozen=True)
class EmbedSettings:
    """All that decides the vector that a model makes of a photo.

    Attributes
    ----------
    model : str
        SHA-256 of the model file, in hex.
    size : int
        Side of the square that the model is given, in pixels.
    mean, std : tuple of float
        Of the red, green and blue channel, 0 to 1: the first is subtracted, then the second divided by.
    batch : int
        Photos that the model is given at a time.
    output : str or None
        Which of its outputs holds the vectors; None for the only one.
    """

    model: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    output: str | None


@dataclass(frozen=True)
class PhotoSettings:
    """All that decides the hash and the rank of a photo, as a worker needs it.

    Attributes
    ----------
    keep : int or None
        Photos kept a label; None for all.
    strategy : str
        One of `STRATEGY_NAMES`.
    hash : str
        One of `HASH_NAMES`.
    hash_size : int
        Rows of the hash, of so many bits each.
    decode : str
        One of `DECODE_NAMES`.
    exif_orientation : bool
        Whether photos are turned upright before they are hashed.
    drop_flat : bool
        Whether photos without detail are left out.
    avoid_distance : int
        A photo at most so many bits from one to avoid is left out.
    seed : int
        Seed of every keyed draw.
    max_pixels : int
        A photo that declares more pixels is not decoded.
    by_vectors : bool
        Whether photos are compared by vectors; else by their hashes.
    hashed : bool
        Whether photos are read and hashed.
    near_copy : int or None
        At most so many bits apart photos are near copies, which come last; None where none does.
    embed : EmbedSettings or None
        How their vectors are made; None where they are given, or not asked for.
    """

    keep: int | None
    strategy: str
    hash: str
    hash_size: int
    decode: str
    exif_orientation: bool
    drop_flat: bool
    avoid_distance: int
    seed: int
    max_pixels: int
    by_vectors: bool = False
    hashed: bool = True
    near_copy: int | None = None
    embed: EmbedSettings | None = None

    @property
    def bits(self) -> int:
        """Bits of a hash."""
        return self.hash_size**2

    @property
    def unit(self) -> str:
        """What distances are told in."""
        return "cosine" if self.by_vectors else "bits"


def unit_of(job: Mapping[str, Any]) -> str:
    """What distances of a run are told in, by the job in its summary."""
    return "cosine" if job.get("vectors") or job.get("embed") else "bits"


def default_strategy(by_vectors: bool) -> str:
    """How photos are ranked where nothing else is asked for."""
    return "facility-location" if by_vectors else "farthest-first"


def near_copy_bits(bits: int) -> int:
    """At how many bits apart, of so many, two photos of a label still count as near copies.

    It is 6 of dHash's 64: resizing, recompression and brightness stay within it, crops and flips do not.
    """
    return 6 * bits // 64
