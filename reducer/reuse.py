"""What earlier looks at photos gave, put beside the rows of a plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducer.config import Job
from reducer.environment import Environment, compare_with
from reducer.errors import InputError
from reducer.fingerprint import Fingerprint
from reducer.rules import flag
from reducer.schemas import FLAT, HASHES_SCHEMA, KNOWN_SCHEMA, PLACE_SCHEMA
from reducer.store import RunFolder
from reducer.types import MemberKeys, Shard

log = logging.getLogger("reducer")

#: Settings that must be equal for hashes to be the same.
HASH_SETTINGS = ("hash", "hash_size", "decode", "exif_orientation")
#: Where the columns of `KNOWN_SCHEMA` come from in the ledger.
LEDGER_NAMES = {name: name.removeprefix("known_") for name in KNOWN_SCHEMA.names if name != "known_reused"}
KEY = ("id", "path")


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

    Raises
    ------
    InputError
        If it is no run, or its hashes are not what this job would find.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        where = f"--reuse {job.reuse}"
        folder = RunFolder(job.reuse_place)
        try:
            summary = folder.summary()
        except InputError as error:
            raise InputError(f"--reuse: {error}") from None
        saved = folder.read_plan()
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
        if job.drop_flat and not theirs["drop_flat"]:
            raise InputError(f"{where} was run without --drop-flat: which photos are flat is not known. Leave it out")
        ledger = folder.ledger([*ledger_columns(), "label", *PLACE_SCHEMA.names])
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
        self.shards = {shard.path: shard for shard in folder.read_shards() or ()}
        if (
            job.manifest is None
            and self.shards
            and (summary["job"]["manifest"], theirs["label_field"])
            != (
                None,
                job.label_field,
            )
        ):
            raise InputError(
                f"{where} did not take its labels from its shards as this run does (--manifest, --label-field): leave "
                "--reuse out"
            )
        if summary["status"] != "done":
            log.warning("%s is not finished: what it has hashed so far is taken", where)

    def is_unchanged(self, shard: Shard) -> bool:
        """Whether a shard is as it was then, and was checked against the same MD5 sum if it is to be checked."""
        then = self.shards.get(shard.path)
        if then is None or (shard.md5 is not None and shard.md5 != then.md5):
            return False
        state = "mtime_ns" if shard.etag is None else "etag"
        return then.bytes == shard.bytes and getattr(then, state) == getattr(shard, state)

    def found(self, shards: Sequence[Shard], keys: MemberKeys) -> pa.Table:
        """What is known of the photos in shards that are as they were.

        Parameters
        ----------
        shards : sequence of Shard
            The shards now.
        keys : MemberKeys
            What photos are told by in them.

        Returns
        -------
        pyarrow.Table
            `HASHES_SCHEMA` rows, in the order of the shards.
        """
        same = [shard.path for shard in shards if self.is_unchanged(shard)]
        place = pc.index_in(self.ledger["shard"], value_set=pa.array(same, pa.string()))
        good = pc.and_(pc.is_valid(place), pc.is_null(self.ledger["error"]))
        rows = self.ledger.append_column("place", place).filter(good)
        rows = rows.sort_by([("place", "ascending"), ("offset", "ascending")])
        columns = {field.name: rows[field.name] for field in HASHES_SCHEMA if field.name in rows.column_names}
        columns["key"] = rows["path" if keys is MemberKeys.PATH else "id"]
        columns["flat"] = pc.if_else(pc.is_valid(rows["hash"]), pc.equal(rows["reason"], FLAT), None)
        columns["reused"] = pa.array([True] * rows.num_rows, pa.bool_())
        return pa.table([columns[field.name] for field in HASHES_SCHEMA], schema=HASHES_SCHEMA)

    def check_environment(self, now: Environment) -> None:
        """Refuse hashes of workers that hash otherwise.

        Raises
        ------
        InputError
            Naming what differs.
        """
        differs = compare_with(
            self.fingerprint.environment, now, "this computer or cluster now", f"--reuse {self.job.reuse}"
        )
        if differs is not None:
            raise InputError(f"{differs}, or leave --reuse out")


def ledger_columns() -> list[str]:
    """Columns of the ledger that `as_known` needs."""
    return [*KEY, "row", "reason", *(name for name in LEDGER_NAMES.values() if name != "flat")]


def as_known(ledger: pa.Table) -> pa.Table:
    """What a ledger knows of the photos that it has a hash of.

    Parameters
    ----------
    ledger : pyarrow.Table
        Rows with `ledger_columns`.

    Returns
    -------
    pyarrow.Table
        ``id``, ``path`` and `KNOWN_SCHEMA`.
    """
    hashed = ledger.filter(pc.is_valid(ledger["hash"]))
    columns = {name: hashed[name] for name in KEY}
    for name, theirs in LEDGER_NAMES.items():
        columns[name] = pc.equal(hashed["reason"], FLAT) if theirs == "flat" else hashed[theirs]
    columns["known_reused"] = pa.array([True] * hashed.num_rows, pa.bool_())
    return pa.table(columns)


def beside(rows: pa.Table, known: pa.Table) -> pa.Table:
    """Put what is known of photos, by their id and path, beside rows of a plan.

    Parameters
    ----------
    rows : pyarrow.Table
        With ``id`` and ``path``.
    known : pyarrow.Table
        From `as_known`.

    Returns
    -------
    pyarrow.Table
        The rows with the columns of `KNOWN_SCHEMA`.
    """
    places = pc.index_in(_keys(rows), value_set=_keys(known))
    for field in KNOWN_SCHEMA:
        rows = rows.append_column(field, known[field.name].take(places).cast(field.type))
    return rows


def _keys(table: pa.Table) -> pa.ChunkedArray:
    """One text a row for its id and path; large, since all of them may be more than one Arrow array of text holds."""
    large = pa.large_string()
    return pc.binary_join_element_wise(
        *(table[name].cast(large) for name in KEY), pa.scalar("\0", large)
    ).combine_chunks()
