"""Record all that decides hashes and ranks of a run, so that it is not resumed by mistake under other settings."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reducer.config.checks import flag
from reducer.config.job import Job
from reducer.config.resolved import ResolvedJob
from reducer.config.settings import STORAGE_OPTIONS
from reducer.errors import InputError
from reducer.photos.seen import DECODE_POLICY, SAME_BY_ALL_POLICIES
from reducer.run.tasks.environment import Environment, compare_with
from reducer.run.tasks.vector_files import find_vectors
from reducer.storage.codecs import Hashes
from reducer.storage.location import absolute, explaining_errors
from reducer.storage.tables import parts_of

log = logging.getLogger("reducer")

#: Fields of a job that decide neither which photos are read nor what is found.
INDIFFERENT = (
    "output",
    "manifest",  # compared by its content
    "always_keep",  # in the plan, as the next ones are
    "avoid",
    "rank_all",
    "partition_images",
    "md5",  # in the shards
    "check",
    "max_failures",
    "format",
    "extra_columns",
    "report",
    "reuse",
    "cross_label",
    "overwrite",
    "break_lock",
    "reader",
    "read_ahead",
    *STORAGE_OPTIONS,
)
#: Fields of a job that decide which vectors a model makes.
EMBED_SETTINGS = ("embed", "embed_size", "embed_mean", "embed_std", "embed_batch", "embed_output")
BLOCK = 2**20


@dataclass(frozen=True)
class Fingerprint:
    """All that decides the hashes and ranks of a run; kept with its plan.

    Attributes
    ----------
    settings : dict
        Fields of the job, from `settings_of`.
    manifest : str or None
        SHA-256 of the manifest's bytes; None without a manifest.
    avoid : str or None
        SHA-256 of the hashes to avoid; None without any.
    environment : Environment
        Environment of the workers.
    decode_policy : int
        `DECODE_POLICY` of the version that began it.
    """

    settings: dict[str, Any]
    manifest: str | None
    avoid: str | None
    environment: Environment
    decode_policy: int = 1

    @classmethod
    def of(cls, job: ResolvedJob, avoid: Hashes | None, environment: Environment) -> Fingerprint:
        """Return the fingerprint of a run that begins now.

        Raises
        ------
        InputError
            If the manifest cannot be read.
        """
        return cls(settings_of(job), manifest_digest(job), avoid_digest(avoid), environment, DECODE_POLICY)

    @property
    def digest(self) -> str:
        """Digest of the fingerprint, 16 hexadecimal digits."""
        content = json.dumps(
            [
                *(self.settings, self.manifest, self.avoid, self.environment.digest),
                *(_version(self.environment), self.decode_policy),
            ]
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def is_outdated(self) -> bool:
        """Whether photos may be hashed otherwise now: by another decode policy."""
        return is_outdated(self.decode_policy, self.settings["decode"])

    def as_dict(self) -> dict[str, Any]:
        """Return the fingerprint as JSON has it; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Fingerprint:
        """Return the fingerprint that `as_dict` has written."""
        return cls(**content | {"environment": Environment(**content["environment"])})

    def check_settings(self, job: ResolvedJob, avoid: Hashes | None) -> None:
        """Refuse to resume a run with another job than it was begun with.

        Raises
        ------
        InputError
            Naming all that differs.
        """
        try:
            now = settings_of(job.with_model())
        except InputError as error:
            log.warning("%s: whether it has changed cannot be told", error)
            now = _settings(job, self.settings["vectors"], self.settings["embed"])
        changed = [
            _changed(name, job, self.settings.get(name), now.get(name))
            for name in dict.fromkeys([*self.settings, *now])
            if self.settings.get(name) != now.get(name)
        ]
        try:
            if manifest_digest(job) != self.manifest:
                changed.append(f"--manifest {job.manifest} has another content")
        except InputError as error:
            log.warning("%s: whether it has changed cannot be told; the plan in %s holds", error, job.output)
        if avoid_digest(avoid) != self.avoid:
            changed.append("the hashes to avoid (avoid.parquet) are not what they were")
        if changed:
            raise InputError(f"the run in {job.output} was begun otherwise: {'; '.join(changed)}. {_advice(job)}")

    def check_environment(self, job: Job, now: Environment) -> None:
        """Refuse to resume a run where photos would be hashed or ranked otherwise.

        Raises
        ------
        InputError
            Naming all that differs.
        """
        where = f"the run in {job.output}"
        if _version(self.environment) != _version(now):
            raise InputError(
                f"{where} was begun with Reducer {_version(self.environment)}, this is {_version(now)}: install that "
                f"version. {_advice(job)}"
            )
        differs = compare_with(self.environment, now, "this computer or cluster now", where)
        if differs is not None:
            raise InputError(f"{differs}. {_advice(job)}")


def is_outdated(decode_policy: int, decode: str) -> bool:
    """Tell whether hashes of a decode policy may be others now; those that were decoded exactly are not."""
    return decode_policy != DECODE_POLICY and decode != "exact"


def hashed_otherwise(rows: pa.Table) -> pa.ChunkedArray:
    """Tell which rows, with ``hash`` and ``format``, have a hash that another decode policy may make otherwise."""
    is_same = pc.is_in(rows["format"], value_set=pa.array(SAME_BY_ALL_POLICIES))
    return pc.and_not(pc.is_valid(rows["hash"]), is_same)


def _changed(name: str, job: Job, before: object, now: object) -> str:
    """Return in words how a setting has changed."""
    if name in ("vectors", "embed") and None not in (before, now):  # digests
        return f"{flag(name)} {getattr(job, name)} has another content"
    return f"{'IMAGES' if name == 'images' else flag(name)} was {before!r} and is {now!r}"


def settings_of(job: ResolvedJob) -> dict[str, Any]:
    """Return the fields of a job that decide its results, as JSON has them.

    Raises
    ------
    InputError
        If the vectors cannot be read.
    """
    files = find_vectors(job)
    return _settings(job, None if files is None else files.digest, None if job.model is None else job.model.model)


def _settings(job: ResolvedJob, vectors: str | None, model: str | None) -> dict[str, Any]:
    """Return the fields of a job that decide its results, with digests in place of the paths of vectors and model."""
    deciding = {name: value for name, value in job.as_asked().items() if name not in INDIFFERENT}
    deciding |= {"images": absolute(job.images), "vectors": vectors, "embed": model}
    settings: dict[str, Any] = json.loads(json.dumps(deciding))
    return settings


def manifest_digest(job: Job) -> str | None:
    """Return the SHA-256 of the bytes of a job's manifest, in hex; None without a manifest.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    if job.manifest is None:
        return None
    digest, where = hashlib.sha256(), f"--manifest {job.manifest}"
    with explaining_errors(job.manifest_location, where):
        for part in parts_of(where, job.manifest_location) or [job.manifest_location]:
            with part.open_file() as file:
                while block := file.read(BLOCK):
                    digest.update(block)
    return digest.hexdigest()


def avoid_digest(avoid: Hashes | None) -> str | None:
    """Return the SHA-256 of packed hashes to avoid, in hex; None without any."""
    return None if avoid is None else hashlib.sha256(avoid.tobytes()).hexdigest()


def _version(environment: Environment) -> str:
    return environment.versions.get("reducer", "of an unknown version")


def _advice(job: Job) -> str:
    return f"To begin again: reducer run with --overwrite, or another --output and --reuse {job.output}"
