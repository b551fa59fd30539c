"""Export the photos of a reduced list: copied, linked, made smaller, or packed into shards."""

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
from reducer.config.resolved import ResolvedJob, resolve
from reducer.config.settings import SHARD_BYTES
from reducer.errors import InputError, LostLockError, ReducerError
from reducer.formatting import format_bytes
from reducer.outputs.export.batches import write_here, write_on
from reducer.outputs.export.layout import (
    BY_LABEL,
    FAILURES,
    LABELS,
    LIST,
    OWN_FILES,
    SAME,
    TABLE,
    ExportOptions,
    index_name,
    shard_name,
)
from reducer.outputs.export.plan import COLUMNS, ExportPlan, make_plan, same_photos
from reducer.outputs.export.present import skip_present
from reducer.outputs.export.target import ExportFolder
from reducer.outputs.export.transfer import Transfer
from reducer.outputs.export.write import PUTS, CopySettings
from reducer.run.dask.connect import CPU_COUNT
from reducer.run.folder import RunFolder
from reducer.run.summary import check_storage_options, job_of
from reducer.storage.location import Location, lies_in, refuse_secret
from reducer.storage.schemas import EXPORT_SCHEMA
from reducer.storage.tables import EXAMPLES, csv_file, in_nanoseconds, read_columns

#: Photos per batch on a cluster, and in this process.
GROUP, GROUP_HERE = 200, 1000


@dataclass(frozen=True)
class ExportResult:
    """Outcome of an export.

    Attributes
    ----------
    target : str
        Where the photos are.
    photos, labels : int
        Photos of the list that are there now, and their labels.
    written : int
        Photos of these that were written now; the others were there, and equal.
    bytes_before, bytes : int
        Bytes of the files that the photos there came from, and of the photos there.
    renamed : int
        With layout ``same``: photos that lie elsewhere than the manifest says, since that was not safe.
    copied_not_linked : int
        Photos that were to be linked, and were copied since they cannot be linked.
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
    break_lock: bool = False,
    cluster: ClusterSpec | None = None,
    storage_options: Mapping[str, Any] | None = None,
    output_storage_options: Mapping[str, Any] | None = None,
    target_storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ExportResult:
    """Write the photos of a run's reduced list to a folder.

    May be stopped or killed and called again: what is there and equal is not written again. Each file is whole or
    absent. On S3, an export that was killed at once has left its lock: see ``break_lock``.

    Parameters
    ----------
    run, target : path
        Folder of a finished run, and folder to write: empty, or an export of the same kind. Local paths or URLs.
    list_file : path, optional
        A reduced list, as `reducer.cut` writes it; default the run's own.
    layout : {"same", "by-label", "tar"}
        ``same``: photos lie as the manifest says, with ``train.csv``. ``by-label``: a folder per label. ``tar``:
        WebDataset's shards.
    link, overwrite, progress : bool
        Whether to make hard links instead of copies; to remove what another export left in ``target``; to show a bar.
    break_lock : bool
        Whether to take ``target`` from an export that seems to be at work there.
    resize : int, optional
        Pixels: photos whose longest side has more are encoded again.
    shard_bytes : int or str
        Bytes per shard at most, such as ``500MB``, by the photos' bytes before they are made smaller; one photo that
        has more gets a shard of its own.
    cluster : ClusterSpec, optional
        Where photos of a URL are written to a URL; default a LocalCluster. All else runs here, with its ``threads``.
    storage_options, output_storage_options, target_storage_options : mapping, optional
        Open the photos, as for `Job`; ``run`` and ``list_file``; ``target``. A run folder does not keep them.

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
    refuse_secret("--list", str(list_file or ""), "what opens it by --output-storage-option KEY=VALUE")
    run_folder = RunFolder(Location(str(run), output_storage_options or {}))
    summary = run_folder.finished()
    job = resolve(job_of(summary, {"output": str(run), "storage_options": storage_options or {}}))
    check_storage_options(summary, job)
    folder = ExportFolder(Location(str(target), target_storage_options or {}))
    spec = _checked_cluster(job, folder.location, options, cluster)
    list_location = None if list_file is None else Location(str(list_file), run_folder.location.options)
    plan = _plan(run_folder, summary, job, list_location, options, folder.location)
    folder.state()  # what is no export is refused before anything is made
    with folder.held(break_lock=break_lock):
        transfer = _begin(folder, plan, job, overwrite=overwrite)
        state = {"run": summary["run"], "images": summary["job"]["images"], **options.settings}
        return _carry_out(transfer, folder, job, spec, state, progress=progress)


def _carry_out(
    transfer: Transfer,
    folder: ExportFolder,
    job: ResolvedJob,
    spec: ClusterSpec,
    state: dict[str, Any],
    *,
    progress: bool,
) -> ExportResult:
    """Write the photos that are left, and what tells of them."""
    try:
        folder.write_state({"status": "running", **state})
    except LostLockError:
        raise
    except ReducerError as error:
        raise InputError(f"TARGET {folder.path} may not be written: {error}") from None
    folder.write_table(transfer.whole_table())
    _write_photos(transfer, folder, job, spec, progress=progress)
    _finish(folder, transfer, job)
    result = _result(folder, transfer)
    counts = {"photos": result.photos, "bytes": result.bytes, "failures": len(result.failures)}
    folder.write_state({"status": "done", **state, **counts})
    return result


