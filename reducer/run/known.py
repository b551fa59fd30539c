"""Take what earlier runs know of photos: hashes to reuse, and hashes to avoid."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.config.checks import flag
from reducer.config.job import Job, member_keys_by, path_rule
from reducer.config.resolved import ResolvedJob
from reducer.errors import InputError
from reducer.run.fingerprint import EMBED_SETTINGS, Fingerprint, hashed_otherwise, is_outdated, settings_of
from reducer.run.folder import RunFolder
from reducer.run.plan.keep_avoid import no_column_hint, read_column_or_lines
from reducer.run.tasks.environment import Environment, compare_with, without_model
from reducer.run.tasks.messages import PieceReport, Tally
from reducer.storage.codecs import Hashes, VectorSpool, from_hex
from reducer.storage.location import MemberKeys, Shard, stem_of
from reducer.storage.paths import with_paths
from reducer.storage.schemas import FLAT, KNOWN_SCHEMA, SHARD_POSITION_SCHEMA
from reducer.storage.tables import with_column

log = logging.getLogger("reducer")

#: Settings that must be equal for hashes to be reused.
HASH_SETTINGS = ("hash", "hash_size", "decode", "exif_orientation")
#: Columns of the ledger that those of `KNOWN_SCHEMA` come from.
LEDGER_NAMES = {name: name.removeprefix("known_") for name in KNOWN_SCHEMA.names if name != "known_reused"}
#: Columns that identify a photo in the ledger.
KEY = ("id", "path")
#: Columns that identify a vector.
VECTOR_KEY = ("id", "label")


class Reuse:
    """An earlier run, whose hashes and vectors are reused.

    Parameters
    ----------
    job : ResolvedJob
        Job whose ``reuse`` names the run.

    Attributes
    ----------
    known : pyarrow.Table
        From `as_known`.
    spool : VectorSpool
        Holds the vectors of `known`.

    Raises
    ------
    InputError
        If it is no run, or its hashes are not what this job would find.
    """

    def __init__(self, job: ResolvedJob) -> None:
        self.job = job
        self.folder = folder = RunFolder(job.reuse_location)
        try:
            summary = folder.summary()
        except InputError as error:
            raise InputError(f"--reuse: {error}") from None
        saved = folder.plan.read()
        if saved is None:
            raise InputError(
                f"{self._where} has no plan.parquet, which tells how its photos were hashed: leave --reuse out"
            )
        plan, terms = saved
        self.fingerprint = Fingerprint.from_dict(terms["fingerprint"])
        self._check_settings()
        self.spool = VectorSpool()
        self.ledger = self._read_ledger(plan)
        self.known = as_known(self.ledger)
        self.shards = {shard.path: shard for shard in folder.plan.read_shards() or ()}
        own = summary["job"]
        then = member_keys_by(own["manifest"], own["path_column"], own["path_template"])
        #: Keys of the photos that were looked for in the shards; None for all photos that the shards hold.
        self.looked_for = None if then is MemberKeys.SAMPLE else plan["path"].combine_chunks()
        self.keys_then = then
        if self.shards and job.manifest is None and (own["manifest"], own["label_field"]) != (None, job.label_field):
            raise InputError(
                f"{self._where} did not take its labels from its shards as this run does (--manifest, --label-field): "
                "leave --reuse out"
            )
        if summary["status"] != "done":
            log.warning("%s is not finished: what it has hashed so far is taken", self._where)

    @property
    def _where(self) -> str:
        return f"--reuse {self.job.reuse}"

    def _check_settings(self) -> None:
        """Refuse a run whose hashes, vectors or flat photos are not those that this job would find."""
        job, where, theirs = self.job, self._where, self.fingerprint.settings
        for name in HASH_SETTINGS:
            if theirs[name] != getattr(job, name):
                raise InputError(
                    f"{where} has {flag(name)} {theirs[name]}, this run {getattr(job, name)}: its hashes would not be "
                    f"this run's. Give {flag(name)} {theirs[name]}, or leave --reuse out"
                )
        ours = settings_of(job)
        if job.embed is not None and any(theirs.get(name) != ours[name] for name in EMBED_SETTINGS):
            raise InputError(
                f"{where} has no vectors of this model as it is used here (--embed, --embed-size, --embed-mean, "
                "--embed-std, --embed-batch, --embed-output): leave --reuse out"
            )
        if job.drop_flat and not theirs["drop_flat"]:
            raise InputError(f"{where} was run without --drop-flat: which photos are flat is not known. Leave it out")
        if theirs["max_pixels"] > job.max_pixels:
            # Width and height do not always tell how many pixels are decoded.
            raise InputError(
                f"{where} has --max-pixels {theirs['max_pixels']}, this run {job.max_pixels}: photos that it took may "
                f"be too large now. Give --max-pixels {theirs['max_pixels']}, or leave --reuse out"
            )

    def _read_ledger(self, plan: pa.Table) -> pa.Table:
        """Read the ledger, with a column ``vector`` of positions in the spool where there is a model."""
        ledger = self.folder.parts.ledger([*ledger_columns(), "label", *SHARD_POSITION_SCHEMA.names])
        if self.job.embed is not None:
            vectors = self.folder.vectors.read_all(self.spool)
            position = pc.index_in(_keys(ledger, VECTOR_KEY), value_set=_keys(vectors, VECTOR_KEY))
            ledger = ledger.append_column("vector", vectors["vector"].take(position))
        if self.job.drop_flat:
            # Photos that are always kept were not asked whether they are flat.
            always = plan.filter(plan["always_keep"])["row"].to_numpy()
            ledger = ledger.filter(pa.array(~np.isin(ledger["row"].to_numpy(), always)))
        if self.fingerprint.is_outdated:
            is_other = hashed_otherwise(ledger)
            log.info(
                "%s: %d photos were decoded otherwise, they are read again", self._where, pc.sum(is_other).as_py() or 0
            )
            ledger = ledger.filter(pc.invert(is_other))
        return ledger

    def pieces(self, shards: Sequence[Shard], keys: MemberKeys) -> dict[int, tuple[pa.Table, PieceReport]]:
        """Read the hashes of shards that have not changed since.

        Parameters
        ----------
        shards : sequence of Shard
            The shards as they are now.
        keys : MemberKeys
            Kind of key that identifies photos in them.

        Returns
        -------
        dict of int to (pyarrow.Table, PieceReport)
            `HASHES_SCHEMA` rows and reports, by the number that the shard has now; of shards that were whole, and
            checked against the same MD5 sum if they are to be checked.
        """
        reports = self.folder.pieces.reports()
        ranged = self.ledger.filter(pc.and_(pc.is_valid(self.ledger["hash"]), pc.is_valid(self.ledger["shard"])))
        pieces = {}
        for shard in shards:
            then = self.shards.get(shard.path)
            report = None if then is None else reports.get(then.number)
            if then is None or report is None or report.damage is not None or report.wrong_md5:
                continue
            is_unchecked = shard.md5 is None  # then it does not matter against what it was checked before
            if replace(then, number=shard.number, md5=None if is_unchecked else then.md5) != shard:
                continue
            rows = self.folder.pieces.read(then.number)[0]
            rows = _with_ledger(without_outdated(rows) if self.fingerprint.is_outdated else rows, ranged, self.spool)
            if keys is not MemberKeys.SAMPLE:
                paths = rows["path"].to_pylist()
                key = paths if keys is MemberKeys.PATH else list(map(stem_of, paths))
                rows = with_column(rows, "key", pa.array(key, pa.string()))
                rows = with_column(rows, "label", pa.nulls(rows.num_rows, pa.string()))
            # Failed photos are read again, where there is something to read.
            error = pc.if_else(pc.equal(rows["bytes"], 0), rows["error"], pa.scalar(None, pa.string()))
            rows = with_column(rows, "error", error)
            rows = with_column(rows, "reused", pa.array([True] * rows.num_rows, pa.bool_()))
            tally = Tally(reused=rows.num_rows - rows["hash"].null_count)
            pieces[shard.number] = rows, replace(report, tally=tally)
        return pieces

    def may_hold(self, unknown: pa.ChunkedArray, keys: MemberKeys) -> bool:
        """Tell whether unchanged shards may hold photos that the earlier run did not look for in them.

        Parameters
        ----------
        unknown : pyarrow.ChunkedArray of string
            Keys of photos that the earlier run does not know.
        keys : MemberKeys
            Kind of the keys.
        """
        if self.looked_for is None or not len(unknown):
            return False
        return keys is not self.keys_then or not pc.all(pc.is_in(unknown, value_set=self.looked_for)).as_py()

    def check_environment(self, now: Environment) -> None:
        """Refuse hashes that workers with other libraries have made.

        Raises
        ------
        InputError
            Naming what differs.
        """
        then = self.fingerprint.environment
        if self.job.embed is None:
            then = without_model(then)
        differs = compare_with(then, now, "this computer or cluster now", self._where)
        if differs is not None:
            raise InputError(f"{differs}, or leave --reuse out")


def without_outdated(rows: pa.Table) -> pa.Table:
    """Take what was decoded by another policy out of the rows of shards and pieces, so that it is read again."""
    is_other = hashed_otherwise(rows)
    for name in ("width", "height", "format", "hash", "vector"):
        rows = with_column(rows, name, pc.if_else(is_other, pa.scalar(None, rows[name].type), rows[name]))
    return with_column(rows, "flat", pc.if_else(is_other, pa.scalar(False), rows["flat"]))


def _with_ledger(rows: pa.Table, ledger: pa.Table, spool: VectorSpool) -> pa.Table:
    """Add the hashes and vectors of photos that were read from a shard later, one by one, to the rows of the shard."""
    position = pc.index_in(_positions(rows), value_set=_positions(ledger))
    late = pc.and_(pc.is_null(rows["hash"]), pc.is_valid(position))
    for name in ("width", "height", "format", "hash"):
        rows = with_column(rows, name, pc.if_else(late, ledger[name].take(position), rows[name]))
    if "vector" in ledger.column_names:
        vectors = spool.packed(ledger["vector"].take(position))
        rows = with_column(rows, "vector", pc.if_else(late, vectors, rows["vector"]))
    is_flat = pc.equal(ledger["reason"], FLAT).take(position)
    return with_column(rows, "flat", pc.if_else(late, is_flat, rows["flat"]))


def _positions(table: pa.Table) -> pa.Array:
    """Return a text per row that identifies a photo by its shard and offset."""
    large = pa.large_string()
    columns = (table["shard"].cast(large), table["offset"].cast(pa.string()).cast(large))
    joined = pc.binary_join_element_wise(*columns, pa.scalar("\0", large))
    return joined.combine_chunks()


def ledger_columns() -> list[str]:
    """Return the columns of the ledger that `as_known` needs."""
    return [*KEY, "row", "reason", *(name for name in LEDGER_NAMES.values() if name not in ("flat", "vector"))]


def as_known(ledger: pa.Table) -> pa.Table:
    """Return what a ledger knows of the photos that it has a hash of.

    Parameters
    ----------
    ledger : pyarrow.Table
        Rows with `ledger_columns`, and positions of their vectors in a spool as ``vector``, where they have some.

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
    """Join what is known of photos, by their id and path, to rows of a plan.

    Parameters
    ----------
    rows : pyarrow.Table
        Rows of the plan.
    known : pyarrow.Table
        From `as_known`.
    job : Job
        Job that was planned; gives the paths of the rows.

    Returns
    -------
    pyarrow.Table
        The rows with the columns of `KNOWN_SCHEMA`.
    """
    positions = pc.index_in(_keys(with_paths(path_rule(job), rows)), value_set=_keys(known))
    for field in KNOWN_SCHEMA:
        rows = rows.append_column(field, known[field.name].take(positions).cast(field.type))
    return rows


