"""What crosses a border between stages: frozen dataclasses and Arrow schemas."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction

import pyarrow as pa

from reducer.config import PhotoSettings
from reducer.environment import Environment
from reducer.places import Source


def _field(name: str, kind: pa.DataType, description: str, unit: str | None = None) -> pa.Field:
    metadata = {"description": description}
    if unit is not None:
        metadata["unit"] = unit
    return pa.field(name, kind, metadata=metadata)


#: One row per photo of the manifest, as `reducer.manifest` returns it.
MANIFEST_SCHEMA = pa.schema(
    [
        _field("row", pa.int64(), "position in the manifest, the first photo is 0"),
        _field("id", pa.string(), "photo id, as written in the manifest"),
        _field("label", pa.string(), "label, as written in the manifest"),
        _field("path", pa.string(), "where the photo lies"),
        _field("bytes", pa.int64(), "file size; null where it is not known", "bytes"),
    ]
)

#: The rows to read.
TASK_SCHEMA = pa.schema(
    [*MANIFEST_SCHEMA, _field("always_keep", pa.bool_(), "whether the photo is ranked before all others of its label")]
)

#: The ledger `RUN/images/part-*.parquet`: one row per manifest row (after duplicates).
LEDGER_SCHEMA = pa.schema(
    [
        *MANIFEST_SCHEMA,
        _field("width", pa.int32(), "width as stored, before any EXIF rotation", "pixels"),
        _field("height", pa.int32(), "height as stored, before any EXIF rotation", "pixels"),
        _field("format", pa.string(), "file format that Pillow found, whatever the file's name says"),
        _field("mtime", pa.timestamp("ns", tz="UTC"), "time of the file's last change"),
        _field("etag", pa.string(), "entity tag of an object in a store; null for local files"),
        _field("shard", pa.string(), "tar shard that holds the photo; null for single files"),
        _field("offset", pa.int64(), "where the photo starts in its shard", "bytes"),
        _field("hash", pa.string(), "perceptual hash in hex, as str() of imagehash's; null if not hashed"),
        _field("rank", pa.int32(), "place in the order of its label, the first is 0; null if not ranked"),
        _field(
            "insertion_distance",
            pa.float64(),
            "distance to the nearest photo of the label with a smaller rank; null for rank 0",
            "bits",
        ),
        _field("nearest_kept", pa.string(), "id of the nearest kept photo of the label; itself if kept"),
        _field("nearest_kept_distance", pa.float64(), "distance to nearest_kept", "bits"),
        _field("kept", pa.bool_(), "whether the photo is in the reduced list"),
        _field("reason", pa.string(), "kept, kept-small-label, beyond-keep, not-sampled, flat, avoided or failed"),
        _field("error", pa.string(), "why the photo could not be read, one line; null if it could"),
    ]
)

#: What a worker finds out; the other columns of the ledger never leave the client.
FOUND_SCHEMA = pa.schema([field for field in LEDGER_SCHEMA if field.name not in ("row", "id", "label", "path")])

KEPT = "kept"
KEPT_SMALL_LABEL = "kept-small-label"
BEYOND_KEEP = "beyond-keep"
NOT_SAMPLED = "not-sampled"
FLAT = "flat"
AVOIDED = "avoided"
FAILED = "failed"

#: Columns of `reduced.parquet` after the manifest's own two.
REDUCED_COLUMNS = ("rank", "insertion_distance", "hash", "path", "bytes", "width", "height")


def reduced_schema(id_column: str, label_column: str) -> pa.Schema:
    """Schema of `reduced.parquet`: the manifest's own two columns, then `REDUCED_COLUMNS`.

    One of the latter whose name the manifest uses for its id or label gets the prefix ``photo_``.

    Parameters
    ----------
    id_column, label_column : str
        What the manifest calls them.
    """
    own = (id_column, label_column)
    extra = [LEDGER_SCHEMA.field(name) for name in REDUCED_COLUMNS]
    return pa.schema(
        [
            LEDGER_SCHEMA.field("id").with_name(id_column),
            LEDGER_SCHEMA.field("label").with_name(label_column),
            *(field.with_name(f"photo_{field.name}") if field.name in own else field for field in extra),
        ]
    )


def to_ipc(table: pa.Table) -> bytes:
    """Pack a table into one compressed Arrow IPC stream.

    The whole stream is compressed rather than each buffer, so that an id that stands again in its path costs less.
    """
    sink = pa.BufferOutputStream()
    with (
        pa.CompressedOutputStream(sink, "zstd") as compressed,
        pa.ipc.new_stream(compressed, table.schema) as writer,
    ):
        writer.write_table(table)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def from_ipc(packed: bytes) -> pa.Table:
    """Unpack what `to_ipc` packed."""
    with (
        pa.CompressedInputStream(pa.BufferReader(packed), "zstd") as stream,
        pa.ipc.open_stream(stream) as reader,
    ):
        return reader.read_all()


@dataclass(frozen=True)
class PathRule:
    """Where the photos of a collection lie, by id and label.

    Attributes
    ----------
    root : str
        Absolute path or URL of the folder that holds them.
    template : str
        Path below it, with ``{id}``, ``{label}`` and single characters of them.
    """

    root: str
    template: str


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
        rule gives it, and ``always_keep`` where it is true of any.
    settings : PhotoSettings
        The same for all partitions of a run.
    source : Source
        How photos are read; may hold secrets.
    path_rule : PathRule or None
        Where the photos lie.
    """

    index: int
    photos: int
    rows: bytes
    settings: PhotoSettings
    source: Source
    path_rule: PathRule | None = None

    def __repr__(self) -> str:
        # Dask prints tasks in its logs and on its dashboard: no path list there.
        return f"PartitionTask(index={self.index}, photos={self.photos})"


