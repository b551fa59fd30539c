"""Options that commands share, and the end of a command: errors and signals become exit codes."""

from __future__ import annotations

import codecs
import functools
import json
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from reducer.cli.streams import lasting_streams
from reducer.config.cluster import ClusterFile, ClusterSpec
from reducer.config.settings import EMBED_BATCH, EMBED_MEAN, EMBED_SIZE, EMBED_STD, STORAGE_OPTIONS
from reducer.errors import InputError, ReducerError
from reducer.formatting import format_labels

Command = Callable[..., None]


class Terminated(BaseException):
    """Raised on SIGTERM and SIGHUP; not an `Exception`, so that nothing which handles errors catches it.

    Attributes
    ----------
    exit_code : int
        128 and the number of the signal, as shells count.
    """

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


def candidates_number(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Parse ``--candidates``: a whole number of 1 or more, or None for ``all``."""
    if value == "all":
        return None
    if value.isdecimal() and int(value) >= 1:
        return int(value)
    raise click.BadParameter(f"{value!r} is neither a whole number of 1 or more nor 'all'")


def read_cluster_file(ctx: click.Context, param: click.Parameter, value: str | None) -> ClusterSpec | None:
    """Read ``--cluster``; its section ``job`` becomes the defaults of flags."""
    if value is None:
        return None
    try:
        file = ClusterFile.read(value)
    except ReducerError as error:
        end(f"Error: {error}", error.exit_code)
    options = {option.name: option for option in ctx.command.params}
    try:
        # A run that is resumed has its job already: only the options that open its locations are of use.
        known = options if "images" in options else options.keys() & set(STORAGE_OPTIONS)
        flags = {name: _as_flag(options[name], default) for name, default in file.job.items() if name in known}
    except ReducerError as error:
        end(f"Error: {value}: {error}", error.exit_code)
    ctx.default_map = {**(ctx.default_map or {}), **flags}
    return file.spec


def _as_flag(option: click.Parameter, value: Any) -> Any:
    """Return a value from YAML as the command line would give it."""
    name = option.name
    if isinstance(value, dict) and name in STORAGE_OPTIONS:
        pairs = {key: json.dumps(v) if isinstance(v, bool | dict) else str(v) for key, v in value.items()}
        return [f"{key}={v}" for key, v in pairs.items()]
    if isinstance(value, list) and name == "labels":
        return format_labels(value)
    if isinstance(value, list) and name in ("embed_mean", "embed_std"):
        return ",".join(map(str, value))
    expected = "keys with values" if name in STORAGE_OPTIONS else "one value"
    if getattr(option, "is_flag", False):
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif not isinstance(value, dict | list | bool) and name not in STORAGE_OPTIONS:
        return str(value)
    raise InputError(f"job: {name} is a {type(value).__name__}: expected {expected}")


def exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors and signals into exit codes that scripts can rely on.

    Left to click, Ctrl-C would become exit code 1, also under ``dask reducer``.
    """

    def stop(signum: int, frame: object) -> NoReturn:
        raise Terminated(signum)

    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> None:
        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
        # A terminal that is closed; ignored where nohup or the like has said so. Windows has no such signal.
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            before[hangup] = signal.signal(hangup, stop)
        try:
            check_encoding()
            with lasting_streams():
                command(**kwargs)
        except ReducerError as error:
            end(f"Error: {error}", error.exit_code)
        except ValueError as error:
            if "dask config file" not in str(error):
                raise
            end(f"Error: Dask's own settings cannot be read: {' '.join(str(error).split())[:300]}", 2)
        except KeyboardInterrupt:
            end(_stopped(kwargs), 130)
        except Terminated as stopped:
            end(_stopped(kwargs), stopped.exit_code)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    return wrapped


def check_encoding() -> None:
    """Refuse a Python that takes the names of files for another encoding than UTF-8.

    Raises
    ------
    InputError
        If it does, by a locale that Python does not mend by itself.
    """
    encoding = sys.getfilesystemencoding()
    if codecs.lookup(encoding).name != "utf-8":
        raise InputError(
            f"names of files are {encoding} here, by the locale, and would be read wrongly: set PYTHONUTF8=1, or a "
            "locale of UTF-8 such as LC_ALL=C.UTF-8, for workers too"
        )


def end(message: str, code: int) -> NoReturn:
    """Print a message to stderr, where there still is one, and end the command."""
    with suppress(OSError):  # of a terminal that is closed
        click.echo(message, err=True)
    sys.exit(code)


def _stopped(kwargs: dict[str, Any]) -> str:
    """Return the message for a person who stopped a command: the state of its files, and how to continue."""
    if "target" in kwargs:
        return f"Stopped. What is in {kwargs['target']} is whole; to go on, give the same command again."
    if click.get_current_context().info_name == "embed":
        return (
            f"Stopped. What is made so far is kept in {kwargs['output']}.parts; to go on, give the same command again."
        )
    path = kwargs.get("output") if "images" in kwargs else kwargs.get("run")
    if path is None:
        return "Stopped."
    from reducer.run.folder import REPORT, RunFolder
    from reducer.storage.location import Location
    from reducer.storage.remote import parse_options

    folder = RunFolder(Location(path, parse_options("", kwargs.get("output_storage_options", ()))))
    if not folder.is_run():
        return "Stopped before the first photo was hashed; nothing was written."
    summary = folder.read_summary()
    if summary.get("status") == "done":
        report = summary["job"].get("report") and not folder.has(REPORT)
        return f"Stopped; the run in {folder.path} is whole" + (
            f", but its report is not drawn: reducer report {folder.path}" if report else "."
        )
    of_all = "" if summary.get("photos_to_read") is None else f" of {summary['photos_to_read']}"
    return (
        f"Stopped. The photos hashed so far ({summary.get('photos_read', 0)}{of_all}) are kept in {folder.path}; the "
        f"reduced list is not written yet. To go on: reducer resume {folder.path}"
    )


def cluster_options(command: Command) -> Command:
    """Add the options of a command that needs a cluster."""
    for option in (
        click.option("--threads", type=int, help="Threads per worker.  [default: 1]"),
        click.option("--workers", type=int, help="Worker processes; 0 runs in this process.  [default: usable CPUs]"),
    ):
        command = option(command)
    return on_which_cluster(command)


def on_which_cluster(command: Command) -> Command:
    """Add the options that name a cluster."""
    for option in (
        click.option(
            "--cluster",
            metavar="FILE",
            is_eager=True,
            callback=read_cluster_file,
            help="Run on the cluster that this YAML file describes. What it says under 'job' are defaults; flags win.",
        ),
        click.option(
            "--address", metavar="URL", help="Run on the Dask scheduler at this address, e.g. tcp://10.0.0.1:8786."
        ),
    ):
        command = option(command)
    return command


def spec_of(cluster: ClusterSpec | None, address: str | None, workers: int | None, threads: int | None) -> ClusterSpec:
    """Return the place to run, from the options of `cluster_options`."""
    if source_of("cluster") is ParameterSource.DEFAULT_MAP and (address, workers, threads) != (None, None, None):
        cluster = None  # scripts/run_cluster.py names a file for those who say nothing else
    if address is not None and cluster is not None:
        raise click.UsageError("--address and --cluster exclude each other: give one")
    if cluster is not None and (workers is not None or threads is not None):
        raise click.UsageError("--cluster says where to run: leave --workers and --threads out")
    return cluster or ClusterSpec(workers=workers, threads=threads, address=address)


def photo_storage_options(command: Command) -> Command:
    """Add the storage options of IMAGES."""
    option = click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="How the URL of IMAGES is opened, such as endpoint_url=http://127.0.0.1:9000; may be given often. "
        "Without key and secret, the usual AWS credentials are looked for; anon=true for a public bucket.",
    )
    return option(command)


