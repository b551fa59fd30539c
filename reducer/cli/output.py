"""The output of commands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from reducer.config.cut_rules import CutRules
from reducer.config.job import Job
from reducer.errors import TooManyFailuresError
from reducer.formatting import clip, format_bytes, format_distance, format_duration
from reducer.outputs.report.wording import (
    certificate_line,
    quality_rows,
    quality_title,
    remarks,
    skipped_lines,
    skips_many,
)
from reducer.storage.location import Location

if TYPE_CHECKING:
    from reducer.api.cut import CutResult
    from reducer.api.embed import EmbedResult
    from reducer.api.explain import Story
    from reducer.api.forecast import Forecast
    from reducer.api.status import Status
    from reducer.outputs.export.export import ExportResult

#: Failed photos that an export names.
SHOWN_FAILURES = 5


def print_forecast(forecast: Forecast, job: Job, sample: int) -> None:
    """Print the forecast of a dry run.

    Raises
    ------
    TooManyFailuresError
        If all photos of the sample have failed.
    """
    if forecast.bytes_to_read is None:
        size = "of unknown size"
    else:
        size = f"{'about ' if forecast.bytes_estimated else ''}{format_bytes(forecast.bytes_to_read)}"
    if forecast.photos:
        click.echo(f"labels:         {forecast.labels:,}, of which {forecast.labels_to_rank:,} are ranked")
        click.echo(f"photos:         {forecast.photos:,}, of which {forecast.photos_kept_unread:,} are kept unread")
        if job.hashes_photos:
            click.echo(f"photos to read: {forecast.photos_to_read:,}{'' if forecast.shards else f', {size}'}")
        else:
            click.echo(f"photos to rank: {forecast.photos_to_read:,}, by their vectors; none is decoded")
    else:
        click.echo("photos, labels: not known before the shards are read, which tell them")
    if forecast.shards:
        click.echo(f"shards:         {forecast.shards:,}, of which {size} are to be read")
    if forecast.photos_known:
        of_them = "photos in shards that are" if forecast.shards else "of them, not read where they are"
        click.echo(f"known already:  {forecast.photos_known:,} {of_them} unchanged (--reuse)")
    more = " or more: the cluster's worker threads decide" if forecast.threads is None else ""
    if forecast.photos:
        click.echo(f"partitions:     {forecast.partitions:,}{more}")
        click.echo(f"largest label:  {forecast.largest_label} with {forecast.largest_label_photos:,} photos")
    if forecast.sample_failed:
        click.echo(
            f"sample:         {forecast.sample_failed} of {forecast.sampled} photos failed: {forecast.sample_failure}"
        )
    if forecast.sampled and forecast.sample_failed == forecast.sampled:
        raise TooManyFailuresError(
            f"all {forecast.sampled} photos of the sample have failed: check IMAGES, --path-template or --path-column"
        )
    if forecast.shards and sample and job.hashes_photos and forecast.bytes_to_read and not forecast.sampled:
        click.echo("sample:         the first files of the first shard are not wanted, so the time is not known")
    if forecast.thread_seconds is not None:
        if forecast.threads is None:
            where = "on one worker thread; divide by those of the cluster"
        else:
            where = f"on {forecast.threads} worker thread{'s' if forecast.threads > 1 else ''}"
        click.echo(
            f"time:           about {format_duration(forecast.thread_seconds / (forecast.threads or 1))} {where}"
        )
    click.echo("Nothing was written.")


def print_result(location: Location, quiet: bool) -> None:
    """Print the result of a run, if it is done."""
    from reducer.run.folder import REPORT, RunFolder

    folder, output = RunFolder(location), location.path
    summary = folder.read_summary()
    if quiet or summary["status"] != "done":
        return
    quality, timings = summary["quality"], summary["timings"]
    lists = {"csv": "reduced.csv", "parquet": "reduced.parquet", "both": "reduced.csv and reduced.parquet"}[
        summary["job"]["format"]
    ]
    if skips_many(summary):
        for line in skipped_lines(summary):
            click.echo(line)
    click.echo(
        f"Kept {summary['photos_kept']:,} of {summary['photos']:,} photos, {summary['labels']:,} labels "
        f"({summary['labels_ranked']:,} ranked, the others are kept whole)"
    )
    unknown = summary["photos_left_out_of_unknown_size"]
    click.echo(
        f"Left out: {format_bytes(summary['bytes_left_out'])}"
        + (f" and {unknown:,} photos that were not read" if unknown else "")
    )
    job = summary["job"]
    rules = CutRules(total=job["total"], max_bytes=job["max_bytes"])
    reached = summary.get("effective_distance_reached")
    _print_budget(rules, summary["photos_kept"], summary["bytes_kept"], reached, quality["unit"])
    _print_quality(quality)
    if summary["photos_read"]:
        now = summary["photos_read_this_time"]
        earlier = f", {now:,} of them now" if now < summary["photos_read"] else ""
        click.echo(
            f"Read {summary['photos_read']:,} photos, {format_bytes(summary['bytes_read'])}{earlier}, in "
            f"{format_duration(timings['hash_seconds'])} ({summary['photos_per_second'] or 0:,} photos/s); starting "
            f"the cluster took {format_duration(timings['cluster_start_seconds'])}"
        )
    elif job["vectors"] is not None and "hash_seconds" in timings:
        click.echo(
            f"Ranked by vectors in {format_duration(timings['hash_seconds'])}; starting the cluster took "
            f"{format_duration(timings['cluster_start_seconds'])}"
        )
    for remark in remarks(summary, output):
        click.echo(remark)
    report = ", report.html" if folder.has(REPORT) else ""
    click.echo(f"Results: {output}{os.sep} ({lists}, images{os.sep}, summary.json{report})")


def _print_budget(rules: CutRules, photos: int, size: int, reached: float | None, unit: str) -> None:
    """Print how much of a budget is used, if there is one."""
    if not rules.has_budget:
        return
    most = rules.total if rules.total is not None else int(rules.max_bytes or 0)
    used = photos if rules.total is not None else size
    budget = f"{most:,} photos" if rules.total is not None else format_bytes(most)
    went = "" if reached is None else f"; it went down to an effective distance of {format_distance(reached, unit)}"
    click.echo(f"Of the budget of {budget}, {100 * used // most} % is used{went}")


def print_cut(result: CutResult, output: str) -> None:
    """Print the result of a cut."""
    unknown = result.photos_of_unknown_size
    click.echo(
        f"Kept {result.photos:,} photos of {result.labels:,} labels, {format_bytes(result.bytes)}"
        + (f" without {unknown:,} of them that were not read" if unknown else "")
    )
    if result.smallest_distance is not None:
        click.echo(f"The smallest insertion distance kept is {format_distance(result.smallest_distance, result.unit)}")
    _print_budget(result.rules, result.photos, result.bytes, result.reached, result.unit)
    left_out = ", ".join(f"{count:,} {why}" for why, count in result.reasons.items() if not why.startswith("kept"))
    click.echo(f"Left out: {left_out or 'none'}")
    click.echo(f"List: {output}")


def print_embedded(result: EmbedResult) -> None:
    """Print the result of embedding."""
    rate = "" if result.photos_per_second is None else f", {result.photos_per_second:,} photos/s"
    click.echo(f"Embedded {result.photos - result.failed:,} of {result.photos:,} photos{rate}")
    if result.failed:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.failures.items())
        click.echo(f"Failed: {kinds} (the column error says more)")
    click.echo(f"Vectors: {result.output} ({result.dimensions:,} dimensions, float16)")


def print_export(result: ExportResult) -> None:
    """Print the result of an export."""
    there = result.photos - result.written
    click.echo(
        f"Exported {result.photos:,} photos of {result.labels:,} labels"
        + (f"; {there:,} of them were there already" if there else "")
    )
    click.echo(f"Before: {format_bytes(result.bytes_before)}, after: {format_bytes(result.bytes)}")
    if result.renamed:
        click.echo(
            f"Elsewhere than the manifest says, which is not safe: {result.renamed:,} photos (see export.parquet)"
        )
    if result.copied_not_linked:
        click.echo(f"Copied, since they cannot be linked here: {result.copied_not_linked:,} photos")
    if result.passed_over:
        click.echo(f"torchvision's ImageFolder passes over files that end in {', '.join(result.passed_over)}")
    for row in result.failures.head(SHOWN_FAILURES).to_dict("records"):
        click.echo(f"Failed: {clip(row['id'])} ({clip(row['source'])}): {clip(row['error'])}")
    click.echo(f"Photos: {result.target}")


def print_story(story: Story) -> None:
    """Print the story of one photo of one label."""
    row = story.row
    click.echo(f"photo:        {row['id']} ({row['path']})")
    if row["width"] is not None:
        what = f"{row['width']} x {row['height']} {row['format']}, {format_bytes(row['bytes'])}, hash {row['hash']}"
        click.echo(f"file:         {what}")
    if row["shard"] is not None:
        click.echo(f"shard:        {row['shard']}, {row['bytes']:,} bytes from byte {row['offset']:,} on")
    click.echo(f"label:        {row['label']}, {story.label_photos:,} photos, of which {story.label_kept:,} are kept")
    if row["rank"] is not None:
        far = (
            ""
            if row["rank"] == 0
            else f", {format_distance(row['insertion_distance'], story.unit)} from the nearest of those before it"
        )
        click.echo(f"rank:         {row['rank']} of {story.label_ranked:,} (the first is 0){far}")
    click.echo(f"kept:         {'yes' if row['kept'] else 'no'}, {row['reason']}: {story.why}")
    if row["error"] is not None:
        click.echo(f"error:        {row['error']}")
    if story.nearest is not None:
        near = story.nearest
        click.echo(
            f"nearest kept: {near['id']} ({near['path']}), "
            f"{format_distance(row['nearest_kept_distance'], story.unit)} away"
            + (
                " (a near copy)"
                if story.unit == "bits" and row["nearest_kept_distance"] <= story.near_copy_bits
                else ""
            )
        )
    for other in story.other_labels:
        click.echo(f"like:         {other['id']} of label {other['label']}, {other['distance']:g} bits away")


def print_status(status: Status) -> None:
    """Print the progress of a run."""
    click.echo(f"state:      {status.state}")
    whole = "" if status.to_read is None else f" of {status.to_read:,}"
    shards = f"{status.shards_done:,} of {status.shards:,} shards read, " if status.shards else ""
    partitions = f"{status.partitions_done:,} of {status.partitions:,} partitions"
    click.echo(f"done:       {status.done:,}{whole} photos, {shards}{partitions}")
    ahead = "" if status.seconds_left is None else f", about {format_duration(status.seconds_left)} at this rate"
    left = "not known yet" if status.to_read is None else f"{max(0, status.to_read - status.done):,} photos"
    click.echo(f"left:       {left}{ahead}")
    if status.reused:
        click.echo(f"reused:     {status.reused:,} photos, from an earlier run")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in status.failures.items())
    click.echo(f"failed:     {sum(status.failures.values()):,}{f' ({kinds})' if kinds else ''}")
    click.echo(f"rate:       {'not known' if status.rate is None else f'{status.rate:,} photos/s'}")


def _print_quality(quality: dict[str, Any]) -> None:
    """Print the quality of the selection beside that of a random one."""
    if not quality["selection"]["pairs"]:
        return
    for table in (quality, quality["by_hash"]):
        if table:
            click.echo(f"{quality_title(table):<48}{'kept':>10}{'random':>10}")
            for what, kept, random in quality_rows(table):
                click.echo(f"  {what:<46}{kept:>10}{random:>10}")
    if certificate := certificate_line(quality):
        click.echo(certificate)
