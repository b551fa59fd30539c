"""``report.html``: a run to look at, in one file that needs no network."""

from __future__ import annotations

import base64
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from reducer.config.cluster import ClusterSpec
from reducer.config.resolved import ResolvedJob, resolve
from reducer.config.settings import GALLERY_PHOTOS
from reducer.errors import InputError
from reducer.outputs.report.figures import LARGEST
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
from reducer.outputs.report.rendering import as_html
from reducer.outputs.report.sections import (
    Measure,
    choice_of_k,
    command_of,
    failures_of,
    figures_of,
    total_bytes,
    with_vectors,
)
from reducer.outputs.report.statistics import insertion_curve, label_counts
from reducer.outputs.report.thumbnails import NO_WORKER, PictureRequest, draw, draw_on
from reducer.outputs.report.wording import certificate_line, remarks
from reducer.photos.resize import Thumbnail
from reducer.run.folder import RunFolder
from reducer.run.summary import check_storage_options, job_of
from reducer.storage.location import Location, PhotoRef, file_of
from reducer.storage.tables import in_nanoseconds

if TYPE_CHECKING:
    from reducer.run.dask.connect import Client

#: Pictures in a report at most, whatever is asked for.
MOST_GALLERY_PHOTOS = 2000
#: Labels that may be asked for.
MOST_LABELS = 100
#: Bytes of all pictures, and of one of them, at most: base64 makes four of three, and a report stays under 15 MB.
PICTURES_BYTES, PICTURE_BYTES = 7_500_000, 40_000
#: Labels named in a list.
NAMED = 20

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
        Folder of a finished run, a local path or a URL.
    labels : sequence of str
        Labels that are shown before those that the report chooses, at most `MOST_LABELS`.
    gallery_photos : int
        Pictures of photos at most, 0 to `MOST_GALLERY_PHOTOS`; no more photos are read.
    cluster : ClusterSpec, optional
        Where photos are read; default in this process.
    storage_options, output_storage_options : mapping, optional
        Open the photos, as for `ResolvedJob`, and ``run``: a run folder does not keep them.
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
    labels = _checked(labels, gallery_photos)
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
        draw_report(folder, job, labels, gallery_photos, client=client, progress=progress)
    return folder.report