def manifest_storage_options(command: Command) -> Command:
    """Add the storage options of --manifest."""
    option = click.option(
        "--manifest-storage-option",
        "manifest_storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="The same for --manifest.",
    )
    return option(command)


def run_storage_options(command: Command) -> Command:
    """Add the storage options of the run folder."""
    option = click.option(
        "--output-storage-option",
        "output_storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="How the URL of RUN is opened, as --storage-option of `reducer run` says for IMAGES.",
    )
    return option(command)


def parsed_storage(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parse the storage options among the options of a command."""
    from reducer.storage.remote import parse_options

    return {
        name: parse_options("--" + name.removesuffix("s").replace("_", "-"), options[name])
        for name in STORAGE_OPTIONS
        if name in options
    }


def logging_options(command: Command) -> Command:
    """Add the options that set how much a command says."""
    for option in (
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="warning",
            show_default=True,
            help="What Reducer logs to stderr, and Dask for a LocalCluster that the run starts.",
        ),
        click.option("--quiet", is_flag=True, help="Print errors only."),
    ):
        command = option(command)
    return command


def cut_options(command: Command) -> Command:
    """Add the filters and budgets."""
    for option in (
        click.option(
            "--min-per-label",
            type=int,
            metavar="M",
            help="Photos that every label gets first of --total or --max-bytes.  [default: 1]",
        ),
        click.option(
            "--max-bytes",
            metavar="SIZE",
            help="Most bytes of the photos of all labels, such as 20GB (20 x 10^9): the most different first.",
        ),
        click.option("--total", type=int, metavar="N", help="Most photos of all labels: the most different first."),
        click.option(
            "--min-distance",
            type=float,
            metavar="BITS",
            help="Of each label only the first photo, and those at least so far from all that come before them.",
        ),
    ):
        command = option(command)
    return command


def embed_options(command: Command) -> Command:
    """Add the options for the input and output of a model."""
    for option in (
        click.option(
            "--embed-output", metavar="NAME", help="Which of its outputs holds the vectors.  [default: its one]"
        ),
        click.option(
            "--embed-batch", default=EMBED_BATCH, show_default=True, help="Photos that the model is given at a time."
        ),
        click.option(
            "--embed-std",
            default=",".join(map(str, EMBED_STD)),
            show_default=True,
            metavar="R,G,B",
            help="What their levels are divided by then.",
        ),
        click.option(
            "--embed-mean",
            default=",".join(map(str, EMBED_MEAN)),
            show_default=True,
            metavar="R,G,B",
            help="What is subtracted from their levels, 0 to 1, first.",
        ),
        click.option(
            "--embed-size",
            default=EMBED_SIZE,
            show_default=True,
            metavar="PIXELS",
            help="Side of the middle square of each photo that the model is given.",
        ),
    ):
        command = option(command)
    return command


def source_of(name: str) -> ParameterSource | None:
    """Return the source of an option's value: the command line, the cluster file or the default."""
    return click.get_current_context().get_parameter_source(name)


def log_to_stderr(level: str, quiet: bool = False) -> None:
    """Log messages of a level and above; `quiet` leaves warnings out unless another level asks for them."""
    level = "error" if quiet and level == "warning" else level
    logger = logging.getLogger("reducer")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
