"""Strong scaling without a cluster: a real run's times, replayed as sleeps through the job's own dispatch."""

from __future__ import annotations

import heapq
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from unittest import mock

import dask
import numpy as np
import pyarrow as pa
from benchmarks.common import PROCESSES, linked_collection, machine, run_job, say, sizes_of, table
from distributed import Client, LocalCluster, get_worker
from numpy.typing import NDArray

import reducer.run.dask.worker
from reducer import ClusterSpec, Job
from reducer.config.resolved import resolve
from reducer.run.dask.connect import DASK_SETTINGS
from reducer.run.dask.dispatch import Dispatch
from reducer.run.plan.manifest import Manifest
from reducer.run.plan.plan import Plan, plan_of
from reducer.run.tasks.messages import PartitionResult, PartitionTask, Piece, PieceReport, PiecesResult, Tally
from reducer.run.tasks.tasks import PartitionTasks
from reducer.storage.schemas import MANIFEST_SCHEMA

#: A header and its rows, or a line of text.
Told = tuple[list[str], list[list[object]]] | str

#: Of the rate that the harness can do, no more than one in so many is asked for; and one in so many where that takes no
#: longer than `seconds`, since what a partition costs beside its sleep would else show as a loss of that share.
LEAST_ROOM, GOOD_ROOM = 5, 20
SECONDS = 40.0
#: For what one large machine would need.
CORES = 32
PHOTO_KB = 142
PEER_SECONDS = 2236


@dataclass
class Recorded:
    """What a real run took, task by task.

    Attributes
    ----------
    photos : int
        Photos hashed.
    worker_seconds : float
        Of all tasks on the workers.
    hashing, ranking : list of float
        Seconds a photo of each task that hashed photos, and of each that only ranked what pieces had hashed.
    writing : dict of bool to list of float
        Seconds for which the client was busy with a result before it asked for the next, for pieces (True) and
        partitions.
    found_bytes : list of float
        Bytes a photo that each task sent back.
    """

    photos: int = 0
    worker_seconds: float = 0.0
    hashing: list[float] = field(default_factory=list)
    ranking: list[float] = field(default_factory=list)
    writing: dict[bool, list[float]] = field(default_factory=lambda: defaultdict(list))
    found_bytes: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Phase:
    """One stage of a plan, pieces or partitions, and how long its tasks take.

    Attributes
    ----------
    tasks : PartitionTasks
        What is dispatched.
    seconds : dict of int to float
        Of each task by its number, as on a real core.
    """

    tasks: PartitionTasks
    seconds: dict[int, float]


@dataclass(frozen=True)
class Replay:
    """What a replay came to.

    Attributes
    ----------
    seconds : float
        From the first task sent to the last result taken.
    tail : float
        Seconds of it between the first worker's last task and the end of its phase, over phases.
    """

    seconds: float
    tail: float


def scaling(
    sizes: str, photos: int = 30_000, most: int = 256, seconds: float = SECONDS, protocol: str = "inproc://"
) -> None:
    """1 to 256 workers, simulated: they sleep for as long as a real run's have hashed, the job's own dispatch is real.

    Parameters
    ----------
    sizes : str
        TSV file with the columns images_in_class and n_classes: the collection whose plan is replayed.
    photos : int
        Photos of the real run.
    most : int
        Workers at most.
    seconds : float
        A replay lasts about so long at most, but where the harness needs it to be longer.
    protocol : str
        How clients, scheduler and workers talk: ``inproc://``, or ``tcp://``, which packs all messages.
    """
    recorded = record(photos)
    plan = plan_for(sizes_of(sizes))
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    rows: list[list[object]] = []
    efficiencies = {}
    for workers in counts:
        print(f"replaying with {workers} workers ...", file=sys.stderr)
        phases = phases_of(plan.numbered(workers), recorded)
        tasks = sum(len(phase.seconds) for phase in phases)
        work = sum(sum(phase.seconds.values()) for phase in phases)
        ideal = sum(longest_first(list(phase.seconds.values()), workers) for phase in phases)
        client = sum(fmean(recorded.writing[phase.tasks.is_pieces]) * len(phase.seconds) for phase in phases)
        expected = max(work / workers, client)
        with cluster_of(workers, protocol) as dask_client:
            ceiling = tasks / replay(dask_client, workers, phases, recorded, 0.0).seconds
            lasts = max(LEAST_ROOM * tasks / ceiling, min(GOOD_ROOM * tasks / ceiling, seconds))
            scale = lasts / expected
            found = replay(dask_client, workers, phases, recorded, scale)
        efficiencies[workers] = work * scale / workers / found.seconds
        rows.append(
            [
                workers,
                tasks,
                work / workers,
                tasks / expected,
                round(ceiling),
                scale,
                found.seconds,
                f"{efficiencies[workers]:.1%}",
                f"{work / workers / ideal:.1%}",
                f"{work / workers / max(ideal, client):.1%}",
                f"{found.tail:.2f} ({found.tail / found.seconds:.1%})",
                f"{client / expected:.0%}",
            ]
        )
        print(rows[-1], file=sys.stderr)
    for part in told_of(plan, recorded, rows, efficiencies, photos, seconds, protocol):
        if isinstance(part, str):
            say(part)
        else:
            table(*part)


