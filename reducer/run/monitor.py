"""Watch a run: show and note how far it has come, and give it up where nothing comes of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from reducer.errors import TooManyFailuresError
from reducer.run.counters import Counters
from reducer.run.dask.dispatch import Dispatch
from reducer.run.folder import RunFolder
from reducer.run.join import MISSING
from reducer.run.path_hints import path_hint
from reducer.run.tasks.serial import InProcess
from reducer.storage.codecs import NO_VECTOR

#: Photos after which a run of which all have failed is given up: it has a wrong path, not bad photos.
ALL_FAILED = 200
#: Seconds between two notes in ``summary.json`` of how far a run has come.
NOTED_EVERY = 10.0


@dataclass
class Monitor:
    """Shows how far a run has come, and notes it in ``summary.json``.

    Attributes
    ----------
    folder : RunFolder
        The run folder.
    counters : Counters
        Counts of the run.
    summary : dict
        Content of ``summary.json`` but for the counts.
    """

    folder: RunFolder
    counters: Counters
    summary: dict[str, Any]

    @contextmanager
    def results(
        self, executor: InProcess | Dispatch, total: int, unit: str
    ) -> Iterator[tuple[Iterator[Any], tqdm[Any]]]:
        """Start an executor, and a progress bar beside it.

        Parameters
        ----------
        executor : InProcess or Dispatch
            Does the tasks.
        total : int
            Size of all tasks.
        unit : {"B", " photos"}
            Unit of the size.

        Yields
        ------
        iterator of PartitionResult or PiecesResult
            The results as they come.
        tqdm
            The progress bar.
        """
        results = executor.results()
        with (
            closing(results),  # what is still running is cancelled while there is a client to do it
            tqdm(
                total=total,
                unit=unit,
                unit_scale=unit == "B",
                disable=not self.counters.progress or not total,
                smoothing=0.1,
                file=sys.stderr,
            ) as bar,
        ):
            yield results, bar

    def note(self, bar: tqdm[Any], *, give_up: bool) -> None:
        """Show how far the run has come, and note it every `NOTED_EVERY` seconds.

        Parameters
        ----------
        bar : tqdm
            The progress bar.
        give_up : bool
            Whether to give the run up where all photos have failed so far.

        Raises
        ------
        TooManyFailuresError
            If it is given up.
        """
        counters = self.counters
        now = time.perf_counter()
        rate = counters.this_session.bytes_read / 1e6 / max(now - counters.begun, 1e-9)
        bar.set_postfix_str(f"{rate:.1f} MB/s, {counters.this_session.failed} failed", refresh=False)
        if give_up:
            self._check_failures()
        if now - counters.noted > NOTED_EVERY:
            counters.noted = now
            counters.timings["hash_seconds"] = now - counters.begun
            self.folder.write_summary(self.summary | counters.figures())

    def _check_failures(self) -> None:
        tally, first_failure = self.counters.this_session, self.counters.first_failure
        if tally.tried < ALL_FAILED or tally.failed < tally.tried or tally.reused:
            return
        if tally.looked_up and not tally.read:
            advice = "that the file of vectors is of these photos, and --id-column, which names its ids too"
        elif f": {NO_VECTOR}" in (first_failure or ""):
            advice = "the model, --embed-mean, --embed-std and --embed-output"
        else:
            advice = "IMAGES, --path-template or --path-column, and that the workers see this path"
        path, _, _ = (first_failure or "").rpartition(f": {MISSING}: ")
        if path and (hint := path_hint([path])):
            advice = f"the paths: {hint}"
        raise TooManyFailuresError(
            f"the first {tally.tried} photos have all failed, so the run was given up. The first path tried: "
            f"{first_failure}. Check {advice}"
        )
