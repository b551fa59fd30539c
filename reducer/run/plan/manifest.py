"""Read a manifest, or list a folder of photos, as one checked table: row, id, label, path, bytes."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pathspec import GitIgnoreSpec

from reducer.config.job import Job, path_rule
from reducer.errors import InputError
from reducer.run.plan.listing import check_images, list_folder, list_remote
from reducer.storage.location import (
    SECRET_URL,
    MemberKeys,
    PathRule,
    absolute,
    is_url,
    refuse_secret,
    template_fields,
)
from reducer.storage.paths import paths_by_rule
from reducer.storage.schemas import MANIFEST_SCHEMA
from reducer.storage.sorting import in_groups, is_new, ranked, text_order, text_ranks
from reducer.storage.tables import (
    EXAMPLES,
    columns_of,
    holds_bytes,
    read_columns,
    refuse_empty,
    release_unused,
    whole_number_type,
)

log = logging.getLogger("reducer")

#: Folders of a collection that is divided for training and testing.
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))
#: Versions of objects; and keys with empty segments, with dots for segments, or with control characters.
VERSIONED = r"\?versionId="
NOT_FOR_OBSTORE = r"[\x00-\x1f\x7f]|[^:]//|/\.{1,2}(/|$)|^\.{1,2}/"
#: The column of GLDv2's train_clean.csv that lists the ids of a label.
ID_LISTS = "images"


@dataclass(frozen=True)
class Manifest:
    """The photos of a job, checked.

    Attributes
    ----------
    table : pyarrow.Table
        `MANIFEST_SCHEMA` rows, sorted by (label, id), no two with the same (id, label). The paths are null where
        `with_paths` makes them.
    duplicates : int
        Rows left out because an equal (id, label) was there already.
    shared_ids : int
        Ids that stand under more than one label; all their rows are kept.
    shared_examples : tuple of str
        The first few of these ids.
    skipped_files : mapping of str to int
        Files of a folder that were not taken, counted by reason.
    types : mapping of str to str
        Arrow's types of ids and labels (``id_type``, ``label_type``), where the manifest holds no text.
    columns : tuple of str
        All columns of the manifest that travel along into the reduced lists, where it has others than ids and labels.
    """

    table: pa.Table
    duplicates: int = 0
    shared_ids: int = 0
    shared_examples: tuple[str, ...] = ()
    skipped_files: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()

    def figures(self) -> dict[str, Any]:
        """Return the figures for ``summary.json``."""
        return {
            "rows": self.table.num_rows + self.duplicates,
            "duplicate_rows": self.duplicates,
            "ids_under_several_labels": self.shared_ids,
            "ids_under_several_labels_examples": list(self.shared_examples),
            "skipped_files": self.skipped_files,
            **({"types": self.types} if self.types else {}),
            **({"columns": list(self.columns)} if self.columns else {}),
        }


def read_manifest(job: Job, keys: MemberKeys | None = None) -> Manifest:
    """Read and check the photos of a job.

    Parameters
    ----------
    job : Job
        The job.
    keys : MemberKeys, optional
        Kind of key that identifies photos in shards: then there is a manifest, and its paths are keys.

    Raises
    ------
    InputError
        If there is nothing to read, a column is missing, an id or label is null, or a path cannot be made.
    """
    if keys is None:
        check_images(job)
    if job.manifest is not None:
        where = f"--manifest {job.manifest}"
        columns = columns_of(where, job.manifest_location)
        found = check(_read_table(job, keys, [field.name for field in columns]), {}, where, job.path_column)
        if keys is None:
            _check_keys(job, found.table)
        return replace(found, types=_types(job, columns), columns=_travelling(job, columns))
    found = _listed(job)
    _check_keys(job, found.table)
    _warn_of_folders(job, pc.unique(found.table["label"]).to_pylist(), found.table["label"])
    return found


def _warn_of_folders(job: Job, labels: Sequence[str], label: pa.ChunkedArray) -> None:
    """Say where folders seem to be no labels: splits above them, and IMAGES itself."""
    tops = {name.partition("/")[0] for name in labels if "/" in name}
    is_split = bool(tops) and {top.lower() for top in tops} <= SPLITS
    if is_split and all("/" in name or name == "." for name in labels):
        shown = ", ".join(sorted(tops))
        log.warning("IMAGES %s: the labels begin with %s; to take one: %s/%s", job.images, shown, job.images, min(tops))
    if "." in labels and len(labels) > 1:
        count = pc.sum(pc.equal(label, ".")).as_py()
        # The second pattern takes the folders in again: a pattern of names with dots would leave labels out.
        log.warning(
            "IMAGES %s: %d photos lie in no folder and have the label '.'; to leave them out: "
            "--exclude '/*' --exclude '!/*/'",
            *(job.images, count),
        )


def _listed(job: Job) -> Manifest:
    """Return the photos that a listing of IMAGES finds."""
    is_excluded = _excluding(job.exclude)
    if job.images_location.remote:
        return check(*list_remote(job.images_location, is_excluded))
    return check(*list_folder(job.images, is_excluded))


def _check_keys(job: Job, table: pa.Table) -> None:
    """Refuse objects of S3 that the reader cannot name, or names otherwise than they are called."""
    if not job.hashes_photos:
        return
    told = table["path"].null_count < table.num_rows
    if not (job.images_location.on_s3 or (told and job.path_column is not None)):
        return
    patterns = [(VERSIONED, "name a version of an object (?versionId=): give the keys alone, the newest is read")]
    if job.reader == "obstore":
        patterns.append((NOT_FOR_OBSTORE, "have keys that --reader obstore cannot name: use --reader s3fs"))
    for pattern, what in patterns:
        for column in (table["path"],) if told else (table["id"], table["label"]):
            found = pc.match_substring_regex(column, pattern)
            if count := pc.sum(found).as_py():
                example = column[pc.index(found, True).as_py()].as_py()
                raise InputError(f"{count:,} photos, such as {example!r}, {what}")


def _types(job: Job, columns: Sequence[pa.Field]) -> dict[str, str]:
    """Return Arrow's types of ids and labels of a manifest, where they are no text."""
    known = {"id_type": job.id_column, "label_type": job.label_column}
    types = {which: whole_number_type(columns, name) for which, name in known.items()}
    return {which: kind for which, kind in types.items() if kind is not None}


