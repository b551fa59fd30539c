"""YAML with variables of the environment filled in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from reducer.errors import InputError

if TYPE_CHECKING:
    import yaml

#: Marks around the name of a variable while the file is read as YAML: characters of Unicode's private use.
BEGIN, END = "\ue000", "\ue001"


def load_yaml(text: str, path: str | Path) -> object:
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
