"""The commands: flags to configuration to one call. Imports nothing heavy before a command runs."""

from __future__ import annotations

import os
from typing import Any

import click
from click.core import ParameterSource

from reducer._version import __version__
from reducer.cli.options import (
    candidates_number,
    cluster_options,
    cut_options,
    embed_options,
    exit_codes,
    log_to_stderr,
    logging_options,
    manifest_storage_options,
    on_which_cluster,
    parsed_storage,
    photo_storage_options,
    run_storage_options,
    source_of,
    spec_of,
)
from reducer.cli.output import (
    print_cut,
    print_embedded,
    print_export,
    print_forecast,
    print_result,
    print_status,
    print_story,
)
from reducer.config.cluster import ClusterSpec
from reducer.config.cut_rules import DEFAULT_KEEP
from reducer.config.job import GLDV2_TEMPLATE, Job
from reducer.config.settings import (
    DECODE_NAMES,
    FORMATS,
    GALLERY_PHOTOS,
    HASH_NAMES,
    LAYOUT_NAMES,
    READER_NAMES,
    SAMPLE_PHOTOS,
    SHARD_BYTES,
    STRATEGY_NAMES,
)
from reducer.errors import TooManyFailuresError
from reducer.formatting import format_bytes

#: Options of a job that exclude each other: an option of the command line wins over one of the cluster file.
EXCLUSIVE = (("path_column", "path_template"), ("total", "max_bytes"))


@click.group(
    name="reducer",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: reducer sample photos && reducer run photos/train --manifest photos/train.csv --output run",
)
@click.version_option(__version__, prog_name="reducer")
def main() -> None:
    """Reduce a labelled photo collection to the K most different photos of every label."""
    # A notebook sets its own backend for all processes that it starts. Where that is not installed matplotlib could not
    # be imported, and files are written without one.
    os.environ.pop("MPLBACKEND", None)