def _travelling(job: Job, columns: Sequence[pa.Field]) -> tuple[str, ...]:
    """Return the columns of a manifest, in its order, if any beside ids and labels travels along."""
    names = [field.name for field in columns]
    if not job.extra_columns or job.id_column not in names:  # lists of ids have no others
        return ()
    twice = {name for name in names if names.count(name) > 1}
    of_bytes = {field.name for field in columns if holds_bytes(field.type)} - {job.id_column, job.label_column}
    for left_out, what in ((twice, "of one name"), (of_bytes, "of bytes")):
        if left_out:
            shown = ", ".join(map(repr, sorted(left_out)))
            log.warning("--manifest %s: columns %s stay out of the reduced lists: %s", job.manifest, what, shown)
    left = tuple(name for name in names if name not in twice | of_bytes)
    return left if len(left) > 2 else ()


def _excluding(patterns: tuple[str, ...] | None) -> Callable[[str], bool]:
    """Return what tells whether a path is left out by patterns of gitignore."""
    if patterns is None:
        return lambda name: False
    try:
        return GitIgnoreSpec.from_lines(patterns).match_file
    except ValueError as error:
        raise InputError(f"--exclude {' '.join(patterns)} is no pattern as gitignore has them: {error}") from None


def check(
    table: pa.Table, skipped_files: dict[str, int], where: str = "the collection", path_column: str | None = None
) -> Manifest:
    """Sort the rows by (label, id) and leave out all but one of those with the same id, label and path.

    Parameters
    ----------
    table : pyarrow.Table
        ``id`` and ``label``, and ``path`` and ``bytes`` where they are known, in the order of the manifest.
    skipped_files : dict of str to int
        Files of a folder that were not taken, counted by reason.
    where : str
        What error messages call the table.
    path_column : str, optional
        Name of its column of paths.

    Raises
    ------
    InputError
        If photos with the same id and label have different paths.
    """
    label, names = ranked(table["label"])
    _warn_of_like_labels(where, names.to_pylist())
    table = table.drop_columns("label")
    release_unused()
    order, new = text_order(table["id"])
    release_unused()
    order, shared, other_paths = _without_duplicates(table, label, order, new)
    if len(other_paths):
        examples = [f"{table['id'][row]} ({table['path'][row]})" for row in other_paths[:3].tolist()]
        raise InputError(
            f"{where}: {len(other_paths):,} rows have the id and the label of another row, but another path, such as "
            f"{', '.join(examples)}. An id names one photo: give a column of ids that does"
            + ("" if path_column is None else f", or the paths as ids: --id-column {path_column}")
        )
    order = order[np.argsort(label[order], kind="stable")]
    known = {name: table[name].take(pa.array(order)) for name in table.column_names}
    known |= {"row": pa.array(order), "label": names.take(pa.array(label[order]))}
    columns = [known.get(field.name, pa.nulls(len(order), field.type)) for field in MANIFEST_SCHEMA]
    return Manifest(
        table=pa.table(columns, schema=MANIFEST_SCHEMA),
        duplicates=table.num_rows - len(order),
        shared_ids=len(shared),
        shared_examples=tuple(table["id"].take(pa.array(shared[:EXAMPLES])).to_pylist()),
        skipped_files=skipped_files,
    )


