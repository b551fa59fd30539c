"""Quality of a choice, as sums that add up over labels and partitions in any order."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Distances between the chosen photos, and of all others to them; sums of integers, so order-free.

    Distances are in steps (`reducer.selection.distance`): a bit, or 2**-30 of a cosine distance.

    Attributes
    ----------
    labels : int
        Labels with a chosen photo.
    candidates : int
        Photos of these labels that could have been chosen.
    nearest_sum : int
        Sum of their distances to the nearest chosen photo of their label.
    radius_sum, radius_max : int
        Sum over labels, and largest, of the coverage radius: the largest of these distances.
    labels_with_pairs : int
        Labels with at least two chosen photos.
    pairs : int
        Pairs of chosen photos within a label.
    near_copies : int
        Pairs that are at most `reducer.config.settings.near_copy_bits` apart; 0 for vectors.
    distance_sum : int
        Sum of all pair distances.
    smallest_sum : int
        Sum over labels of the smallest pair distance.
    """

    labels: int = 0
    candidates: int = 0
    nearest_sum: int = 0
    radius_sum: int = 0
    radius_max: int = 0
    labels_with_pairs: int = 0
    pairs: int = 0
    near_copies: int = 0
    distance_sum: int = 0
    smallest_sum: int = 0

    def __add__(self, other: Spread) -> Spread:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Spread(**sums | {"radius_max": max(self.radius_max, other.radius_max)})


@dataclass(frozen=True)
class Certificate:
    """Choices of farthest-first against an upper bound for every choice, over labels; exact, so order-free.

    Attributes
    ----------
    labels : int
        Labels whose bound is known.
    share_sum : Fraction
        Sum over these labels of the smallest pair distance over its upper bound, each 0 to 1.
    worst : Fraction
        The smallest of these shares; 1 without labels.
    """

    labels: int = 0
    share_sum: Fraction = Fraction(0)
    worst: Fraction = Fraction(1)

    def __add__(self, other: Certificate) -> Certificate:
        return Certificate(self.labels + other.labels, self.share_sum + other.share_sum, min(self.worst, other.worst))


@dataclass(frozen=True)
class Quality:
    """Quality of a choice, against a random one.

    Attributes
    ----------
    selection, random : Spread
        Spread of the strategy's choice, and of a seeded random choice of the same size from the same candidates.
    certificate : Certificate
        Bound of farthest-first; empty for other strategies.
    """

    selection: Spread = Spread()
    random: Spread = Spread()
    certificate: Certificate = Certificate()

    def __add__(self, other: Quality) -> Quality:
        return Quality(
            self.selection + other.selection, self.random + other.random, self.certificate + other.certificate
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the sums as values of JSON; `from_dict` reads them."""
        certificate = asdict(self.certificate)
        certificate |= {name: str(certificate[name]) for name in ("share_sum", "worst")}
        return {"selection": asdict(self.selection), "random": asdict(self.random), "certificate": certificate}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Quality:
        """Read the values made by `as_dict`."""
        certificate = values["certificate"]
        return cls(
            Spread(**values["selection"]),
            Spread(**values["random"]),
            Certificate(certificate["labels"], Fraction(certificate["share_sum"]), Fraction(certificate["worst"])),
        )