def _checked(labels: Sequence[str], gallery_photos: int) -> list[str]:
    """Return the labels that are asked for, each once.

    Raises
    ------
    InputError
        If the labels or the number of pictures are out of range.
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
    return asked


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
        Folder of the run.
    job : ResolvedJob
        Its job, with the storage options that open its photos.
    asked : sequence of str
        Labels that are shown before those that the report chooses.
    gallery_photos : int
        Pictures of photos at most.
    client : distributed.Client, optional
        Client of the cluster on which photos are read; None for this process.
    avoid : collection of str
        Addresses of workers that read none.
    progress : bool
        Whether to show a progress bar.
    """
    summary = folder.finished()
    measure = Measure.of(summary["quality"])
    ledger = folder.whole_ledger(summary, ["id", "hash", "insertion_distance", "kept", "bytes", *LABEL_COLUMNS])
    chosen = labels_to_show(ledger, measure.near, asked)
    context = _context(folder, job, summary, measure, ledger)
    del ledger
    cross_label = _cross_label(folder, min(MOST_CROSS_LABEL, gallery_photos // 20)) if gallery_photos else []
    each = (gallery_photos - 2 * len(cross_label)) // max(1, len(chosen))
    galleries = _galleries(folder, job, chosen, each, measure.bits) if gallery_photos else []
    arrangements: list[Gallery | Pair] = [*galleries, *cross_label]
    photos = [photo for arrangement in arrangements for photo in arrangement.drawn()]
    pictures = _pictures(photos, job, client, avoid, progress)
    page = as_html(
        "report.html",
        **context,
        galleries=galleries,
        cross_label=cross_label,
        picture=lambda photo: _picture(photo, pictures),
    )
    folder.check_unchanged(summary)
    folder.lists.write_report(page.encode("utf-8", "replace"))


def _context(
    folder: RunFolder, job: ResolvedJob, summary: dict[str, Any], measure: Measure, ledger: pa.Table
) -> dict[str, Any]:
    """Return the variables of the template that take no photo."""
    counts, curve = label_counts(ledger), insertion_curve(ledger)
    return {
        "run": folder.path,
        "name": Path(folder.path.rstrip("/")).name or folder.path,
        "summary": summary,
        "command": command_of(summary["job"]),
        "bytes": total_bytes(ledger),
        "missing_labels": counts.empty,
        "most_named": NAMED,
        "certificate": certificate_line(summary["quality"]),
        "remarks": remarks(summary, folder.path),
        "figures": figures_of(folder, job, measure, ledger, counts, curve),
        "choice": choice_of_k(curve, counts, job.keep, measure.near),
        "near": measure.near,
        "unit": measure.unit,
        "compared_by": f"{job.hash}, {measure.bits} bits" if measure.unit == "bits" else "vectors, cosine",
        "distance": measure.distance,
        "number_of": measure.number,
        "largest": LARGEST,
        "failures": failures_of(folder, summary["failures"]),
    }


def _galleries(
    folder: RunFolder, job: ResolvedJob, chosen: Mapping[str, list[str]], pictures: int, bits: int
) -> list[Gallery]:
    """Return the galleries of labels that have something to show, with a number of pictures each at most."""
    rows = with_vectors(folder, in_nanoseconds(folder.parts.ledger(where=pc.field("label").isin(list(chosen)))), job)
    galleries = [
        gallery(rows.filter(pc.equal(rows["label"], label)), why, pictures, bits) for label, why in chosen.items()
    ]
    return [shown for shown in galleries if shown.shown or shown.pairs or shown.failed]


def _cross_label(folder: RunFolder, most: int) -> list[Pair]:
    """Return near copies under different labels: one pair of each two labels before a second one."""
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


def _pictures(
    photos: Sequence[Photo], job: ResolvedJob, client: Client | None, avoid: Collection[str], progress: bool
) -> Pictures:
    """Return pictures of photos, each photo read once per size; on the cluster first, then here what is left."""
    # In the order of the shards and their offsets, as they lie on the disk.
    photo_of = {(photo.ref, photo.side): photo for photo in photos}
    keys = sorted(photo_of, key=_reading_order)
    most_bytes = min(PICTURE_BYTES, PICTURES_BYTES // max(1, len(photos)))
    pictures: dict[tuple[PhotoRef, int], Thumbnail | str] = {}
    with tqdm(total=len(keys), unit=" pictures", disable=not progress, file=sys.stderr) as bar:
        for cluster in (client, None):  # its workers may be gone by now, as those of an adaptive one
            left = [key for key in keys if pictures.get(key, NO_WORKER) == NO_WORKER]
            wanted = [PictureRequest(*key, is_known=photo_of[key].is_known) for key in left]
            with closing(
                draw(wanted, job.source, job.settings_without_model, most_bytes=most_bytes)
                if cluster is None
                else draw_on(
                    cluster, wanted, job.source, job.settings_without_model, most_bytes=most_bytes, avoid=avoid
                )
            ) as drawing:
                for number, picture in drawing:
                    pictures[left[number]] = picture
                    bar.update(picture != NO_WORKER)
    return pictures


def _reading_order(key: tuple[PhotoRef, int]) -> tuple[str, int, int]:
    ref, side = key
    return file_of(ref), 0 if isinstance(ref, str) else ref.offset, side


def _picture(photo: Photo, pictures: Pictures) -> dict[str, Any]:
    """Return what stands where a photo is shown: a picture, or why there is none."""
    picture = pictures[photo.ref, photo.side] if photo.is_drawn else photo.row["error"]
    if not isinstance(picture, Thumbnail):
        return {"error": picture}
    data = base64.b64encode(picture.content).decode()
    return {"error": None, "src": f"data:image/jpeg;base64,{data}", "width": picture.width, "height": picture.height}