def _warn_of_like_labels(where: str, names: Sequence[str]) -> None:
    """Name labels that differ by blanks, case or Unicode form alone: they are taken for different ones."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        alike["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    groups = [group for group in alike.values() if len(group) > 1]
    if groups:
        shown = "; ".join(" and ".join(map(repr, group[:3])) for group in groups[:EXAMPLES])
        log.warning("%s: %d labels differ by blanks, case or Unicode form alone: %s", where, len(groups), shown)


def _without_duplicates(
    table: pa.Table, label: NDArray[np.int32], order: NDArray[np.int64], new: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Leave out all but one row of those with the same id and label, and find those of them with different paths.

    Parameters
    ----------
    table : pyarrow.Table
        From the manifest, as in `check`; labels do not matter.
    label : ndarray of int32, shape (n,)
        Number of each row's label.
    order, new : ndarray, shape (n,)
        From `text_order` of the ids.

    Returns
    -------
    ndarray of int64
        The order without the rows that are left out.
    ndarray of int64
        The first row of each id that stands under several labels, sorted by id.
    ndarray of int64
        The rows with the id and label of another row and a path of their own, in the manifest's order.
    """
    repeated = in_groups(new)
    rows, group = order[repeated], np.cumsum(new)[repeated]
    path = np.zeros(len(rows), dtype=np.int64)
    if "path" in table.column_names:
        path = text_ranks(table["path"].take(pa.array(rows)))
    by_group = np.lexsort((path, label[rows], group))
    rows, group, path = rows[by_group], group[by_group], path[by_group]
    first = is_new(group, label[rows])
    if not first.all():
        is_left_out = np.zeros(len(order), dtype=bool)
        is_left_out[rows[~first]] = True
        order = order[~is_left_out[order]]
    _, starts, labels = np.unique(group[first], return_index=True, return_counts=True)
    return order, rows[first][starts[labels > 1]], np.sort(rows[~first & is_new(path)])


