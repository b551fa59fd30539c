"""A run as it is asked for (`Job`). `config.resolved` fills in the values in force, `config.cluster` says where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from reducer.config.checks import channels, check_bits, check_count, check_hash, choose, flag, texts
from reducer.config.cut_rules import CutRules
from reducer.config.settings import (
    DECODE_NAMES,
    EMBED_BATCH,
    EMBED_MEAN,
    EMBED_SIZE,
    EMBED_STD,
    FORMATS,
    HASH_NAMES,
    READER_NAMES,
    STORAGE_OPTIONS,
    STRATEGY_NAMES,
    Source,
)
from reducer.errors import InputError
from reducer.storage.location import (
    Location,
    MemberKeys,
    PathRule,
    absolute,
    is_url,
    lies_in,
    refuse_secret,
    resolved,
    template_fields,
)
from reducer.storage.remote import check_obstore, with_truths

#: Where GLDv2 keeps a photo: the path template in force where a job names none.
GLDV2_TEMPLATE = "{id[0]}/{id[1]}/{id[2]}/{id}.jpg"
#: Fields of a job that are paths or URLs, and those of them that must be local.
PATH_FIELDS = ("images", "output", "manifest", "always_keep", "avoid", "reuse", "md5", "vectors", "embed")
#: Those of files and folders that are read, and nowhere written.
INPUT_FILES = ("manifest", "always_keep", "avoid", "reuse", "md5", "vectors", "embed")
#: Those of them that may be run folders, in which there is room for other files.
RUN_FIELDS = ("avoid", "reuse")
LOCAL_FIELDS = ("always_keep", "avoid", "embed")
#: Fields that are text and may be left out, but not empty.
TEXT_FIELDS = ("path_column", "path_template", "id_column", "label_column", "label_field", "embed_output")
COUNT_FIELDS = (
    *("candidates", "limit_labels", "partition_images", "max_pixels", "read_ahead"),
    *("embed_size", "embed_batch"),
)


@dataclass(frozen=True)
class Job:
    """One reduction as it was asked for: which photos, how they are compared, how many are kept, where results go.

    Fields hold what was given and nothing that follows from it, so `dataclasses.replace` gives the job that would have
    been asked for with the other values. No file is opened.

    Attributes
    ----------
    images : str
        Folder of the photos: a local path, or a URL that fsspec opens, such as ``s3://bucket/prefix``. Or tar shards: a
        folder of nothing else, or a glob such as ``train/images_*.tar``.
    output : str
        The run folder to write, a local path or a URL.
    manifest : str, optional
        File with one row per photo (CSV, JSON lines, Parquet or Feather, or a folder of Parquet files), a local path
        or a URL. Without a manifest every photo file below ``images`` is taken, its folder is its label and its
        relative path its id; in tar shards every sample of WebDataset's.
    exclude : tuple of str, optional
        Files and folders below ``images`` that are left out where it is listed, as patterns of gitignore.
    id_column, label_column : str
        Columns of photo ids and labels, in the manifest and in the reduced list.
    path_column : str, optional
        The manifest's column with paths (relative to ``images`` or absolute).
    path_template : str, optional
        Path of a photo below ``images`` when there is no path column: a format string over ``id`` and ``label``,
        ``{id[0]}`` being the first character. Default: GLDv2's layout; in tar shards a photo is found by its file's
        name without the extension, wherever it lies.
    keep : int, optional
        Photos kept per label; default 25, or no limit with ``total`` or ``max_bytes``.
    min_distance, total, max_bytes, min_per_label
        Rules over the photos of all labels, as for `reducer.config.cut_rules.CutRules`. Any of them but
        ``min_per_label`` reads and ranks all labels.
    candidates : int or None
        Photos read per label at most, drawn at random; None reads all.
    strategy : {"farthest-first", "facility-location", "pairs", "random"}, optional
        How photos are ranked; default farthest-first by hashes, facility-location by vectors (which take no pairs).
    vectors : str, optional
        Vectors to rank by: a Parquet file (a local path, or a URL that is opened as ``images`` is), or a folder of
        such files, with a column ``id_column`` and one column of lists of numbers, or one column per dimension. No
        photo is read unless another option needs its hash: ``near_copy``, ``avoid``, ``drop_flat``, ``cross_label``,
        ``max_bytes``.
    embed : str, optional
        ONNX model, a local path, whose vectors of the photos they are ranked by.
    embed_size, embed_mean, embed_std, embed_batch, embed_output
        Input and output of the model, as for `reducer.config.settings.EmbedSettings`.
    near_copy : int, optional
        With hashes and vectors: a photo at most this number of bits from a photo of smaller rank is ranked after all
        that are farther; default 6 of 64 with ``embed``, none with ``vectors``.
    hash : {"dhash", "dhash-vertical", "phash", "ahash", "whash"}
        Perceptual hash, of imagehash's, that photos are compared by.
    hash_size : int
        Size of the hash, 2 to 32 (a power of two for whash); it has the square of its size in bits.
    exif_orientation : bool
        Turn photos upright, as their EXIF data say, before they are hashed.
    drop_flat : bool
        Do not keep photos without detail. As any label may have some, all labels are read.
    always_keep : str, optional
        File of ids that are ranked before all others of their label and are kept whatever ``drop_flat`` and ``avoid``
        say: one id per line, or a CSV or Parquet file with the column ``id_column``.
    avoid : str, optional
        Photos near one of these are not kept (all labels are read): another run's folder, a CSV or Parquet file with
        a column ``hash``, or one hash per line, in hex.
    avoid_distance : int, optional
        Distance in bits up to which a photo is near one to avoid; default as for near copies, 6 of 64.
    decode : {"fast", "fastest", "exact"}
        How JPEGs are decoded: at reduced size; at reduced size, large progressive files by their first scan only; in
        full, as imagehash does.
    seed : int
        Seed of every random choice.
    labels : tuple of str, optional
        Only these labels (a trial run).
    limit_labels : int, optional
        Only this number of labels, drawn at random (a trial run).
    rank_all : bool
        Read and rank labels with no more than ``keep`` photos too.
    reuse : str, optional
        Folder of an earlier run, a local path or a URL (opened as ``output`` is), that hashes of photos which have not
        changed since are taken from.
    cross_label : bool
        Also write the near copies under different labels.
    partition_images : int, optional
        Photos per partition; default 500 to 2,000 by the size of the job.
    md5 : str, optional
        File or folder (a local path, or a URL that is opened as ``images`` is) of the published MD5 sums of the tar
        shards in ``images``: photos of a shard with another sum fail.
    md5_warn : bool
        Take photos of shards with another sum, with a warning.
    label_field : str, optional
        Field of a sample's JSON that is its label, for WebDataset's shards without a manifest; default the content of
        its ``.cls``.
    max_pixels : int
        Photos that declare more pixels fail.
    check : bool
        Whether photos that are kept without being read are looked for (a stat each, or a listing): those that are not
        there, and empty files, fail. Photos in shards always are.
    max_failures : float
        Share of the photos read or looked for that may fail, 0 to 1.
    format : {"csv", "parquet", "both"}
        Reduced lists to write.
    extra_columns : bool
        Whether the other columns of the manifest travel along into the reduced lists.
    report : bool
        Draw ``report.html`` at the end.
    overwrite : bool
        Replace an earlier run in ``output``.
    break_lock : bool
        Take ``output`` from a run that seems to be at work on it.
    storage_options, manifest_storage_options, output_storage_options : mapping
        fsspec options that open the URLs of ``images``, ``manifest`` and ``output``: ``endpoint_url``, ``key``,
        ``secret``, ``anon``, ``profile``, ``region`` and others that the file system takes. They are not shown and not
        stored.
    reader : {"s3fs", "obstore"}
        Client that reads photos of ``s3://``.
    read_ahead : int
        Photos of a URL that are requested ahead, per worker thread; of tar shards a quarter as many blocks of 4 MiB.

    Raises
    ------
    InputError
        If a value is out of its range or two contradict each other.
    """

    images: str
    output: str
    manifest: str | None = None
    exclude: tuple[str, ...] | None = None
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
    check: bool = True
    max_failures: float = 0.1
    format: str = "both"
    extra_columns: bool = True
    report: bool = True
    overwrite: bool = False
    break_lock: bool = False
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    manifest_storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    output_storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    reader: str = "s3fs"
    read_ahead: int = 32

    def __post_init__(self) -> None:
        values: dict[str, object] = {
            name: str(path) for name in PATH_FIELDS if (path := getattr(self, name)) is not None
        }
        if self.labels is not None:
            values["labels"] = texts("labels", self.labels)
        if self.exclude is not None:
            values["exclude"] = texts("exclude", self.exclude) or None
        values |= {name: channels(name, getattr(self, name)) for name in ("embed_mean", "embed_std")}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _check(self)

    @property
    def by_vectors(self) -> bool:
        """True if photos are compared by vectors."""
        return self.vectors is not None or self.embed is not None

    @property
    def hashes_photos(self) -> bool:
        """True if photos are read and hashed: with given vectors, only if another option needs the hashes."""
        return (
            self.vectors is None
            or self.near_copy is not None
            or self.avoid is not None
            or self.drop_flat
            or self.cross_label
            or self.max_bytes is not None
        )

    @property
    def template(self) -> str:
        """The path template in force."""
        return self.path_template or GLDV2_TEMPLATE

    @property
    def images_location(self) -> Location:
        """Location of the photos."""
        return Location(self.images, self.storage_options)

    @property
    def manifest_location(self) -> Location:
        """Location of the manifest; an empty path without one."""
        return Location(self.manifest or "", self.manifest_storage_options)

    @property
    def output_location(self) -> Location:
        """Location of the run folder."""
        return Location(self.output, self.output_storage_options)

    @property
    def reuse_location(self) -> Location:
        """Location of the earlier run whose hashes are reused; an empty path without one."""
        return Location(self.reuse or "", self.output_storage_options)

    @property
    def vectors_location(self) -> Location:
        """Location of the given vectors; an empty path without any."""
        return Location(self.vectors or "", self.storage_options)

    @property
    def source(self) -> Source:
        """Settings with which workers read the photos."""
        return Source(self.storage_options, self.reader, self.read_ahead)


def given_fields(job: Job) -> tuple[str, ...]:
    """Return the names of the fields of a job that have another value than their defaults: those that were given."""
    return tuple(
        field.name
        for field in fields(Job)
        if field.name not in STORAGE_OPTIONS and getattr(job, field.name) != field.default
    )


def path_rule(job: Job) -> PathRule | None:
    """Return the rule for the paths of a job's photos; None where the manifest names each path."""
    if job.path_column is not None:
        return None
    root = absolute(job.images)
    return PathRule(root, "{id}" if job.manifest is None else job.template)


