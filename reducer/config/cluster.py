"""The place where a job runs (`ClusterSpec`): checked before anything starts. `cluster_file` reads it from YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from reducer.config.checks import flag, is_whole, shown
from reducer.errors import InputError

SHIP_CODE_NAMES = ("auto", "never")
#: Arguments of cluster classes that decide the number of workers, as `scale` and `adapt` do.
OWN_SIZE = ("n_workers", "hosts", "n", "workers")
TLS_SCHEMES = ("tls://", "wss://")


@dataclass(frozen=True)
class TLS:
    """PEM files for encrypted connections; a cluster that Reducer starts uses the same pair on every side.

    Attributes
    ----------
    ca_file : str
        Certificates of the authorities to trust.
    client_cert, client_key : str
        Certificate and key of this process.

    Raises
    ------
    InputError
        If a file cannot be read.
    """

    ca_file: str
    client_cert: str
    client_key: str

    def __post_init__(self) -> None:
        for file in fields(self):
            path = getattr(self, file.name)
            if not os.access(path, os.R_OK) or not os.path.isfile(path):
                raise InputError(f"security: {file.name} {path} is no file that can be read")


@dataclass(frozen=True)
class WorkerRules:
    """Rules for the workers of a run: their number, how long to wait for them, and the code they run.

    Attributes
    ----------
    min : int
        Workers that must have joined before the run begins.
    wait : float
        Seconds that a run goes without a worker (at its beginning: without `min` of them) before it ends.
    stall : float
        Seconds after which a partition that makes no progress is given to another worker.
    ship_code : {"auto", "never"}
        Whether this package is sent to workers that lack it, or have another version.

    Raises
    ------
    InputError
        If a value is out of its range.
    """

    min: int = 1
    wait: float = 300.0
    stall: float = 600.0
    ship_code: str = "auto"

    def __post_init__(self) -> None:
        if not is_whole(self.min) or self.min < 1:
            raise InputError(f"workers: min is {self.min!r}: expected a whole number of 1 or more")
        for name in ("wait", "stall"):
            _check_seconds(f"workers: {name}", getattr(self, name))
        if self.ship_code not in SHIP_CODE_NAMES:
            raise InputError(f"workers: ship_code is {self.ship_code!r}: expected one of {', '.join(SHIP_CODE_NAMES)}")


@dataclass(frozen=True)
class ClusterSpec:
    """The place where a job runs: this process, a LocalCluster, a cluster of a Dask class, or a running scheduler.

    Attributes
    ----------
    workers : int, optional
        Processes of a LocalCluster; default the CPUs that this process may use; 0 runs the job in this process.
    threads : int, optional
        Threads per worker of the LocalCluster; default 1.
    address : str, optional
        Address of a running scheduler, such as ``tcp://10.0.0.1:8786``; it is never closed.
    class_path : str, optional
        Dotted path of a Dask deployment class, which is started and closed.
    kwargs : mapping
        Arguments of the class. They may hold secrets: not shown and not stored.
    scale : int, optional
        Workers that the class is asked for.
    adapt : tuple of int, optional
        Smallest and largest number of workers that the class is asked for, as the work demands.
    timeout : float
        Seconds that a scheduler may take to answer.
    security : TLS, optional
        Files for encrypted connections.
    rules : WorkerRules
        Rules for the workers.

    Raises
    ------
    InputError
        If a value is out of its range or two contradict each other.
    """

    workers: int | None = None
    threads: int | None = None
    address: str | None = None
    class_path: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    scale: int | None = None
    adapt: tuple[int, int] | None = None
    timeout: float = 60.0
    security: TLS | None = None
    rules: WorkerRules = field(default_factory=WorkerRules)

    def __post_init__(self) -> None:
        for name in ("address", "class_path"):
            if getattr(self, name) == "":
                raise InputError(
                    f"the cluster's {name.removesuffix('_path')} is empty: give it a value or leave it out"
                )
        if self.address is not None and self.class_path is not None:
            raise InputError("a cluster is an address or a class, not both")
        if (self.address or self.class_path) and (self.workers is not None or self.threads is not None):
            raise InputError(
                "--workers and --threads are for the LocalCluster that a run starts itself: leave them out with "
                "--address and --cluster"
            )
        for name, least in (("workers", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or value < least):
                raise InputError(f"{flag(name)} is {value!r}: expected a whole number of {least} or more")
        if self.workers == 0 and self.threads is not None:
            raise InputError("--workers 0 runs in this process, one photo at a time: leave --threads out")
        _check_seconds("client: timeout", self.timeout)
        self._check_size()
        self._check_security()

    def _check_size(self) -> None:
        """Refuse options that set the number of workers twice, or without effect."""
        if self.class_path is None:
            for name in ("kwargs", "scale", "adapt"):
                if getattr(self, name):
                    raise InputError(f"cluster: {name} {'need' if name == 'kwargs' else 'needs'} a class")
        if self.scale is not None and self.adapt is not None:
            raise InputError("cluster: scale and adapt exclude each other: give one")
        if self.scale is not None and (not is_whole(self.scale) or self.scale < 1):
            raise InputError(f"cluster: scale is {shown(self.scale)}: expected a whole number of 1 or more")
        if self.adapt is not None:
            least, most = self.adapt
            if not (is_whole(least) and is_whole(most) and 0 <= least <= most and most >= 1):
                raise InputError(
                    f"cluster: adapt has minimum {shown(least)} and maximum {shown(most)}: expected whole numbers, "
                    "the maximum 1 or more and no less than the minimum"
                )
            if least < self.rules.min:
                raise InputError(
                    f"cluster: adapt has minimum {least}, and workers: min is {self.rules.min}: a run begins when that "
                    "many have joined, and nobody would start them; raise minimum or lower min"
                )
        asked = [name for name in ("scale", "adapt") if getattr(self, name) is not None]
        for name in OWN_SIZE:
            if asked and name in self.kwargs:
                raise InputError(
                    f"cluster: {asked[0]} and kwargs: {name} both say how many workers there are: give one"
                )
        most_workers: object = self.scale or self.workers or self.kwargs.get("n_workers")
        if isinstance(most_workers, int) and most_workers < self.rules.min:
            raise InputError(
                f"workers: min is {self.rules.min}, and the cluster is asked for {most_workers}: a run would wait for "
                "the others in vain"
            )

    def _check_security(self) -> None:
        """Refuse TLS files that would not be used."""
        if self.security is None:
            return
        if "security" in self.kwargs:
            raise InputError("security and cluster: kwargs: security exclude each other: give one")
        if self.address is not None and not self.address.startswith(TLS_SCHEMES):
            raise InputError(
                f"security is given, and the address {self.address} is not encrypted: expected one that begins with "
                f"{' or '.join(TLS_SCHEMES)}"
            )
        if self.serial:
            raise InputError("security is for a cluster: leave it out with --workers 0")

    @property
    def serial(self) -> bool:
        """True if the job runs in this process, without Dask."""
        return self.workers == 0

    @classmethod
    def from_yaml(cls, path: str | Path) -> ClusterSpec:
        """Read ``cluster.yaml``.

        Parameters
        ----------
        path : str or Path
            The file; the one at the top of the repository explains its keys. ``job`` is not looked at.

        Raises
        ------
        InputError
            If it cannot be read or is not of the form.
        """
        from reducer.config.cluster_file import ClusterFile

        return ClusterFile.read(path).spec


def _check_seconds(where: str, value: float) -> None:
    """Refuse a value that is no number of seconds, more than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{where} is {value!r}: expected more than 0 seconds")
