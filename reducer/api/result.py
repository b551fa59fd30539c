"""The results of a run, for Python and notebooks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from reducer.config.resolved import ResolvedJob, resolve
from reducer.errors import InputError, nearest
from reducer.formatting import clip, format_distance
from reducer.run.folder import REPORT, RunFolder
from reducer.storage.location import Location
from reducer.storage.schemas import ListForm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reducer.outputs.report.galleries import Photo

#: Pixels of the longest side of a photo in a figure of many, and of two.
SMALL_SIDE, LARGE_SIDE = 320, 1000
#: Bytes that a picture in a figure may take: more than any needs.
PICTURE_BYTES = 2**24
#: Photos per row of a figure.
COLUMNS = 5


@dataclass(frozen=True)
class Result:
    """The results of a run.

    Attributes
    ----------
    output : Path or str
        The run folder; text where it is a URL.
    summary : dict
        ``summary.json``.
    """

    output: Path | str
    summary: dict[str, Any] = field(repr=False)
    _folder: RunFolder = field(repr=False)
    _job: ResolvedJob = field(repr=False)

    @property
    def reduced(self) -> pd.DataFrame:
        """The reduced list: the rows and columns of ``reduced.parquet``."""
        frame: pd.DataFrame = self._folder.lists.reduced(ListForm.of(self.summary)).to_pandas()
        return frame

    @property
    def images(self) -> pd.DataFrame:
        """The ledger: one row per photo of the manifest, in its order."""
        frame: pd.DataFrame = self._folder.parts.ledger().to_pandas()
        return frame

    def plot_counts(self) -> Figure:
        """Plot how many labels have how many images, before and after, also without the 100 largest labels.

        Returns
        -------
        matplotlib.figure.Figure
            Two histograms, their counts on a logarithmic axis; one where there are no more than 100 labels.
        """
        from reducer.outputs.report.figures import both_counts
        from reducer.outputs.report.statistics import label_counts

        return both_counts(label_counts(self._folder.parts.ledger(["label", "kept"])))

    def plot_pair(self, label: object, which: str = "closest") -> Figure:
        """Plot two photos of a label side by side, titled with the distance of their hashes or vectors.

        Parameters
        ----------
        label : str
            The label.
        which : {"closest", "farthest"}
            Pair to show, of all photos of the label that have a hash, or a vector if photos are ranked by vectors.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            If the run has no such label, or fewer than two of its photos can be compared.
        """
        from reducer.outputs.report.figures import photos_plot
        from reducer.outputs.report.galleries import extreme_pairs
        from reducer.outputs.report.sections import with_vectors

        if which not in ("closest", "farthest"):
            raise InputError(f"which is {which!r}: expected 'closest' or 'farthest'")
        pairs = extreme_pairs(with_vectors(self._folder, self._rows(label), self._job), self._job.hash_size**2)
        if not pairs:
            raise InputError(
                f"fewer than two photos of the label {str(label)!r} can be compared: there is no pair to show"
            )
        pair = next(pair for pair in pairs if pair.which == which)
        photos = (pair.first, pair.second)
        pictures = self._pictures(photos, LARGE_SIDE)
        difference = f"hash difference {pair.distance:g} of {self._job.hash_size**2} bits"
        if self._job.by_vectors:
            difference = f"cosine distance {pair.distance:.4f}"
        title = f"{clip(label, 60)}, the {which} two: {difference}"
        captions = [clip(photo.row["id"], 60) for photo in photos]
        return photos_plot(title, list(zip(captions, pictures, strict=True)), 2)

    def show(self, label: object, most: int = 25) -> Figure:
        """Plot the kept photos of a label by rank, each with its insertion distance.

        Parameters
        ----------
        label : str
            The label.
        most : int
            Largest number of photos.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            If the run has no such label.
        """
        from reducer.outputs.report.figures import photos_plot
        from reducer.outputs.report.galleries import as_photo, kept_by_rank

        if not isinstance(most, int) or most < 1:
            raise InputError(f"most is {most!r}: expected a whole number of 1 or more")
        rows = self._rows(label)
        kept = kept_by_rank(rows)
        photos = [as_photo(row, SMALL_SIDE) for row in kept.slice(0, most).to_pylist()]
        pictures = self._pictures(photos, SMALL_SIDE)
        shown = kept.num_rows if kept.num_rows <= most else f"the first {most} of {kept.num_rows:,}"
        unit = "cosine" if self._job.by_vectors else "bits"
        title = f"{clip(label, 60)}: {shown} kept photos of {rows.num_rows:,}, by rank"
        captions = [_caption(photo.row, unit) for photo in photos]
        return photos_plot(title, list(zip(captions, pictures, strict=True)), COLUMNS)

    def _rows(self, label: object) -> pa.Table:
        """Return the rows of the ledger of a label."""
        from reducer.storage.tables import in_nanoseconds

        rows = in_nanoseconds(self._folder.parts.ledger(where=pc.field("label") == str(label)))
        if not rows.num_rows:
            known = pc.unique(self._folder.parts.ledger(["label"])["label"]).to_pylist()
            raise InputError(f"no photo of the run has the label {str(label)!r}{nearest(str(label), known)}")
        return rows

    def _pictures(self, photos: Sequence[Photo], side: int) -> list[np.ndarray[Any, Any] | str]:
        """Read photos in this process, and return their pixels, or why there are none."""
        from reducer.outputs.report.thumbnails import PictureRequest, draw
        from reducer.photos.resize import Thumbnail
        from reducer.run.summary import check_storage_options

        check_storage_options(self.summary, self._job)
        wanted = [PictureRequest(photo.ref, side, is_known=photo.is_known) for photo in photos]
        drawn = draw(wanted, self._job.source, self._job.settings_without_model, most_bytes=PICTURE_BYTES)
        return [
            # Grey pixels would be drawn in matplotlib's own colours.
            np.asarray(Image.open(io.BytesIO(picture.content)).convert("RGB"))
            if isinstance(picture, Thumbnail)
            else picture
            for _, picture in drawn
        ]

    def _repr_html_(self) -> str:
        from reducer.outputs.report.rendering import as_html

        report = self._folder.report if self._folder.has(REPORT) else None
        return as_html("result.html", summary=self.summary, run=str(self.output), report=report)


def open_run(
    run: Path | str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    output_storage_options: Mapping[str, Any] | None = None,
) -> Result:
    """Open the results of a run that is finished; reads no photo.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL.
    storage_options, output_storage_options : mapping, optional
        As for `Job`: a run folder does not keep them.

    Raises
    ------
    InputError
        If it is no run folder, or the run is not finished.

    Examples
    --------
    >>> from reducer import open_run
    >>> open_run("run").show("6044")  # doctest: +SKIP
    """
    from reducer.run.summary import job_of

    folder = RunFolder(Location(str(run), output_storage_options or {}))
    summary = folder.finished()
    options = {"storage_options": storage_options or {}, "output_storage_options": output_storage_options or {}}
    job = resolve(job_of(summary, {"output": str(run), **options}))
    return Result(job.output if job.output_location.remote else Path(job.output), summary, folder, job)


def _caption(row: dict[str, Any], unit: str) -> str:
    """Return the caption of a kept photo."""
    name = clip(row["id"], 24)
    if row["rank"] is None:
        return f"{name}\nnot ranked"
    distance = "the first" if row["insertion_distance"] is None else format_distance(row["insertion_distance"], unit)
    return f"{name}\nrank {row['rank']}, {distance}"