def member_keys(job: Job) -> MemberKeys:
    """Return how photos are identified in tar shards."""
    return member_keys_by(job.manifest, job.path_column, job.path_template)


def member_keys_by(manifest: str | None, path_column: str | None, path_template: str | None) -> MemberKeys:
    """Return how photos are identified in tar shards, by the options of a job that decide it."""
    if manifest is None:
        return MemberKeys.SAMPLE
    return MemberKeys.STEM if path_column is None and path_template is None else MemberKeys.PATH


def rules_of(job: Job) -> CutRules:
    """Return the rules in force: which of the ranked photos a job keeps.

    Raises
    ------
    InputError
        If a value is out of its range or two contradict each other.
    """
    return CutRules(job.min_distance, job.keep, job.total, job.max_bytes, job.min_per_label).with_default_keep()


def _check(job: Job) -> None:
    """Refuse values out of their range, and values that contradict each other; opens no file."""
    _check_texts(job)
    if job.strategy is not None:
        choose("strategy", job.strategy, STRATEGY_NAMES)
    _check_vectors(job)
    choose("hash", job.hash, HASH_NAMES)
    choose("decode", job.decode, DECODE_NAMES)
    choose("format", job.format, FORMATS)
    choose("reader", job.reader, READER_NAMES)
    _check_storage_options(job)
    rules = rules_of(job)
    for name in COUNT_FIELDS:
        check_count(name, getattr(job, name))
    check_hash(job.hash, job.hash_size)
    rules.check_scale("cosine" if job.by_vectors else "bits", job.hash_size**2)
    if job.avoid_distance is not None:
        if job.avoid is None:
            raise InputError("--avoid-distance says how near a photo to avoid may be: give --avoid too")
        check_bits("avoid_distance", job.avoid_distance, job.hash_size**2)
    if job.candidates is not None and rules.keep is not None and job.candidates < rules.keep:
        raise InputError(
            f"--candidates {job.candidates} is less than --keep {rules.keep}: no ranked label could keep that "
            "many; raise --candidates or lower --keep"
        )
    if not 0 <= job.max_failures <= 1:
        raise InputError(f"--max-failures is {job.max_failures}: expected a share from 0 to 1")
    _check_photos(job)


