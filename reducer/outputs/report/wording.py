"""Summary of a run in words: remarks, quality of the selection, certificate."""

from __future__ import annotations

from typing import Any

from reducer.formatting import format_duration

#: Beginning of the reasons for which files are skipped that may be photos; more than one file in `MANY` is many.
BY_EXTENSION, MANY = "file ending in ", 10


def remarks(summary: dict[str, Any], output: str) -> list[str]:
    """Return remarks on a run that its figures do not tell, one line each.

    Parameters
    ----------
    summary : dict
        Summary of a finished run.
    output : str
        Folder of the run, to show.
    """
    lines = []
    if summary["photos_reused"]:
        lines.append(f"Not read again, since they are as they were: {summary['photos_reused']:,} photos")
    unread = summary["reasons"].get("kept-small-label", 0)
    if unread and summary.get("photos_looked_for") == 0:
        why = "ranked by vectors, no photo is read" if summary["job"]["check"] else "--no-check"
        lines.append(f"Kept unread, and not looked for ({why}): {unread:,} photos")
    left_out = {
        "min-distance": "too near to others (--min-distance)",
        "budget": "beyond the budget",
        "flat": "without detail",
        "avoided": "near a photo to avoid",
    }
    for reason, what in left_out.items():
        if summary["reasons"].get(reason):
            lines.append(f"Not kept, {what}: {summary['reasons'][reason]:,} photos (reason {reason!r})")
    if summary["failures"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary["failures"].items())
        again = f"; reducer resume {output} --retry-failed reads them again"
        if summary["job"]["vectors"] is not None and list(summary["failures"]) == ["no vector"]:
            again = ""  # with other vectors it is another run
        lines.append(f"Failed: {kinds} (the column error of {output}/images says more{again})")
    if summary.get("path_hint"):
        lines.append(f"Perhaps {summary['path_hint']}")
    if names := summary["labels_partitioned"]:
        lines.append(
            f"Labels so large that facility location has chosen from parts of them first: {len(names):,}: "
            f"{', '.join(names[:5])}{' ...' if names[5:] else ''}"
        )
    manifest = summary["manifest"]
    if manifest["duplicate_rows"]:
        lines.append(f"Duplicate rows of the manifest left out: {manifest['duplicate_rows']:,}")
    if manifest["ids_under_several_labels"]:
        shown = ", ".join(manifest["ids_under_several_labels_examples"])
        lines.append(
            f"Ids under more than one label (kept under each): {manifest['ids_under_several_labels']:,}: {shown}"
        )
    if not skips_many(summary):
        lines += skipped_lines(summary)
    if "shards" in summary:
        lines += _shard_remarks(summary["shards"], output)
    for what, name in (
        ("To be kept always, but failed", "always_keep_failed"),
        ("Labels left with no photo", "labels_without_photos"),
        ("Labels with fewer than --keep photos though some were not drawn (raise --candidates)", "labels_short"),
        (
            "Labels of which most photos have one hash (copies, or all alike to it)",
            "labels_of_one_hash",
        ),
    ):
        if names := summary.get(name):
            lines.append(f"{what}: {len(names):,}: {', '.join(names[:5])}{' ...' if names[5:] else ''}")
    if "cross_label_pairs" in summary:
        lines.append(
            f"Near copies under different labels: {summary['cross_label_pairs']:,} pairs (cross_label.parquet), in "
            f"{format_duration(summary['timings']['cross_label_seconds'])}"
        )
    return lines


def skips_many(summary: dict[str, Any]) -> bool:
    """Tell whether so many files of IMAGES are skipped for their extensions that it should be said first."""
    skipped: int = sum(
        count for why, count in summary["manifest"]["skipped_files"].items() if why.startswith(BY_EXTENSION)
    )
    return bool(skipped * MANY > summary["photos"] + skipped)


def skipped_lines(summary: dict[str, Any]) -> list[str]:
    """Return a line for each reason for which files of IMAGES are skipped."""
    return [f"Skipped in IMAGES: {count:,} x {why}" for why, count in summary["manifest"]["skipped_files"].items()]


def _shard_remarks(shards: dict[str, Any], output: str) -> list[str]:
    """Return remarks on shards that are not as they should be."""
    lines = [f"Skipped in the shards: {count:,} x {why}" for why, count in shards["skipped"].items()]
    damaged = [f"{path}: {damage}" for path, damage in shards["damaged"].items()]
    for what, paths in (
        ("Damaged shards, whose photos up to the damage are taken", damaged),
        ("Shards with another MD5 sum than the published one", shards["wrong_md5"]),
    ):
        if paths:
            lines.append(f"{what}: {len(paths):,}: {'; '.join(paths[:5])}{' ...' if paths[5:] else ''}")
    if damaged or shards["wrong_md5"]:
        lines.append(f"When they are mended: reducer resume {output} --retry-failed reads them again")
    return lines


def quality_title(quality: dict[str, Any]) -> str:
    """Return a title for the rows of `quality_rows`, with the unit of their distances."""
    return "Cosine distances" if quality["unit"] == "cosine" else f"Distances in bits, of {quality['bits']}"


def quality_rows(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the quality of the kept photos and of a random choice, as rows of measure, kept and random.

    Parameters
    ----------
    quality : dict
        ``quality`` of a summary, over at least one pair of photos.
    """
    measures = [
        ("smallest pair distance, mean over labels", "mean_smallest_pair_distance"),
        ("mean pair distance", "mean_pair_distance"),
        (f"near-copy pairs (at most {quality['near_copy_bits']} bits)", "near_copy_pairs"),
        ("mean distance to the nearest kept photo", "mean_nearest_kept_distance"),
        ("the largest such distance, mean over labels", "mean_coverage_radius"),
        ("the largest such distance of all", "worst_coverage_radius"),
    ]
    sides = [quality["selection"], quality["random"]]
    rows = []
    for measure, name in measures:
        if sides[0][name] is None:  # vectors have no near copies
            continue
        digits = ".4f" if quality["unit"] == "cosine" else ",.1f" if name.startswith("mean") else ",d"
        kept, random = (format(side[name], digits) for side in sides)
        rows.append((measure, kept, random))
    return rows


def certificate_line(quality: dict[str, Any]) -> str | None:
    """Return the lower bound that is certified for the smallest pair distance, as a sentence; None without one.

    Parameters
    ----------
    quality : dict
        ``quality`` of a summary.
    """
    certificate = quality["certificate"]
    if not certificate:
        return None
    mean, worst = _percent(certificate["mean"]), _percent(certificate["worst"])
    return (
        f"Certificate: the smallest pair distance is at least {mean} of what any choice of the photos read could reach "
        f"(mean over {certificate['labels']:,} labels; the worst {worst})"
    )


def _percent(share: float) -> str:
    """Return a share in percent, rounded down, so that "at least" stays true."""
    return f"{round(1000 * share) // 10} %"
