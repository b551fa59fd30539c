"""Rules for which of the ranked photos are kept. `reducer.selection.rules` applies them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reducer.config.checks import bytes_of, check_count
from reducer.errors import InputError

#: Photos kept per label in a run, where nothing else bounds the reduced list.
DEFAULT_KEEP = 25
#: Photos of each label that a budget must leave room for.
DEFAULT_MIN_PER_LABEL = 1


@dataclass(frozen=True)
class CutRules:
    """Rules for which of the ranked photos are kept, in the order in which they apply.

    Attributes
    ----------
    min_distance : float, optional
        First: of each label, rank 0 and the photos with at least this insertion distance, in bits.
    keep : int, optional
        Then: at most this number of photos per label, by rank.
    total, max_bytes : int, optional
        Then a budget over all labels, at most one: a number of photos, or bytes of photos (text such as ``20GB``,
        20 x 10^9, or ``20GiB`` becomes a number). Every label first gets ``min_per_label`` photos; the rest of the
        budget goes to photos of all labels by falling effective distance: the smallest insertion distance among this
        photo and those of its label that are left and rank before it. It ends at the first photo that does not fit.
    min_per_label : int, optional
        Photos of each label that a budget must leave room for; default 1.

    Raises
    ------
    InputError
        If a value is out of its range or two contradict each other.
    """

    min_distance: float | None = None
    keep: int | None = None
    total: int | None = None
    max_bytes: int | str | None = None
    min_per_label: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_bytes, str):
            object.__setattr__(self, "max_bytes", bytes_of("max_bytes", self.max_bytes))
        for name in ("keep", "total", "max_bytes"):
            check_count(name, getattr(self, name))
        if self.min_distance is not None and not self.min_distance >= 0:
            raise InputError(f"--min-distance is {self.min_distance!r}: expected a number of bits, 0 or more")
        if self.total is not None and self.max_bytes is not None:
            raise InputError("--total and --max-bytes exclude each other: give one budget")
        if self.min_per_label is not None:
            if not self.has_budget:
                raise InputError("--min-per-label is what a budget leaves room for: give --total or --max-bytes too")
            if not isinstance(self.min_per_label, int) or self.min_per_label < 0:
                raise InputError(f"--min-per-label is {self.min_per_label!r}: expected a whole number of 0 or more")

    def check_scale(self, unit: str, bits: int) -> None:
        """Refuse a minimum distance that no two photos of a run can have.

        Parameters
        ----------
        unit : {"bits", "cosine"}
            Unit of the run's distances.
        bits : int
            Bits of a hash.

        Raises
        ------
        InputError
            If it is more than the bits of a hash, or than 2, the cosine distance of opposite vectors.
        """
        most = bits if unit == "bits" else 2
        if self.min_distance is not None and self.min_distance > most:
            where = f"bits of a hash, from 0 to {bits}" if unit == "bits" else "a cosine distance, from 0 to 2"
            raise InputError(
                f"--min-distance is {self.min_distance:g}, and the distances of this run are {where}: no two photos "
                "are so far apart; give less"
            )

    @property
    def has_budget(self) -> bool:
        """True if photos compete with those of other labels."""
        return self.total is not None or self.max_bytes is not None

    @property
    def needs_all_ranks(self) -> bool:
        """True if photos can be chosen only when all are ranked."""
        return self.min_distance is not None or self.has_budget

    def with_default_keep(self) -> CutRules:
        """Return the rules of a run, which keeps `DEFAULT_KEEP` photos per label unless it has another limit."""
        return self if self.keep is not None or self.has_budget else replace(self, keep=DEFAULT_KEEP)

    @property
    def guaranteed(self) -> int:
        """Photos of each label that a budget must leave room for."""
        return DEFAULT_MIN_PER_LABEL if self.min_per_label is None else self.min_per_label
