"""What a user gives beside the manifest: ids to keep always, hashes to avoid."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa

from reducer.config.checks import flag
from reducer.config.job import Job
from reducer.errors import InputError
from reducer.run.plan.keep_avoid import _column_or_lines, _no_column
from reducer.storage.codecs import Hashes, from_hex
from reducer.store import RunFolder

log = logging.getLogger("reducer")

#: Settings of a run that must be equal for its hashes to be compared with another's.
COMPARED_SETTINGS = ("hash", "hash_size", "exif_orientation")


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
