"""Commands, called in this process as a person types them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from reducer.cli.main import main


def invoke(*arguments: object) -> tuple[int, str, str]:
    """A command; a run draws its report, which takes a second, only where ``--report`` is given."""
    given = [str(argument) for argument in arguments]
    if given[0] == "run" and not {"--report", "--help"} & set(given):
        given.append("--no-report")
    done = CliRunner().invoke(main, given)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def reduce(collection: Path, run: Path, *options: object) -> tuple[int, str, str]:
    arguments = [collection / "train", "--manifest", collection / "train.csv", "--output", run, "--keep", 8]
    return invoke("run", *arguments, *(() if "--workers" in options else ("--workers", 0)), *options)


def flags(given: Mapping[str, Any], flag: str = "--storage-option") -> list[str]:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    return [part for key, text in texts.items() for part in (flag, f"{key}={text}")]
