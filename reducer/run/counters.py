"""Counts of a run; they add up over partitions, pieces and sessions."""

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
    """Counts of a run: totals over all sessions, and what this process has done.

    Attributes
    ----------
    bits : int
        Bits of a hash.
    unit : {"bits", "cosine"}
        Unit of the distances.
    progress : bool
        Whether to show a progress bar.
    done : dict of int to Tally
        Totals of each partition that is done, also in earlier sessions.
    hashed : dict of int to Tally
        Totals of each piece and shard that is done, also in earlier sessions.
    pieced : frozenset of int or None
        Partitions whose photos are hashed in pieces, or by the shard, first; None before that is known.
    this_session : Tally
        Totals of what this session has done.
    worker_seconds : float
        Wall time of the tasks of this session on their workers.
    peak_memory : int
        Highest resident memory of a worker of this session, in bytes.
    first_failure : str or None
        ``path: error`` of the first photo that failed in this session.
    started : float
        Start of this session, seconds since 1970.
    begun, noted : float
        When hashing began, and when its progress was noted last, by `time.perf_counter`.
    timings : dict of str to float
        Seconds that the steps of this session have taken.
    """

    bits: int
    unit: str
    progress: bool
    done: dict[int, Tally] = field(default_factory=dict)
    hashed: dict[int, Tally] = field(default_factory=dict)
    pieced: frozenset[int] | None = None
    this_session: Tally = field(default_factory=Tally)
    worker_seconds: float = 0.0
    peak_memory: int = 0
    first_failure: str | None = None
    started: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    noted: float = field(default_factory=time.perf_counter)
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, result: PartitionResult, tally: Tally, hashed_before: Tally) -> None:
        """Count a partition.

        Parameters
        ----------
        result : PartitionResult
            What this session has done of it.
        tally : Tally
            Totals of the whole partition.
        hashed_before : Tally
            Totals of those of its photos that were counted with pieces or shards already.
        """
        self.done[result.index] = tally
        self.this_session += replace(
            result.tally,
            read=result.tally.read - hashed_before.read,
            failed=result.tally.failed - hashed_before.failed,
            bytes_read=result.tally.bytes_read - hashed_before.bytes_read,
        )
        self._add_work(result, result.first_failure)

    def add_pieces(self, result: PiecesResult) -> None:
        """Count pieces or shards."""
        for piece in result.pieces:
            self.hashed[piece.number] = piece.report.tally
            self.this_session += piece.report.tally
        self._add_work(result, next((piece.first_failure for piece in result.pieces if piece.first_failure), None))

    def _add_work(self, result: PartitionResult | PiecesResult, first_failure: str | None) -> None:
        self.worker_seconds += result.seconds
        self.peak_memory = max(self.peak_memory, result.peak_memory)
        self.first_failure = self.first_failure or first_failure

    @property
    def total(self) -> Tally:
        """Totals of all that is done."""
        return counters_so_far(self.done, self.hashed, self.pieced)

    @contextmanager
    def timing(self, step: str) -> Iterator[None]:
        """Note the seconds that a step takes, also where it fails."""
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.timings[f"{step}_seconds"] = time.perf_counter() - clock

    def figures(self) -> dict[str, Any]:
        """Return the figures of ``summary.json``: counts of the whole run, times of this session."""
        total, hashing = self.total, self.timings.get("hash_seconds")
        read_now = self.this_session.read
        return {
            "partitions": len(self.done),
            "photos_read": total.read,
            # A photo that several shards hold is read more than once.
            "photos_read_this_time": min(read_now, total.read),
            "photos_reused": total.reused,
            "photos_failed": total.failed,
            "bytes_read": total.bytes_read,
            "photos_per_second": round(read_now / hashing, 1) if hashing and read_now else None,
            "timings": {name: round(seconds, 3) for name, seconds in self.timings.items()}
            | {"worker_seconds": round(self.worker_seconds, 3)},
            "worker_peak_memory_bytes": self.peak_memory,
            "quality": quality_summary(total.quality, self.bits, self.unit, total.by_hash),
        }


def counters_so_far(done: Mapping[int, Tally], hashed: Mapping[int, Tally], pieced: frozenset[int] | None) -> Tally:
    """Return the totals of a run; a photo that is hashed and not yet ranked counts too.

    Parameters
    ----------
    done : mapping of int to Tally
        Totals of each partition that is done.
    hashed : mapping of int to Tally
        Totals of each piece and shard that is done.
    pieced : frozenset of int or None
        Partitions whose photos are counted with pieces and shards; None before that is known.
    """
    if not hashed or (pieced is not None and pieced <= done.keys()):  # partitions count also what no shard held
        return sum(done.values(), Tally())
    whole = (tally for number, tally in done.items() if number not in (pieced or ()))
    return sum([*whole, *hashed.values()], Tally())
