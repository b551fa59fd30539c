"""A summary in words: remarks, what the choice is worth, the certificate."""

from __future__ import annotations

from typing import Any

from reducer.formatting import format_duration


def remarks(summary: dict[str, Any], output: str) -> list[str]:
    """What there is to say of a run beside its figures, a line each.

    Parameters
    ----------
    summary : dict
        Of a finished run.
    output : str
        Its folder.
    """
    said = []
    if summary["photos_reused"]:
        said.append(f"Not read again, since they are as they were: {summary['photos_reused']:,} photos")
    left_out = {
        "min-distance": "too near to others (--min-distance)",
        "budget": "beyond the budget",
        "flat": "without detail",
        "avoided": "near a photo to avoid",
    }
    for reason, what in left_out.items():
        if summary["reasons"].get(reason):
            said.append(f"Not kept, {what}: {summary['reasons'][reason]:,} photos (reason {reason!r})")
    if summary["failures"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary["failures"].items())
        again = f"; reducer resume {output} --retry-failed reads them again"
        if summary["job"]["vectors"] is not None and list(summary["failures"]) == ["no vector"]:
            again = ""  # with other vectors it is another run
        said.append(f"Failed: {kinds} (the column error of {output}/images says more{again})")
    if names := summary["labels_partitioned"]:
        said.append(
            f"Labels so large that facility location has chosen from parts of them first: {len(names):,}: "
            f"{', '.join(names[:5])}{' ...' if names[5:] else ''}"
        )
    manifest = summary["manifest"]
    if manifest["duplicate_rows"]:
        said.append(f"Duplicate rows of the manifest left out: {manifest['duplicate_rows']:,}")
    if manifest["ids_under_several_labels"]:
        shown = ", ".join(manifest["ids_under_several_labels_examples"])
        said.append(
            f"Ids under more than one label (kept under each): {manifest['ids_under_several_labels']:,}: {shown}"
        )
    for why, count in manifest["skipped_files"].items():
        said.append(f"Skipped in IMAGES: {count:,} x {why}")
    if "shards" in summary:
        said += _of_shards(summary["shards"], output)
    for what, name in (
        ("To be kept always, but failed", "always_keep_failed"),
        ("Labels left with no photo", "labels_without_photos"),
        ("Labels with fewer than --keep photos though some were not drawn (raise --candidates)", "labels_short"),
    ):
        if names := summary[name]:
            said.append(f"{what}: {len(names):,}: {', '.join(names[:5])}{' ...' if names[5:] else ''}")
    if "cross_label_pairs" in summary:
        said.append(
            f"Near copies under different labels: {summary['cross_label_pairs']:,} pairs (cross_label.parquet), in "
            f"{format_duration(summary['timings']['cross_label_seconds'])}"
        )
    return said


def _of_shards(shards: dict[str, Any], output: str) -> list[str]:
    """What there is to say of shards that are not as they should be."""
    said = [f"Skipped in the shards: {count:,} x {why}" for why, count in shards["skipped"].items()]
    damaged = [f"{path}: {damage}" for path, damage in shards["damaged"].items()]
    for what, paths in (
        ("Damaged shards, whose photos up to the damage are taken", damaged),
        ("Shards with another MD5 sum than the published one", shards["wrong_md5"]),
    ):
        if paths:
            said.append(f"{what}: {len(paths):,}: {'; '.join(paths[:5])}{' ...' if paths[5:] else ''}")
    if damaged or shards["wrong_md5"]:
        said.append(f"When they are mended: reducer resume {output} --retry-failed reads them again")
    return said


def quality_title(quality: dict[str, Any]) -> str:
    """What the distances of `quality_rows` are."""
    return "Cosine distances" if quality["unit"] == "cosine" else f"Distances in bits, of {quality['bits']}"


def quality_rows(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the kept photos are worth: what is measured, of them, and of a random choice.

    Parameters
    ----------
    quality : dict
        Of a summary; of at least one pair of photos.
    """
    lines = [
        ("smallest pair distance, mean over labels", "mean_smallest_pair_distance"),
        ("mean pair distance", "mean_pair_distance"),
        (f"near-copy pairs (at most {quality['near_copy_bits']} bits)", "near_copy_pairs"),
        ("mean distance to the nearest kept photo", "mean_nearest_kept_distance"),
        ("the largest such distance, mean over labels", "mean_coverage_radius"),
        ("the largest such distance of all", "worst_coverage_radius"),
    ]
    sides = [quality["selection"], quality["random"]]
    rows = []
    for what, name in lines:
        if sides[0][name] is None:  # vectors have no near copies
            continue
        digits = ".4f" if quality["unit"] == "cosine" else ",.1f" if name.startswith("mean") else ",d"
        kept, random = (format(side[name], digits) for side in sides)
        rows.append((what, kept, random))
    return rows


def certificate_line(quality: dict[str, Any]) -> str | None:
    """What is promised of the smallest pair distance; None where nothing is."""
    found = quality["certificate"]
    if not found:
        return None
    return (
        f"Certificate: the smallest pair distance is at least {_percent(found['mean'])} of what any choice of the "
        f"photos read could reach (mean over {found['labels']:,} labels; the worst {_percent(found['worst'])})"
    )


def _percent(share: float) -> str:
    """Rounded down: what is "at least" so much must be so."""
    return f"{round(1000 * share) // 10} %"
