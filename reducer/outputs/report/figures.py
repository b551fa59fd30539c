"""Figures for the report and for notebooks, with matplotlib: counts of labels, distances, photos."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from reducer.outputs.report.statistics import InsertionCurve, LabelCounts, PairDistances

#: Colours of text, lines, photos before, kept photos, and a random choice. The report gives each a name, so that they
#: can change with the reader's theme.
INK, LINE, BEFORE_COLOUR, KEPT_COLOUR, RANDOM_COLOUR = "#1c2530", "#c3cad3", "#7d8896", "#0b63c5", "#b3541e"
NAMES = {INK: "--ink", LINE: "--line", BEFORE_COLOUR: "--before", KEPT_COLOUR: "--kept", RANDOM_COLOUR: "--random"}
#: Inches. Narrow, so that text keeps its size on a phone.
SIZE = (4.6, 3.1)
BINS = 100
#: Bins of cosine distances at most.
MOST_COSINE_BINS = 50
#: Largest labels, without which the counts are shown a second time.
LARGEST = 100
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # dollar signs in labels and ids begin no formula
}


class Picture(Figure):
    """Figure that a notebook shows, whether pyplot is imported there or not."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=110)
        return png.getvalue()


@contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a notebook's own style may hide what is drawn here
        matplotlib.rcParams.update(STYLE)
        yield


