"""The YAML file that says where a job runs (`ClusterFile`), with variables of the environment filled in."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reducer.config.checks import is_whole, known_keys, shown
from reducer.config.cluster import TLS, ClusterSpec, WorkerRules
from reducer.config.job import Job
from reducer.errors import InputError
from reducer.formatting import parse_seconds

if TYPE_CHECKING:
    import yaml

#: Marks around the name of a variable while the file is read as YAML: characters of Unicode's private use.
BEGIN, END = "\ue000", "\ue001"


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
            return cls._of(_load(text, path))
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


def _load(text: str, path: str | Path) -> object:
    """Read YAML with ``${NAME}`` filled in from the environment; refuse a key that is given twice."""
    import yaml

    # Braces mean something to YAML: variables are marked by characters without a meaning.
    marked = re.sub(r"\$\{([^}\n]*)\}", f"{BEGIN}\\1{END}", text)
    try:
        loader = yaml.SafeLoader(marked)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _fill_in(node, [], set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # Not the error itself: it shows the line, which may hold a secret.
        mark = getattr(error, "problem_mark", None)
        where = f" near line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"--cluster {path} is no YAML that can be read{where} ({type(error).__name__})") from None


def _fill_in(node: yaml.Node, where: list[str], done: set[int]) -> None:
    """Fill in variables below a node of the parsed file, so that their content is never read as YAML."""
    import yaml

    if id(node) in done:  # an alias
        return
    done.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or BEGIN in key.value:
                raise InputError(f"{': '.join(where) or 'the file'}: a key is no plain text")
            if key.value in seen and key.value != "<<":
                raise InputError(f"{': '.join([*where, str(key.value)])} is given twice")
            seen.add(key.value)
            _fill_in(value, [*where, str(key.value)], done)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _fill_in(value, where, done)
    elif isinstance(node, yaml.ScalarNode) and BEGIN in node.value:
        alone = node.style is None and re.fullmatch(f"{BEGIN}[^{END}]*{END}", node.value)
        node.value = re.sub(
            f"(\\$?){BEGIN}([^{END}]*){END}", lambda match: _variable(match, ": ".join(where)), node.value
        )
        # A number is read as if it stood in the file itself; in quotes it stays text.
        whole = alone and re.fullmatch(r"0|-?[1-9][0-9]*", node.value)
        node.tag = f"tag:yaml.org,2002:{'int' if whole else 'str'}"


def _variable(match: re.Match[str], where: str) -> str:
    """Return the value of an environment variable, or the text ``${NAME}`` where it is written with two ``$``."""
    escape, name = match[1], match[2]
    if escape:
        return f"${{{name}}}"
    if name not in os.environ:
        raise InputError(
            f"{where}: the environment variable {name!r} is not set; set it, or write $${{...}} for the text itself"
        )
    return os.environ[name]