def record(photos: int) -> Recorded:
    """Times of a real run on hard links to drawn photos, with two worker processes."""
    recorded = Recorded()
    results = Dispatch.results

    def watched(self: Dispatch) -> Iterator[PartitionResult | PiecesResult]:
        assert isinstance(self.tasks, PartitionTasks)
        for result in results(self):
            note(recorded, self.tasks, result)
            start = time.perf_counter()
            yield result
            recorded.writing[self.tasks.is_pieces].append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(Dispatch, "results", watched):
        manifest, _ = linked_collection(Path(temporary), photos)
        run_job(Path(temporary), manifest, "run")
    recorded.writing[True] = recorded.writing[True] or recorded.writing[False]  # a small run has no pieces
    return recorded


def note(recorded: Recorded, tasks: PartitionTasks, result: PartitionResult | PiecesResult) -> None:
    """Add what one task of a real run took."""
    rows = tasks.rows[result.index].num_rows
    recorded.worker_seconds += result.seconds
    found = result.rows if isinstance(result, PartitionResult) else b"".join(piece.rows for piece in result.pieces)
    recorded.found_bytes.append(len(found) / rows)
    if result.index in tasks.trusted:
        recorded.ranking.append(result.seconds / rows)
    else:
        recorded.photos += rows
        recorded.hashing.append(result.seconds / rows)


def plan_for(sizes: NDArray[np.int64]) -> Plan:
    """The plan of a job with its default options on labels of these sizes; no photo needs to exist."""
    sizes = np.random.default_rng(0).permutation(sizes)
    photos = int(sizes.sum())
    columns = {
        "row": pa.array(np.arange(photos)),
        "id": pa.array([f"{number:016x}" for number in range(photos)]),
        "label": pa.array([f"{label:06}" for label in range(len(sizes))]).take(
            pa.array(np.repeat(np.arange(len(sizes)), sizes))
        ),
        "path": pa.array([""] * photos),
        "bytes": pa.nulls(photos, pa.int64()),
    }
    job = Job("/photos/train", "/run", manifest="/photos/train.csv", path_template="{label}/{id}.jpg", keep=25)
    return plan_of(resolve(job), Manifest(pa.table(columns, schema=MANIFEST_SCHEMA)))


def phases_of(plan: Plan, recorded: Recorded) -> list[Phase]:
    """What a run of this plan sends out, one after the other; each task takes the time of a drawn one of the real run.

    Parameters
    ----------
    plan : Plan
        With its partitions.
    recorded : Recorded
        The real run.
    """
    generator = np.random.default_rng(0)
    pieces, partitions, pieced = plan.pieces(), plan.partitions(), plan.pieced
    phases = []
    for tasks, is_pieces in ((pieces, True), (partitions, False)):
        if tasks:
            seconds = {}
            for number, rows in tasks.items():
                only_ranked = not is_pieces and number in pieced
                rates = (recorded.ranking or [0.0]) if only_ranked else recorded.hashing
                seconds[number] = rows.num_rows * float(generator.choice(rates))
            # All are trusted, so that nobody looks whether photos can be read: there are none.
            phases.append(Phase(PartitionTasks(plan.job, tasks, frozenset(tasks), is_pieces=is_pieces), seconds))
    return phases


def longest_first(seconds: list[float], workers: int) -> float:
    """When the last of some tasks is done that are dealt out without any cost, the longest first (Graham 1969)."""
    free = [0.0] * workers
    for own in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + own)
    return max(free)


