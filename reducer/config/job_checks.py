"""Checks of a whole job: values out of range, and options that contradict each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from reducer.config.checks import check_bits, check_count, choose, flag
from reducer.config.cut_rules import CutRules
from reducer.config.settings import (
    DECODE_NAMES,
    FORMATS,
    HASH_NAMES,
    LARGEST_HASH,
    READER_NAMES,
    SMALLEST_HASH,
    STRATEGY_NAMES,
)
from reducer.errors import InputError
from reducer.storage.location import absolute, is_url, template_fields
from reducer.storage.remote import check_obstore

if TYPE_CHECKING:
    from reducer.config.job import Job

#: Fields of a job that are paths or URLs, and those of them that must be local.
PATH_FIELDS = ("images", "output", "manifest", "always_keep", "avoid", "reuse", "md5", "vectors", "embed")
LOCAL_FIELDS = ("always_keep", "avoid", "embed")
#: Fields that are text and may be left out, but not empty.
TEXT_FIELDS = ("path_column", "path_template", "id_column", "label_column", "label_field", "embed_output")
COUNT_FIELDS = (
    *("candidates", "limit_labels", "partition_images", "max_pixels", "read_ahead"),
    *("embed_size", "embed_batch"),
)


def label_names(labels: Iterable[object]) -> tuple[str, ...]:
    """Return the labels of a trial run as text.

    Raises
    ------
    InputError
        If they are one text instead of a list.
    """
    if isinstance(labels, str):
        raise InputError("labels: give a list of labels, not one text")
    return tuple(str(label) for label in labels)


def rules_of(job: Job) -> CutRules:
    """Return the rules in force: which of the ranked photos a job keeps.

    Raises
    ------
    InputError
        If a value is out of its range or two contradict each other.
    """
    rules = CutRules(job.min_distance, job.keep, job.total, job.max_bytes, job.min_per_label)
    return rules.with_default_keep()


def check_job(job: Job) -> None:
    """Refuse a job that cannot be meant; opens no file.

    Raises
    ------
    InputError
        If a value is out of its range or two contradict each other.
    """
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
    _check_hashes(job)
    if job.candidates is not None and rules.keep is not None and job.candidates < rules.keep:
        raise InputError(
            f"--candidates {job.candidates} is less than --keep {rules.keep}: no ranked label could keep that "
            "many; raise --candidates or lower --keep"
        )
    if not 0 <= job.max_failures <= 1:
        raise InputError(f"--max-failures is {job.max_failures}: expected a share from 0 to 1")
    _check_photos(job)


def _check_texts(job: Job) -> None:
    for name in PATH_FIELDS:
        path = getattr(job, name)
        if path is None:
            continue
        where = "IMAGES" if name == "images" else flag(name)
        if not path:
            raise InputError(f"{where} is empty: give a path")
        if is_url(path) and name in LOCAL_FIELDS:
            raise InputError(f"{where} {path} is a URL; it is read from local paths only")
    for name in TEXT_FIELDS:
        if getattr(job, name) == "":
            raise InputError(f"{flag(name)} is empty: give it a value or leave it out")


def _check_vectors(job: Job) -> None:
    if 0.0 in job.embed_std:
        raise InputError(f"--embed-std is {','.join(map(str, job.embed_std))}: nothing can be divided by 0")
    if job.vectors is not None and job.embed is not None:
        raise InputError("--vectors and --embed exclude each other: give the vectors, or what makes them")
    if job.embed is None:
        for field in fields(job):
            if field.name.startswith("embed_") and getattr(job, field.name) != field.default:
                raise InputError(f"{flag(field.name)} is about a model: give --embed too, or leave it out")
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
    for what, option, location, others in (
        # MD5 sums and vectors are opened as IMAGES is, and the run to reuse as --output is.
        ("IMAGES", "--storage-option", job.images_location, (job.md5, job.vectors)),
        ("--manifest", "--manifest-storage-option", job.manifest_location, ()),
        ("--output", "--output-storage-option", job.output_location, (job.reuse,)),
    ):
        remote = location.remote or any(path is not None and is_url(path) for path in others)
        if location.options and not remote:
            raise InputError(f"{option} says how a URL is opened, and {what} is none: leave it out")
    if job.reader == "obstore" and job.images_location.on_s3:
        check_obstore(job.storage_options)


def _check_hashes(job: Job) -> None:
    if not isinstance(job.hash_size, int) or not SMALLEST_HASH <= job.hash_size <= LARGEST_HASH:
        raise InputError(
            f"--hash-size is {job.hash_size!r}: expected a whole number from {SMALLEST_HASH} to {LARGEST_HASH}"
        )
    if job.hash == "whash" and job.hash_size.bit_count() != 1:
        raise InputError(f"--hash-size is {job.hash_size}: whash needs a power of two (2, 4, 8, 16 or 32)")
    if job.avoid_distance is not None:
        if job.avoid is None:
            raise InputError("--avoid-distance says how near a photo to avoid may be: give --avoid too")
        check_bits("avoid_distance", job.avoid_distance, job.hash_size**2)


def _check_photos(job: Job) -> None:
    """Refuse options that contradict each other on where photos, labels and earlier hashes are found."""
    if job.id_column == job.label_column:
        raise InputError(f"--id-column and --label-column are both {job.id_column!r}")
    if job.path_column is not None and job.path_template is not None:
        raise InputError("--path-column and --path-template exclude each other: give one")
    if job.manifest is None and (job.path_column or job.path_template):
        raise InputError("--path-column and --path-template say where a manifest's photos lie: give --manifest")
    if job.reuse is not None and absolute(job.reuse) == absolute(job.output):
        raise InputError(
            f"--reuse and --output are both {job.reuse}: give another --output, or go on with reducer resume"
        )
    if job.md5_warn and job.md5 is None:
        raise InputError("--md5-warn says what becomes of photos whose shard has another sum: give --md5 too")
    if job.label_field is not None and job.manifest is not None:
        raise InputError("--label-field is for tar shards without a manifest: leave it out, or --manifest")
    template_fields(job.template)
