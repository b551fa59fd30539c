"""Vectors of a whole collection, in one file: the first half of a run, without a choice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reducer.config.cluster import ClusterSpec
from reducer.config.job import Job, path_rule
from reducer.config.resolved import resolve
from reducer.errors import InputError, TooManyFailuresError
from reducer.run.counters import Counters
from reducer.run.dask.connect import refuse_import_of_main
from reducer.run.dask.workers import Workers
from reducer.run.execute import Run, recording_stop
from reducer.run.fingerprint import Fingerprint
from reducer.run.folder import RunFolder
from reducer.run.join import join_plan
from reducer.run.plan.partitions import piece_size
from reducer.run.plan.plan import Plan, make_plan
from reducer.run.prepare import check_vectors, open_client, plan_terms, thread_count
from reducer.run.remaining import Remaining
from reducer.run.summary import failure_kinds, opening
from reducer.storage.atomic import whole_file, whole_object
from reducer.storage.codecs import as_lists, vector_field
from reducer.storage.location import Location
from reducer.storage.paths import with_paths
from reducer.storage.schemas import VECTORS_SCHEMA
from reducer.storage.tables import with_column

#: What is embedded so far lies beside the file, in a run folder of this name.
PARTS = ".parts"
#: How to go on.
AGAIN = "give the same command again"
#: Rows of a row group.
ROWS = 10_000


@dataclass(frozen=True)
class EmbedResult:
    """What `embed` has written.

    Attributes
    ----------
    output : str
        The file.
    photos, failed : int
        Photos of the collection, and those of them without a vector: their rows have none, and tell why.
    dimensions : int
        Of the vectors; 0 where there is none.
    failures : dict of str to int
        How many photos failed, by kind.
    photos_per_second : float or None
        While photos were embedded; None where all had been before.
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
        Whose ``embed`` names the model, and whose ``output`` the Parquet file to write (columns: the ids, the labels,
        ``error``, ``vector``; the order is the manifest's). Of what is chosen nothing matters. What is made so far lies
        in a folder beside the file, ``output`` and ``.parts``: the same call goes on from there.
    cluster : ClusterSpec, optional
        Where; default a LocalCluster with a worker for each CPU that this process may use.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    InputError
        If anything is found wrong before the first photo is read.
    TooManyFailuresError
        If more than ``job.max_failures`` of the photos have failed (the file is written), or the first 200 all have.
    ClusterError
        If some photos cannot be finished; the same call goes on.

    Examples
    --------
    >>> from reducer import Job, embed
    >>> embed(Job("photos/train", "vectors.parquet", embed="model.onnx"))  # doctest: +SKIP
    """
    refuse_import_of_main()
    if job.embed is None:
        raise InputError("embed needs a model: give --embed MODEL.onnx")
    spec, target = cluster or ClusterSpec(), job.output_location
    _check_target(target, job.overwrite)
    asked = replace(job, output=f"{job.output}{PARTS}", overwrite=True, candidates=None, rank_all=True, report=False)
    job = resolve(asked)
    session = Counters(job.hash_size**2, "cosine", progress)
    folder = RunFolder(job.output_location)
    with session.timing("plan"):
        job = job.with_model()
        check_vectors(job)
        saved = folder.plan.read() if folder.is_run() else None
        if saved is None:
            folder.check_free(overwrite=True, break_lock=job.break_lock)
            plan = make_plan(job)
        else:
            with _named(folder):
                Fingerprint.from_dict(saved[1]["fingerprint"]).check_settings(job, None)
            plan = Plan(job, saved[0], saved[1]["manifest"], folder.plan.read_shards(), saved[1]["is_listed"])
            _check_photos(plan, folder)
    with ExitStack() as open_cluster:
        client = open_client(spec, session, open_cluster, job)
        threads = thread_count(client, spec)
        if saved is None:
            plan = _in_pieces(plan, threads)
        todo = Remaining(plan, folder, threads, is_begun=saved is not None)
        errand, workers = todo.pieces(), Workers(client, spec)
        work = None if errand is None else workers.take(errand)
        if saved is not None and work is not None:
            with _named(folder):
                Fingerprint.from_dict(saved[1]["fingerprint"]).check_environment(job, work.environment)
        folder.make()
        with folder.locked(break_lock=job.break_lock):
            if saved is not None:
                summary = folder.summary()
                terms = saved[1]
            elif work is None:
                raise InputError(f"IMAGES {job.images} holds no photo")
            else:
                fingerprint = Fingerprint.of(job, None, work.environment)
                summary = opening(plan, spec, fingerprint, session.started)
                terms = plan_terms(summary, plan, fingerprint)
                folder.start(summary)
                if plan.shards is not None:
                    folder.plan.write_shards(plan.shards)
                folder.plan.write(plan.rows, terms)
            if work is not None:
                with recording_stop(folder, summary, session, AGAIN), session.timing("hash"):
                    run = Run(replace(todo, is_begun=True), session, summary, workers, terms)
                    run.run_hash_stage(work)
            todo = replace(todo, is_begun=True)
            if not plan.is_listed:
                plan = todo.listed()
                todo = replace(todo, plan=plan)
            result = _write(todo, target, session)
    _remove(folder)
    if result.failed > job.max_failures * result.photos:
        raise TooManyFailuresError(
            f"{result.failed} of {result.photos} photos have failed, over --max-failures {job.max_failures:g}. "
            f"Everything is written to {result.output}; its column error says why"
        )
    return result


@contextmanager
def _named(folder: RunFolder) -> Iterator[None]:
    """What was made so far is of another kind: say where it lies."""
    try:
        yield
    except InputError as error:
        found = str(error).partition(". To begin again")[0]
        raise InputError(f"{found}. To begin again, remove {folder.path}") from None


def _check_target(target: Location, overwrite: bool) -> None:
    if not target.path.endswith(".parquet"):
        raise InputError(f"--output {target.path}: the name must end in .parquet, which is what is written")
    if not target.remote and Path(target.path).is_dir():
        raise InputError(f"--output {target.path} is a folder: give the name of a file")
    if not overwrite and (target.holds_something() if target.remote else Path(target.path).exists()):
        raise InputError(f"--output {target.path} is there already: give another name, or --overwrite")
    if not target.remote and not Path(target.path).absolute().parent.is_dir():
        raise InputError(f"--output {target.path} cannot be written: there is no folder {Path(target.path).parent}")


def _check_photos(plan: Plan, folder: RunFolder) -> None:
    """Refuse to go on with photos that are not those which were there at the beginning."""
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
    """The same plan, but that all photos are in pieces of about equal size; of shards each is one anyway."""
    count = plan.rows.num_rows
    rows = with_column(plan.rows, "partition", pa.array(np.zeros(count, dtype=np.int32)))
    if plan.shards is None:
        size = piece_size(count, threads, plan.job.partition_images)
        rows = with_column(rows, "piece", pa.array((np.arange(count) // size).astype(np.int32)))
    return replace(plan, rows=rows)


def _write(todo: Remaining, target: Location, session: Counters) -> EmbedResult:
    """The file of vectors, in the order of the manifest, a row group at a time."""
    plan, job = todo.plan, todo.plan.job
    plan = replace(plan, rows=with_paths(path_rule(job), plan.rows))
    found = join_plan(plan, todo.hashes(), todo.keys)
    error = pc.if_else(pc.is_null(found["key"]), pa.scalar(todo.missing, pa.string()), found["error"])
    order = pa.array(np.argsort(plan.rows["row"].to_numpy(), kind="stable"))
    rows = pa.table(
        {"id": plan.rows["id"], "label": plan.rows["label"], "error": error, "vector": found["vector"]}
    ).take(order)
    dimensions = todo.spool.dimensions
    about = pa.field("error", pa.string(), metadata={"description": "why there is no vector, one line"})
    own = [field.with_name(name) for field, name in zip(VECTORS_SCHEMA, (job.id_column, job.label_column), strict=True)]
    schema = pa.schema([*own, about, vector_field(max(1, dimensions))])
    with _whole(target) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, rows.num_rows, ROWS):
            group = rows.slice(start, ROWS)
            vectors = as_lists(todo.spool.packed(group["vector"]), max(1, dimensions))
            columns = [group["id"], group["label"], group["error"], vectors]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=ROWS)
    own_tally, seconds = session.this_session, session.timings.get("hash_seconds")
    return EmbedResult(
        output=target.path,
        photos=rows.num_rows,
        failed=rows["vector"].null_count,
        dimensions=dimensions,
        failures=failure_kinds(rows["error"]),
        photos_per_second=round(own_tally.read / seconds, 1) if seconds and own_tally.read else None,
    )


@contextmanager
def _whole(target: Location) -> Iterator[IO[bytes]]:
    with whole_object(target) if target.remote else whole_file(Path(target.path)) as file:
        yield file


def _remove(folder: RunFolder) -> None:
    """Take out what lies beside the file: it is all in there."""
    if not folder.place.remote:
        shutil.rmtree(folder.path)
        return
    system, path = folder.place.open()
    system.rm(path, recursive=True)
