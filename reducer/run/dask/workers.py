"""Choose the executor of a run: this process, or the workers of a cluster."""

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
    """The place where tasks run.

    Attributes
    ----------
    client : distributed.Client or None
        Client of a cluster; None for this process.
    spec : ClusterSpec
        The cluster.
    """

    client: Client | None
    spec: ClusterSpec

    def take(
        self, tasks: PartitionTasks | ShardTasks, before: InProcess | Dispatch | None = None
    ) -> InProcess | Dispatch:
        """Prepare an executor for a stage of a run.

        Parameters
        ----------
        tasks : PartitionTasks or ShardTasks
            The tasks of the stage.
        before : InProcess or Dispatch, optional
            The executor of the stage before.

        Raises
        ------
        InputError
            If workers differ in what decides hashes, or some of them cannot read the photos.
        """
        if self.client is None:
            return InProcess(tasks)
        return Dispatch(self.client, tasks, self.spec, before if isinstance(before, Dispatch) else None)
