"""Apply filters and budgets to the ledger of a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from reducer.run.folder import RunFolder
from reducer.run.plan.plan import Plan
from reducer.run.tasks.messages import Tally
from reducer.selection.quality import reevaluate_ledger
from reducer.selection.rules import DECIDING, select
from reducer.storage.tables import with_column


def apply_filters(folder: RunFolder, plan: Plan) -> tuple[dict[str, Tally], float | None]:
    """Keep in the ledger what filters and budget leave, once all partitions are done.

    May be interrupted and repeated: it goes by ranks only.

    Parameters
    ----------
    folder : RunFolder
        Run folder whose part files are replaced.
    plan : Plan
        Plan of the run.

    Returns
    -------
    dict of str to Tally
        Totals of each part file by its name.
    float or None
        `Selection.reached`.
    """
    names = folder.parts.names()
    # Read twice: of all parts at once only what decides is held.
    ledger = pa.concat_tables([folder.parts.read(name)[0].select(["row", *DECIDING]) for name in names])
    always = np.isin(ledger["row"].to_numpy(), plan.always_kept_rows)
    selection = select(ledger, plan.job.cut_rules, always)
    settings = plan.job.settings_without_model
    vector_parts = folder.vectors.names() if settings.by_vectors else []
    tallies = {}
    start = 0
    for name in names:
        before, tally = folder.parts.read(name)
        part = slice(start, start + before.num_rows)
        start = part.stop
        chosen = with_column(before, "kept", pa.array(selection.kept[part]))
        chosen = with_column(chosen, "reason", selection.reason[part])
        vectors = folder.vectors.read(name, before.num_rows, vector_parts) if settings.by_vectors else None
        rows, quality, by_hash = reevaluate_ledger(chosen, vectors, always[part], settings)
        tallies[name] = replace(tally, quality=quality, by_hash=by_hash)
        folder.parts.replace(name, rows, tallies[name], settings.unit)
    return tallies, selection.reached
