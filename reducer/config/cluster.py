"""The place where a job runs (`ClusterSpec`), and the YAML file that names it: checked before anything starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from reducer.config.checks import flag, is_whole, known_keys, shown
from reducer.config.job import Job
from reducer.config.yaml_file import load_yaml
from reducer.errors import InputError
from reducer.formatting import parse_seconds
from reducer.storage.location import refuse_secret

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
        if self.address is not None:
            refuse_secret("--address", self.address, "certificates under security: in cluster.yaml")
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
        return ClusterFile.read(path).spec


@dataclass(frozen=True)
class ClusterFile:
    """The content of ``cluster.yaml``.

    Attributes
    ----------
    spec : ClusterSpec
        The place where a job runs.
    job : mapping
        Defaults for fields of `reducer.Job`.
    """

    spec: ClusterSpec
    job: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> ClusterFile:
        """Read the file.

        Parameters
        ----------
        path : str or Path
            The file.

        Raises
        ------
        InputError
            If it cannot be read or is not of the form. Values that may be secrets are not repeated.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"--cluster {path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"--cluster {path} is no YAML: {error}") from None
        try:
            return cls._of(load_yaml(text, path))
        except InputError as error:
            message = str(error)
            raise InputError(message if str(path) in message else f"{path}: {message}") from None

    @classmethod
    def _of(cls, content: object) -> ClusterFile:
        """Check the parsed content of the file."""
        top = known_keys("the file", content, ("version", "cluster", "client", "security", "workers", "job"))
        if not is_whole(top.get("version")) or top["version"] != 1:
            raise InputError(f"version is {top.get('version')!r}; this Reducer reads version 1")
        cluster = known_keys("cluster", top.get("cluster"), ("class", "kwargs", "address", "scale", "adapt"))
        for key in ("class", "address"):
            if cluster.get(key) is not None and not isinstance(cluster[key], str):
                raise InputError(f"cluster: {key} is {shown(cluster[key])}; expected text")
        if cluster.get("class") is None and cluster.get("address") is None:
            raise InputError("cluster needs a class (started for the run) or an address (running already)")
        kwargs = {} if cluster.get("kwargs") is None else cluster["kwargs"]
        if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
            raise InputError(f"cluster: kwargs is a {type(kwargs).__name__}; expected keys with values")
        adapt = cluster.get("adapt")
        if adapt is not None:
            adapt = known_keys("cluster: adapt", adapt, ("minimum", "maximum"))
            if "maximum" not in adapt:
                raise InputError("cluster: adapt needs a maximum")
            adapt = (1 if adapt.get("minimum") is None else adapt["minimum"], adapt["maximum"])

        client = _section(top, "client", ("timeout",))
        rules = _section(top, "workers", tuple(rule.name for rule in fields(WorkerRules)))
        for name in ("wait", "stall"):
            if name in rules:
                rules[name] = _seconds(f"workers: {name}", rules[name])
        spec = ClusterSpec(
            address=cluster.get("address"),
            class_path=cluster.get("class"),
            kwargs=kwargs,
            scale=cluster.get("scale"),
            adapt=adapt,
            security=_security(top),
            rules=WorkerRules(**rules),
            timeout=_seconds("client: timeout", client.get("timeout", ClusterSpec.timeout)),
        )
        return cls(spec, _section(top, "job", tuple(job.name for job in fields(Job))))


def _section(top: Mapping[str, Any], name: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Return a section of the file, empty where it is left out; keys without a value are left out too."""
    if top.get(name) is None:
        return {}
    return {key: value for key, value in known_keys(name, top[name], known).items() if value is not None}


def _security(top: Mapping[str, Any]) -> TLS | None:
    """Return the section ``security``; None where it is left out."""
    names = tuple(file.name for file in fields(TLS))
    files = _section(top, "security", names)
    if top.get("security") is None:
        return None
    for name in names:
        if not isinstance(files.get(name), str):
            raise InputError(f"security: {name} is {shown(files.get(name))}; expected a PEM file")
    return TLS(**{name: os.path.expanduser(path) for name, path in files.items()})


def _seconds(where: str, value: object) -> float:
    """Return the seconds of a length of time as Dask writes it: ``60s``, ``10 minutes``, or a number of seconds."""
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(value)
        seconds = parse_seconds(value) if isinstance(value, str) else float(value)
        if not math.isfinite(seconds):
            raise ValueError(value)
        return seconds
    except (ValueError, OverflowError):
        raise InputError(f"{where} is {shown(value)}: expected a length of time, such as 60s or 10m") from None


def _check_seconds(where: str, value: float) -> None:
    """Refuse a value that is no number of seconds, more than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{where} is {value!r}: expected more than 0 seconds")