@dataclass(frozen=True)
class Terms:
    """What all workers of a run must meet, and how they report; the same for all of its tasks.

    Attributes
    ----------
    run_token : str
        Names this run, in the Dask keys too: no result of an earlier run answers for this one.
    code : str
        Digest of our own code (`reducer.shipping.code_digest`).
    environment : str
        Digest of what decides hashes (`reducer.environment.Environment.digest`).
    seen : str or None
        Path of a photo that every worker must be able to read.
    beat : float
        Seconds between two signs of progress.
    patience : float
        Seconds that one photo may take where photos are looked at apart.
    """

    run_token: str
    code: str
    environment: str
    seen: str | None
    beat: float
    patience: float


@dataclass(frozen=True)
class Work:
    """One element of the Dask bag: a partition, sent to a worker.

    Attributes
    ----------
    task : PartitionTask
        The partition.
    terms : Terms
        Of the run.
    attempt : int
        How often it was sent before.
    apart : bool
        Whether its photos are to be looked at in a process of their own, since a worker died or stalled with them.
    """

    task: PartitionTask
    terms: Terms
    attempt: int = 0
    apart: bool = False

    def __repr__(self) -> str:
        return f"Work({self.task!r}, attempt={self.attempt}, apart={self.apart})"


@dataclass(frozen=True)
class Unfit:
    """A worker's answer when it cannot do its part as the others do.

    Attributes
    ----------
    worker : str
        Its address.
    reason : str
        One line.
    environment : Environment or None
        The worker's own, where that is why.
    """

    worker: str
    reason: str
    environment: Environment | None = None


@dataclass(frozen=True)
class Spread:
    """How different the chosen photos are, and how near all others are to them; sums of integers, so order-free.

    Attributes
    ----------
    labels : int
        Labels with a chosen photo.
    candidates : int
        Photos of these labels that could have been chosen.
    nearest_sum : int
        Sum of their distances to the nearest chosen photo of their label, in bits.
    radius_sum, radius_max : int
        Sum over labels, and largest, of the coverage radius: the largest of these distances, in bits.
    labels_with_pairs : int
        Labels with at least two chosen photos.
    pairs : int
        Pairs of chosen photos within a label.
    near_copies : int
        Those of the pairs that are at most `reducer.config.near_copy_bits` apart.
    distance_sum : int
        Sum of all pair distances, in bits.
    smallest_sum : int
        Sum over labels of the smallest pair distance, in bits.
    """

    labels: int = 0
    candidates: int = 0
    nearest_sum: int = 0
    radius_sum: int = 0
    radius_max: int = 0
    labels_with_pairs: int = 0
    pairs: int = 0
    near_copies: int = 0
    distance_sum: int = 0
    smallest_sum: int = 0

    def __add__(self, other: Spread) -> Spread:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Spread(**sums | {"radius_max": max(self.radius_max, other.radius_max)})


@dataclass(frozen=True)
class Certificate:
    """How near farthest-first has come to an upper bound for every choice, over labels; exact, so order-free.

    Attributes
    ----------
    labels : int
        Labels that it is known for.
    share_sum : Fraction
        Sum over them of the smallest pair distance over its upper bound, each 0 to 1.
    worst : Fraction
        The smallest of these shares; 1 without labels.
    """

    labels: int = 0
    share_sum: Fraction = Fraction(0)
    worst: Fraction = Fraction(1)

    def __add__(self, other: Certificate) -> Certificate:
        return Certificate(self.labels + other.labels, self.share_sum + other.share_sum, min(self.worst, other.worst))


@dataclass(frozen=True)
class Quality:
    """What the choice is worth.

    Attributes
    ----------
    selection, random : Spread
        Of what the strategy chose, and of a seeded random choice of the same size from the same candidates.
    certificate : Certificate
        Of farthest-first; empty for other strategies.
    """

    selection: Spread = Spread()
    random: Spread = Spread()
    certificate: Certificate = Certificate()

    def __add__(self, other: Quality) -> Quality:
        return Quality(
            self.selection + other.selection, self.random + other.random, self.certificate + other.certificate
        )


@dataclass(frozen=True)
class PartitionResult:
    """What a worker sends back for one partition.

    Attributes
    ----------
    index : int
        Number of the partition.
    found : bytes
        `FOUND_SCHEMA` rows, one for each of the task's and in their order, packed by `to_ipc`.
    read, failed : int
        Photos tried, and those of them that could not be hashed.
    bytes_read : int
        Bytes of photos read.
    first_failure : str or None
        ``path: error`` of the first failed photo.
    quality : Quality
        What the choice is worth.
    seconds : float
        Wall time on the worker.
    peak_memory : int
        Highest resident memory of the worker process so far, in bytes; 0 where it cannot be told.
    """

    index: int
    found: bytes
    read: int
    failed: int
    bytes_read: int
    first_failure: str | None
    quality: Quality
    seconds: float
    peak_memory: int

    def __repr__(self) -> str:
        return f"PartitionResult(index={self.index}, read={self.read}, failed={self.failed})"
