"""What a run has counted so far; adds up over parts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from reducer.run.tasks.messages import PartitionResult, PiecesResult, Tally
from reducer.selection.quality import quality_summary


@dataclass
class Counters:
    """How far a run has come, and what this process has done of it.

    Attributes
    ----------
    bits : int
        Bits of a hash.
    unit : {"bits", "cosine"}
        What distances are told in.
    progress : bool
        Whether to show a progress bar.
    done : dict of int to Tally
        What each partition that is done has come to, also in earlier sessions.
    hashed : dict of int to Tally
        The same of each piece and shard.
    pieced : frozenset of int or None
        Partitions whose photos are hashed in pieces, or by the shard, first; None before that is known.
    own : Tally
        What this session has done.
    worker_seconds : float
        Wall time of its partitions on their workers.
    peak_memory : int
        Highest resident memory of one of its workers, in bytes.
    first_failure : str or None
        ``path: error`` of the first photo that failed in it.
    started : float
        Seconds since 1970.
    begun, noted : float
        When hashing began, and when it was last noted how far it has come, by `time.perf_counter`.
    timings : dict of str to float
        Seconds that its steps have taken.
    """

    bits: int
    unit: str
    progress: bool
    done: dict[int, Tally] = field(default_factory=dict)
    hashed: dict[int, Tally] = field(default_factory=dict)
    pieced: frozenset[int] | None = None
    own: Tally = field(default_factory=Tally)
    worker_seconds: float = 0.0
    peak_memory: int = 0
    first_failure: str | None = None
    started: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    noted: float = field(default_factory=time.perf_counter)
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, result: PartitionResult, tally: Tally, before: Tally) -> None:
        """Count a partition, of whose photos pieces or shards have told some before."""
        self.done[result.index] = tally
        own = result.tally
        self.own += replace(
            own,
            read=own.read - before.read,
            failed=own.failed - before.failed,
            bytes_read=own.bytes_read - before.bytes_read,
        )
        self._add_work(result, result.first_failure)

    def add_pieces(self, result: PiecesResult) -> None:
        """Count pieces or shards."""
        for piece in result.pieces:
            self.hashed[piece.number] = piece.report.tally
            self.own += piece.report.tally
        self._add_work(result, next((piece.first_failure for piece in result.pieces if piece.first_failure), None))

    def _add_work(self, result: PartitionResult | PiecesResult, first_failure: str | None) -> None:
        self.worker_seconds += result.seconds
        self.peak_memory = max(self.peak_memory, result.peak_memory)
        self.first_failure = self.first_failure or first_failure

    @property
    def total(self) -> Tally:
        """Of all that is done."""
        return counters_so_far(self.done, self.hashed, self.pieced)

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.timings[f"{what}_seconds"] = time.perf_counter() - clock

    def figures(self) -> dict[str, Any]:
        """What ``summary.json`` tells of it: counts of the whole run, times of this session."""
        total, hashing = self.total, self.timings.get("hash_seconds")
        return {
            "partitions": len(self.done),
            "photos_read": total.read,
            # A photo that several shards hold is read more than once.
            "photos_read_this_time": min(self.own.read, total.read),
            "photos_reused": total.reused,
            "photos_failed": total.failed,
            "bytes_read": total.bytes_read,
            "photos_per_second": round(self.own.read / hashing, 1) if hashing and self.own.read else None,
            "timings": {name: round(seconds, 3) for name, seconds in self.timings.items()}
            | {"worker_seconds": round(self.worker_seconds, 3)},
            "worker_peak_memory_bytes": self.peak_memory,
            "quality": quality_summary(total.quality, self.bits, self.unit, total.by_hash),
        }


def counters_so_far(done: Mapping[int, Tally], hashed: Mapping[int, Tally], pieced: frozenset[int] | None) -> Tally:
    """What a run has come to; a photo that is hashed and not yet ranked counts too.

    Parameters
    ----------
    done : dict of int to Tally
        Of each partition that is done.
    hashed : dict of int to Tally
        Of each piece and shard that is done.
    pieced : frozenset of int or None
        Partitions whose photos those tell of; None before that is known.
    """
    if not hashed or (pieced is not None and pieced <= done.keys()):  # partitions count also what no shard held
        return sum(done.values(), Tally())
    whole = (tally for number, tally in done.items() if number not in (pieced or ()))
    return sum([*whole, *hashed.values()], Tally())
