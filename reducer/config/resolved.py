"""The values in force that follow from a job (`ResolvedJob`): worked out once per run and handed down."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from reducer.config.checks import file_digest
from reducer.config.cut_rules import CutRules
from reducer.config.job import Job, given_fields, rules_of
from reducer.config.settings import STRATEGY_NAMES, EmbedSettings, PhotoSettings, default_strategy, near_copy_bits


@dataclass(frozen=True)
class ResolvedJob(Job):
    """A job in which nothing is left open: fields that other fields decide hold the value in force.

    Made by `resolve`. To change what is asked, change the `Job` and resolve it again: here the values in force would
    stay behind.

    Attributes
    ----------
    keep : int or None
        Photos kept per label; None for no limit.
    strategy : str
        How photos are ranked, one of `reducer.config.settings.STRATEGY_NAMES`.
    max_bytes : int or None
        Budget in bytes.
    rank_all : bool
        Whether labels with no more than ``keep`` photos are ranked too: always with a filter or a budget.
    model : EmbedSettings or None
        How the model of ``embed`` is used, its digest included; None without one, and before `with_model`.
    given : tuple of str
        Names of the fields of `Job` that have not their default values there.
    """

    strategy: str = STRATEGY_NAMES[0]
    max_bytes: int | None = None
    model: EmbedSettings | None = None
    given: tuple[str, ...] = field(default=(), compare=False)

    def with_model(self) -> ResolvedJob:
        """Return the job with the digest of its model; the only step that reads a file.

        Raises
        ------
        InputError
            If there is a model, and it cannot be read.
        """
        if self.embed is None:
            return self
        digest = file_digest("--embed", self.embed)
        model = EmbedSettings(
            digest, self.embed_size, self.embed_mean, self.embed_std, self.embed_batch, self.embed_output
        )
        return replace(self, model=model)

    def as_asked(self) -> dict[str, Any]:
        """Return the values of the fields of `Job`, by name: a job that asks for all that is in force here."""
        return {field.name: getattr(self, field.name) for field in fields(Job)}

    @property
    def cut_rules(self) -> CutRules:
        """Rules for which of the ranked photos are kept."""
        return CutRules(self.min_distance, self.keep, self.total, self.max_bytes, self.min_per_label)

    @property
    def has_filters(self) -> bool:
        """True if photos can be chosen only when all are ranked."""
        return self.cut_rules.needs_all_ranks

    @property
    def reads_all(self) -> bool:
        """True if labels of no more than ``keep`` photos are read too, since some of their photos may be left out."""
        return self.rank_all or self.drop_flat or self.avoid is not None

    @property
    def photo_settings(self) -> PhotoSettings:
        """The part of the job that decides hashes, vectors and ranks."""
        if self.embed is not None and self.model is None:
            raise RuntimeError("the model is not read yet: call with_model first")
        return replace(self.settings_without_model, embed=self.model)

    @property
    def settings_without_model(self) -> PhotoSettings:
        """The part of the job that decides hashes and ranks, for what makes no vectors."""
        near = near_copy_bits(self.hash_size**2)
        return PhotoSettings(
            keep=self.keep,
            strategy=self.strategy,
            hash=self.hash,
            hash_size=self.hash_size,
            decode=self.decode,
            exif_orientation=self.exif_orientation,
            drop_flat=self.drop_flat,
            avoid_distance=near if self.avoid_distance is None else self.avoid_distance,
            seed=self.seed,
            max_pixels=self.max_pixels,
            by_vectors=self.by_vectors,
            hashed=self.hashes_photos,
            near_copy=near if self.near_copy is None and self.embed is not None else self.near_copy,
        )


def resolve(job: Job) -> ResolvedJob:
    """Return the values in force that follow from a job; opens no file.

    Parameters
    ----------
    job : Job
        What was asked. A resolved job gives an equal one, without its model.
    """
    rules = rules_of(job)
    asked = {field.name: getattr(job, field.name) for field in fields(Job)}
    in_force = {
        "keep": rules.keep,
        "max_bytes": rules.max_bytes,
        "strategy": default_strategy(job.by_vectors) if job.strategy is None else job.strategy,
        "rank_all": job.rank_all or rules.needs_all_ranks,
        "given": job.given if isinstance(job, ResolvedJob) else given_fields(job),
    }
    return ResolvedJob(**asked | in_force)
