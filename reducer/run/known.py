"""What earlier looks at photos gave, put beside the rows of a plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.config.checks import flag
from reducer.config.job import Job, member_keys, path_rule
from reducer.errors import InputError
from reducer.run.fingerprint import EMBED_SETTINGS, Fingerprint, settings_of
from reducer.run.folder import RunFolder
from reducer.run.plan.keep_avoid import _column_or_lines, _no_column
from reducer.run.tasks.environment import Environment, compare_with, without_model
from reducer.run.tasks.messages import PieceReport, Tally
from reducer.storage.codecs import Hashes, VectorSpool, from_hex
from reducer.storage.location import MemberKeys, Shard, stem_of
from reducer.storage.paths import with_paths
from reducer.storage.schemas import FLAT, KNOWN_SCHEMA, SHARD_POSITION_SCHEMA
from reducer.storage.tables import with_column

log = logging.getLogger("reducer")

#: Settings that must be equal for hashes to be the same.
HASH_SETTINGS = ("hash", "hash_size", "decode", "exif_orientation")
#: Where the columns of `KNOWN_SCHEMA` come from in the ledger.
LEDGER_NAMES = {name: name.removeprefix("known_") for name in KNOWN_SCHEMA.names if name != "known_reused"}
KEY = ("id", "path")
#: What a vector is told by.
OF_VECTOR = ("id", "label")


class Reuse:
    """What is taken from an earlier run.

    Parameters
    ----------
    job : Job
        Whose ``reuse`` names it.

    Attributes
    ----------
    known : pyarrow.Table
        From `as_known`.
    aside : VectorSpool
        Holds its vectors.

    Raises
    ------
    InputError
        If it is no run, or its hashes are not what this job would find.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        where = f"--reuse {job.reuse}"
        self.folder = folder = RunFolder(job.reuse_place)
        try:
            summary = folder.summary()
        except InputError as error:
            raise InputError(f"--reuse: {error}") from None
        saved = folder.plan.read()
        if saved is None:
            raise InputError(f"{where} has no plan.parquet, which tells how its photos were hashed: leave --reuse out")
        plan, terms = saved
        self.fingerprint = Fingerprint.from_dict(terms["fingerprint"])
        theirs = self.fingerprint.settings
        for name in HASH_SETTINGS:
            if theirs[name] != getattr(job, name):
                raise InputError(
                    f"{where} has {flag(name)} {theirs[name]}, this run {getattr(job, name)}: its hashes would not be "
                    f"this run's. Give {flag(name)} {theirs[name]}, or leave --reuse out"
                )
        self.aside = VectorSpool()
        ours = settings_of(job)
        if job.embed is not None and any(theirs.get(name) != ours[name] for name in EMBED_SETTINGS):
            raise InputError(
                f"{where} has no vectors of this model as it is used here (--embed, --embed-size, --embed-mean, "
                "--embed-std, --embed-batch, --embed-output): leave --reuse out"
            )
        if job.drop_flat and not theirs["drop_flat"]:
            raise InputError(f"{where} was run without --drop-flat: which photos are flat is not known. Leave it out")
        ledger = folder.parts.ledger([*ledger_columns(), "label", *SHARD_POSITION_SCHEMA.names])
        if job.embed is not None:
            vectors = folder.vectors.read_all(self.aside)
            own = pc.index_in(_keys(ledger, OF_VECTOR), value_set=_keys(vectors, OF_VECTOR))
            ledger = ledger.append_column("vector", vectors["vector"].take(own))
        if theirs["max_pixels"] > job.max_pixels:
            # How many pixels are decoded is not always told by width and height.
            raise InputError(
                f"{where} has --max-pixels {theirs['max_pixels']}, this run {job.max_pixels}: photos that it took may "
                f"be too large now. Give --max-pixels {theirs['max_pixels']}, or leave --reuse out"
            )
        if job.drop_flat:
            # Whether these are flat was not asked.
            always = plan.filter(plan["always_keep"])["row"].to_numpy()
            ledger = ledger.filter(pa.array(~np.isin(ledger["row"].to_numpy(), always)))
        self.known = as_known(ledger)
        self.ledger = ledger
        self.shards = {shard.path: shard for shard in folder.plan.read_shards() or ()}
        own = summary["job"]
        told_by = {name: own[name] for name in ("manifest", "path_column", "path_template")}
        then = member_keys(replace(job, **told_by, label_field=None, manifest_storage_options={}))
        #: What photos were looked for by in the shards; None for all that they hold.
        self.looked_for = None if then is MemberKeys.SAMPLE else plan["path"].combine_chunks()
        self.keys_then = then
        if self.shards and job.manifest is None and (own["manifest"], own["label_field"]) != (None, job.label_field):
            raise InputError(
                f"{where} did not take its labels from its shards as this run does (--manifest, --label-field): leave "
                "--reuse out"
            )
        if summary["status"] != "done":
            log.warning("%s is not finished: what it has hashed so far is taken", where)

    def pieces(self, shards: Sequence[Shard], keys: MemberKeys) -> dict[int, tuple[pa.Table, PieceReport]]:
        """What is known of shards that are as they were.

        Parameters
        ----------
        shards : sequence of Shard
            The shards now.
        keys : MemberKeys
            What photos are told by in them.

        Returns
        -------
        dict of int to (pyarrow.Table, PieceReport)
            `HASHES_SCHEMA` rows and what came of them, by the number that the shard has now; of shards that were whole,
            and checked against the same MD5 sum if they are to be checked.
        """
        reports = self.folder.pieces.reports()
        ranged = self.ledger.filter(pc.and_(pc.is_valid(self.ledger["hash"]), pc.is_valid(self.ledger["shard"])))
        found = {}
        for shard in shards:
            then = self.shards.get(shard.path)
            report = None if then is None else reports.get(then.number)
            if then is None or report is None or report.damage is not None or report.wrong_md5:
                continue
            unchecked = shard.md5 is None  # then it does not matter against what it was checked before
            if replace(then, number=shard.number, md5=None if unchecked else then.md5) != shard:
                continue
            rows = _with_ledger(self.folder.pieces.read(then.number)[0], ranged, self.aside)
            if keys is not MemberKeys.SAMPLE:
                paths = rows["path"].to_pylist()
                key = paths if keys is MemberKeys.PATH else list(map(stem_of, paths))
                rows = with_column(rows, "key", pa.array(key, pa.string()))
                rows = with_column(rows, "label", pa.nulls(rows.num_rows, pa.string()))
            # What failed is read again, where it can be.
            error = pc.if_else(pc.equal(rows["bytes"], 0), rows["error"], pa.scalar(None, pa.string()))
            rows = with_column(rows, "error", error)
            rows = with_column(rows, "reused", pa.array([True] * rows.num_rows, pa.bool_()))
            tally = Tally(reused=rows.num_rows - rows["hash"].null_count)
            found[shard.number] = rows, replace(report, tally=tally)
        return found

    def may_hold(self, unknown: pa.ChunkedArray, keys: MemberKeys) -> bool:
        """Whether shards that are as they were may hold photos that this run did not find in them.

        Parameters
        ----------
        unknown : pyarrow.ChunkedArray of string
            What the photos are told by.
        keys : MemberKeys
            Of which kind that is.
        """
        if self.looked_for is None or not len(unknown):
            return False
        return keys is not self.keys_then or not pc.all(pc.is_in(unknown, value_set=self.looked_for)).as_py()

    def check_environment(self, now: Environment) -> None:
        """Refuse hashes of workers that hash otherwise.

        Raises
        ------
        InputError
            Naming what differs.
        """
        then = self.fingerprint.environment
        if self.job.embed is None:
            then = without_model(then)
        differs = compare_with(then, now, "this computer or cluster now", f"--reuse {self.job.reuse}")
        if differs is not None:
            raise InputError(f"{differs}, or leave --reuse out")