def _write_photos(
    transfer: Transfer, folder: ExportFolder, job: ResolvedJob, spec: ClusterSpec, *, progress: bool
) -> None:
    """Write the photos that are left, here or on a cluster, and record what comes of them."""
    shards, options = transfer.plan.shards, transfer.plan.options
    settings = CopySettings(
        source=job.source,
        target=folder.location,
        photo_settings=job.settings_without_model,
        resize=options.resize,
        link=options.link,
        threads=PUTS if folder.location.remote else spec.threads or 2 * CPU_COUNT,
    )
    with ExitStack() as stack:
        if transfer.left and _on_cluster(job, folder.location) and not spec.serial:
            from reducer.run.dask.connect import connect, refuse_import_of_main

            refuse_import_of_main()
            client = stack.enter_context(connect(spec))
            done = write_on(client, transfer.batches(GROUP), settings, wait=spec.rules.wait)
        else:
            done = write_here(transfer.batches(GROUP_HERE), replace(settings, decoders=spec.threads or CPU_COUNT))
        stack.enter_context(closing(done))
        disable = not progress or not transfer.left
        bar = stack.enter_context(tqdm(desc="export", total=transfer.left, unit=" photos", disable=disable))
        of_all = format_bytes(transfer.bytes_left)
        for numbers, results in done:
            folder.check_ours()
            transfer.note(numbers, results)
            if shards is not None:
                shard = int(shards[numbers[0]])
                folder.write_index(shard_name(shard), transfer.table(transfer.plan.rows_of(shard)))
            bar.set_postfix_str(f"{format_bytes(transfer.bytes_read)} of {of_all}", refresh=False)
            bar.update(len(numbers))


def _on_cluster(job: ResolvedJob, target: Location) -> bool:
    """Return whether photos go from a URL to a URL: only then all workers can do it."""
    return job.images_location.remote and target.remote