def _new(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Picture, NDArray[Any]]:
    figure = Picture(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()


def counts_plot(counts: LabelCounts, *, largest: bool = True) -> Picture:
    """Draw how many labels have how many photos, before and after.

    Parameters
    ----------
    counts : LabelCounts
        Photos of each label.
    largest : bool
        Whether the `LARGEST` labels are among them.
    """
    with _styled():
        figure, (axes,) = _new(*SIZE)
        _counts(axes, counts if largest else counts.without_largest(LARGEST))
        return figure


def both_counts(counts: LabelCounts) -> Picture:
    """Draw `counts_plot` with and without the `LARGEST` labels, side by side; with no more labels, once.

    Parameters
    ----------
    counts : LabelCounts
        Photos of each label.
    """
    with _styled():
        wide = len(counts.names) > LARGEST
        figure, axes = _new(SIZE[0] * (2 if wide else 1), SIZE[1], 1, 2 if wide else 1)
        _counts(axes[0], counts)
        axes[0].set_title("Images per label")
        if wide:
            _counts(axes[1], counts.without_largest(LARGEST))
            axes[1].set_title(f"Without the {LARGEST} largest labels")
        return figure


def _counts(axes: Axes, counts: LabelCounts) -> None:
    most = int(max(counts.photos.max(initial=1), 1))
    # Whole numbers: a bin that holds one of them more than others would look like a peak.
    step = -(-most // BINS)
    edges = np.arange(0.5, most + step + 0.5, step)
    for values, name, colour, filled in (
        (counts.photos, "before", BEFORE_COLOUR, True),
        (counts.kept, "after", KEPT_COLOUR, False),
    ):
        axes.stairs(
            np.histogram(values, edges)[0], edges, label=name, color=colour, fill=filled, linewidth=1.2, baseline=0.5
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0.5)
    axes.set_xlabel("images of a label")
    axes.set_ylabel("labels")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend()


def pairs_plot(pairs: PairDistances, near_copy_bits: int) -> Picture:
    """Draw how far apart two photos of a label are, among kept photos and in a random choice.

    Parameters
    ----------
    pairs : PairDistances
        Distances of kept photos and of a random choice.
    near_copy_bits : int
        Bits up to which two photos are near copies; -1 for vectors.
    """
    with _styled():
        figure, (axes,) = _new(*SIZE)
        edges, sides = pairs.edges, [pairs.random, pairs.kept]
        if pairs.unit != "bits":  # no more bins than can be seen, over the distances that there are
            used = 1 + int(np.flatnonzero(pairs.kept + pairs.random).max(initial=0))
            starts = np.arange(0, used, -(-used // MOST_COSINE_BINS))
            edges = edges[np.append(starts, min(len(edges) - 1, starts[-1] + -(-used // MOST_COSINE_BINS)))]
            sides = [np.add.reduceat(values, starts) for values in sides]
        if near_copy_bits >= 0:
            axes.axvspan(-0.5, near_copy_bits + 0.5, color=LINE, alpha=0.5, linewidth=0, label="near copies")
        for values, name, colour in zip(sides, ("random choice", "kept"), (RANDOM_COLOUR, KEPT_COLOUR), strict=True):
            axes.stairs(100 * values / max(1, values.sum()), edges, label=name, color=colour, linewidth=1.5)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"distance of two photos of a label, {pairs.unit}")
        axes.set_ylabel("% of the pairs")
        axes.legend(loc="upper right")
        return figure


def insertion_plot(
    curve: InsertionCurve, near_copy_bits: int, keep: int | None, most: int, unit: str = "bits"
) -> Picture:
    """Draw how far the next photo is from those before it.

    Parameters
    ----------
    curve : InsertionCurve
        Distances by rank, at least one.
    near_copy_bits : int
        Bits up to which two photos are near copies; -1 for vectors.
    keep : int, optional
        Photos kept per label.
    most : int
        Ranks that are shown, at most.
    unit : {"bits", "cosine"}
        Unit of distances.
    """
    with _styled():
        figure, (axes,) = _new(*SIZE)
        low, median, high = curve.distance[:, :most]
        after = np.arange(1, len(median) + 1)
        axes.fill_between(after, low, high, color=KEPT_COLOUR, alpha=0.2, linewidth=0, label="80 % of the labels")
        marker = "o" if len(after) < 3 else None
        axes.plot(after, median, color=KEPT_COLOUR, linewidth=1.8, label="median", marker=marker)
        if near_copy_bits >= 0:
            axes.axhspan(0, near_copy_bits, color=LINE, alpha=0.5, linewidth=0, label="near copies")
        if keep is not None and keep <= len(median):
            axes.axvline(keep, color=INK, linewidth=1, linestyle="--")
            axes.annotate(f" K = {keep}", (keep, 0.99), xycoords=("data", "axes fraction"), va="top", fontsize=8)
        axes.set_xlim(left=1 if len(after) > 1 else 0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("photos per label (rank)")
        axes.set_ylabel("insertion distance (bits)" if unit == "bits" else "insertion distance (cosine)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
        return figure


def photos_plot(title: str, photos: Sequence[tuple[str, NDArray[np.uint8] | str]], columns: int) -> Picture:
    """Draw photos in rows.

    Parameters
    ----------
    title : str
        Title over all photos.
    photos : sequence of (str, ndarray of uint8 of shape (height, width, 3) or str)
        Caption of each photo, and its pixels, or why there are none.
    columns : int
        Photos per row.
    """
    with _styled():
        columns = max(1, min(columns, len(photos)))
        rows = max(1, -(-len(photos) // columns))
        side = 4.2 if columns <= 2 else 1.9
        figure, axes = _new(side * columns, side * rows + 0.5, rows, columns)
        figure.suptitle(title, fontsize=11)
        for cell in axes:
            cell.axis("off")
        for cell, (caption, pixels) in zip(axes, photos, strict=False):
            cell.set_title(caption, fontsize=8)
            if isinstance(pixels, str):
                cell.text(0.5, 0.5, pixels, ha="center", va="center", wrap=True, fontsize=8)
            else:
                cell.imshow(pixels)
        return figure


def as_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an element of an HTML page, with its colours by the names of `NAMES`.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Figure from a function of this module that draws numbers only.
    name : str
        Name of this figure in the page.
    description : str
        Description for readers who cannot see it.
    """
    content = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _styled(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    drawn = content.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None
    head = (
        f'<svg {box[0]} role="img" aria-label="{html.escape(description)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    drawn = head + drawn[drawn.index(">") + 1 :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    # Ids of one figure must not meet those of another in the same page.
    drawn = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
    for colour, variable in NAMES.items():
        drawn = drawn.replace(colour, f"var({variable})")
    return drawn
