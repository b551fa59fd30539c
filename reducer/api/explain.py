"""The story of one photo, read from the ledger of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from reducer.config.cut_rules import CutRules
from reducer.config.settings import near_copy_bits, unit_of
from reducer.errors import InputError
from reducer.run.folder import RunFolder
from reducer.storage.location import Location
from reducer.storage.schemas import (
    AVOIDED,
    BEYOND_KEEP,
    BUDGET,
    FAILED,
    FLAT,
    KEPT,
    KEPT_SMALL_LABEL,
    MIN_DISTANCE,
    NOT_SAMPLED,
)


@dataclass(frozen=True)
class Story:
    """The result of a run for one photo under one label.

    Attributes
    ----------
    row : dict
        The photo's row of the ledger.
    why : str
        Explanation of its reason.
    label_photos, label_ranked, label_kept : int
        Photos of its label, ranked photos and kept photos among them.
    nearest : dict or None
        ``id`` and ``path`` of the kept photo nearest to it; None if it is kept, or none is known.
    near_copy_bits : int
        Distance in bits up to which two photos are near copies.
    unit : {"bits", "cosine"}
        Unit of the distances in ``row``.
    other_labels : list of dict
        ``id``, ``label`` and ``distance`` in bits of near copies under other labels, read from
        ``cross_label.parquet`` where there is one.
    """

    row: dict[str, Any]
    why: str
    label_photos: int
    label_ranked: int
    label_kept: int
    nearest: dict[str, Any] | None
    near_copy_bits: int
    unit: str = "bits"
    other_labels: list[dict[str, Any]] = field(default_factory=list)


def explain(run: Path | str, photo: str, *, storage_options: Mapping[str, Any] | None = None) -> list[Story]:
    """Explain the result of a run for one photo.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL; of an unfinished run, what it has written so far.
    photo : str
        The photo's id.
    storage_options : mapping, optional
        fsspec options that open ``run`` where it is a URL.

    Returns
    -------
    list of Story
        One story per label that the id stands under, at least one.

    Raises
    ------
    InputError
        If it is no run folder, or the photo is not in its ledger.
    """
    folder = RunFolder(Location(str(run), storage_options or {}))
    summary = folder.summary()
    rows = folder.parts.ledger(where=pc.field("id") == photo)
    if not rows.num_rows:
        raise InputError(_missing(folder, summary, photo))
    labels = folder.parts.ledger(where=pc.field("label").isin(pc.unique(rows["label"])))
    rules = CutRules(**{name: summary["job"][name] for name in ("min_distance", "total", "max_bytes")})
    unfiltered = summary["status"] != "done" and rules.needs_all_ranks
    pairs = folder.lists.cross_label_of(photo)
    stories = []
    for row in rows.to_pylist():
        label = labels.filter(pc.equal(labels["label"], row["label"]))
        nearest = None
        if not row["kept"] and row["nearest_kept"] is not None:
            nearest = label.filter(pc.equal(label["id"], row["nearest_kept"])).select(["id", "path"]).to_pylist()[0]
        ranked = len(label) - label["rank"].null_count
        kept = pc.sum(label["kept"]).as_py()
        stories.append(
            Story(
                row=row,
                why=_why(row, summary["job"], len(label), str(run), unfiltered),
                label_photos=len(label),
                label_ranked=ranked,
                label_kept=kept,
                nearest=nearest,
                near_copy_bits=near_copy_bits(summary["job"]["hash_size"] ** 2),
                unit=unit_of(summary["job"]),
                other_labels=[pair for own_label, pair in pairs if own_label == row["label"]],
            )
        )
    return stories


def _missing(folder: RunFolder, summary: dict[str, Any], photo: str) -> str:
    """Say why a photo is not in the ledger."""
    saved = folder.plan.read() if summary["status"] != "done" else None
    if saved is not None and pc.any(pc.equal(saved[0]["id"], photo)).as_py():
        return f"photo {photo!r} is not in the ledger yet: the run is not finished (reducer status {folder.path})"
    return f"no photo of the run in {folder.path} has the id {photo!r}: expected one as its manifest writes it"


def _why(row: dict[str, Any], job: dict[str, Any], photos: int, run: str, unfiltered: bool) -> str:
    """Explain a photo's reason."""
    keep = job["keep"]
    budget = f"--total {job['total']}" if job["total"] is not None else f"--max-bytes {job['max_bytes']}"
    if unfiltered and row["rank"] is not None:
        return "not told yet: --min-distance, --total and --max-bytes count when all photos are hashed"
    return {
        KEPT: "it is among the first of its label" if keep is None else f"it is among the first {keep} of its label",
        KEPT_SMALL_LABEL: f"a label of {photos} photos, at most --keep {keep}, is kept whole and not read",
        BEYOND_KEEP: f"{keep} photos of its label come before it (--keep)",
        MIN_DISTANCE: f"it is nearer than --min-distance {job['min_distance']} to a photo before it",
        BUDGET: f"photos that differ more from others of their labels came first ({budget})",
        NOT_SAMPLED: f"it is not among the {job['candidates']} of {photos} photos of its label that were drawn "
        "(--candidates)",
        FLAT: "it shows next to nothing (--drop-flat)",
        AVOIDED: "it is near a photo to avoid (--avoid)",
        FAILED: f"it could not be read; reducer resume {run} --retry-failed tries again",
    }[row["reason"]]
