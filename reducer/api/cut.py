"""A new reduced list, cut from the ledger of a run without reading a photo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.config.cut_rules import CutRules
from reducer.config.job import check_no_input
from reducer.config.settings import unit_of
from reducer.errors import InputError
from reducer.run.folder import RunFolder
from reducer.run.folder.lists import LIST_COLUMNS
from reducer.selection.rules import DECIDING, NeedsRanksError, Selection, select
from reducer.storage.location import Location, refuse_secret
from reducer.storage.schemas import ListForm
from reducer.storage.tables import counts

#: Format of a reduced list by the ending of its name.
KINDS = {".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class CutResult:
    """A reduced list that was cut from a run.

    Attributes
    ----------
    rules : CutRules
        Rules that the list was cut by.
    photos, labels, bytes : int
        Kept photos, their labels, and their size in bytes as far as it is known.
    photos_of_unknown_size : int
        Kept photos that were not read.
    reasons : dict of str to int
        Photos of the ledger by the reason why they are kept or left out.
    smallest_distance : float or None
        The smallest insertion distance kept, in ``unit``; None where no label keeps two ranked photos.
    reached : float or None
        With a budget: the effective distance of the last photo that it had room for beyond those guaranteed,
        in ``unit``.
    unit : {"bits", "cosine"}
        Unit of distances.
    """

    rules: CutRules
    photos: int
    labels: int
    bytes: int
    photos_of_unknown_size: int
    reasons: dict[str, int]
    smallest_distance: float | None
    reached: float | None
    unit: str
    _rows: pa.Table = field(repr=False)
    _form: ListForm = field(repr=False)
    _folder: RunFolder = field(repr=False)

    @property
    def reduced(self) -> pd.DataFrame:
        """The rows of the list, in the columns of ``reduced.parquet``."""
        frame: pd.DataFrame = self._folder.lists.in_columns(self._rows, self._form).to_pandas()
        return frame


def cut(
    run: Path | str,
    output: Path | str | None = None,
    *,
    min_distance: float | None = None,
    keep: int | None = None,
    total: int | None = None,
    max_bytes: int | str | None = None,
    min_per_label: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> CutResult:
    """Cut a new reduced list from the photos that a run has ranked.

    Parameters
    ----------
    run : path
        The run folder, a local path or a URL. The run must be finished.
    output : path, optional
        File to write the list to, ``.csv`` (the manifest's id and label columns) or ``.parquet``.
    min_distance, keep, total, max_bytes, min_per_label
        As for `CutRules`; without ``keep`` there is no limit per label. ``max_bytes`` may be text such as ``20GB``.
    storage_options : mapping, optional
        fsspec options that open ``run`` and ``output`` where they are URLs.

    Raises
    ------
    InputError
        If the rules, the run or ``output`` are wrong, or the rules need ranks of photos that were not read.

    Examples
    --------
    >>> from reducer import cut
    >>> cut("run", "ten.csv", keep=10).photos  # doctest: +SKIP
    """
    rules = CutRules(min_distance, keep, total, max_bytes, min_per_label)
    folder = RunFolder(Location(str(run), storage_options or {}))
    summary = folder.finished()
    rules.check_scale(unit_of(summary["job"]), summary["job"]["hash_size"] ** 2)
    target = None if output is None else _target(summary, Location(str(output), storage_options or {}))

    ledger = folder.whole_ledger(summary, ["row", *DECIDING])
    try:
        selection = select(ledger, rules, _always_kept(folder, summary["job"], ledger["row"]))
    except NeedsRanksError as error:
        raise InputError(
            f"{error}, which this cut needs. First: reducer resume {folder.path} --rank-all (it ranks the "
            f"{error.unranked.unread:,} photos of labels that were kept whole, and looks at no other)"
        ) from None
    # Of photos that are left out only what decides is held.
    kept = ledger["row"].filter(pa.array(selection.kept)).combine_chunks()
    rows, form = folder.parts.ledger(list(LIST_COLUMNS), pc.field("row").isin(kept)), ListForm.of(summary)
    folder.check_unchanged(summary)
    result = _result(rows, rules, selection, form, folder, unit_of(summary["job"]))
    if target is not None:
        folder.lists.write_list(target, rows, form, KINDS[Path(target.path).suffix], result.unit)
    return result


def _result(
    rows: pa.Table, rules: CutRules, selection: Selection, form: ListForm, folder: RunFolder, unit: str
) -> CutResult:
    """Return the figures of a list, from its rows of the ledger."""
    return CutResult(
        rules=rules,
        photos=rows.num_rows,
        labels=pc.count_distinct(rows["label"]).as_py(),
        bytes=pc.sum(rows["bytes"]).as_py() or 0,
        photos_of_unknown_size=rows["bytes"].null_count,
        reasons=counts(selection.reason),
        smallest_distance=pc.min(rows["insertion_distance"]).as_py(),
        reached=selection.reached,
        unit=unit,
        _rows=rows,
        _form=form,
        _folder=folder,
    )


def _target(summary: dict[str, Any], output: Location) -> Location:
    """Return the file to write a list to, refusing one that cannot be written, or is an input or a file of a run."""
    refuse_secret("--output", output.path, "what opens it by --output-storage-option KEY=VALUE")
    if Path(output.path).suffix not in KINDS:
        raise InputError(f"--output {output.path}: the name must end in .csv or .parquet, which says what is written")
    RunFolder.refuse_file(output)
    check_no_input(output.path, summary["job"])
    if not output.remote:
        path = Path(output.path)
        if path.is_dir() or not path.absolute().parent.is_dir():
            what = "it is a folder" if path.is_dir() else f"there is no folder {path.absolute().parent}"
            raise InputError(f"--output {output.path} cannot be written: {what}")
    return output


def _always_kept(folder: RunFolder, job: Mapping[str, Any], rows: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Mark the rows of a ledger whose photos are always kept."""
    if job["always_keep"] is None:
        return np.zeros(len(rows), dtype=bool)
    saved = folder.plan.read()
    if saved is None:
        raise InputError(f"the plan of the run in {folder.path} (plan.parquet) is gone: it tells what is always kept")
    plan = saved[0]
    always: NDArray[np.bool_] = np.isin(rows.to_numpy(), plan.filter(plan["always_keep"])["row"].to_numpy())
    return always