def _checked_cluster(
    job: ResolvedJob, target: Location, options: ExportOptions, cluster: ClusterSpec | None
) -> ClusterSpec:
    """Return where the work is done, and refuse what cannot be before anything is written.

    Raises
    ------
    InputError
        If the cluster, links or TARGET do not go with where the photos lie.
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
    if lies_in(target.path, job.images):
        raise InputError(f"TARGET {target.path} is in IMAGES {job.images}: give another folder")
    if lies_in(job.images, target.path):  # photos of an earlier export, which this one would take out
        raise InputError(f"IMAGES {job.images} is in TARGET {target.path}: give another folder")
    return spec


def _plan(
    run_folder: RunFolder,
    summary: dict[str, Any],
    job: ResolvedJob,
    list_location: Location | None,
    options: ExportOptions,
    target: Location,
) -> ExportPlan:
    """Plan which photos of a run go where.

    Raises
    ------
    InputError
        If the list cannot be used or would be written over, or links are asked for and the photos lie in shards.
    """
    own = (target.below(name).path for name in OWN_FILES)
    if list_location is not None and any(lies_in(list_location.path, name) for name in own):
        raise InputError(
            f"--list {list_location.path} is a file that an export to TARGET {target.path} writes anew: give a copy of "
            "it, or another TARGET"
        )
    ledger = in_nanoseconds(run_folder.whole_ledger(summary, COLUMNS))
    rows = _rows_to_export(ledger, job, list_location)
    if options.link and pc.any(pc.is_valid(ledger["shard"])).as_py():
        raise InputError("--link cannot be: the photos lie in tar shards, and are no files of their own. Leave it out")
    return make_plan(rows, ledger, job, options, target)


def _rows_to_export(ledger: pa.Table, job: ResolvedJob, list_location: Location | None) -> pa.Table:
    """Return the rows of the ledger whose photos are exported: the kept ones, or those of a list.

    Raises
    ------
    InputError
        If the list cannot be read, or names a photo that the run does not have.
    """
    if list_location is None:
        return ledger.filter(ledger["kept"])
    where = f"--list {list_location.path}"
    columns = [job.id_column, job.label_column]
    wanted = read_columns(where, list_location, columns, "Give a list that `reducer cut` has written")
    wanted = wanted.select(columns).rename_columns(["id", "label"]).group_by(["id", "label"]).aggregate([])
    unknown = wanted.join(ledger.select(["id", "label"]), ["id", "label"], join_type="left anti")
    if unknown.num_rows:
        shown = [f"{row['id']} ({row['label']})" for row in unknown.sort_by("id").slice(0, EXAMPLES).to_pylist()]
        raise InputError(
            f"{where}: {unknown.num_rows:,} of {wanted.num_rows:,} photos are not of this run: {', '.join(shown)}"
            f"{' ...' if unknown.num_rows > EXAMPLES else ''}"
        )
    if not wanted.num_rows:
        raise InputError(f"{where} has no rows: expected one row a photo")
    return ledger.join(wanted, ["id", "label"], join_type="inner")


def _begin(folder: ExportFolder, plan: ExportPlan, job: ResolvedJob, *, overwrite: bool) -> Transfer:
    """Compare a plan with what TARGET holds, and remove what an earlier export of another kind left.

    Raises
    ------
    InputError
        If TARGET holds something else, or has no room.
    """
    options = plan.options
    before = folder.state()
    old = EXPORT_SCHEMA.empty_table() if before is None else folder.table()
    if before is not None and _settings(before, options) == options.settings:
        plan = plan.with_shards_of(old)
    clear = before is not None and _is_cleared(folder, before, old, plan, overwrite=overwrite)
    transfer = Transfer(plan)
    if not clear:
        skip_present(transfer, folder, old, job)
    if not folder.location.remote and not (options.link and _on_one_disk(job, folder.location)):
        freed = pc.sum(old["bytes"]).as_py() or 0
        _check_room(folder.location, transfer, freed if clear else 0)
    if clear:
        folder.remove(_files_of(old))
        folder.remove([TABLE])  # last: it names the others, if this is stopped
    return transfer


def _settings(before: dict[str, Any], options: ExportOptions) -> dict[str, Any]:
    """Return the settings of an earlier export, from its state."""
    return {name: before.get(name) for name in options.settings}


def _is_cleared(
    folder: ExportFolder, before: dict[str, Any], old: pa.Table, plan: ExportPlan, *, overwrite: bool
) -> bool:
    """Return whether what an earlier export has written is to be removed first.

    Raises
    ------
    InputError
        If it is, and may not be.
    """
    settings = _settings(before, plan.options)
    if settings != plan.options.settings:
        shown = (f"{name.replace('_', '-')} {value}" for name, value in settings.items() if value is not None)
        what = f"another export ({', '.join(shown)})"
    elif not same_photos(old, plan.places()):
        what = "photos of an earlier export that this one does not have, or has elsewhere"
    else:
        return False
    if not overwrite:
        raise InputError(
            f"TARGET {folder.path} holds {what}: give another folder, or --overwrite, which takes them out"
        )
    return True


def _files_of(old: pa.Table) -> list[str]:
    """Return the names of all files that an export has written, but for its state and its plan."""
    shards = pc.unique(old["shard"].drop_null()).to_pylist()
    single = pc.unique(old.filter(pc.is_null(old["shard"]))["path"]).to_pylist()
    return [LIST, LABELS, FAILURES, *single, *shards, *map(index_name, shards)]


def _on_one_disk(job: ResolvedJob, target: Location) -> bool:
    """Return whether links can be made from IMAGES to TARGET, as far as can be told beforehand."""
    try:
        return os.stat(job.images).st_dev == os.stat(target.path).st_dev
    except OSError:
        return False


def _check_room(target: Location, transfer: Transfer, freed: int) -> None:
    """Refuse an export that the disk has no room for.

    Parameters
    ----------
    target : Location
        A local folder.
    transfer : Transfer
        The photos to be written.
    freed : int
        Bytes that are removed first.

    Raises
    ------
    InputError
        If less is free than is needed.
    """
    free, needed = shutil.disk_usage(target.path).free + freed, transfer.room_needed()
    if needed > free:
        raise InputError(
            f"TARGET {target.path}: the disk has {format_bytes(free)} free, and the {transfer.left:,} photos to be "
            f"written take about {format_bytes(needed)}. Make room, cut a shorter list (reducer cut, --list), or use "
            "--resize"
        )


def _finish(folder: ExportFolder, transfer: Transfer, job: ResolvedJob) -> None:
    """Write the lists of the photos that are there, and of those that failed."""
    table = transfer.whole_table()
    there, failed = _there_and_failed(table)
    folder.write_table(table)
    if transfer.plan.options.layout == SAME:
        columns = {job.id_column: there["id"], job.label_column: there["label"]}
        if job.path_column is not None:
            columns[job.path_column] = there["path"]
        folder.write(LIST, csv_file(pa.table(columns)))
    else:
        folder.write(LABELS, csv_file(transfer.plan.labels(transfer.target_sizes >= 0)))
    if failed.num_rows:
        folder.write(FAILURES, csv_file(failed))
    else:
        folder.remove_own([FAILURES])


def _there_and_failed(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the rows of ``export.parquet`` of photos that are there, and id, label, source and error of the others."""
    failed = table.filter(pc.is_valid(table["error"]))
    return table.filter(pc.is_null(table["error"])), failed.select(["id", "label", "source", "error"])


def _result(folder: ExportFolder, transfer: Transfer) -> ExportResult:
    there, failed = _there_and_failed(transfer.whole_table())
    layout = transfer.plan.layout
    return ExportResult(
        target=folder.path,
        photos=there.num_rows,
        labels=pc.count_distinct(there["label"]).as_py(),
        written=transfer.written,
        bytes_before=transfer.bytes_before,
        bytes=transfer.bytes_there,
        renamed=layout.renamed,
        copied_not_linked=transfer.copied_not_linked,
        passed_over=layout.passed_over if transfer.plan.options.layout == BY_LABEL else [],
        failures=failed.to_pandas(),
    )
