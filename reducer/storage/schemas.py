"""Arrow schemas of the tables that cross a border between stages, and how tables travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


def _field(name: str, kind: pa.DataType, description: str, unit: str | None = None) -> pa.Field:
    metadata = {"description": description}
    if unit is not None:
        metadata["unit"] = unit
    return pa.field(name, kind, metadata=metadata)


#: One row per photo of the manifest, as `reducer.run.plan.manifest` returns it.
MANIFEST_SCHEMA = pa.schema(
    [
        _field("row", pa.int64(), "position in the manifest, the first photo is 0"),
        _field("id", pa.string(), "photo id, as written in the manifest"),
        _field("label", pa.string(), "label, as written in the manifest"),
        _field("path", pa.string(), "where the photo lies; in a plan of shards, what it is looked for by"),
        _field("bytes", pa.int64(), "file size; null where it is not known", "bytes"),
    ]
)

#: The rows to read.
TASK_SCHEMA = pa.schema(
    [*MANIFEST_SCHEMA, _field("always_keep", pa.bool_(), "whether the photo is ranked before all others of its label")]
)

#: What is known of a photo from an earlier look at it, in columns behind those of `TASK_SCHEMA`; null where nothing is.
KNOWN_SCHEMA = pa.schema(
    [
        _field("known_hash", pa.string(), "perceptual hash in hex"),
        _field("known_flat", pa.bool_(), "whether it shows next to nothing"),
        _field("known_width", pa.int32(), "width as stored", "pixels"),
        _field("known_height", pa.int32(), "height as stored", "pixels"),
        _field("known_format", pa.string(), "file format"),
        _field("known_bytes", pa.int64(), "file size", "bytes"),
        _field("known_mtime", pa.timestamp("ns", tz="UTC"), "time of the file's last change"),
        _field("known_etag", pa.string(), "entity tag of an object in a store"),
        _field("known_error", pa.string(), "why it could not be hashed"),
        _field("known_vector", pa.int64(), "its unit vector: where it stands among those that are kept aside"),
        _field("known_reused", pa.bool_(), "whether an earlier run looked at it, and not this one"),
    ]
)

#: The vectors of photos that `--vectors` files give, in columns behind the others of a task's rows.
GIVEN_SCHEMA = pa.schema(
    [
        _field("given_vector", pa.binary(), "unit vector, float16 numbers; null where none can be ranked"),
        _field("given_error", pa.string(), "why there is no vector; null where there is one"),
    ]
)

#: Where photos of shards lie, in columns behind the others of a row; null for single files.
SHARD_POSITION_SCHEMA = pa.schema(
    [
        _field("shard", pa.string(), "tar shard that holds the photo; null for single files"),
        _field("offset", pa.int64(), "where the photo starts in its shard", "bytes"),
    ]
)

#: `RUN/hashes/part-*.parquet`: what was found in a shard, or of a piece of a label that is too large for a partition.
HASHES_SCHEMA = pa.schema(
    [
        _field("key", pa.string(), "what the plan's column path calls the photo"),
        _field("label", pa.string(), "label that stands beside it in its shard; null where the manifest tells it"),
        _field("path", pa.string(), "where the photo lies: in its shard, where it is in one"),
        *SHARD_POSITION_SCHEMA,
        _field("bytes", pa.int64(), "file size", "bytes"),
        _field("mtime", pa.timestamp("ns", tz="UTC"), "time of the last change, of the shard where it is in one"),
        _field("etag", pa.string(), "entity tag of an object in a store, of the shard where it is in one"),
        _field("width", pa.int32(), "width as stored, before any EXIF rotation", "pixels"),
        _field("height", pa.int32(), "height as stored, before any EXIF rotation", "pixels"),
        _field("format", pa.string(), "file format that Pillow found"),
        _field("hash", pa.string(), "perceptual hash in hex; null if it is not to be hashed, or cannot be"),
        _field("flat", pa.bool_(), "whether it shows next to nothing; null without a hash"),
        _field("error", pa.string(), "why the photo could not be hashed, one line"),
        _field("vector", pa.binary(), "unit vector that a model made of it, float16 numbers; null without a model"),
        _field("reused", pa.bool_(), "whether the hash is an earlier run's"),
    ]
)

#: The same in the memory of the client, which keeps vectors aside: where each stands there.
SPOOLED_SCHEMA = pa.schema(
    [f if f.name != "vector" else f.with_type(pa.int64()).with_metadata(None) for f in HASHES_SCHEMA]
)

#: `RUN/shards.parquet`: the shards, as they were when the run began, or when they were to be read again.
SHARDS_SCHEMA = pa.schema(
    [
        _field("number", pa.int32(), "place in the order of the paths; names the file of hashes"),
        _field("path", pa.string(), "path or URL"),
        _field("bytes", pa.int64(), "size", "bytes"),
        _field("mtime_ns", pa.int64(), "time of the last change since 1970 UTC", "nanoseconds"),
        _field("etag", pa.string(), "entity tag of an object in a store"),
        _field("md5", pa.string(), "MD5 sum that was published, in hex"),
    ]
)

#: The plan `RUN/plan.parquet`: one row per manifest row (after duplicates), sorted by (label, id). The path is null
#: where a rule tells it from id and label (`reducer.storage.paths.with_paths`).
PLAN_SCHEMA = pa.schema(
    [
        *TASK_SCHEMA,
        _field("partition", pa.int32(), "number of the part file that gets the photo; null if it is not read"),
        _field("piece", pa.int32(), "number of the file of hashes that gets it first; null if none, or shards tell"),
        _field("reason", pa.string(), "kept-small-label or not-sampled; null if it is read"),
    ]
)

#: The ledger `RUN/images/part-*.parquet`: one row per manifest row (after duplicates).
LEDGER_SCHEMA = pa.schema(
    [
        *MANIFEST_SCHEMA,
        _field("width", pa.int32(), "width as stored, before any EXIF rotation", "pixels"),
        _field("height", pa.int32(), "height as stored, before any EXIF rotation", "pixels"),
        _field("format", pa.string(), "file format that Pillow found, whatever the file's name says"),
        _field("mtime", pa.timestamp("ns", tz="UTC"), "time of the last change of the file, or of the shard"),
        _field("etag", pa.string(), "entity tag of an object in a store, or of the shard; null for local files"),
        *SHARD_POSITION_SCHEMA,
        _field("hash", pa.string(), "perceptual hash in hex, as str() of imagehash's; null if not hashed"),
        _field("rank", pa.int32(), "place in the order of its label, the first is 0; null if not ranked"),
        _field(
            "insertion_distance",
            pa.float64(),
            "distance to the nearest photo of the label with a smaller rank; null for rank 0",
            "bits",  # or cosine: `with_distance_unit`
        ),
        _field("nearest_kept", pa.string(), "id of the nearest kept photo of the label; itself if kept"),
        _field("nearest_kept_distance", pa.float64(), "distance to nearest_kept", "bits"),
        _field("kept", pa.bool_(), "whether the photo is in the reduced list"),
        _field(
            "reason",
            pa.string(),
            "kept, kept-small-label, beyond-keep, min-distance, budget, not-sampled, flat, avoided or failed",
        ),
        _field("error", pa.string(), "why the photo could not be read, one line; null if it could"),
    ]
)

#: `RUN/cross_label.parquet`: one row per pair of photos of different labels.
CROSS_LABEL_SCHEMA = pa.schema(
    [
        _field("id", pa.string(), "photo id, as written in the manifest"),
        _field("label", pa.string(), "its label, the first of the two as text"),
        _field("path", pa.string(), "where it lies"),
        _field("hash", pa.string(), "its perceptual hash in hex, as str() of imagehash's"),
        _field("other_id", pa.string(), "id of the photo of another label that is like it"),
        _field("other_label", pa.string(), "label of that photo"),
        _field("other_path", pa.string(), "where that photo lies"),
        _field("other_hash", pa.string(), "perceptual hash of that photo"),
        _field("distance", pa.float64(), "distance between the two hashes", "bits"),
    ]
)

#: `RUN/vectors/part-*.parquet`, before its last column, ``vector``: a list of as many float16 numbers as there are
#: dimensions (`reducer.storage.codecs.vector_field`).
VECTORS_SCHEMA = pa.schema(
    [
        _field("id", pa.string(), "photo id, as written in the manifest"),
        _field("label", pa.string(), "label, as written in the manifest"),
    ]
)

#: `TARGET/export.parquet`: one row per photo that is exported; written before the first is, and again at the end.
EXPORT_SCHEMA = pa.schema(
    [
        _field("id", pa.string(), "photo id, as written in the manifest"),
        _field("label", pa.string(), "label, as written in the manifest"),
        _field("path", pa.string(), "where it lies in TARGET; in a shard of it, what it is called there"),
        _field("shard", pa.string(), "tar shard in TARGET that holds it; null for single files"),
        _field("bytes", pa.int64(), "its size in TARGET; null before the end, and where it failed", "bytes"),
        _field("source", pa.string(), "where it came from, as the ledger's path"),
        _field("source_shard", pa.string(), "tar shard that it came from; null for single files"),
        _field("error", pa.string(), "why it is not there, one line; null before the end, and if it is"),
    ]
)

#: What a worker finds out; the other columns of the ledger never leave the client.
RESULT_SCHEMA = pa.schema(
    [field for field in LEDGER_SCHEMA if field.name not in ("row", "id", "label", "path", *SHARD_POSITION_SCHEMA.names)]
)

KEPT = "kept"
KEPT_SMALL_LABEL = "kept-small-label"
BEYOND_KEEP = "beyond-keep"
MIN_DISTANCE = "min-distance"
BUDGET = "budget"
NOT_SAMPLED = "not-sampled"
FLAT = "flat"
AVOIDED = "avoided"
FAILED = "failed"

#: Columns of `reduced.parquet` after the manifest's own two.
REDUCED_COLUMNS = ("rank", "insertion_distance", "hash", "path", "bytes", "width", "height")


@dataclass(frozen=True)
class ListForm:
    """Form of a reduced list: that of the manifest.

    Attributes
    ----------
    id_column, label_column : str
        What the manifest calls them.
    id_type, label_type : str
        Arrow's names of their types.
    columns : tuple of str
        All columns of the manifest that travel along, ids and labels among them, in its order; none where there are no
        others.
    """

    id_column: str
    label_column: str
    id_type: str = "string"
    label_type: str = "string"
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> ListForm:
        """Return the form of the lists of a run, from its summary."""
        job, manifest = summary["job"], summary["manifest"]
        types, columns = manifest.get("types", {}), manifest.get("columns", ())
        return cls(job["id_column"], job["label_column"], **types, columns=tuple(columns))

    @property
    def others(self) -> tuple[str, ...]:
        """Columns of the manifest beside ids and labels."""
        return tuple(name for name in self.columns if name not in (self.id_column, self.label_column))

    @property
    def schema(self) -> pa.Schema:
        """Schema of `reduced.parquet`: the manifest's own two columns, then `REDUCED_COLUMNS`.

        One of the latter whose name the manifest uses for its id or label gets the prefix ``photo_``.
        """
        own = (self.id_column, self.label_column)
        extra = [LEDGER_SCHEMA.field(name) for name in REDUCED_COLUMNS]
        return pa.schema(
            [
                LEDGER_SCHEMA.field("id").with_name(self.id_column).with_type(pa.type_for_alias(self.id_type)),
                LEDGER_SCHEMA.field("label").with_name(self.label_column).with_type(pa.type_for_alias(self.label_type)),
                *(field.with_name(f"photo_{field.name}") if field.name in own else field for field in extra),
            ]
        )

    @property
    def names_of_others(self) -> list[str]:
        """Names of the other columns in `reduced.parquet`: ``manifest_NAME`` where a name is taken."""
        names: list[str] = self.schema.names
        for name in self.others:
            while name in names:
                name = f"manifest_{name}"  # noqa: PLW2901
            names.append(name)
        return names[-len(self.others) :]


def with_distance_unit(table: pa.Table, unit: str) -> pa.Table:
    """A table whose distances between photos of a label are said to be in a unit, ``bits`` or ``cosine``."""
    schema = table.schema
    for name in ("insertion_distance", "nearest_kept_distance"):
        if name in schema.names:
            field = schema.field(name)
            schema = schema.set(
                schema.get_field_index(name), field.with_metadata({**field.metadata, b"unit": unit.encode()})
            )
    return pa.Table.from_arrays(table.columns, schema=schema)


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