def check_no_input(output: str, inputs: Mapping[str, Any]) -> None:
    """Refuse a file to be written that is, or lies in, an input of the job.

    Parameters
    ----------
    output : str
        Path or URL of the file.
    inputs : mapping
        Paths or URLs by the names of `INPUT_FILES`; those that are missing or None are not there.

    Raises
    ------
    InputError
        Naming the option of the input.
    """
    for name in INPUT_FILES:
        path = inputs.get(name)
        if path is None or (name in RUN_FIELDS and resolved(output) != resolved(path)):
            continue
        if lies_in(output, path):
            raise InputError(f"--output {output} would overwrite {flag(name)} {path}, an input: give another name")


def _check_texts(job: Job) -> None:
    """Refuse paths and other texts that are empty, and URLs where a local path is needed."""
    for name in PATH_FIELDS:
        path = getattr(job, name)
        if path is None:
            continue
        where = "IMAGES" if name == "images" else flag(name)
        if not path:
            raise InputError(f"{where} is empty: give a path")
        option = {"manifest": "--manifest-storage-option", "output": "--output-storage-option"}
        given = option.get("output" if name == "reuse" else name, "--storage-option")
        refuse_secret(where, path, f"what opens it by {given} KEY=VALUE")
        if is_url(path) and name in LOCAL_FIELDS:
            raise InputError(f"{where} {path} is a URL; it is read from local paths only")
    for name in TEXT_FIELDS:
        if getattr(job, name) == "":
            raise InputError(f"{flag(name)} is empty: give it a value or leave it out")


