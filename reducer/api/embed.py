"""Vectors of a whole collection in one file: the first half of a run, without a selection."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reducer.config.cluster import ClusterSpec
from reducer.config.job import Job, check_no_input, path_rule
from reducer.config.resolved import ResolvedJob, resolve
from reducer.errors import InputError, TooManyFailuresError
from reducer.run.counters import Counters
from reducer.run.dask.connect import refuse_import_of_main
from reducer.run.execute import recording_stop
from reducer.run.fingerprint import Fingerprint
from reducer.run.folder import RunFolder
from reducer.run.join import join_plan
from reducer.run.plan.partitions import piece_size
from reducer.run.plan.plan import Plan, make_plan
from reducer.run.prepare import Prepared, check_vectors, start_workers
from reducer.run.remaining import Remaining
from reducer.run.summary import failure_kinds
from reducer.storage.atomic import whole_file, whole_object
from reducer.storage.codecs import as_lists, vector_field
from reducer.storage.location import Location
from reducer.storage.paths import with_paths
from reducer.storage.schemas import VECTORS_SCHEMA
from reducer.storage.tables import with_column

#: Ending of the run folder beside the file that holds the vectors made so far.
PARTS = ".parts"
#: Advice on how to continue.
AGAIN = "give the same command again"
#: Rows per row group of the file.
ROWS = 10_000


@dataclass(frozen=True)
class EmbedResult:
    """Figures on the file that `embed` has written.

    Attributes
    ----------
    output : str
        The file.
    photos, failed : int
        Photos of the collection, and those of them without a vector: their rows tell why.
    dimensions : int
        Dimensions of the vectors; 0 where there is none.
    failures : dict of str to int
        Photos that failed, by kind.
    photos_per_second : float or None
        Rate at which photos were embedded; None where all had been embedded before.
    """

    output: str
    photos: int
    failed: int
    dimensions: int
    failures: dict[str, int]
    photos_per_second: float | None


def embed(job: Job, cluster: ClusterSpec | None = None, *, progress: bool = True) -> EmbedResult:
    """Make the vectors of all photos of a collection.

    Parameters
    ----------
    job : Job
        Job whose ``embed`` names the model, and whose ``output`` names the Parquet file to write (columns: the ids,
        the labels, ``error``, ``vector``; the order is the manifest's). Options of ranking and selection do not matter.
        Vectors made so far lie in a folder beside the file, ``output`` and ``.parts``: the same call continues there.
    cluster : ClusterSpec, optional
        Where to do it; default a LocalCluster with one worker per CPU that this process may use.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    InputError
        If anything is found wrong before the first photo is read.
    TooManyFailuresError
        If more than ``job.max_failures`` of the photos have failed (the file is written), or the first 200 all have.
    ClusterError
        If some photos cannot be finished; the same call continues.

    Examples
    --------
    >>> from reducer import Job, embed
    >>> embed(Job("photos/train", "vectors.parquet", embed="model.onnx"))  # doctest: +SKIP
    """
    refuse_import_of_main()
    if job.embed is None:
        raise InputError("embed needs a model: give --embed MODEL.onnx")
    target = job.output_location
    _check_target(target, job.overwrite)
    RunFolder.refuse_file(target)
    check_no_input(target.path, vars(job))
    parts = replace(job, output=f"{job.output}{PARTS}", overwrite=True, candidates=None, rank_all=True, report=False)
    counters = Counters(job.hash_size**2, "cosine", progress)
    folder = RunFolder(parts.output_location)
    with counters.timing("plan"):
        plan, terms = _read(resolve(parts), folder)
    with ExitStack() as open_cluster:
        prepared = _prepare(plan, terms, folder, cluster or ClusterSpec(), counters, open_cluster)
        result = _execute(prepared, target, is_new=terms is None)
    _remove(folder)
    if result.failed > job.max_failures * result.photos:
        raise TooManyFailuresError(
            f"{result.failed} of {result.photos} photos have failed, over --max-failures {job.max_failures:g}. "
            f"Everything is written to {result.output}; its column error says why"
        )
    return result


def _read(job: ResolvedJob, folder: RunFolder) -> tuple[Plan, dict[str, Any] | None]:
    """Return the plan, and what is stored with it where vectors have been made before; None where none have."""
    job = job.with_model()
    check_vectors(job)
    saved = folder.plan.read() if folder.is_run() else None
    if saved is None:
        folder.check_free(overwrite=True, break_lock=job.break_lock)
        return make_plan(job), None
    rows, terms = saved
    with _naming(folder):
        Fingerprint.from_dict(terms["fingerprint"]).check_settings(job, None)
    plan = Plan(job, rows, terms["manifest"], folder.plan.read_shards(), terms["is_listed"])
    _check_photos(plan, folder)
    return plan, terms


def _prepare(
    plan: Plan,
    terms: dict[str, Any] | None,
    folder: RunFolder,
    spec: ClusterSpec,
    counters: Counters,
    open_cluster: ExitStack,
) -> Prepared:
    pool = start_workers(plan.job, spec, counters, open_cluster)
    if terms is None:
        plan = _in_pieces(plan, pool.threads)
    remaining = Remaining(plan, folder, pool.threads, is_begun=terms is not None)
    tasks = remaining.pieces()
    executor = None if tasks is None else pool.workers.take(tasks)
    if terms is not None:
        if executor is not None:
            with _naming(folder):
                Fingerprint.from_dict(terms["fingerprint"]).check_environment(plan.job, executor.environment)
        return Prepared(remaining, counters, pool, executor, {}, terms)
    if executor is None:
        raise InputError(f"IMAGES {plan.job.images} holds no photo")
    return Prepared.new(remaining, counters, pool, executor)


def _execute(prepared: Prepared, target: Location, *, is_new: bool) -> EmbedResult:
    folder, counters = prepared.folder, prepared.counters
    folder.make()
    with folder.locked(break_lock=prepared.remaining.plan.job.break_lock):
        if is_new:
            folder.start(prepared.summary)
            prepared.write_plan()
        else:
            prepared.summary = folder.summary()
        if prepared.executor is not None:
            with recording_stop(folder, prepared.summary, counters, AGAIN), counters.timing("hash"):
                prepared.run.run_hash_stage(prepared.executor)
        remaining = replace(prepared.remaining)  # read anew: all pieces are done
        if not remaining.plan.is_listed:
            remaining = replace(remaining, plan=remaining.listed())
        return _write(remaining, target, counters)


@contextmanager
def _naming(folder: RunFolder) -> Iterator[None]:
    """Name the folder to remove in errors that say that the vectors made so far are of another kind."""
    try:
        yield
    except InputError as error:
        reason = str(error).partition(". To begin again")[0]
        raise InputError(f"{reason}. To begin again, remove {folder.path}") from None


def _check_target(target: Location, overwrite: bool) -> None:
    """Refuse a name that no file of vectors can be written to."""
    if not target.path.endswith(".parquet"):
        raise InputError(f"--output {target.path}: the name must end in .parquet, which is what is written")
    if not target.remote and Path(target.path).is_dir():
        raise InputError(f"--output {target.path} is a folder: give the name of a file")
    if not overwrite and (target.holds_something() if target.remote else Path(target.path).exists()):
        raise InputError(f"--output {target.path} is there already: give another name, or --overwrite")
    if not target.remote and not Path(target.path).absolute().parent.is_dir():
        raise InputError(f"--output {target.path} cannot be written: there is no folder {Path(target.path).parent}")


def _check_photos(plan: Plan, folder: RunFolder) -> None:
    """Refuse to continue with other photos than those that were there at the beginning."""
    now = make_plan(plan.job)
    same = now.shards == plan.shards
    if same and plan.is_listed and now.is_listed:
        same = all(now.rows[name].equals(plan.rows[name]) for name in ("id", "label"))
    if not same:
        raise InputError(
            f"the photos in {plan.job.images} are not those of which vectors were being made: to begin again, remove "
            f"{folder.path}"
        )


def _in_pieces(plan: Plan, threads: int) -> Plan:
    """Return a plan with all photos in pieces of about equal size; each shard is a piece anyway."""
    count = plan.rows.num_rows
    rows = with_column(plan.rows, "partition", pa.array(np.zeros(count, dtype=np.int32)))
    if plan.shards is None:
        size = piece_size(count, threads, plan.job.partition_images)
        rows = with_column(rows, "piece", pa.array((np.arange(count) // size).astype(np.int32)))
    return replace(plan, rows=rows)


def _write(remaining: Remaining, target: Location, counters: Counters) -> EmbedResult:
    """Write the file of vectors, in the order of the manifest, one row group at a time."""
    plan, job = remaining.plan, remaining.plan.job
    plan = replace(plan, rows=with_paths(path_rule(job), plan.rows))
    results = join_plan(plan, remaining.hashes(), remaining.keys)
    error = pc.if_else(pc.is_null(results["key"]), pa.scalar(remaining.missing, pa.string()), results["error"])
    order = pa.array(np.argsort(plan.rows["row"].to_numpy(), kind="stable"))
    rows = pa.table(
        {"id": plan.rows["id"], "label": plan.rows["label"], "error": error, "vector": results["vector"]}
    ).take(order)
    dimensions = remaining.spool.dimensions
    about = pa.field("error", pa.string(), metadata={"description": "why there is no vector, one line"})
    names = (job.id_column, job.label_column)
    columns = [field.with_name(name) for field, name in zip(VECTORS_SCHEMA, names, strict=True)]
    schema = pa.schema([*columns, about, vector_field(max(1, dimensions))])
    with _whole(target) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, rows.num_rows, ROWS):
            group = rows.slice(start, ROWS)
            vectors = as_lists(remaining.spool.packed(group["vector"]), max(1, dimensions))
            values = [group["id"], group["label"], group["error"], vectors]
            writer.write_table(pa.Table.from_arrays(values, schema=schema), row_group_size=ROWS)
    read, seconds = counters.this_session.read, counters.timings.get("hash_seconds")
    return EmbedResult(
        output=target.path,
        photos=rows.num_rows,
        failed=rows["vector"].null_count,
        dimensions=dimensions,
        failures=failure_kinds(rows["error"]),
        photos_per_second=round(read / seconds, 1) if seconds and read else None,
    )


@contextmanager
def _whole(target: Location) -> Iterator[IO[bytes]]:
    """Open a file or object that is there only once it is whole."""
    with whole_object(target) if target.remote else whole_file(Path(target.path)) as file:
        yield file


def _remove(folder: RunFolder) -> None:
    """Remove the folder of the vectors made so far: all of them are in the file."""
    if not folder.location.remote:
        shutil.rmtree(folder.path)
        return
    system, path = folder.location.open()
    system.rm(path, recursive=True)
