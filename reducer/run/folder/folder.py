"""A run folder as a whole: whether it may be written, how a run begins in it, and its summary."""

from __future__ import annotations

import json
import os
import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa

from reducer.errors import InputError, ReducerError
from reducer.run.folder.files import HASHES, IMAGES, OWN_FILES, REPORT, SUMMARY, VECTORS, RunFiles
from reducer.run.folder.lists import ListFiles
from reducer.run.folder.manifest_columns import ManifestColumns
from reducer.run.folder.parts import LedgerParts
from reducer.run.folder.pieces import PieceFiles
from reducer.run.folder.plan import PlanFiles
from reducer.run.folder.vectors import VectorParts
from reducer.storage.atomic import temporary_name
from reducer.storage.location import Location, explaining_errors, resolved
from reducer.storage.lock import check_unlocked, is_of_lock

FORMAT = "reducer-run"
#: 2 keeps a plan, and tallies in its parts; 3 hashes of shards and of pieces; 4 vectors.
FORMAT_VERSION = 4


class RunFolder(RunFiles):
    """A run folder.

    Parameters
    ----------
    location : Location or str
        Where it is, or will be.

    Attributes
    ----------
    plan : PlanFiles
        The plan, from which the run can be resumed.
    pieces : PieceFiles
        Hashes that are not ranked yet.
    parts : LedgerParts
        The ledger.
    vectors : VectorParts
        The vectors beside the ledger.
    lists : ListFiles
        The reduced list, near copies under different labels, the report.
    images, report : str
        Path or URL of the folder of the ledger, and of the report, to show.
    """

    def __init__(self, location: Location | str) -> None:
        super().__init__(location)
        self.plan = PlanFiles(self)
        self.pieces = PieceFiles(self)
        self.vectors = VectorParts(self)
        self.parts = LedgerParts(self, self.vectors)
        self.manifest = ManifestColumns(self)
        self.lists = ListFiles(self, self.parts, self.manifest)
        self.images = self.location.below(IMAGES).path
        self.report = self.location.below(REPORT).path

    def check_free(self, *, overwrite: bool, break_lock: bool = False) -> None:
        """Refuse a folder that holds something, unless it is a run folder that may be replaced.

        Parameters
        ----------
        overwrite : bool
            Whether a run may be replaced.
        break_lock : bool
            Whether also one that seems to be at work; or the lock is our own.

        Raises
        ------
        InputError
            If it may not be written.
        """
        with explaining_errors(self.location, f"--output {self.path} cannot be used"):
            if not self.location.remote:
                _check_local(Path(self.path))
            if not self.location.holds_something() or all(map(_is_of_the_start, self._names())):
                return
            if not self.is_run():
                raise InputError(
                    f"--output {self.path} is not empty and is no run folder (it has no summary.json of ours): nothing "
                    "in it was touched; give another folder"
                )
            check_unlocked(self.location, break_lock=break_lock)
            if not overwrite:
                raise InputError(
                    f"--output {self.path} holds a run already: give another folder, or --overwrite to replace it"
                )

    def is_run(self) -> bool:
        """Tell whether this is a folder that a run has written, finished or not."""
        try:
            summary = self.read_summary()
        except (OSError, ValueError):
            return False
        return isinstance(summary, dict) and summary.get("format") == FORMAT

    def make(self) -> None:
        """Make the folder itself, where there are folders.

        Raises
        ------
        InputError
            If it cannot be made.
        """
        with explaining_errors(self.location, f"--output {self.path} cannot be used"):
            self.make_folder()

    def start(self, summary: dict[str, Any]) -> None:
        """Write a first summary, and remove what an earlier run left (nothing else).

        Parameters
        ----------
        summary : dict
            Its ``run`` names this run: a plan of another one is not obeyed.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        self.make()
        try:
            # The first summary marks the folder as ours before anything else is removed or written.
            self.write_summary(summary)
            self.make_folder(IMAGES)
            self.remove_leftovers()
            names = self._names()
            self.remove([name for name in OWN_FILES if name in names])
            self.parts.remove()
            self.pieces.remove()
        except (OSError, ReducerError) as error:
            raise InputError(f"--output {self.path} cannot be used: {error}") from None

    def remove_leftovers(self) -> None:
        """Remove files that a killed run was about to write."""
        if self.location.remote:
            return
        temporary = [temporary_name(name) for name in (SUMMARY, *OWN_FILES)]
        self.remove([name for name in self._names() if name in temporary])
        for folder in (IMAGES, HASHES, VECTORS):
            hidden = [name for name in self._names(folder) if name.startswith(".part-")]
            self.remove([name for name in hidden if name == temporary_name(name[1:-4])], folder)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **summary}
        self.write(SUMMARY, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def read_summary(self) -> dict[str, Any]:
        """Read ``summary.json``, whatever it is."""
        summary: dict[str, Any] = json.loads(self._read(SUMMARY).decode())
        return summary

    def summary(self) -> dict[str, Any]:
        """Read ``summary.json`` of a folder that is to be a run's.

        Raises
        ------
        InputError
            If it is none, or of another version.
        """
        with explaining_errors(self.location, f"{self.path} cannot be read"):
            if not self.is_run():
                raise InputError(f"{self.path} is no run folder: it has no summary.json of ours")
            summary = self.read_summary()
            if summary.get("format_version") != FORMAT_VERSION:
                raise InputError(
                    f"{self.path} was written by another version of Reducer (format {summary.get('format_version')}, "
                    f"this one writes {FORMAT_VERSION}): use that version, or begin again"
                )
            return summary

    def finished(self) -> dict[str, Any]:
        """Read ``summary.json`` of a run that is to be finished.

        Raises
        ------
        InputError
            If it is not.
        """
        summary = self.summary()
        if summary["status"] != "done":
            raise InputError(
                f"the run in {self.path} is not finished (see reducer status {self.path}). First: reducer resume "
                f"{self.path}"
            )
        return summary

    def check_unchanged(self, summary: dict[str, Any]) -> None:
        """Refuse a run that is not the finished one any more of which the summary tells.

        Raises
        ------
        InputError
            If it was begun anew or resumed.
        """
        now = self.finished()
        if (now["run"], now["resumed"]) != (summary["run"], summary["resumed"]):
            raise InputError(f"the run in {self.path} has changed meanwhile: try again")

    def whole_ledger(self, summary: dict[str, Any], columns: list[str]) -> pa.Table:
        """Read the ledger of a finished run, all of it.

        Parameters
        ----------
        summary : dict
            From `finished`, read before.
        columns : list of str
            Only these columns; a name that stands twice counts once.

        Raises
        ------
        InputError
            If the run has changed since, or part files are missing.
        """
        ledger = self.parts.ledger(list(dict.fromkeys(columns)))
        self.check_unchanged(summary)
        if ledger.num_rows != summary["photos"]:
            raise InputError(
                f"the ledger of the run in {self.path} has {ledger.num_rows:,} of {summary['photos']:,} photos: part "
                f"files are missing. First: reducer resume {self.path}"
            )
        return ledger

    @classmethod
    def refuse_file(cls, output: Location) -> None:
        """Refuse to write over a file of a run, be it the run at hand or another.

        Raises
        ------
        InputError
            Naming the run folder.
        """
        folder = output.path
        for _ in range(2):  # in the run folder itself, or in a folder of part files
            folder = posixpath.dirname(resolved(folder))
            run = cls(Location(folder, output.options))
            if run.holds(output.path) and run.is_run():
                raise InputError(f"--output {output.path} is a file of the run in {folder}: give another name")


def _check_local(path: Path) -> None:
    """Refuse a local path that is no folder, or cannot become one."""
    if not path.exists():
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"--output {path} cannot be made: {parent} is no folder that may be written")
    elif not path.is_dir():
        raise InputError(f"--output {path} is a file: give a folder")


def _is_of_the_start(name: str) -> bool:
    """Tell whether a run that was killed before its first summary stood may have left a file of this name."""
    return is_of_lock(name) or name == temporary_name(SUMMARY)