def _check_vectors(job: Job) -> None:
    """Refuse options of vectors and models that contradict each other."""
    if 0.0 in job.embed_std:
        raise InputError(f"--embed-std is {','.join(map(str, job.embed_std))}: nothing can be divided by 0")
    if job.vectors is not None and job.embed is not None:
        raise InputError("--vectors and --embed exclude each other: give the vectors, or what makes them")
    if job.embed is None:
        for option in fields(job):
            if option.name.startswith("embed_") and getattr(job, option.name) != option.default:
                raise InputError(f"{flag(option.name)} is about a model: give --embed too, or leave it out")
    if job.by_vectors and job.strategy == "pairs":
        raise InputError(
            "--strategy pairs compares hashes: with vectors give facility-location, farthest-first or random"
        )
    if job.near_copy is None:
        return
    if not job.by_vectors:
        raise InputError("--near-copy says which photos come last when they are ranked by vectors: give --vectors")
    check_bits("near_copy", job.near_copy, job.hash_size**2)


def _check_storage_options(job: Job) -> None:
    """Refuse options that would open no URL."""
    for what, option, location, others in (
        # MD5 sums and vectors are opened as IMAGES is, and the run to reuse as --output is.
        ("IMAGES", "--storage-option", job.images_location, (job.md5, job.vectors)),
        ("--manifest", "--manifest-storage-option", job.manifest_location, ()),
        ("--output", "--output-storage-option", job.output_location, (job.reuse,)),
    ):
        with_truths(location.options)
        remote = location.remote or any(path is not None and is_url(path) for path in others)
        if location.options and not remote:
            if what == "IMAGES" and job.path_column is not None:  # which may name URLs
                continue
            raise InputError(f"{option} says how a URL is opened, and {what} is none: leave it out")
    if job.reader == "obstore" and job.images_location.on_s3:
        check_obstore(job.storage_options)


def _check_photos(job: Job) -> None:
    """Refuse options that contradict each other on where photos, labels and earlier hashes are found."""
    if job.id_column == job.label_column:
        raise InputError(f"--id-column and --label-column are both {job.id_column!r}")
    if job.path_column is not None and job.path_template is not None:
        raise InputError("--path-column and --path-template exclude each other: give one")
    if job.manifest is None and (job.path_column or job.path_template):
        raise InputError("--path-column and --path-template say where a manifest's photos lie: give --manifest")
    if job.exclude is not None and job.manifest is not None:
        raise InputError("--exclude leaves out what a listing finds, and a manifest names its photos: leave it out")
    if job.exclude is not None and "" in job.exclude:
        raise InputError("--exclude is empty: give a pattern, or leave it out")
    if job.reuse is not None and absolute(job.reuse) == absolute(job.output):
        raise InputError(
            f"--reuse and --output are both {job.reuse}: give another --output, or go on with reducer resume"
        )
    if job.md5_warn and job.md5 is None:
        raise InputError("--md5-warn says what becomes of photos whose shard has another sum: give --md5 too")
    if job.label_field is not None and job.manifest is not None:
        raise InputError("--label-field is for tar shards without a manifest: leave it out, or --manifest")
    template_fields(job.template)
