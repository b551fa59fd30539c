"""Flags to configuration to one call; errors to exit codes. Imports nothing heavy before a command runs."""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click
from click.core import ParameterSource

import reducer
from reducer.clusterspec import ClusterFile, ClusterSpec
from reducer.config import (
    DECODE_NAMES,
    FORMATS,
    GLDV2_TEMPLATE,
    HASH_NAMES,
    READER_NAMES,
    SAMPLE_PHOTOS,
    STORAGE_OPTIONS,
    STRATEGY_NAMES,
    Job,
)
from reducer.errors import InputError, ReducerError, TooManyFailuresError


class Terminated(BaseException):
    """SIGTERM came; not caught by anything that handles errors."""


def candidates_number(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """A whole number of 1 or more, or None for ``all``."""
    if value == "all":
        return None
    if value.isdecimal() and int(value) >= 1:
        return int(value)
    raise click.BadParameter(f"{value!r} is neither a whole number of 1 or more nor 'all'")


def read_cluster_file(ctx: click.Context, param: click.Parameter, value: str | None) -> ClusterSpec | None:
    """Read ``--cluster``; what it says of the job becomes what flags are by default."""
    if value is None:
        return None
    try:
        file = ClusterFile.read(value)
    except ReducerError as error:
        _end(f"Error: {error}", error.exit_code)
    options = {option.name: option for option in ctx.command.params}
    try:
        flags = {name: _as_flag(options[name], default) for name, default in file.job.items()}
    except ReducerError as error:
        _end(f"Error: {value}: {error}", error.exit_code)
    ctx.default_map = {**(ctx.default_map or {}), **flags}
    return file.spec


def _as_flag(option: click.Parameter, value: Any) -> Any:
    """A value from YAML as the command line would give it."""
    name = option.name
    if isinstance(value, dict) and name in STORAGE_OPTIONS:
        pairs = {key: json.dumps(v) if isinstance(v, bool | dict) else str(v) for key, v in value.items()}
        return [f"{key}={v}" for key, v in pairs.items()]
    if isinstance(value, list) and name == "labels":
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(value)
        return text.getvalue()
    expected = "keys with values" if name in STORAGE_OPTIONS else "one value"
    if getattr(option, "is_flag", False):
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif not isinstance(value, dict | list | bool) and name not in STORAGE_OPTIONS:
        return str(value)
    raise InputError(f"job: {name} is a {type(value).__name__}: expected {expected}")


def exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors and signals into the exit codes that scripts go by.

    Done here and not left to click, which turns Ctrl-C into exit code 1, also under ``dask reducer``.
    """

    def on_sigterm(signum: int, frame: object) -> NoReturn:
        raise Terminated

    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> None:
        before = signal.signal(signal.SIGTERM, on_sigterm)
        try:
            command(**kwargs)
        except ReducerError as error:
            _end(f"Error: {error}", error.exit_code)
        except KeyboardInterrupt:
            _end(_stopped(kwargs), 130)
        except Terminated:
            _end(_stopped(kwargs), 143)
        finally:
            signal.signal(signal.SIGTERM, before)

    return wrapped


def _end(message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)


def _stopped(kwargs: dict[str, Any]) -> str:
    """What a person who stopped a command should know."""
    if "output" not in kwargs:
        return "Stopped."
    from reducer.places import Place, parse_options
    from reducer.store import RunFolder

    folder = RunFolder(Place(kwargs["output"], parse_options("", kwargs.get("output_storage_options", ()))))
    if not folder.is_run():
        return "Stopped before the first photo was hashed; nothing was written."
    found = folder.read_summary()
    if found.get("status") == "done":
        return f"Stopped; the run in {folder.path} is an earlier one and whole."
    return (
        f"Stopped. The photos hashed so far ({found.get('photos_read', 0)} of {found.get('photos_to_read')}) are kept "
        f"in {folder.images}; no reduced list was written. To start again: the same command with --overwrite."
    )


@click.group(
    name="reducer",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: reducer sample photos && reducer run photos/train --manifest photos/train.csv --output run",
)
@click.version_option(reducer.__version__, prog_name="reducer")
def main() -> None:
    """Reduce a labelled photo collection to the K most different photos of every label."""


@main.command(
    epilog="Example: reducer run photos/train --manifest photos/train.csv --keep 25 --output run",
)
@click.argument("images")
@click.option("--output", required=True, metavar="RUN", help="Run folder to write, a local path or a URL.")
@click.option(
    "--manifest",
    metavar="FILE",
    help="CSV or Parquet file with one row a photo, or GLDv2's train_clean.csv. Without one, every photo below IMAGES "
    "is taken: its folder is its label, its relative path its id.",
)
@click.option("--address", metavar="URL", help="Run on the Dask scheduler at this address, e.g. tcp://10.0.0.1:8786.")
@click.option(
    "--cluster",
    metavar="FILE",
    is_eager=True,
    callback=read_cluster_file,
    help="Run on the cluster that this YAML file describes. What it says under 'job' are defaults; flags win.",
)
@click.option("--id-column", default="id", show_default=True, help="The manifest's column of photo ids.")
@click.option("--label-column", default="landmark_id", show_default=True, help="The manifest's column of labels.")
@click.option("--path-column", metavar="COL", help="The manifest's column of paths, relative to IMAGES or absolute.")
@click.option(
    "--path-template",
    metavar="TEXT",
    help="Where a photo lies below IMAGES, when there is no --path-column; {id}, {label} and single characters "
    f"such as {{id[0]}}.  [default: {GLDV2_TEMPLATE}]",
)
@click.option("--keep", default=25, show_default=True, help="Photos kept a label.")
@click.option(
    "--candidates",
    callback=candidates_number,
    metavar="N|all",
    default="1000",
    show_default=True,
    help="Photos read a label at most, drawn at random.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGY_NAMES),
    default="farthest-first",
    show_default=True,
    help="How to rank.",
)
@click.option(
    "--hash",
    type=click.Choice(HASH_NAMES),
    default="dhash",
    show_default=True,
    help="The perceptual hash (imagehash's) that photos are compared by.",
)
@click.option(
    "--hash-size", default=8, show_default=True, help="2 to 32; a hash has so many bits squared (whash: powers of two)."
)
@click.option("--exif-orientation", is_flag=True, help="Turn photos upright, as EXIF says, before they are hashed.")
@click.option("--drop-flat", is_flag=True, help="Do not keep photos without detail. Reads all labels.")
@click.option(
    "--always-keep",
    metavar="FILE",
    help="Ids that are ranked before all others and kept whatever --avoid and --drop-flat say, at most --keep a label: "
    "one a line, or a CSV or Parquet file with the --id-column.",
)
@click.option(
    "--avoid",
    metavar="FILE",
    help="Do not keep photos near one of these, a test set say: another run's folder, a CSV or Parquet file with a "
    "column 'hash', or one hash a line (which must be of --hash's kind: a list does not tell). Reads all labels.",
)
@click.option(
    "--avoid-distance",
    type=int,
    metavar="BITS",
    help="With --avoid: at most so many bits apart is near.  [default: 6 of 64, in proportion]",
)
@click.option(
    "--decode",
    type=click.Choice(DECODE_NAMES),
    default="fast",
    show_default=True,
    help="exact: bit for bit imagehash on the full decode. fast: JPEGs at reduced size, dHash 0.15 bit off on average.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
@click.option("--labels", metavar="A,B,C", help="Trial run: only these labels.")
@click.option("--limit-labels", type=int, metavar="N", help="Trial run: only N labels, drawn at random.")
@click.option("--rank-all", is_flag=True, help="Read and rank labels with no more than --keep photos too.")
@click.option("--workers", type=int, help="Worker processes; 0 runs in this process.  [default: usable CPUs]")
@click.option("--threads", type=int, help="Threads a worker.  [default: 1]")
@click.option("--partition-images", type=int, metavar="N", help="Photos a partition.  [default: 500 to 2000]")
@click.option("--max-pixels", default=200_000_000, show_default=True, help="Photos that declare more pixels fail.")
@click.option(
    "--max-failures",
    default=0.1,
    show_default=True,
    help="Exit 3 when more than this share of the photos read have failed.",
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="both",
    show_default=True,
    help="Reduced lists to write.",
)
@click.option(
    "--storage-option",
    "storage_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="How the URL of IMAGES is opened, such as endpoint_url=http://127.0.0.1:9000; may be given often. Without key "
    "and secret, the usual AWS credentials are looked for; anon=true for a public bucket.",
)
@click.option(
    "--manifest-storage-option",
    "manifest_storage_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="The same for --manifest.",
)
@click.option(
    "--output-storage-option",
    "output_storage_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="The same for --output.",
)
@click.option(
    "--reader",
    type=click.Choice(READER_NAMES),
    default="s3fs",
    show_default=True,
    help="What reads photos of s3:// URLs; obstore is faster and an extra: pip install 'reducer[obstore]'.",
)
@click.option(
    "--read-ahead", default=32, show_default=True, help="Photos of a URL under way at a time, for each worker thread."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in RUN.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and about how long it takes; write nothing.")
@click.option("--no-sample", is_flag=True, help="With --dry-run: read no photo, so no time is estimated.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="What Reducer logs to stderr, and Dask for a LocalCluster that the run starts.",
)
@exit_codes
def run(
    labels: str | None,
    address: str | None,
    cluster: ClusterSpec | None,
    workers: int | None,
    threads: int | None,
    dry_run: bool,
    no_sample: bool,
    quiet: bool,
    log_level: str,
    **options: Any,
) -> None:
    """Rank the photos of every label and keep the first K.

    IMAGES is the folder of the photos, or a URL such as s3://bucket/photos. RUN gets reduced.csv (drops in for the
    manifest), reduced.parquet, the ledger images/ and summary.json.

    Exit codes: 0 done; 2 something is wrong with the input; 3 too many photos failed; 130 Ctrl-C; 143 SIGTERM; 1
    anything else.
    """
    _log_to_stderr("error" if quiet and log_level == "warning" else log_level)
    if _source("cluster") is ParameterSource.DEFAULT_MAP and (address, workers, threads) != (None, None, None):
        cluster = None  # scripts/run_cluster.py names a file for those who say nothing else
    if address is not None and cluster is not None:
        raise click.UsageError("--address and --cluster exclude each other: give one")
    if cluster is not None and (workers is not None or threads is not None):
        raise click.UsageError("--cluster says where to run: leave --workers and --threads out")
    if no_sample and not dry_run:
        raise click.UsageError("--no-sample goes with --dry-run")
    from reducer.places import parse_options

    # Two that exclude each other: the one of the command line wins over the one of the cluster file.
    for name, other in (("path_column", "path_template"), ("path_template", "path_column")):
        if _source(name) is ParameterSource.COMMANDLINE and _source(other) is ParameterSource.DEFAULT_MAP:
            options[other] = None
    for name in STORAGE_OPTIONS:
        options[name] = parse_options("--" + name.removesuffix("s").replace("_", "-"), options[name])
    job = Job(
        **options,
        labels=None if labels is None else _parse_labels(labels),
    )
    if cluster is not None:
        spec = cluster
    else:
        spec = ClusterSpec(workers=workers, threads=threads, address=address)
    if dry_run:
        _print_forecast(job, spec, 0 if no_sample else SAMPLE_PHOTOS)
        return
    # Dask and Arrow are imported from here on.
    from reducer.job import reduce_images

    try:
        reduce_images(job, spec, progress=not quiet)
    except TooManyFailuresError:
        _print_result(job, quiet)
        raise
    _print_result(job, quiet)


@main.command(epilog="Example: reducer sample photos --labels 20 --images 300")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--labels", default=60, show_default=True, help="Landmarks to draw.")
@click.option("--images", default=2000, show_default=True, help="Photos in all.")
@click.option("--seed", default=0, show_default=True, help="Another seed draws another collection.")
@exit_codes
def sample(directory: str, labels: int, images: int, seed: int) -> None:
    """Draw a collection in Google Landmarks v2's layout, to try things on.

    DIR gets train/a/b/c/ID.jpg, train.csv (id, landmark_id) and truth.csv (id, view, change: which photos are
    copies of one view, and how each copy was made).
    """
    from reducer.sample import write_sample

    total = write_sample(directory, labels=labels, images=images, seed=seed)
    click.echo(f"{images} photos of {labels} landmarks, {_size(total)}, are in {directory}/train")
    click.echo(f"Next: reducer run {directory}/train --manifest {directory}/train.csv --output run")


def _source(name: str) -> ParameterSource | None:
    """Where the value of an option comes from."""
    return click.get_current_context().get_parameter_source(name)


def _log_to_stderr(level: str) -> None:
    logger = logging.getLogger("reducer")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)


def _parse_labels(text: str) -> tuple[str, ...]:
    from reducer.plan import parse_labels

    return parse_labels(text)


def _print_forecast(job: Job, spec: ClusterSpec, sample: int) -> None:
    from reducer.dryrun import forecast

    found = forecast(job, spec, sample=sample)
    if found.bytes_to_read is None:
        size = "of unknown size"
    else:
        size = f"{'about ' if found.bytes_estimated else ''}{_size(found.bytes_to_read)}"
    click.echo(f"labels:         {found.labels:,}, of which {found.labels_to_rank:,} are ranked")
    click.echo(f"photos:         {found.photos:,}, of which {found.photos_kept_unread:,} are kept unread")
    click.echo(f"photos to read: {found.photos_to_read:,}, {size}")
    more = " or more: the cluster's worker threads decide" if found.threads is None else ""
    click.echo(f"partitions:     {found.partitions:,}{more}")
    click.echo(f"largest label:  {found.largest_label} with {found.largest_label_photos:,} photos")
    if found.sample_failed:
        click.echo(f"sample:         {found.sample_failed} of {found.sampled} photos failed: {found.sample_failure}")
    if found.sampled and found.sample_failed == found.sampled:
        raise TooManyFailuresError(
            f"all {found.sampled} photos of the sample have failed: check IMAGES, --path-template or --path-column"
        )
    if found.thread_seconds is not None:
        if found.threads is None:
            where = "on one worker thread; divide by those of the cluster"
        else:
            where = f"on {found.threads} worker thread{'s' if found.threads > 1 else ''}"
        click.echo(f"time:           about {_duration(found.thread_seconds / (found.threads or 1))} {where}")
    click.echo("Nothing was written.")


def _print_result(job: Job, quiet: bool) -> None:
    from reducer.store import RunFolder

    output, formats = job.output, job.format
    summary = RunFolder(job.output_place).read_summary()
    if quiet or summary["status"] != "done":
        return
    quality, timings = summary["quality"], summary["timings"]
    lists = {"csv": "reduced.csv", "parquet": "reduced.parquet", "both": "reduced.csv and reduced.parquet"}[formats]
    click.echo(
        f"Kept {summary['photos_kept']:,} of {summary['photos']:,} photos, {summary['labels']:,} labels "
        f"({summary['labels_ranked']:,} ranked, the others are kept whole)"
    )
    unknown = summary["photos_left_out_of_unknown_size"]
    click.echo(
        f"Left out: {_size(summary['bytes_left_out'])}"
        + (f" and {unknown:,} photos that were not read" if unknown else "")
    )
    _print_quality(quality)
    if summary["photos_read"]:
        click.echo(
            f"Read {summary['photos_read']:,} photos, {_size(summary['bytes_read'])}, in "
            f"{_duration(timings['hash_seconds'])} ({summary['photos_per_second']:,} photos/s); starting the cluster "
            f"took {_duration(timings['cluster_start_seconds'])}"
        )
    left_out = {"flat": "without detail", "avoided": "near a photo to avoid"}
    for reason, what in left_out.items():
        if summary["reasons"].get(reason):
            click.echo(f"Not kept, {what}: {summary['reasons'][reason]:,} photos (reason {reason!r})")
    if summary["failures"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary["failures"].items())
        click.echo(f"Failed: {kinds} (the column error of {output}/images says more)")
    manifest = summary["manifest"]
    if manifest["duplicate_rows"]:
        click.echo(f"Duplicate rows of the manifest left out: {manifest['duplicate_rows']:,}")
    if manifest["ids_under_several_labels"]:
        shown = ", ".join(manifest["ids_under_several_labels_examples"])
        click.echo(
            f"Ids under more than one label (kept under each): {manifest['ids_under_several_labels']:,}: {shown}"
        )
    for why, count in manifest["skipped_files"].items():
        click.echo(f"Skipped in IMAGES: {count:,} x {why}")
    for what, name in (
        ("To be kept always, but failed", "always_keep_failed"),
        ("Labels left with no photo", "labels_without_photos"),
        ("Labels with fewer than --keep photos though some were not drawn (raise --candidates)", "labels_short"),
    ):
        if names := summary[name]:
            click.echo(f"{what}: {len(names):,}: {', '.join(names[:5])}{' ...' if names[5:] else ''}")
    click.echo(f"Results: {output}{os.sep} ({lists}, images{os.sep}, summary.json)")


def _print_quality(quality: dict[str, Any]) -> None:
    selection, random = quality["selection"], quality["random"]
    if not selection["pairs"]:
        return
    lines = [
        ("smallest pair distance, mean over labels", "mean_smallest_pair_distance"),
        ("mean pair distance", "mean_pair_distance"),
        (f"near-copy pairs (at most {quality['near_copy_bits']} bits)", "near_copy_pairs"),
        ("mean distance to the nearest kept photo", "mean_nearest_kept_distance"),
        ("the largest such distance, mean over labels", "mean_coverage_radius"),
        ("the largest such distance of all", "worst_coverage_radius"),
    ]
    title = f"Distances in bits, of {quality['bits']}"
    click.echo(f"{title:<48}{'kept':>10}{'random':>10}")
    for what, name in lines:
        digits = ",.1f" if name.startswith("mean") else ",d"
        click.echo(f"  {what:<46}{selection[name]:>10{digits}}{random[name]:>10{digits}}")
    found = quality["certificate"]
    if found:
        click.echo(
            f"Certificate: the smallest pair distance is at least {_percent(found['mean'])} of what any choice of the "
            f"photos read could reach (mean over {found['labels']:,} labels; the worst {_percent(found['worst'])})"
        )


def _percent(share: float) -> str:
    """Rounded down: what is "at least" so much must be so."""
    return f"{round(1000 * share) // 10} %"


def _size(count: int) -> str:
    """A number of bytes as people write it (20 GB = 20 x 10^9 bytes)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
