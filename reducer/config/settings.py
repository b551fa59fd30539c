"""The parts of a job that workers need, and the values that its options may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STRATEGY_NAMES = ("farthest-first", "facility-location", "pairs", "random")
HASH_NAMES = ("dhash", "dhash-vertical", "phash", "ahash", "whash")
#: Size of a hash; it has the square of its size in bits.
SMALLEST_HASH, LARGEST_HASH = 2, 32
DECODE_NAMES = ("fast", "fastest", "exact")
FORMATS = ("csv", "parquet", "both")
STORAGE_OPTIONS = ("storage_options", "manifest_storage_options", "output_storage_options")
READER_NAMES = ("s3fs", "obstore")
#: How exported photos are laid out, and bytes per exported shard.
LAYOUT_NAMES = ("same", "by-label", "tar")
SHARD_BYTES = "1GB"
#: Pictures of photos in a report.
GALLERY_PHOTOS = 400
#: Photos that a dry run reads to estimate the time.
SAMPLE_PHOTOS = 64
#: Input of an embedding model by default: pixels per side, photos per batch, ImageNet's channel means and deviations.
EMBED_SIZE, EMBED_BATCH = 224, 32
EMBED_MEAN, EMBED_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """Settings for reading photos; sent to the workers.

    Attributes
    ----------
    options : mapping
        fsspec options that open URLs; may hold secrets.
    reader : str
        Client for ``s3://``, one of `READER_NAMES`.
    read_ahead : int
        Photos of a URL that are requested ahead, per worker thread; of shards a quarter as many blocks.
    """

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    reader: str = "s3fs"
    read_ahead: int = 32


@dataclass(frozen=True)
class EmbedSettings:
    """Settings that decide the vector of a photo.

    Attributes
    ----------
    model : str
        SHA-256 of the model file, in hex.
    size : int
        Side of the square input of the model, in pixels.
    mean, std : tuple of float
        For the red, green and blue channel, whose levels are 0 to 1: the mean is subtracted, the result divided by std.
    batch : int
        Photos per call of the model.
    output : str or None
        Name of the model's output that holds the vectors; None for the only output.
    """

    model: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    output: str | None


@dataclass(frozen=True)
class PhotoSettings:
    """Settings that decide the hash and the rank of a photo; sent to the workers.

    Attributes
    ----------
    keep : int or None
        Photos kept per label; None for all.
    strategy : str
        One of `STRATEGY_NAMES`.
    hash : str
        One of `HASH_NAMES`.
    hash_size : int
        Rows of the hash, and bits per row.
    decode : str
        One of `DECODE_NAMES`.
    exif_orientation : bool
        Whether photos are turned upright before they are hashed.
    drop_flat : bool
        Whether photos without detail are left out.
    avoid_distance : int
        A photo is left out if it is at most this number of bits from a photo to avoid.
    seed : int
        Seed of every keyed draw.
    max_pixels : int
        A photo that declares more pixels is not decoded.
    by_vectors : bool
        Whether photos are compared by vectors; else by their hashes.
    hashed : bool
        Whether photos are read and hashed.
    near_copy : int or None
        Photos at most this number of bits apart are near copies, which are ranked last; None to rank by vectors alone.
    embed : EmbedSettings or None
        How vectors are made; None where they are given, or not asked for.
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
        """Unit of distances, ``bits`` or ``cosine``."""
        return "cosine" if self.by_vectors else "bits"


def unit_of(job: Mapping[str, Any]) -> str:
    """Return the unit of the distances of a run, ``bits`` or ``cosine``, from the job in its summary."""
    return "cosine" if job.get("vectors") or job.get("embed") else "bits"


def default_strategy(by_vectors: bool) -> str:
    """Return the strategy of a job that names none."""
    return "facility-location" if by_vectors else "farthest-first"


def near_copy_bits(bits: int) -> int:
    """Return the distance in bits up to which two photos are near copies, for hashes of a number of bits.

    It is 6 of dHash's 64 bits, in proportion: resizing, recompression and brightness stay within it, crops and flips
    do not.
    """
    return 6 * bits // 64
