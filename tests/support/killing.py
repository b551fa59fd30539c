"""Commands that end, as by ``kill -9``, before a file is put in its place."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from reducer.cli.main import main

# A server that has imported all forks a process for each command: that takes a tenth of a new one's second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [__name__, "reducer.api.resume", "reducer.outputs.export.export"]
)  # what commands import when they run


def killed_before(name: str, time: int, *arguments: object) -> bool:
    """Run a command, in a process of its own, that dies before it puts a file in its place.

    Parameters
    ----------
    name : str
        What the file's path ends with; all do with ``""``.
    time : int
        It dies the n-th time; 1 is the first.
    *arguments : object
        Of the command line.

    Returns
    -------
    bool
        False if it came to a good end before.
    """
    given = [str(argument) for argument in arguments]
    if "run" in given and name != "report.html":
        given.append("--no-report")
    with tempfile.NamedTemporaryFile() as said:
        process = FORKS.Process(target=_run, args=(name, time, given, dict(os.environ), said.name))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), Path(said.name).read_text()
    return process.exitcode != 0


def _run(name: str, left: int, arguments: Sequence[str], environment: Mapping[str, str], said: str) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    real = Path.replace

    def replace(path: Path, target: Path | str) -> Path:
        nonlocal left
        left -= str(target).endswith(name)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, target)

    Path.replace = replace  # type: ignore[method-assign,assignment]
    raise SystemExit(main(arguments))
