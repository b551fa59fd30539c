"""``report.html``: what a run came to, to look at, in one file that needs no network."""

from __future__ import annotations

import base64
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from tqdm.auto import tqdm

from reducer.config.checks import flag
from reducer.config.cluster import ClusterSpec
from reducer.config.resolved import ResolvedJob, resolve
from reducer.config.settings import GALLERY_PHOTOS, STORAGE_OPTIONS, default_strategy, unit_of
from reducer.errors import InputError
from reducer.formatting import SHOWN_CHARACTERS, clip, format_bytes, format_duration, format_labels
from reducer.outputs.report.figures import LARGEST, as_svg, counts_plot, insertion_plot, pairs_plot
from reducer.outputs.report.galleries import (
    LABEL_COLUMNS,
    MOST_CROSS_LABEL,
    Gallery,
    Pair,
    Photo,
    cross_label_shown,
    gallery,
    labels_to_show,
)
from reducer.outputs.report.statistics import (
    InsertionCurve,
    LabelCounts,
    PairDistances,
    insertion_curve,
    label_counts,
    labels_to_compare,
    pair_distances,
)
from reducer.outputs.report.thumbnails import NO_WORKER, PictureRequest, draw, draw_on
from reducer.outputs.report.wording import certificate_line, quality_rows, quality_title, remarks
from reducer.photos.resize import Thumbnail
from reducer.run.folder import RunFolder
from reducer.run.summary import check_storage_options, job_of
from reducer.storage.location import Location, PhotoRef, file_of
from reducer.storage.schemas import FAILED
from reducer.storage.tables import in_nanoseconds

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client

#: Pictures in a report at most, whatever is asked for.
MOST_GALLERY_PHOTOS = 2000
#: Labels that may be asked for.
MOST_LABELS = 100
#: A report stays under 15 MB: its pictures take at most so many bytes in all, before base64 makes four of three, and
#: one of them at most so many.
PICTURES_BYTES, PICTURE_BYTES = 7_500_000, 40_000
#: Failures shown of each kind, and names of labels in a list.
EXAMPLES, NAMED = 5, 20
#: Numbers of photos that the table to read K from has rows for, and at most so many of them.
KS = (1, 2, 3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000)
#: The curve shows so many times as many photos as are kept a label, and at least so many.
TIMES_KEPT, LEAST_RANKS = 4, 60

Pictures = Mapping[tuple[PhotoRef, int], Thumbnail | str]


