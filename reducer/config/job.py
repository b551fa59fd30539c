"""What a job does (`Job`): validated on construction, before anything starts. Where it runs: `config.cluster`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from reducer.config.checks import channels, check_count, choose, file_digest, flag
from reducer.config.cut_rules import CutRules
from reducer.config.settings import (
    DECODE_NAMES,
    EMBED_BATCH,
    EMBED_MEAN,
    EMBED_SIZE,
    EMBED_STD,
    FORMATS,
    HASH_NAMES,
    LARGEST_HASH,
    READER_NAMES,
    SMALLEST_HASH,
    STRATEGY_NAMES,
    EmbedSettings,
    PhotoSettings,
    Source,
    default_strategy,
    near_copy_bits,
)
from reducer.errors import InputError
from reducer.storage.location import Location, MemberKeys, PathRule, absolute, is_url, template_fields
from reducer.storage.remote import check_obstore

#: Photos kept a label, where nothing else bounds the reduced list.
DEFAULT_KEEP = 25
GLDV2_TEMPLATE = "{id[0]}/{id[1]}/{id[2]}/{id}.jpg"


@dataclass(frozen=True)
class Job:
    """One reduction: which photos, how they are looked at, how many are kept, where the results go.

    Attributes
    ----------
    images : str
        Folder of the photos: a local path, or a URL that fsspec opens, such as ``s3://bucket/prefix``. Or tar shards: a
        folder of nothing else, or a glob such as ``train/images_*.tar``.
    output : str
        The run folder to write, a local path or a URL.
    manifest : str, optional
        A local path or a URL.
        CSV or Parquet file with one row a photo. Without one every photo file below ``images`` is taken, its
        folder is its label and its relative path its id; in tar shards every sample of WebDataset's.
    id_column, label_column : str
        The manifest's columns; also those of the reduced list.
    path_column : str, optional
        The manifest's column with paths (relative to ``images`` or absolute).
    path_template : str, optional
        Where a photo lies below ``images`` when there is no path column: a format string over ``id`` and
        ``label``, ``{id[0]}`` being the first character. Default: GLDv2's layout; in tar shards a photo is found by its
        file's name without the extension, wherever it lies.
    keep : int, optional
        Photos kept a label; default 25, or no limit with ``total`` or ``max_bytes``.
    min_distance, total, max_bytes, min_per_label
        Which photos are kept of all labels, as for `CutRules`. Any of them reads and ranks all labels.
    candidates : int or None
        At most so many photos a label are read, drawn at random; None reads all.
    strategy : {"farthest-first", "facility-location", "pairs", "random"}
        How photos are ranked; default farthest-first by hashes, facility-location by vectors (which take no pairs).
    vectors : str, optional
        Rank by these vectors: a Parquet file (a local path, or a URL that is opened as ``images`` is), or a folder of
        such, with a column ``id_column`` and a list of numbers in another one, or a column a dimension. No photo is
        read then unless something else asks for its hash: ``near_copy``, ``avoid``, ``drop_flat``, ``cross_label``,
        ``max_bytes``.
    embed : str, optional
        Rank by the vectors that this ONNX model makes of the photos, a local path.
    embed_size, embed_mean, embed_std, embed_batch, embed_output
        What the model is given and which output is taken, as for `EmbedSettings`.
    near_copy : int, optional
        With hashes and vectors: a photo at most so many bits from one with a smaller rank comes behind all that are
        not; default 6 of 64 with ``embed``, none with ``vectors``.
    hash : {"dhash", "dhash-vertical", "phash", "ahash", "whash"}
        Which perceptual hash of imagehash's they are compared by.
    hash_size : int
        Its size, 2 to 32 (a power of two for whash); it has so many bits squared.
    exif_orientation : bool
        Turn photos upright, as their EXIF data say, before they are hashed.
    drop_flat : bool
        Do not keep photos without detail. As any label may have some, all labels are read.
    always_keep : str, optional
        File of ids that are ranked before all others of their label and are kept whatever ``drop_flat`` and ``avoid``
        say: one a line, or a CSV or Parquet file with the column ``id_column``.
    avoid : str, optional
        Photos near one of these are not kept (all labels are read): another run's folder, a CSV or Parquet file with
        a column ``hash``, or one hash a line, in hex.
    avoid_distance : int, optional
        How near, in bits; default as for near copies, 6 of 64.
    decode : {"fast", "fastest", "exact"}
        How JPEGs are decoded: at reduced size; the same, but large progressive ones by their first scan only; in full,
        as imagehash does.
    seed : int
        Of every random choice.
    labels : tuple of str, optional
        Only these labels (a trial run).
    limit_labels : int, optional
        Only so many labels, drawn at random (a trial run).
    rank_all : bool
        Read and rank labels with no more than ``keep`` photos too.
    reuse : str, optional
        Folder of an earlier run, a local path or a URL (opened as ``output`` is): hashes of photos that have not
        changed since come from it.
    cross_label : bool
        Also write the near copies under different labels.
    partition_images : int, optional
        Photos a partition; default 500 to 2,000 by the size of the job.
    md5 : str, optional
        A file or folder (a local path, or a URL that is opened as ``images`` is) of MD5 sums that were published of the
        tar shards in ``images``: photos of a shard with another sum fail.
    md5_warn : bool
        Such photos are taken, with a warning.
    label_field : str, optional
        Of WebDataset's shards without a manifest: which field of a sample's JSON is its label; default what its
        ``.cls`` holds.
    max_pixels : int
        Photos that declare more pixels fail.
    max_failures : float
        Share of the photos read that may fail, 0 to 1.
    format : {"csv", "parquet", "both"}
        Which reduced lists are written.
    report : bool
        Draw ``report.html`` at the end.
    overwrite : bool
        Replace an earlier run in ``output``.
    break_lock : bool
        Take ``output`` from a run that seems to be at work on it.
    storage_options, manifest_storage_options, output_storage_options : mapping
        What fsspec is to open the URLs of ``images``, ``manifest`` and ``output`` with: ``endpoint_url``, ``key``,
        ``secret``, ``anon``, ``profile``, ``region`` and whatever else it takes. They are not shown and not stored.
    reader : {"s3fs", "obstore"}
        What reads photos of ``s3://``.
    read_ahead : int
        Photos of a URL that are under way at a time, for each worker thread; of tar shards a quarter as many blocks of
        4 MiB.

    Raises
    ------
    InputError
        If a value is out of its range or two contradict each other.
    """

    images: str
    output: str
    manifest: str | None = None
    id_column: str = "id"
    label_column: str = "landmark_id"
    path_column: str | None = None
    path_template: str | None = None
    keep: int | None = None
    min_distance: float | None = None
    total: int | None = None
    max_bytes: int | str | None = None
    min_per_label: int | None = None
    candidates: int | None = 1000
    strategy: str | None = None
    vectors: str | None = None
    embed: str | None = None
    embed_size: int = EMBED_SIZE
    embed_mean: tuple[float, ...] = EMBED_MEAN
    embed_std: tuple[float, ...] = EMBED_STD
    embed_batch: int = EMBED_BATCH
    embed_output: str | None = None
    near_copy: int | None = None
    hash: str = "dhash"
    hash_size: int = 8
    exif_orientation: bool = False
    drop_flat: bool = False
    always_keep: str | None = None
    avoid: str | None = None
    avoid_distance: int | None = None
    decode: str = "fast"
    seed: int = 0
    labels: tuple[str, ...] | None = None
    limit_labels: int | None = None
    rank_all: bool = False
    reuse: str | None = None
    cross_label: bool = False
    partition_images: int | None = None
    md5: str | None = None
    md5_warn: bool = False
    label_field: str | None = None
    max_pixels: int = 200_000_000
    max_failures: float = 0.1
    format: str = "both"
    report: bool = True
    overwrite: bool = False
    break_lock: bool = False
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    manifest_storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    output_storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    reader: str = "s3fs"
    read_ahead: int = 32

    def __post_init__(self) -> None:
        for name in ("images", "output", "manifest", "always_keep", "avoid", "reuse", "md5", "vectors", "embed"):
            value = getattr(self, name)
            if value is None:
                continue
            where = "IMAGES" if name == "images" else flag(name)
            if not str(value):
                raise InputError(f"{where} is empty: give a path")
            if is_url(str(value)) and name in ("always_keep", "avoid", "embed"):
                raise InputError(f"{where} {value} is a URL; it is read from local paths only")
            object.__setattr__(self, name, str(value))
        for name in ("path_column", "path_template", "id_column", "label_column", "label_field", "embed_output"):
            if getattr(self, name) == "":
                raise InputError(f"{flag(name)} is empty: give it a value or leave it out")
        if isinstance(self.labels, str):
            raise InputError("labels: give a list of labels, not one text")
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        if self.strategy is None:
            object.__setattr__(self, "strategy", default_strategy(self.by_vectors))
        choose("strategy", self.ranked_by, STRATEGY_NAMES)
        self._check_vectors()
        choose("hash", self.hash, HASH_NAMES)
        choose("decode", self.decode, DECODE_NAMES)
        choose("format", self.format, FORMATS)
        choose("reader", self.reader, READER_NAMES)
        for what, option, place in (
            ("IMAGES", "--storage-option", self.images_location),
            ("--manifest", "--manifest-storage-option", self.manifest_location),
            ("--output", "--output-storage-option", self.output_location),
        ):
            others = {"IMAGES": (self.md5, self.vectors), "--output": (self.reuse,)}.get(what, ())
            if any(other is not None and is_url(other) for other in others):
                continue  # they open that one
            if place.options and not place.remote:
                raise InputError(f"{option} says how a URL is opened, and {what} is none: leave it out")
        if self.reader == "obstore" and self.images_location.on_s3:
            check_obstore(self.storage_options)
        object.__setattr__(self, "max_bytes", self.cut_rules.max_bytes)
        if self.keep is None and not self.cut_rules.has_budget:
            object.__setattr__(self, "keep", DEFAULT_KEEP)
        for name in (
            *("candidates", "limit_labels", "partition_images", "max_pixels", "read_ahead"),
            *("embed_size", "embed_batch"),
        ):
            check_count(name, getattr(self, name))
        if self.has_filters:
            object.__setattr__(self, "rank_all", True)
        if not isinstance(self.hash_size, int) or not SMALLEST_HASH <= self.hash_size <= LARGEST_HASH:
            raise InputError(
                f"--hash-size is {self.hash_size!r}: expected a whole number from {SMALLEST_HASH} to {LARGEST_HASH}"
            )
        if self.hash == "whash" and self.hash_size.bit_count() != 1:
            raise InputError(f"--hash-size is {self.hash_size}: whash needs a power of two (2, 4, 8, 16 or 32)")
        if self.avoid_distance is not None:
            if self.avoid is None:
                raise InputError("--avoid-distance says how near a photo to avoid may be: give --avoid too")
            if not isinstance(self.avoid_distance, int) or not 0 <= self.avoid_distance <= self.hash_size**2:
                raise InputError(
                    f"--avoid-distance is {self.avoid_distance!r}: expected a whole number of bits from 0 to "
                    f"{self.hash_size**2}"
                )
        if self.candidates is not None and self.keep is not None and self.candidates < self.keep:
            raise InputError(
                f"--candidates {self.candidates} is less than --keep {self.keep}: no ranked label could keep that "
                "many; raise --candidates or lower --keep"
            )
        if not 0 <= self.max_failures <= 1:
            raise InputError(f"--max-failures is {self.max_failures}: expected a share from 0 to 1")
        if self.id_column == self.label_column:
            raise InputError(f"--id-column and --label-column are both {self.id_column!r}")
        if self.path_column is not None and self.path_template is not None:
            raise InputError("--path-column and --path-template exclude each other: give one")
        if self.manifest is None and (self.path_column or self.path_template):
            raise InputError("--path-column and --path-template say where a manifest's photos lie: give --manifest")
        if self.reuse is not None and absolute(self.reuse) == absolute(self.output):
            raise InputError(
                f"--reuse and --output are both {self.reuse}: give another --output, or go on with reducer resume"
            )
        if self.md5_warn and self.md5 is None:
            raise InputError("--md5-warn says what becomes of photos whose shard has another sum: give --md5 too")
        if self.label_field is not None and self.manifest is not None:
            raise InputError("--label-field is for tar shards without a manifest: leave it out, or --manifest")
        template_fields(self.template)

    def _check_vectors(self) -> None:
        for name in ("embed_mean", "embed_std"):
            object.__setattr__(self, name, channels(name, getattr(self, name)))
        if 0.0 in self.embed_std:
            raise InputError(f"--embed-std is {','.join(map(str, self.embed_std))}: nothing can be divided by 0")
        if self.vectors is not None and self.embed is not None:
            raise InputError("--vectors and --embed exclude each other: give the vectors, or what makes them")
        if self.embed is None:
            for own in fields(self):
                if own.name.startswith("embed_") and getattr(self, own.name) != own.default:
                    raise InputError(f"{flag(own.name)} is about a model: give --embed too, or leave it out")
        if self.by_vectors and self.strategy == "pairs":
            raise InputError(
                "--strategy pairs compares hashes: with vectors give facility-location, farthest-first or random"
            )
        if self.near_copy is None:
            return
        if not self.by_vectors:
            raise InputError("--near-copy says which photos come last when they are ranked by vectors: give --vectors")
        if not isinstance(self.near_copy, int) or not 0 <= self.near_copy <= self.hash_size**2:
            raise InputError(
                f"--near-copy is {self.near_copy!r}: expected a whole number of bits from 0 to {self.hash_size**2}"
            )

    @property
    def ranked_by(self) -> str:
        """The strategy in force."""
        assert self.strategy is not None
        return self.strategy

    @property
    def by_vectors(self) -> bool:
        """Whether photos are compared by vectors."""
        return self.vectors is not None or self.embed is not None

    @property
    def hashes_photos(self) -> bool:
        """Whether photos are read and hashed: with vectors that are given, only where something needs it."""
        return (
            self.vectors is None
            or self.near_copy is not None
            or self.avoid is not None
            or self.drop_flat
            or self.cross_label
            or self.max_bytes is not None
        )

    @property
    def vectors_location(self) -> Location:
        """Where the vectors are; an empty path without any."""
        return Location(self.vectors or "", self.storage_options)

    @property
    def cut_rules(self) -> CutRules:
        """Which of the ranked photos are kept."""
        return CutRules(self.min_distance, self.keep, self.total, self.max_bytes, self.min_per_label)

    @property
    def has_filters(self) -> bool:
        """Whether which photos are kept can only be told when all are ranked."""
        return self.min_distance is not None or self.cut_rules.has_budget

    @property
    def template(self) -> str:
        """The path template in force."""
        return self.path_template or GLDV2_TEMPLATE

    @property
    def images_location(self) -> Location:
        """Where the photos are."""
        return Location(self.images, self.storage_options)

    @property
    def manifest_location(self) -> Location:
        """Where the manifest is; an empty path without one."""
        return Location(self.manifest or "", self.manifest_storage_options)

    @property
    def output_location(self) -> Location:
        """Where the run folder is."""
        return Location(self.output, self.output_storage_options)

    @property
    def reuse_place(self) -> Location:
        """Where the run is whose hashes are taken; an empty path without one."""
        return Location(self.reuse or "", self.output_storage_options)

    @property
    def source(self) -> Source:
        """How workers read the photos."""
        return Source(self.storage_options, self.reader, self.read_ahead)

    @property
    def embed_settings(self) -> EmbedSettings | None:
        """How vectors are made; None where they are not.

        Raises
        ------
        InputError
            If the model cannot be read.
        """
        if self.embed is None:
            return None
        model = file_digest("--embed", self.embed)
        return EmbedSettings(
            model, self.embed_size, self.embed_mean, self.embed_std, self.embed_batch, self.embed_output
        )

    @property
    def photo_settings(self) -> PhotoSettings:
        """The part of the job that decides hashes, vectors and ranks.

        Raises
        ------
        InputError
            If there is a model, and it cannot be read.
        """
        return replace(self.settings_without_model, embed=self.embed_settings)

    @property
    def settings_without_model(self) -> PhotoSettings:
        """The same, but that no vectors are made."""
        near = None if self.embed is None else near_copy_bits(self.hash_size**2)
        return PhotoSettings(
            keep=self.keep,
            strategy=self.ranked_by,
            hash=self.hash,
            hash_size=self.hash_size,
            decode=self.decode,
            exif_orientation=self.exif_orientation,
            drop_flat=self.drop_flat,
            avoid_distance=(near_copy_bits(self.hash_size**2) if self.avoid_distance is None else self.avoid_distance),
            seed=self.seed,
            max_pixels=self.max_pixels,
            by_vectors=self.by_vectors,
            hashed=self.hashes_photos,
            near_copy=near if self.near_copy is None else self.near_copy,
        )

    @property
    def reads_all(self) -> bool:
        """Whether labels with no more than ``keep`` photos are read too: some of theirs may have to be left out."""
        return self.rank_all or self.drop_flat or self.avoid is not None


def path_rule(job: Job) -> PathRule | None:
    """Where the photos of a job lie; None where the manifest names each path."""
    if job.path_column is not None:
        return None
    root = absolute(job.images)
    return PathRule(root, "{id}" if job.manifest is None else job.template)


def member_keys(job: Job) -> MemberKeys:
    """By what photos in shards are told from others."""
    if job.manifest is None:
        return MemberKeys.SAMPLE
    return MemberKeys.STEM if job.path_column is None and job.path_template is None else MemberKeys.PATH