def _keys(table: pa.Table, names: Sequence[str] = KEY) -> pa.ChunkedArray:
    """Return a text per row that identifies it; large, since all may be more than one Arrow array of text holds."""
    large = pa.large_string()
    return pc.binary_join_element_wise(
        *(table[name].cast(large) for name in names), pa.scalar("\0", large)
    ).combine_chunks()


#: Settings of a run that must be equal for its hashes to be compared with another's.
COMPARED_SETTINGS = ("hash", "hash_size", "exif_orientation")


def read_avoided(job: Job) -> Hashes | None:
    """Read the hashes to avoid.

    Parameters
    ----------
    job : Job
        Job whose ``avoid`` names them, and that says of which kind and size they must be.

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
        # The folder of a run's file, such as reduced.parquet, tells how its photos were hashed.
        run = next((run for run in map(RunFolder, map(str, path.absolute().parents[:2])) if run.is_run()), None)
        if run is not None:
            _check_settings(where, run, job)
        texts, lines = read_column_or_lines(where, job.avoid, "hash")
    if len(texts) == 0:
        raise InputError(f"{where} holds no hash")
    packed = set()
    for number, text in enumerate(texts.to_pylist(), start=1):
        try:
            packed.add(from_hex(text, bits))
        except ValueError as error:
            raise InputError(
                f"{where}, hash {number}: {error}, as --hash {job.hash} --hash-size {job.hash_size} gives"
                f"{no_column_hint('hash') if lines else ''}"
            ) from None
    return np.frombuffer(b"".join(sorted(packed)), dtype=np.uint8).reshape(len(packed), -1)


def _hashes_of_run(where: str, path: Path, job: Job) -> pa.Array:
    """Read all hashes of another run's ledger."""
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
    """Refuse the hashes of a run that cannot be compared with this job's."""
    summary = run.read_summary()
    if summary["status"] != "done":
        raise InputError(f"{where} is of a run that is not finished: photos are missing from its ledger")
    theirs = summary["job"]
    for name in COMPARED_SETTINGS:
        before, now = theirs.get(name), getattr(job, name)
        if before != now:
            raise InputError(
                f"{where}: that run's {flag(name)} is {before}, this one's {now}: their hashes do not compare"
            )
    if theirs["decode"] != job.decode:
        log.warning(
            "%s was hashed with --decode %s: hashes may differ by a bit, those of transparent and of 16-bit pictures "
            "by many",
            where,
            theirs["decode"],
        )
    if is_outdated(summary.get("decode_policy", 1), theirs["decode"]):
        others = pc.sum(hashed_otherwise(run.parts.ledger(["hash", "format"]))).as_py()
        if others:
            raise InputError(
                f"{where}: {others} photos of that run (no JPEGs) may have other hashes now, since transparency and "
                "levels of 16 bits are hashed as they are seen. Run its command again with another --output and "
                f"--reuse {run.path}, and give that one"
            )