def write_report(
    run: Path | str,
    *,
    labels: Sequence[str] = (),
    gallery_photos: int = GALLERY_PHOTOS,
    cluster: ClusterSpec | None = None,
    storage_options: Mapping[str, Any] | None = None,
    output_storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> str:
    """Draw the report of a run anew.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL. The run must be finished.
    labels : sequence of str
        Labels that are shown before those that the report chooses, at most `MOST_LABELS`.
    gallery_photos : int
        Pictures of photos at most, 0 to `MOST_GALLERY_PHOTOS`; only so many photos are read.
    cluster : ClusterSpec, optional
        Where photos are read; default in this process.
    storage_options, output_storage_options : mapping, optional
        As for `ResolvedJob`: a run folder does not keep them.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    str
        Path or URL of ``report.html``.

    Raises
    ------
    InputError
        If it is no finished run, has no such label, or its photos cannot be opened without storage options.

    Examples
    --------
    >>> from reducer import write_report
    >>> write_report("run", labels=["6044"])  # doctest: +SKIP
    """
    if not isinstance(gallery_photos, int) or not 0 <= gallery_photos <= MOST_GALLERY_PHOTOS:
        raise InputError(
            f"--gallery-photos is {gallery_photos!r}: expected a whole number from 0 to {MOST_GALLERY_PHOTOS}"
        )
    if isinstance(labels, str):
        raise InputError("labels: give a list of labels, not one text")
    asked = list(dict.fromkeys(map(str, labels)))
    if len(asked) > MOST_LABELS:
        raise InputError(f"--labels names {len(asked)} labels: a report shows at most {MOST_LABELS}")
    folder = RunFolder(Location(str(run), output_storage_options or {}))
    summary = folder.finished()
    job = resolve(job_of(summary, {"output": str(run), "storage_options": storage_options or {}}))
    if gallery_photos:
        check_storage_options(summary, job)
    with ExitStack() as open_cluster:
        client = None
        if gallery_photos and cluster is not None and not cluster.serial:
            from reducer.run.dask.connect import connect, refuse_import_of_main

            refuse_import_of_main()
            client = open_cluster.enter_context(connect(cluster))
        draw_report(folder, job, asked, gallery_photos, client=client, progress=progress)
    return folder.report


def draw_report(
    folder: RunFolder,
    job: ResolvedJob,
    asked: Sequence[str] = (),
    gallery_photos: int = GALLERY_PHOTOS,
    *,
    client: Client | None = None,
    avoid: Collection[str] = (),
    progress: bool = False,
) -> None:
    """Write ``report.html`` into the folder of a finished run.

    Parameters
    ----------
    folder : RunFolder
        The folder.
    job : ResolvedJob
        Its job, with the storage options that open its photos.
    asked, gallery_photos, progress
        As ``labels``, ``gallery_photos`` and ``progress`` of `write_report`.
    client : distributed.Client, optional
        Of the cluster on which photos are read; None for this process.
    avoid : collection of str
        Addresses of workers that read none.
    """
    summary = folder.finished()
    bits, unit = summary["quality"]["bits"], summary["quality"]["unit"]
    near = summary["quality"]["near_copy_bits"] if unit == "bits" else -1
    ledger = folder.whole_ledger(summary, ["id", "hash", "insertion_distance", "kept", "bytes", *LABEL_COLUMNS])
    chosen = labels_to_show(ledger, near, asked)
    counts, curve = label_counts(ledger), insertion_curve(ledger)
    context = {
        "run": folder.path,
        "name": Path(folder.path.rstrip("/")).name or folder.path,
        "summary": summary,
        "command": command_of(summary["job"]),
        "bytes": _bytes(ledger),
        "missing_labels": counts.empty,
        "certificate": certificate_line(summary["quality"]),
        "remarks": remarks(summary, folder.path),
        "figures": _figures(folder, counts, curve, ledger, job, bits, near),
        "reading": _reading(curve, counts, job.keep, near),
        "near": near,
        "unit": unit,
        "compared_by": f"{job.hash}, {bits} bits" if unit == "bits" else "vectors, cosine",
        "apart": lambda distance: _of(distance, "bit") if unit == "bits" else f"{distance:.4f}",
        "figure": lambda distance: _number(distance) if unit == "bits" else f"{distance:.4f}",
        "largest": LARGEST,
        "failures": _failures(folder, summary["failures"]) if summary["failures"] else [],
    }
    del ledger
    like = _cross_label(folder, min(MOST_CROSS_LABEL, gallery_photos // 20)) if gallery_photos else []
    each = (gallery_photos - 2 * len(like)) // max(1, len(chosen))
    galleries = []
    if gallery_photos:
        rows = with_vectors(
            folder, in_nanoseconds(folder.parts.ledger(where=pc.field("label").isin(list(chosen)))), job
        )
        found = [gallery(rows.filter(pc.equal(rows["label"], label)), why, each, bits) for label, why in chosen.items()]
        galleries = [one for one in found if one.shown or one.pairs or one.failed]
    pictures = _pictures(_drawn(galleries, like), job, client, avoid, progress)
    page = as_html(
        "report.html",
        **context,
        galleries=galleries,
        like=like,
        named=NAMED,
        picture=lambda photo: _picture(photo, pictures),
    )
    folder.check_unchanged(summary)
    folder.lists.write_report(page.encode("utf-8", "replace"))


def command_of(job: Mapping[str, Any]) -> list[str]:
    """The command that a run was begun with, in parts, as far as its summary tells: storage options are left out."""
    parts = [["reducer", "run", job["images"]], ["--output", job["output"]]]
    for field in fields(ResolvedJob):
        value, default = job.get(field.name, field.default), field.default
        if isinstance(default, tuple) and isinstance(value, list):  # from JSON
            value = tuple(value)
        if field.name == "strategy":
            default = default_strategy(unit_of(job) == "cosine")
        if field.name in ("images", "output", "overwrite", "break_lock", "report", *STORAGE_OPTIONS):
            continue
        if value == default:
            continue
        if value is True:
            parts.append([flag(field.name)])
        else:
            several = isinstance(value, list | tuple)
            shown = format_labels(value) if several else "all" if value is None else str(value)
            parts.append([flag(field.name), shown])
    return [shlex.join(part) for part in parts]


def _bytes(ledger: pa.Table) -> dict[str, Any]:
    """Bytes of all photos and of the kept ones, as far as they are known."""
    kept = ledger.filter(ledger["kept"])["bytes"]
    return {
        "before": format_bytes(pc.sum(ledger["bytes"]).as_py() or 0),
        "after": format_bytes(pc.sum(kept).as_py() or 0),
        "unknown_before": ledger["bytes"].null_count,
        "unknown_after": kept.null_count,
    }


def with_vectors(folder: RunFolder, rows: pa.Table, job: ResolvedJob) -> pa.Table:
    """Rows of the ledger with their vectors (bytes of float16 numbers) as ``vector``, where they are ranked by such."""
    if not job.by_vectors:
        return rows
    vectors = folder.vectors.read_labels(pc.unique(rows["label"]).to_pylist())
    of = {(name, label): vector for name, label, vector in zip(*(c.to_pylist() for c in vectors.columns), strict=True)}
    keys = zip(rows["id"].to_pylist(), rows["label"].to_pylist(), strict=True)
    return rows.append_column("vector", pa.array([of.get(key) for key in keys], pa.binary()))


def _figures(
    folder: RunFolder,
    counts: LabelCounts,
    curve: InsertionCurve,
    ledger: pa.Table,
    job: ResolvedJob,
    bits: int,
    near: int,
) -> dict[str, Markup]:
    """The plots, as elements of the page."""
    found = {
        "counts": as_svg(
            counts_plot(counts),
            "counts",
            f"Histogram: how many of {len(counts.names):,} labels have how many images, before and after. Before at "
            f"most {counts.photos.max(initial=0):,}, after at most {counts.kept.max(initial=0):,}.",
        )
    }
    if len(counts.names) > LARGEST:
        found["counts_rest"] = as_svg(
            counts_plot(counts, largest=False),
            "counts-rest",
            f"The same histogram without the {LARGEST} largest labels.",
        )
    if job.by_vectors:
        drawn = labels_to_compare(ledger, job.seed)
        own = ledger.filter(pc.is_in(ledger["label"], value_set=pa.array(drawn, pa.string())))
        ranked = with_vectors(folder, own.filter(pc.is_valid(own["rank"])), job)
        pairs = pair_distances(ranked, bits, job.seed)
    else:
        pairs = pair_distances(ledger, bits, job.seed)
    if pairs.kept.sum():
        found["pairs"] = as_svg(
            pairs_plot(pairs, near), "pairs", f"Distances of two photos of a label. {_near_shares(pairs, near)}"
        )
    if len(curve.labels):
        most = max(TIMES_KEPT * (job.keep or 0), LEAST_RANKS)
        found["insertion"] = as_svg(
            insertion_plot(curve, near, job.keep, most, "cosine" if job.by_vectors else "bits"),
            "insertion",
            "Curve: how far the next photo of a label is from those before it, by the number of those; its "
            "median over labels, and between what 80 % of them lie. The table has figures of it.",
        )
    return {name: Markup(drawn) for name, drawn in found.items()}


def _near_shares(pairs: PairDistances, near: int) -> str:
    if pairs.unit != "bits":
        means = [(pairs.edges[:-1] + pairs.edges[1:]) / 2 @ side / side.sum() for side in (pairs.kept, pairs.random)]
        return f"On average {means[0]:.4f} of the kept ones, and {means[1]:.4f} of a random choice."
    shares = [f"{100 * side[: near + 1].sum() / side.sum():.3g}" for side in (pairs.kept, pairs.random)]
    return (
        f"At most {near} bits apart are {shares[0]} % of the pairs of kept photos and {shares[1]} % of those of a "
        "random choice."
    )


def _reading(curve: InsertionCurve, counts: LabelCounts, keep: int | None, near: int) -> dict[str, Any]:
    """What K to choose, in words and as a table."""
    ranks = len(curve.labels)
    if not ranks:
        return {"rows": [], "at": None, "copies_after": None}
    # With a budget labels keep as many as they keep: half of them no more than this.
    own = min(ranks, keep or max(1, int(np.median(counts.kept))))
    rows = [
        {
            "k": k,
            "next": curve.distance[1][k - 1],
            "low": curve.distance[0][k - 1],
            "high": curve.distance[2][k - 1],
            "labels": int(curve.labels[k - 1]),
            "photos": int(curve.photos[k - 1]),
        }
        for k in sorted({*KS, own})
        if k <= ranks
    ]
    copies = np.flatnonzero(curve.distance[1] <= near)
    return {
        "rows": rows,
        "at": next(row for row in rows if row["k"] == own),
        "copies_after": int(copies[0]) + 1 if len(copies) else None,
    }


def _failures(folder: RunFolder, kinds: Mapping[str, int]) -> list[dict[str, Any]]:
    """Photos that have failed, by kind, the most frequent first, with examples."""
    failed = folder.parts.ledger(["id", "label", "path", "error"], where=pc.field("reason") == FAILED)
    return [
        {
            "kind": kind,
            "count": count,
            "examples": failed.filter(pc.starts_with(failed["error"], f"{kind}:")).slice(0, EXAMPLES).to_pylist(),
        }
        for kind, count in sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    ]


def _cross_label(folder: RunFolder, most: int) -> list[Pair]:
    """Some near copies under different labels: one pair of each two labels before a second one."""
    pairs = folder.lists.read_nearest_cross_label()
    if pairs is None or not most:
        return []
    both = pc.binary_join_element_wise(pairs["label"], pairs["other_label"], "\0").combine_chunks()
    first = np.sort(np.unique(both.dictionary_encode().indices.to_numpy(), return_index=True)[1])
    rest = np.setdiff1d(np.arange(pairs.num_rows), first)
    pairs = pairs.take(pa.array(np.concatenate([first, rest])[:most]))
    ids = pa.chunked_array([*pairs["id"].chunks, *pairs["other_id"].chunks], pa.string())
    return cross_label_shown(
        pairs, in_nanoseconds(folder.parts.ledger(where=pc.field("id").isin(ids.combine_chunks())))
    )


def _drawn(galleries: Iterable[Gallery], like: Iterable[Pair]) -> list[Photo]:
    photos = [photo for one in galleries for photo in one.drawn()]
    return photos + [photo for pair in like for photo in (pair.first, pair.second)]


def _pictures(
    photos: Sequence[Photo], job: ResolvedJob, client: Client | None, avoid: Collection[str], progress: bool
) -> Pictures:
    """Pictures of photos, each read once a size."""
    # In the order of the shards and their offsets, which is that of the disk.
    photo_of = {(photo.ref, photo.side): photo for photo in photos}
    keys = sorted(photo_of, key=_place_of)
    most_bytes = min(PICTURE_BYTES, PICTURES_BYTES // max(1, len(photos)))
    found: dict[tuple[PhotoRef, int], Thumbnail | str] = {}
    with tqdm(total=len(keys), unit=" pictures", disable=not progress, file=sys.stderr) as bar:
        for cluster in (client, None):  # whose workers may be gone by now, as those of an adaptive one
            left = [key for key in keys if found.get(key, NO_WORKER) == NO_WORKER]
            wanted = [PictureRequest(*key, is_known=photo_of[key].is_known) for key in left]
            with closing(
                draw(wanted, job.source, job.settings_without_model, most_bytes=most_bytes)
                if cluster is None
                else draw_on(
                    cluster, wanted, job.source, job.settings_without_model, most_bytes=most_bytes, avoid=avoid
                )
            ) as drawing:
                for number, picture in drawing:
                    found[left[number]] = picture
                    bar.update(picture != NO_WORKER)
    return found


def _place_of(key: tuple[PhotoRef, int]) -> tuple[str, int, int]:
    ref, side = key
    return file_of(ref), 0 if isinstance(ref, str) else ref.offset, side


def _picture(photo: Photo, pictures: Pictures) -> dict[str, Any]:
    """What stands where a photo is shown: a picture, or why there is none."""
    found = None if not photo.is_drawn else pictures[photo.ref, photo.side]
    if not isinstance(found, Thumbnail):
        return {"error": photo.row["error"] if found is None else found}
    data = base64.b64encode(found.content).decode()
    return {"error": None, "src": f"data:image/jpeg;base64,{data}", "width": found.width, "height": found.height}


def as_html(template: str, **context: Any) -> str:
    """One of our templates, filled in; whatever comes from outside is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": format_bytes,
        "duration": format_duration,
        "clip": clip,
        "number": _number,
        "of": _of,
        "place": _shown_place,
        "quality_rows": quality_rows,
        "quality_title": quality_title,
    }
    return environment.from_string(
        files("reducer.outputs.report").joinpath("templates", template).read_text("utf-8")
    ).render(context)


def _shown_place(text: object, most: int = SHOWN_CHARACTERS) -> str:
    """The same of what may be a URL: what stands before its host or behind a question mark may be secret."""
    return clip(re.sub(r"(://[^\s?]*\?)[^\s']*", r"\1…", re.sub(r"://[^\s/?@]*@", "://", str(text))), most)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _of(count: float | str, what: str) -> str:
    """So many of something; ``count`` may be written already."""
    shown = count if isinstance(count, str) else _number(count)
    return f"{shown} {what}{'' if shown == '1' else 's'}"