@main.command(
    epilog="Example: reducer run photos/train --manifest photos/train.csv --keep 25 --output run",
)
@click.argument("images")
@click.option("--output", required=True, metavar="RUN", help="Run folder to write, a local path or a URL.")
@click.option(
    "--manifest",
    metavar="FILE",
    help="CSV, JSON lines, Parquet or Feather file with one row per photo, or GLDv2's train_clean.csv. Without one, "
    "every photo below IMAGES is taken: its folder is its label, its relative path its id. In tar shards, every sample "
    "of WebDataset's.",
)
@cluster_options
@click.option("--id-column", default="id", show_default=True, help="The manifest's column of photo ids.")
@click.option("--label-column", default="landmark_id", show_default=True, help="The manifest's column of labels.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave out files and folders below IMAGES, by a pattern as in .gitignore; repeatable. For IMAGES without a "
    "manifest.",
)
@click.option("--path-column", metavar="COL", help="The manifest's column of paths, relative to IMAGES or absolute.")
@click.option(
    "--path-template",
    metavar="TEXT",
    help="Where a photo lies below IMAGES, when there is no --path-column; {id}, {label} and single characters "
    f"such as {{id[0]}}.  [default: {GLDV2_TEMPLATE}; in tar shards, wherever a file is called ID]",
)
@click.option(
    "--keep",
    type=int,
    metavar="K",
    help=f"Photos kept per label.  [default: {DEFAULT_KEEP}, or no limit with --total or --max-bytes]",
)
@cut_options
@click.option(
    "--candidates",
    callback=candidates_number,
    metavar="N|all",
    default="1000",
    show_default=True,
    help="Photos read per label at most, drawn at random.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGY_NAMES),
    help="How to rank.  [default: farthest-first; facility-location with --vectors or --embed]",
)
@click.option(
    "--vectors",
    metavar="FILE",
    help="Rank by these vectors: a Parquet file with the --id-column and a list of numbers (or one column per "
    "dimension), or a folder of such. No photo is read, unless --near-copy, --avoid, --drop-flat, --cross-label or "
    "--max-bytes is given. A URL is opened with --storage-option.",
)
@click.option(
    "--embed",
    metavar="MODEL",
    help="Rank by the vectors that this ONNX model makes of the photos (pip install 'reducer[embed]').",
)
@embed_options
@click.option(
    "--near-copy",
    type=int,
    metavar="BITS",
    help="With hashes and vectors: photos at most this many bits from one with a smaller rank come behind all others."
    "  [default: 6 of 64, in proportion, with --embed; none with --vectors]",
)
@click.option(
    "--hash",
    type=click.Choice(HASH_NAMES),
    default="dhash",
    show_default=True,
    help="The perceptual hash (imagehash's) that photos are compared by.",
)
@click.option(
    "--hash-size", default=8, show_default=True, help="2 to 32; a hash has its square in bits (whash: powers of two)."
)
@click.option("--exif-orientation", is_flag=True, help="Turn photos upright, as EXIF says, before they are hashed.")
@click.option("--drop-flat", is_flag=True, help="Do not keep photos without detail. Reads all labels.")
@click.option(
    "--always-keep",
    metavar="FILE",
    help="Ids that are ranked before all others and kept whatever --avoid and --drop-flat say, at most --keep per "
    "label: one per line, or a CSV or Parquet file with the --id-column.",
)
@click.option(
    "--avoid",
    metavar="FILE",
    help="Do not keep photos near one of these, a test set say: another run's folder, a CSV or Parquet file with a "
    "column 'hash', or one hash per line (which must be of --hash's kind: a list does not tell). Reads all labels.",
)
@click.option(
    "--avoid-distance",
    type=int,
    metavar="BITS",
    help="With --avoid: photos at most this far apart, in bits, are near.  [default: 6 of 64, in proportion]",
)
@click.option(
    "--decode",
    type=click.Choice(DECODE_NAMES),
    default="fast",
    show_default=True,
    help="exact: bit for bit imagehash on the full decode. fast: JPEGs at reduced size, dHash 0.15 bit off on average. "
    "fastest: of large progressive JPEGs the first scan only (of objects on S3 only the beginnings are read), 0.5 bit "
    "off; damage behind it is not noticed.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
@click.option("--labels", metavar="A,B,C", help="Trial run: only these labels.")
@click.option("--limit-labels", type=int, metavar="N", help="Trial run: only N labels, drawn at random.")
@click.option("--rank-all", is_flag=True, help="Read and rank labels with no more than --keep photos too.")
@click.option(
    "--reuse",
    metavar="OLD_RUN",
    help="Take the hashes of photos that have not changed (id, path, size, and mtime or etag) from an earlier run's "
    "folder, and read only the rest. A URL is opened with --output-storage-option.",
)
@click.option(
    "--cross-label",
    is_flag=True,
    help="Also write cross_label.parquet: near copies under different labels, most of them label errors.",
)
@click.option(
    "--md5",
    metavar="FILE|DIR",
    help="Check tar shards against these MD5 sums (as md5sum writes them): photos of one with another sum fail. A URL "
    "is opened with --storage-option.",
)
@click.option("--md5-warn", is_flag=True, help="With --md5: take photos of such shards, with a warning.")
@click.option(
    "--label-field",
    metavar="NAME",
    help="WebDataset shards without a manifest: which field of KEY.json is the label.  [default: what KEY.cls holds]",
)
@click.option("--partition-images", type=int, metavar="N", help="Photos per partition.  [default: 500 to 2000]")
@click.option("--max-pixels", default=200_000_000, show_default=True, help="Photos that declare more pixels fail.")
@click.option(
    "--check/--no-check",
    default=True,
    help="Look whether photos that are kept unread are there: a request each, or listings, where IMAGES is a URL.",
)
@click.option(
    "--max-failures",
    default=0.1,
    show_default=True,
    help="Exit 3 when more than this share of the photos read or looked for have failed.",
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="both",
    show_default=True,
    help="Reduced lists to write.",
)
@click.option(
    "--extra-columns/--no-extra-columns",
    default=True,
    help="Let the other columns of the manifest travel along into the reduced lists.",
)
@click.option(
    "--report/--no-report", default=True, help="Draw report.html at the end, or leave that to `reducer report RUN`."
)
@photo_storage_options
@manifest_storage_options
@run_storage_options
@click.option(
    "--reader",
    type=click.Choice(READER_NAMES),
    default="s3fs",
    show_default=True,
    help="What reads photos of s3:// URLs; obstore is faster and an extra: pip install 'reducer[obstore]'.",
)
@click.option(
    "--read-ahead",
    default=32,
    show_default=True,
    help="Photos of a URL under way at a time, for each worker thread; of tar shards a quarter as many blocks (4 MiB).",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in RUN.")
@click.option("--break-lock", is_flag=True, help="Take RUN from a run that seems to be at work on it.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and about how long it takes; write nothing.")
@click.option("--no-sample", is_flag=True, help="With --dry-run: read no photo, so no time is estimated.")
@logging_options
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

    IMAGES is the folder of the photos, or a URL such as s3://bucket/photos; or tar shards: a folder of nothing else, or
    a glob such as 's3://google-landmark/train/images_*.tar'. RUN gets reduced.csv (drops in for the
    manifest), reduced.parquet, the ledger images/, summary.json and report.html. Given again, the command goes on where
    it was stopped, or shows the results that are there.

    Exit codes: 0 done; 2 something is wrong with the input; 3 too many photos failed; 129 SIGHUP; 130 Ctrl-C;
    143 SIGTERM; 1 anything else.
    """
    log_to_stderr(log_level, quiet)
    spec = spec_of(cluster, address, workers, threads)
    if no_sample and not dry_run:
        raise click.UsageError("--no-sample goes with --dry-run")
    for pair in EXCLUSIVE:
        for name, other in (pair, pair[::-1]):
            if source_of(name) is ParameterSource.COMMANDLINE and source_of(other) is ParameterSource.DEFAULT_MAP:
                options[other] = None
    options |= parsed_storage(options)
    job = Job(
        **options,
        labels=None if labels is None else _parse_labels(labels),
    )
    if dry_run:
        from reducer.api.forecast import forecast

        sample = 0 if no_sample else SAMPLE_PHOTOS
        print_forecast(forecast(job, spec, sample=sample), job, sample)
        return
    # Dask and Arrow are imported from here on.
    from reducer.api.reduce import reduce_images

    try:
        reduce_images(job, spec, progress=not quiet)
    except TooManyFailuresError:
        print_result(job.output_location, quiet)
        raise
    print_result(job.output_location, quiet)


@main.command(epilog="Example: reducer embed photos/train --embed model.onnx --output vectors.parquet")
@click.argument("images")
@click.option("--output", required=True, metavar="FILE", help="Parquet file to write, a local path or a URL.")
@click.option("--embed", required=True, metavar="MODEL", help="The ONNX model (pip install 'reducer[embed]').")
@embed_options
@click.option("--manifest", metavar="FILE", help="As for `reducer run`; without one, every photo below IMAGES.")
@cluster_options
@click.option("--id-column", default="id", show_default=True, help="The manifest's column of photo ids.")
@click.option("--label-column", default="landmark_id", show_default=True, help="The manifest's column of labels.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="As for `reducer run`; repeatable.")
@click.option("--path-column", metavar="COL", help="As for `reducer run`.")
@click.option("--path-template", metavar="TEXT", help="As for `reducer run`.")
@click.option("--exif-orientation", is_flag=True, help="Turn photos upright, as EXIF says.")
@click.option(
    "--decode",
    type=click.Choice(DECODE_NAMES),
    default="fast",
    show_default=True,
    help="exact: JPEGs at full size. Others: at reduced size, no smaller than --embed-size.",
)
@click.option("--labels", metavar="A,B,C", help="Only these labels.")
@click.option("--limit-labels", type=int, metavar="N", help="Only N labels, drawn at random.")
@click.option("--label-field", metavar="NAME", help="As for `reducer run`.")
@click.option("--partition-images", type=int, metavar="N", help="Photos per task.  [default: 500 to 2000]")
@click.option("--max-pixels", default=200_000_000, show_default=True, help="Photos that declare more pixels fail.")
@click.option(
    "--max-failures", default=0.1, show_default=True, help="Exit 3 when more than this share of the photos have failed."
)
@photo_storage_options
@manifest_storage_options
@run_storage_options
@click.option(
    "--reader", type=click.Choice(READER_NAMES), default="s3fs", show_default=True, help="As for `reducer run`."
)
@click.option("--read-ahead", default=32, show_default=True, help="As for `reducer run`.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
@click.option("--break-lock", is_flag=True, help="Take FILE.parts from a command that seems to be at work on it.")
@logging_options
@exit_codes
def embed(
    labels: str | None,
    address: str | None,
    cluster: ClusterSpec | None,
    workers: int | None,
    threads: int | None,
    quiet: bool,
    log_level: str,
    **options: Any,
) -> None:
    """Make vectors of all photos by an ONNX model, and choose none.

    IMAGES is as for `reducer run`. FILE gets one row per photo: its id, its label, why it has no vector if it has none,
    and its unit vector (float16). `reducer run --vectors FILE` ranks by it. What is made so far lies in FILE.parts, so
    a command that was stopped goes on when it is given again. Exit codes are those of `reducer run`.
    """
    log_to_stderr(log_level, quiet)
    spec = spec_of(cluster, address, workers, threads)
    options |= parsed_storage(options)
    job = Job(**options, labels=None if labels is None else _parse_labels(labels))
    from reducer.api.embed import embed as embed_photos

    result = embed_photos(job, spec, progress=not quiet)
    if not quiet:
        print_embedded(result)


@main.command(epilog="Example: reducer resume run --retry-failed")
@click.argument("run", metavar="RUN")
@click.option("--rank-all", is_flag=True, help="Also read and rank the labels that were kept whole.")
@click.option(
    "--retry-failed", is_flag=True, help="Also read the photos that have failed again, and rank their labels anew."
)
@cluster_options
@photo_storage_options
@manifest_storage_options
@run_storage_options
@click.option("--reader", type=click.Choice(READER_NAMES), help="As for `reducer run`.  [default: that of the run]")
@click.option("--read-ahead", type=int, help="As for `reducer run`.  [default: that of the run]")
@click.option("--check/--no-check", default=None, help="As for `reducer run`.  [default: that of the run]")
@click.option("--max-failures", type=float, help="As for `reducer run`.  [default: that of the run]")
@click.option("--report/--no-report", default=None, help="As for `reducer run`.  [default: that of the run]")
@click.option("--break-lock", is_flag=True, help="Take RUN from a run that seems to be at work on it.")
@logging_options
@exit_codes
def resume(
    run: str,
    address: str | None,
    cluster: ClusterSpec | None,
    workers: int | None,
    threads: int | None,
    quiet: bool,
    log_level: str,
    **options: Any,
) -> None:
    """Go on with a run that was stopped or killed, or do more of it.

    RUN is a run folder, a local path or a URL. What the job is and how far it came stand there; only what is left is
    read, and the results are those of an undisturbed run, wherever this one goes on. Storage options are not kept:
    give them again. Exit codes are those of `reducer run`.
    """
    log_to_stderr(log_level, quiet)
    spec = spec_of(cluster, address, workers, threads)
    options |= parsed_storage(options)
    # Dask and Arrow are imported from here on.
    from reducer.api.resume import resume as resume_run
    from reducer.run.folder import RunFolder
    from reducer.storage.location import Location

    location = Location(run, options["output_storage_options"])
    before = RunFolder(location).summary()
    try:
        result = resume_run(run, spec, **options, progress=not quiet)
    except TooManyFailuresError:
        print_result(location, quiet)
        raise
    if all(result.summary[name] == before[name] for name in ("run", "resumed")) and not quiet:
        click.echo("Nothing was left to do.")
    print_result(location, quiet)


@main.command(epilog="Example: reducer cut run --output ten.csv --keep 10 --min-distance 8")
@click.argument("run", metavar="RUN")
@click.option("--output", required=True, metavar="FILE", help="The list to write: .csv, or .parquet with more columns.")
@click.option("--keep", type=int, metavar="K", help="Photos kept per label.  [default: no limit]")
@cut_options
@run_storage_options
@click.option("--quiet", is_flag=True, help="Print errors only.")
@exit_codes
def cut(run: str, output: str, quiet: bool, **options: Any) -> None:
    """Write a new reduced list from a finished run; no photo is read.

    Of each label --min-distance leaves out photos first, then --keep, then a budget over all labels (--total or
    --max-bytes). RUN itself stays as it is. Photos of labels that were kept whole have no rank: where that matters,
    `reducer resume RUN --rank-all` reads them.
    """
    log_to_stderr("warning", quiet)
    storage = parsed_storage(options)["output_storage_options"]
    del options["output_storage_options"]
    from reducer.api.cut import cut as cut_run

    result = cut_run(run, output, **options, storage_options=storage)
    if not quiet:
        print_cut(result, output)


@main.command(epilog="Example: reducer report run --labels 6044,18")
@click.argument("run", metavar="RUN")
@click.option("--labels", metavar="A,B,C", help="Show the photos of these labels too.")
@click.option(
    "--gallery-photos",
    default=GALLERY_PHOTOS,
    show_default=True,
    metavar="N",
    help="Most pictures of photos; no more photos are read. 0 reads none.",
)
@click.option("--workers", type=int, help="Worker processes that read photos.  [default: in this process]")
@click.option("--threads", type=int, help="Threads per worker.  [default: 1]")
@on_which_cluster
@photo_storage_options
@run_storage_options
@logging_options
@exit_codes
def report(
    run: str,
    labels: str | None,
    gallery_photos: int,
    address: str | None,
    cluster: ClusterSpec | None,
    workers: int | None,
    threads: int | None,
    quiet: bool,
    log_level: str,
    **options: Any,
) -> None:
    """Draw the report of a finished run anew: RUN/report.html, one file to look at.

    It shows what the run came to, images per label before and after, how different the kept photos are, photos of some
    labels, and failures. `reducer run` draws it at its end, unless --no-report.
    """
    log_to_stderr(log_level, quiet)
    if workers is None and threads is not None:
        raise click.UsageError("--threads goes with --workers")
    spec = spec_of(cluster, address, workers, threads)
    storage = parsed_storage(options)
    from reducer.outputs.report.page import write_report

    path = write_report(
        run,
        labels=() if labels is None else _parse_labels(labels),
        gallery_photos=gallery_photos,
        cluster=None if spec == ClusterSpec() else spec,
        storage_options=storage["storage_options"],
        output_storage_options=storage["output_storage_options"],
        progress=not quiet,
    )
    if not quiet:
        click.echo(f"Report: {path}")


@main.command(epilog="Example: reducer export run photos-512 --layout by-label --resize 512")
@click.argument("run", metavar="RUN")
@click.argument("target", metavar="TARGET")
@click.option(
    "--list", "list_file", metavar="FILE", help="Photos of this list, as `reducer cut` writes it, and no others."
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUT_NAMES),
    default="same",
    show_default=True,
    help="same: as below IMAGES, with train.csv beside them. by-label: a folder per label, as torchvision's "
    "ImageFolder reads them. tar: WebDataset's shards.",
)
@click.option("--link/--copy", default=False, help="Make hard links, which take no room, or copies.  [default: copy]")
@click.option(
    "--resize",
    type=int,
    metavar="N",
    help="Re-encode photos whose longest side has more than N pixels, so that it has N. Others stay as they are.",
)
@click.option(
    "--shard-bytes",
    default=SHARD_BYTES,
    show_default=True,
    metavar="SIZE",
    help="With --layout tar: bytes of a shard at most, by the photos as they are before --resize.",
)
@click.option("--overwrite", is_flag=True, help="Take out what another export has left in TARGET.")
@click.option("--break-lock", is_flag=True, help="Take TARGET from an export that seems to be at work on it.")
@cluster_options
@photo_storage_options
@run_storage_options
@click.option(
    "--target-storage-option",
    "target_storage_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="How the URL of TARGET is opened, as --storage-option for IMAGES.",
)
@logging_options
@exit_codes
def export(
    run: str,
    target: str,
    address: str | None,
    cluster: ClusterSpec | None,
    workers: int | None,
    threads: int | None,
    quiet: bool,
    log_level: str,
    target_storage_options: tuple[str, ...],
    **options: Any,
) -> None:
    """Write the kept photos of a finished run to a folder.

    RUN is a run folder. TARGET is a folder, or a URL such as s3://bucket/photos: empty, or what an earlier export of
    the same kind has left there. What is there and equal is not written again, so an export that was stopped or
    killed goes on when the same command is given again; on S3, one that was killed at once needs --break-lock.

    Photos of a URL go to a URL on a Dask cluster, by default one of this machine; all else this process does.

    Exit codes: 0 done; 2 something is wrong with the input, or there is no room; 3 some photos are not there
    (TARGET/failures.csv lists them); 129 SIGHUP; 130 Ctrl-C; 143 SIGTERM; 1 anything else.
    """
    log_to_stderr(log_level, quiet)
    if options["layout"] != "tar" and source_of("shard_bytes") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--shard-bytes goes with --layout tar")
    spec = spec_of(cluster, address, workers, threads)
    options |= parsed_storage(options)
    from reducer.outputs.export.export import export as export_run
    from reducer.storage.remote import parse_options

    result = export_run(
        run,
        target,
        **options,
        cluster=spec,
        target_storage_options=parse_options("--target-storage-option", target_storage_options),
        progress=not quiet,
    )
    if not quiet:
        print_export(result)
    if len(result.failures):
        raise TooManyFailuresError(
            f"{len(result.failures):,} photos are not in {result.target}: failures.csv there lists them. The same "
            "command tries them again"
        )


@main.command(epilog="Example: reducer explain run 6e158a47eb2ca3f6")
@click.argument("run", metavar="RUN")
@click.argument("photo", metavar="ID")
@run_storage_options
@exit_codes
def explain(run: str, photo: str, **options: Any) -> None:
    """Tell one photo's story: its rank, whether it is kept or why not, and which kept photo is nearest to it.

    RUN is a run folder, ID what the manifest calls the photo.
    """
    from reducer.api.explain import explain as stories_of

    for story in stories_of(run, photo, storage_options=parsed_storage(options)["output_storage_options"]):
        print_story(story)


@main.command(epilog="Example: reducer status run")
@click.argument("run", metavar="RUN")
@run_storage_options
@exit_codes
def status(run: str, **options: Any) -> None:
    """Tell how far a run is: what is done, what is left, which photos failed, how fast it goes.

    RUN is a run folder; the run may be at work on it, on whatever computer.
    """
    from reducer.api.status import status as status_of

    print_status(status_of(run, storage_options=parsed_storage(options)["output_storage_options"]))


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
    from reducer.api.sample import write_sample

    total = write_sample(directory, labels=labels, images=images, seed=seed)
    click.echo(f"{images} photos of {labels} landmarks, {format_bytes(total)}, are in {directory}/train")
    click.echo(f"Next: reducer run {directory}/train --manifest {directory}/train.csv --output run")


def _parse_labels(text: str) -> tuple[str, ...]:
    from reducer.formatting import parse_labels

    return parse_labels(text)