def _read_table(job: Job, keys: MemberKeys | None, names: Sequence[str]) -> pa.Table:
    """Read ``id``, ``label`` and ``path`` from a manifest with these columns; no path where `with_paths` makes it."""
    where, manifest = f"--manifest {job.manifest}", job.manifest_location
    hint = "Say which to use with --id-column, --label-column and --path-column"
    lists = job.id_column not in names and ID_LISTS in names
    if lists and job.path_column:
        raise InputError(
            f"{where} has one row a label, its ids in the column {ID_LISTS!r}: no --path-column goes with it; give "
            "--path-template"
        )
    wanted = [ID_LISTS if lists else job.id_column, job.label_column, *([job.path_column] if job.path_column else [])]
    table = read_columns(where, manifest, wanted, hint)
    if table.num_rows == 0:
        raise InputError(f"{where} has no rows: expected one row a {'label' if lists else 'photo'}")
    if lists:
        table = _one_row_per_photo(where, table, job)
    ids, labels = table[job.id_column], table[job.label_column]
    columns = {"id": ids, "label": labels}
    rule = path_rule(job)
    if keys is not None and rule is not None:
        rule = PathRule("", "{id}" if keys is MemberKeys.STEM else job.template)
    if rule is None:
        if keys is None:
            _check_urls(where, table[job.path_column])
        paths = table[job.path_column].to_pylist()
        if keys is None:
            root = absolute(job.images)
            # A URL in the column stands for itself, as an absolute path does.
            paths = [path if is_url(path) else os.path.join(root, path) for path in paths]
        else:
            paths = [path.removeprefix("./") for path in paths]
        columns["path"] = pa.array(paths, pa.string())
    else:
        _check_lengths(where, rule, ids, labels, job.hashes_photos)
        if keys is not None:
            columns["path"] = paths_by_rule(rule, ids, labels)
    return pa.table(columns)


def _check_urls(where: str, paths: pa.ChunkedArray) -> None:
    """Refuse URLs that hold secrets."""
    secret = pc.match_substring_regex(paths, SECRET_URL)
    if count := pc.sum(secret).as_py():
        first = pc.index(secret, True).as_py()
        refuse_secret(
            f"{where}: the path of {count:,} photos, first in row {first + 1},",
            paths[first].as_py(),
            "what opens them by --storage-option KEY=VALUE",
        )


def _one_row_per_photo(where: str, table: pa.Table, job: Job) -> pa.Table:
    """Split lists of ids, separated by spaces, into rows."""
    trimmed = pc.utf8_trim_whitespace(table[ID_LISTS])
    refuse_empty(where, ID_LISTS, trimmed)
    lists = pc.utf8_split_whitespace(trimmed).combine_chunks()
    labels = table[job.label_column].combine_chunks().take(pc.list_parent_indices(lists))
    return pa.table({job.id_column: pc.list_flatten(lists), job.label_column: labels})


def _check_lengths(where: str, rule: PathRule, ids: pa.ChunkedArray, labels: pa.ChunkedArray, is_read: bool) -> None:
    """Refuse an id or label that lacks a character which the template uses."""
    for _, name, character in template_fields(rule.template):
        if name is None or character is None:
            continue
        column = ids if name == "id" else labels
        short = pc.index(pc.less_equal(pc.utf8_length(column), character), True).as_py()
        if short >= 0:
            raise InputError(
                f"{where}: {name} {column[short].as_py()!r} of photo {short + 1} (label {labels[short].as_py()!r}) "
                f"is too short for --path-template {rule.template!r}; give the layout of your photos, or --path-column"
                + ("" if is_read else " (no photo is read here: --path-template '{id}' will do)")
            )


def samples(hashes: pa.Table) -> Manifest:
    """Return the photos of WebDataset's shards, which hold their labels themselves.

    Parameters
    ----------
    hashes : pyarrow.Table
        `HASHES_SCHEMA` rows of all shards, with labels.

    Raises
    ------
    InputError
        If there are none.
    """
    if not hashes.num_rows:
        raise InputError(
            "the shards hold no photo with a label: expected WebDataset samples, KEY.jpg with KEY.cls beside it, or "
            "KEY.json with --label-field; or give a --manifest"
        )
    rows = hashes.sort_by([("key", "ascending"), ("label", "ascending")])
    return check(pa.table({"id": rows["key"], "label": rows["label"], "path": rows["key"]}), {})
