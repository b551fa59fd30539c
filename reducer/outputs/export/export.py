"""The kept photos themselves, for a person who came for them: copied, linked, made smaller, or packed into shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from reducer.config.cluster import ClusterSpec
from reducer.config.job import Job
from reducer.config.resolved import resolve
from reducer.config.settings import SHARD_BYTES
from reducer.errors import InputError, ReducerError
from reducer.formatting import format_bytes
from reducer.outputs.export.layout import BY_LABEL, FAILURES, LABELS, LIST, PLAN, SAME, ExportOptions, index_name
from reducer.outputs.export.send import write_here, write_on
from reducer.outputs.export.target import Exported, same_photos
from reducer.outputs.export.transfer import COLUMNS, Transfer
from reducer.outputs.export.write import PUTS, CopySettings
from reducer.run.dask.connect import CPU_COUNT
from reducer.run.folder import RunFolder
from reducer.run.summary import check_storage_options, job_of
from reducer.storage.location import Location, absolute
from reducer.storage.schemas import EXPORT_SCHEMA
from reducer.storage.tables import EXAMPLES, in_nanoseconds, read_columns

#: Photos that go to a worker together, and that this process prepares together.
GROUP, GROUP_HERE = 200, 1000


@dataclass(frozen=True)
class ExportResult:
    """What an export has come to.

    Attributes
    ----------
    target : str
        Where the photos are.
    photos, labels : int
        Photos of the list that are there now, and their labels.
    written : int
        Of these photos those that were written now; the others were there, and equal.
    bytes_before, bytes : int
        Of the photos that are there: of the files that they came from, and of their own.
    renamed : int
        With layout ``same``: photos that lie elsewhere than the manifest says, since that was not safe.
    copied_not_linked : int
        Photos that were to be linked, and were copied since that cannot be done.
    passed_over : list of str
        With layout ``by-label``: extensions of photos that torchvision's ImageFolder does not take.
    failures : DataFrame
        Photos that are not there: ``id``, ``label``, ``source`` and ``error``.
    """

    target: str
    photos: int
    labels: int
    written: int
    bytes_before: int
    bytes: int
    renamed: int
    copied_not_linked: int
    passed_over: list[str]
    failures: pd.DataFrame = field(repr=False)


def export(
    run: Path | str,
    target: Path | str,
    *,
    list_file: Path | str | None = None,
    layout: str = SAME,
    link: bool = False,
    resize: int | None = None,
    shard_bytes: int | str = SHARD_BYTES,
    overwrite: bool = False,
    cluster: ClusterSpec | None = None,
    storage_options: Mapping[str, Any] | None = None,
    output_storage_options: Mapping[str, Any] | None = None,
    target_storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ExportResult:
    """Write the photos of a run's reduced list to a folder.

    May be stopped or killed and called again: what is there and equal is not written again. Each file is whole or
    absent.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL. The run must be finished.
    target : path
        The folder to write, a local path or a URL: empty, or an export of the same kind.
    list_file : path, optional
        A reduced list, as `reducer.cut` writes it; default the run's own.
    layout : {"same", "by-label", "tar"}
        ``same``: photos lie as the manifest says, below ``target`` in the place of IMAGES, and ``train.csv`` beside
        them. ``by-label``: a folder per label. ``tar``: WebDataset's shards.
    link : bool
        Make hard links in the place of copies.
    resize : int, optional
        Pixels: photos whose longest side has more are re-encoded.
    shard_bytes : int or str
        Bytes of a shard at most, such as ``500MB``, by the photos' bytes before they are made smaller. A photo that
        has more gets a shard of its own.
    overwrite : bool
        Whether what another export has left in ``target`` is taken out.
    cluster : ClusterSpec, optional
        Where photos of a URL are written to a URL; default a LocalCluster. All else this process does, with so many
        ``threads``.
    storage_options, output_storage_options : mapping, optional
        As for `Job`: a run folder does not keep them. The latter open ``run`` and ``list_file``.
    target_storage_options : mapping, optional
        What opens ``target``.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    ExportResult

    Raises
    ------
    InputError
        If something is wrong with what is asked for, there is no room, or ``target`` holds something else.
    ReducerError
        If ``target`` cannot be written any more; ClusterError if the cluster is gone.

    Examples
    --------
    >>> from reducer import export
    >>> export("run", "photos", layout="by-label", resize=512)  # doctest: +SKIP
    """
    options = ExportOptions(layout, link, resize, shard_bytes)
    folder = RunFolder(Location(str(run), output_storage_options or {}))
    summary = folder.finished()
    job = resolve(job_of(summary, {"output": str(run), "storage_options": storage_options or {}}))
    check_storage_options(summary, job)
    exported = Exported(Location(str(target), target_storage_options or {}))
    spec = _where(job, exported.place, options, cluster)
    every = in_nanoseconds(folder.whole_ledger(summary, COLUMNS))
    rows = _wanted(every, job, None if list_file is None else Location(str(list_file), folder.place.options))
    if options.link and pc.any(pc.is_valid(every["shard"])).as_py():
        raise InputError("--link cannot be: the photos lie in tar shards, and are no files of their own. Leave it out")
    transfer = Transfer.of(rows, every, job, options, exported.place)
    del every, rows
    exported.state()  # what is no export is refused before anything is made
    with ExitStack() as stack:
        stack.enter_context(exported.held())
        before = exported.state()
        old = EXPORT_SCHEMA.empty_table() if before is None else exported.plan()
        if before is not None and _settings(before, options) == options.settings:
            transfer.keep_shards(old)
        clear = before is not None and _is_cleared(exported, before, old, options, transfer.plan, overwrite)
        if not clear:
            transfer.look(exported, old, job)
        if not exported.place.remote and not (options.link and _on_one_disk(job, exported.place)):
            freed = pc.sum(old["bytes"]).as_py() or 0
            _check_room(exported.place, transfer, freed if clear else 0)
        if clear:
            exported.remove(_files_of(old))
            exported.remove([PLAN])  # last: it is what tells of the others, if this is stopped
        state = {
            "status": "running",
            "run": summary["run"],
            "images": summary["job"]["images"],
            **options.settings,
        }
        try:
            exported.write_state(state)
        except ReducerError as error:
            raise InputError(f"TARGET {exported.path} may not be written: {error}") from None
        exported.write_plan(transfer.plan)
        way = CopySettings(
            source=job.source,
            target=exported.place,
            settings=job.settings_without_model,
            resize=options.resize,
            link=options.link,
            threads=PUTS if exported.place.remote else spec.threads or 2 * CPU_COUNT,
        )
        client = None
        if transfer.left and _on_cluster(job, exported.place) and not spec.serial:
            from reducer.run.dask.connect import connect, refuse_import_of_main

            refuse_import_of_main()
            client = stack.enter_context(connect(spec))
        else:
            way = replace(way, decoders=spec.threads or CPU_COUNT)
        groups = transfer.groups(GROUP_HERE if client is None else GROUP)
        done = write_here(groups, way) if client is None else write_on(client, groups, way, wait=spec.rules.wait)
        of_all = format_bytes(transfer.bytes_to_do)
        with closing(done), _bar(transfer, progress) as bar:
            for numbers, found in done:
                transfer.note(numbers, found, exported)
                bar.set_postfix_str(f"{format_bytes(transfer.bytes_done)} of {of_all}", refresh=False)
                bar.update(len(numbers))
        _finish(exported, transfer, job)
        result = _result(exported, transfer, options)
        state |= {"status": "done", "photos": result.photos, "bytes": result.bytes, "failures": len(result.failures)}
        exported.write_state(state)
    return result


def _on_cluster(job: Job, target: Location) -> bool:
    """Whether photos go from a URL to a URL: only then all workers can do it."""
    return job.images_location.remote and target.remote


def _where(job: Job, target: Location, options: ExportOptions, cluster: ClusterSpec | None) -> ClusterSpec:
    """Where the work is done, checked before anything is written.

    Raises
    ------
    InputError
        If that cannot be.
    """
    spec = cluster or ClusterSpec()
    if not _on_cluster(job, target) and not spec.serial and spec != ClusterSpec(threads=spec.threads):
        raise InputError(
            "--cluster, --address and --workers are for photos of a URL that go to a URL: a folder is read and written "
            "by this process. Leave them out"
        )
    if options.link and (job.images_location.remote or target.remote):
        raise InputError("--link cannot be: hard links are of files of one disk, and a URL is none. Leave it out")
    if target.options and not target.remote:
        raise InputError("--target-storage-option says how a URL is opened, and TARGET is none: leave it out")
    images = absolute(job.images)
    inside = absolute(target.path) if target.remote else os.path.realpath(target.path)
    if f"{inside}/".startswith(f"{images if job.images_location.remote else os.path.realpath(images)}/"):
        raise InputError(f"TARGET {target.path} is in IMAGES {job.images}: give another folder")
    return spec


def _wanted(every: pa.Table, job: Job, list_place: Location | None) -> pa.Table:
    """The rows of the ledger that are exported.

    Raises
    ------
    InputError
        If the list cannot be read, or names a photo that the run does not have.
    """
    if list_place is None:
        return every.filter(every["kept"])
    where = f"--list {list_place.path}"
    columns = [job.id_column, job.label_column]
    wanted = read_columns(where, list_place, columns, "Give a list that `reducer cut` has written")
    wanted = wanted.select(columns).rename_columns(["id", "label"]).group_by(["id", "label"]).aggregate([])
    unknown = wanted.join(every.select(["id", "label"]), ["id", "label"], join_type="left anti")
    if unknown.num_rows:
        shown = [f"{row['id']} ({row['label']})" for row in unknown.sort_by("id").slice(0, EXAMPLES).to_pylist()]
        raise InputError(
            f"{where}: {unknown.num_rows:,} of {wanted.num_rows:,} photos are not of this run: {', '.join(shown)}"
            f"{' ...' if unknown.num_rows > EXAMPLES else ''}"
        )
    if not wanted.num_rows:
        raise InputError(f"{where} has no rows: expected one row a photo")
    return every.join(wanted, ["id", "label"], join_type="inner")


def _settings(before: dict[str, Any], options: ExportOptions) -> dict[str, Any]:
    """The settings of an earlier export, from its state."""
    return {name: before.get(name) for name in options.settings}


def _is_cleared(
    exported: Exported, before: dict[str, Any], old: pa.Table, options: ExportOptions, plan: pa.Table, overwrite: bool
) -> bool:
    """Whether what an earlier export has written is to be taken out first.

    Raises
    ------
    InputError
        If it is, and may not be.
    """
    theirs = _settings(before, options)
    if theirs != options.settings:
        told = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in theirs.items() if value is not None)
        why = f"another export ({told})"
    elif not same_photos(old, plan):
        why = "photos of an earlier export that this one does not have, or has elsewhere"
    else:
        return False
    if not overwrite:
        raise InputError(
            f"TARGET {exported.path} holds {why}: give another folder, or --overwrite, which takes them out"
        )
    return True


def _files_of(old: pa.Table) -> list[str]:
    """What an export has written, but for its state and its plan."""
    shards = pc.unique(old["shard"].drop_null()).to_pylist()
    single = pc.unique(old.filter(pc.is_null(old["shard"]))["path"]).to_pylist()
    return [LIST, LABELS, FAILURES, *single, *shards, *map(index_name, shards)]


def _on_one_disk(job: Job, target: Location) -> bool:
    """Whether links can be made from IMAGES to TARGET, as far as can be told beforehand."""
    try:
        return os.stat(job.images).st_dev == os.stat(target.path).st_dev
    except OSError:
        return False


def _check_room(target: Location, transfer: Transfer, freed: int) -> None:
    """Refuse what the disk has no room for.

    Raises
    ------
    InputError
        If it has less than is needed.
    """
    free, needed = shutil.disk_usage(target.path).free + freed, transfer.room_needed()
    if needed > free:
        raise InputError(
            f"TARGET {target.path}: the disk has {format_bytes(free)} free, and the {transfer.left:,} photos to be "
            f"written take about {format_bytes(needed)}. Make room, cut a shorter list (reducer cut, --list), or use "
            "--resize"
        )


def _bar(transfer: Transfer, progress: bool) -> Any:
    return tqdm(
        desc="export",
        total=transfer.left,
        unit=" photos",
        disable=not progress or not transfer.left,
    )


def _finish(exported: Exported, transfer: Transfer, job: Job) -> None:
    """Write what tells of the photos."""
    plan = transfer.plan
    there = plan.filter(pc.is_null(plan["error"]))
    failed = plan.filter(pc.is_valid(plan["error"]))
    exported.write_plan(plan)
    if transfer.options.layout == SAME:
        columns = {job.id_column: there["id"], job.label_column: there["label"]}
        if job.path_column is not None:
            columns[job.path_column] = there["path"]
        exported.write(LIST, _csv(pa.table(columns)))
    else:
        exported.write(LABELS, _csv(transfer.labels()))
    if failed.num_rows:
        exported.write(FAILURES, _csv(_failures(failed)))
    else:
        exported.remove_own([FAILURES])


def _failures(failed: pa.Table) -> pa.Table:
    return failed.select(["id", "label", "source", "error"])


def _csv(table: pa.Table) -> bytes:
    text: str = table.to_pandas().to_csv(index=False, lineterminator="\n")
    return text.encode()


def _result(exported: Exported, transfer: Transfer, options: ExportOptions) -> ExportResult:
    plan = transfer.plan
    there = plan.filter(pc.is_null(plan["error"]))
    return ExportResult(
        target=exported.path,
        photos=there.num_rows,
        labels=pc.count_distinct(there["label"]).as_py(),
        written=transfer.written,
        bytes_before=transfer.bytes_before,
        bytes=transfer.bytes_there,
        renamed=transfer.layout.renamed,
        copied_not_linked=transfer.copied_not_linked,
        passed_over=transfer.layout.passed_over if options.layout == BY_LABEL else [],
        failures=_failures(plan.filter(pc.is_valid(plan["error"]))).to_pandas(),
    )