def _with_ledger(rows: pa.Table, ledger: pa.Table, aside: VectorSpool) -> pa.Table:
    """What was found in a shard, with the hashes and vectors of photos that were read from it later."""
    place = pc.index_in(_places(rows), value_set=_places(ledger))
    late = pc.and_(pc.is_null(rows["hash"]), pc.is_valid(place))
    for name in ("width", "height", "format", "hash"):
        rows = with_column(rows, name, pc.if_else(late, ledger[name].take(place), rows[name]))
    if "vector" in ledger.column_names:
        vectors = aside.packed(ledger["vector"].take(place))
        rows = with_column(rows, "vector", pc.if_else(late, vectors, rows["vector"]))
    is_flat = pc.equal(ledger["reason"], FLAT).take(place)
    return with_column(rows, "flat", pc.if_else(late, is_flat, rows["flat"]))


def _places(table: pa.Table) -> pa.Array:
    large = pa.large_string()
    columns = (table["shard"].cast(large), table["offset"].cast(pa.string()).cast(large))
    joined = pc.binary_join_element_wise(*columns, pa.scalar("\0", large))
    return joined.combine_chunks()


def ledger_columns() -> list[str]:
    """Columns of the ledger that `as_known` needs."""
    return [*KEY, "row", "reason", *(name for name in LEDGER_NAMES.values() if name not in ("flat", "vector"))]


def as_known(ledger: pa.Table) -> pa.Table:
    """What a ledger knows of the photos that it has a hash of.

    Parameters
    ----------
    ledger : pyarrow.Table
        Rows with `ledger_columns`; their vectors' places as ``vector``, where these are kept aside.

    Returns
    -------
    pyarrow.Table
        ``id``, ``path`` and `KNOWN_SCHEMA`.
    """
    hashed = ledger.filter(pc.is_valid(ledger["hash"]))
    columns = {name: hashed[name] for name in KEY}
    for name, theirs in LEDGER_NAMES.items():
        if theirs == "vector" and theirs not in hashed.column_names:
            columns[name] = pa.nulls(hashed.num_rows, KNOWN_SCHEMA.field(name).type)
        else:
            columns[name] = pc.equal(hashed["reason"], FLAT) if theirs == "flat" else hashed[theirs]
    columns["known_reused"] = pa.array([True] * hashed.num_rows, pa.bool_())
    return pa.table(columns)


def join_known(rows: pa.Table, known: pa.Table, job: Job) -> pa.Table:
    """Put what is known of photos, by their id and path, beside rows of a plan.

    Parameters
    ----------
    rows : pyarrow.Table
        Of the plan.
    known : pyarrow.Table
        From `as_known`.
    job : Job
        Whose plan it is.

    Returns
    -------
    pyarrow.Table
        The rows with the columns of `KNOWN_SCHEMA`.
    """
    places = pc.index_in(_keys(with_paths(path_rule(job), rows)), value_set=_keys(known))
    for field in KNOWN_SCHEMA:
        rows = rows.append_column(field, known[field.name].take(places).cast(field.type))
    return rows


def _keys(table: pa.Table, names: Sequence[str] = KEY) -> pa.ChunkedArray:
    """One text a row for its id and path; large, since all of them may be more than one Arrow array of text holds."""
    large = pa.large_string()
    return pc.binary_join_element_wise(
        *(table[name].cast(large) for name in names), pa.scalar("\0", large)
    ).combine_chunks()


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
    hashes = folder.parts.ledger(["hash"])["hash"]
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
