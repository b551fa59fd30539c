"""The executor of a run: this process, or the workers of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reducer.config.cluster import ClusterSpec
from reducer.run.dask.dispatch import Dispatch
from reducer.run.tasks.serial import InProcess
from reducer.run.tasks.tasks import PartitionTasks, ShardTasks

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Workers:
    """Where work is done.

    Attributes
    ----------
    client : distributed.Client or None
        Of a cluster; None for this process.
    spec : ClusterSpec
        Of the cluster.
    """

    client: Client | None
    spec: ClusterSpec

    def take(
        self, errand: PartitionTasks | ShardTasks, before: InProcess | Dispatch | None = None
    ) -> InProcess | Dispatch:
        """Get ready to do something.

        Parameters
        ----------
        errand : PartitionTasks or ShardTasks
            What is to be done.
        before : InProcess or Dispatch, optional
            What this goes on from.

        Raises
        ------
        InputError
            If workers differ in what decides hashes, or some of them cannot read the photos.
        """
        if self.client is None:
            return InProcess(errand)
        going_on = before if isinstance(before, Dispatch) else None
        return Dispatch(self.client, errand, self.spec, going_on)
