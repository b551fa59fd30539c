"""What a user gives beside the manifest: ids to keep always, hashes to avoid."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.checks import flag
from reducer.config.job import Job
from reducer.errors import InputError
from reducer.storage.codecs import Hashes, from_hex
from reducer.storage.location import Place
from reducer.storage.tables import EXAMPLES, column_names, is_parquet, read_columns, read_lines
from reducer.store import RunFolder

log = logging.getLogger("reducer")

#: Settings of a run that must be equal for its hashes to be compared with another's.
COMPARED_SETTINGS = ("hash", "hash_size", "exif_orientation")


def find_always_keep(job: Job, ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Which rows of the manifest are always kept.

    Parameters
    ----------
    job : Job
        Whose ``always_keep`` names the file.
    ids : pyarrow.ChunkedArray of string, shape (n,)
        The manifest's ids.

    Returns
    -------
    ndarray of bool, shape (n,)

    Raises
    ------
    InputError
        If the file cannot be read, or names an id that the manifest does not have.
    """
    if job.always_keep is None:
        return np.zeros(len(ids), dtype=bool)
    where = f"--always-keep {job.always_keep}"
    wanted, lines = _column_or_lines(where, job.always_keep, job.id_column)
    if len(wanted) == 0:
        raise InputError(f"{where} holds no id")
    unknown = wanted.filter(pc.invert(pc.is_in(wanted, value_set=ids.combine_chunks())))
    if len(unknown):
        shown = ", ".join(map(repr, unknown[:EXAMPLES].to_pylist()))
        raise InputError(
            f"{where}: {len(unknown)} of {len(wanted)} ids are not in the manifest: {shown}"
            f"{' ...' if len(unknown) > EXAMPLES else ''}{_no_column(job.id_column) if lines else ''}"
        )
    found: NDArray[np.bool_] = pc.is_in(ids, value_set=wanted).to_numpy()
    return found


def read_avoided(job: Job) -> Hashes | None:
    """The hashes to avoid.

    Parameters
    ----------
    job : Job
        Whose ``avoid`` names them, and whose hash and hash size they must be of.

    Returns
    -------
    ndarray of uint8, shape (m, hash bytes), or None
        Packed, each once; None if the job avoids nothing.

    Raises
    ------
    InputError
        If there are none, they cannot be read, or are not of the job's kind.
    """
    if job.avoid is None:
        return None
    where, bits = f"--avoid {job.avoid}", job.hash_size**2
    path = Path(job.avoid)
    lines = False
    if path.is_dir():
        texts = _hashes_of_run(where, path, job)
    else:
        # A file of a run's, its reduced.parquet say, tells by its folder how its photos were hashed.
        run = next((run for run in map(RunFolder, map(str, path.absolute().parents[:2])) if run.is_run()), None)
        if run is not None:
            _check_settings(where, run, job)
        texts, lines = _column_or_lines(where, job.avoid, "hash")
    if len(texts) == 0:
        raise InputError(f"{where} holds no hash")
    packed = set()
    for number, text in enumerate(texts.to_pylist(), start=1):
        try:
            packed.add(from_hex(text, bits))
        except ValueError as error:
            raise InputError(
                f"{where}, hash {number}: {error}, as --hash {job.hash} --hash-size {job.hash_size} gives"
                f"{_no_column('hash') if lines else ''}"
            ) from None
    return np.frombuffer(b"".join(sorted(packed)), dtype=np.uint8).reshape(len(packed), -1)


def _hashes_of_run(where: str, path: Path, job: Job) -> pa.Array:
    """All hashes of another run's ledger."""
    folder = next((run for run in map(RunFolder, map(str, (path, path.parent))) if run.is_run()), None)
    if folder is None or str(path) not in (folder.path, folder.images):
        raise InputError(f"{where} is no run folder (it has no summary.json of ours): give one, or a list of hashes")
    _check_settings(where, folder, job)
    hashes = folder.ledger(["hash"])["hash"]
    if hashes.null_count:
        log.warning(
            "%s: %d of its %d photos have no hash (not read, or failed) and are not avoided; `reducer run --rank-all "
            "--candidates all` reads every photo",
            where,
            hashes.null_count,
            len(hashes),
        )
    return hashes.drop_null().combine_chunks()


def _check_settings(where: str, run: RunFolder, job: Job) -> None:
    """Refuse the hashes of a run that do not compare with this job's."""
    summary = run.read_summary()
    if summary["status"] != "done":
        raise InputError(f"{where} is of a run that is not finished: photos are missing from its ledger")
    theirs = summary["job"]
    for name in COMPARED_SETTINGS:
        its, ours = theirs.get(name), getattr(job, name)
        if its != ours:
            raise InputError(
                f"{where}: that run's {flag(name)} is {its}, this one's {ours}: their hashes do not compare"
            )
    if theirs["decode"] != job.decode:
        log.warning("%s was hashed with --decode %s: hashes may differ by a bit", where, theirs["decode"])


def _column_or_lines(where: str, path: str, name: str) -> tuple[pa.Array, bool]:
    """A named column of a CSV or Parquet file, or else a text file's lines; and whether it is lines."""
    place = Place(path)
    names = column_names(where, place)
    if name in names or is_parquet(where, place):
        return read_columns(where, place, [name], "Give that column, or a text file")[name].combine_chunks(), False
    return pa.array(read_lines(where, place), pa.string()), True


def _no_column(name: str) -> str:
    return f". (It has no column {name!r}, so each line was taken for one.)"