@contextmanager
def cluster_of(workers: int, protocol: str) -> Iterator[Client]:
    """A cluster whose workers are threads of this process, with the settings of the job's own."""
    with (
        dask.config.set(DASK_SETTINGS),
        LocalCluster(
            processes=False,
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            protocol=protocol,
            memory_limit=0,  # each would take the memory of this whole process for its own
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def replay(client: Client, workers: int, phases: list[Phase], recorded: Recorded, scale: float) -> Replay:
    """Send out all tasks as a run does; workers and client sleep for as long as theirs took, times ``scale``."""
    size = fmean(recorded.found_bytes)
    total, tail, before = 0.0, 0.0, None
    for phase in phases:
        last: dict[str, float] = {}

        def sleeps(
            task: PartitionTask, *_: object, phase: Phase = phase, last: dict[str, float] = last
        ) -> PartitionResult | PiecesResult:
            time.sleep(phase.seconds[task.index] * scale)
            last[get_worker().address] = time.perf_counter()
            found, tally = bytes(round(task.photos * size)), Tally(read=task.photos)
            if task.is_piece:
                return PiecesResult(task.index, (Piece(task.index, found, PieceReport(tally)),), 0.0, 0)
            return PartitionResult(task.index, found, tally, None, 0.0, 0)

        with (
            mock.patch.object(reducer.run.dask.worker, "run_partition", sleeps),
            mock.patch.object(reducer.run.dask.worker, "run_piece", sleeps),
        ):
            before = Dispatch(client, phase.tasks, ClusterSpec(workers=workers), before)
            start = time.perf_counter()
            count = 0
            for _ in before.results():
                count += 1
                time.sleep(fmean(recorded.writing[phase.tasks.is_pieces]) * scale)
            end = time.perf_counter()
        assert count == len(phase.seconds)
        total += end - start
        tail += end - (min(last.values()) if len(last) == workers else start)
    return Replay(total, tail)


def told_of(
    plan: Plan,
    recorded: Recorded,
    rows: list[list[object]],
    efficiencies: dict[int, float],
    photos: int,
    seconds: float,
    protocol: str,
) -> list[Told]:
    """What was measured, in words and tables."""
    rate = recorded.photos / recorded.worker_seconds
    read = plan.read.num_rows
    likely = max(workers for workers in efficiencies if workers <= CORES)
    together = rate * CORES * efficiencies[likely]
    milliseconds = np.percentile(recorded.hashing, [5, 50, 95]) * 1000
    header = [
        "workers",
        "tasks",
        "ideal at real speed, s",
        "tasks/s asked for at real speed",
        "harness's ceiling, tasks/s",
        "time scale",
        "replayed, s",
        "efficiency",
        "without Dask, longest first",
        "and the client writes",
        "tail, s (share)",
        "client busy",
    ]
    return [
        f"{plan.rows.num_rows} photos of {len(plan.labels.names)} labels, of which {read} are read, {machine()}.",
        f"Times are of a real run: {photos} photos (hard links to drawn ones, 720 to 960 pixels wide), {PROCESSES} "
        "workers, "
        f"{len(recorded.hashing)} tasks with {milliseconds[1]:.2f} ms a photo (5 % to 95 %: {milliseconds[0]:.2f} to "
        f"{milliseconds[2]:.2f}), {rate:.0f} photos/s a worker. Its client took "
        f"{1000 * fmean(recorded.writing[False]):.1f} ms to write a partition and "
        f"{1000 * fmean(recorded.writing[True]):.1f} ms to write a piece, while both cores were at work.",
        "Same photos, ever more workers: the plan is made anew for each number of them, as the job does, so tasks "
        "become smaller, and labels too large for one are hashed in pieces first, which all have to end before "
        f"partitions begin. Dispatch, scheduler and workers are the real ones, in one process ({protocol}); a worker "
        "sleeps instead of hashing, and the client instead of writing.",
        f"All sleeps of a row are multiplied by its time scale: the tasks/s then asked for are at most a "
        f"{LEAST_ROOM}th of what this one process can do with sleeps of 0 (the ceiling), and a {GOOD_ROOM}th where "
        f"that takes no longer than {seconds:g} s. Where the scale is under 1 a task is shorter than a real one, and "
        "what Dask costs weighs more than it would: the efficiency is a lower bound. Where it is over 1, Dask's cost "
        "weighs less than it would: compare the tasks/s asked for at real speed with the ceiling, which is itself "
        "lowered by all workers sharing one interpreter.",
        (header, rows),
        "Efficiency: sleeps / workers / time replayed. Without Dask: the same for the same times dealt out by a heap, "
        "so what the sizes of tasks lose; and if the client has to write as long as in the real run, one result after "
        "the other. What the replay is below that is Dask's. Tail: from the first worker's last task to the end, over "
        "both phases. Client busy: the share of the time that it needs at least for which the client writes; at 100 % "
        "that is what limits the run, and more workers do not help.",
        (
            [f"{CORES} cores, estimated", "is"],
            [
                ["photos/s a core, real run", rate],
                [f"efficiency with {likely} workers", f"{efficiencies[likely]:.1%}"],
                ["photos/s", round(together)],
                [f"MB/s to be read, {PHOTO_KB} KB a photo", round(together * PHOTO_KB / 1000)],
                [f"seconds for the {read} photos that are read", round(read / together)],
                [f"seconds if all {plan.rows.num_rows} were read", round(plan.rows.num_rows / together)],
                ["seconds that fastdup tells for Landmark-2021 on 32 cores", PEER_SECONDS],
            ],
        ),
        f"That assumes {CORES} cores like these, each as fast as one of {PROCESSES} here when all are busy (no shared "
        "limit of memory or cache, no lower clock), a disk that gives those MB/s, and photos that take as long as the "
        "drawn ones. The start of the cluster, the plan and the lists written at the end come on top. The "
        "peer's figure is its authors', on their machine; it was not measured here.",
    ]
