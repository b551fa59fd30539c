"""What a choice is worth, as sums that add up over labels and partitions in any order."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Spread:
    """How different the chosen photos are, and how near all others are to them; sums of integers, so order-free.

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
        Those of the pairs that are at most `reducer.config.settings.near_copy_bits` apart; 0 for vectors.
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
    """How near farthest-first has come to an upper bound for every choice, over labels; exact, so order-free.

    Attributes
    ----------
    labels : int
        Labels that it is known for.
    share_sum : Fraction
        Sum over them of the smallest pair distance over its upper bound, each 0 to 1.
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
    """What the choice is worth.

    Attributes
    ----------
    selection, random : Spread
        Of what the strategy chose, and of a seeded random choice of the same size from the same candidates.
    certificate : Certificate
        Of farthest-first; empty for other strategies.
    """

    selection: Spread = Spread()
    random: Spread = Spread()
    certificate: Certificate = Certificate()

    def __add__(self, other: Quality) -> Quality:
        return Quality(
            self.selection + other.selection, self.random + other.random, self.certificate + other.certificate
        )


def _quality(found: dict[str, Any]) -> Quality:
    certificate = found["certificate"]
    return Quality(
        Spread(**found["selection"]),
        Spread(**found["random"]),
        Certificate(certificate["labels"], Fraction(certificate["share_sum"]), Fraction(certificate["worst"])),
    )
