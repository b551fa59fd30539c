"""Send our own code to workers that lack it or have another version of it.

What runs on a scheduler or worker here must not need this package there: it travels by value (cloudpickle) and imports
what it uses inside, from Python's own library.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import cloudpickle
from distributed.diagnostics.plugin import UploadFile

from reducer._version import __version__
from reducer.errors import ClusterError, InputError, one_line
from reducer.run.dask import code
from reducer.run.dask.code import code_digest, digest_of_package, package_files

if TYPE_CHECKING:
    from distributed import Client


#: Names this process, which has our code and is never to be changed, even if it is a worker itself.
HOME = uuid.uuid4().hex
#: Begins the name of the plugin of each run, before the digest of its code and its client.
PLUGIN = "reducer-code-"


def package_zip() -> bytes:
    """Pack the package into a zip file, the same to the byte whenever its files are."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(package_files().items()):
            archive.writestr(zipfile.ZipInfo(f"reducer/{name}", (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return content.getvalue()


async def install(server: Any, name: str, data: bytes, digest: str, home: str) -> None:
    """Make a scheduler or worker import this very code: its own if that is the same, else the zip file that is sent.

    Parameters
    ----------
    server : distributed.Scheduler or distributed.Worker
        The server in whose process this runs.
    name : str
        Name of the zip file.
    data : bytes
        The zip file.
    digest : str
        Digest of the code.
    home : str
        `HOME` of the client's process, in which nothing is to be done.
    """
    import importlib
    import os
    import re
    import sys

    if getattr(sys.modules.get("reducer.run.dask.ship_code"), "HOME", None) == home:
        return
    if getattr(sys.modules.get("reducer"), "_verified", None) == digest:
        return
    if digest_of_package() != digest:
        await server.upload_file(filename=name, data=data, load=False)
        # Versions that earlier runs have sent are looked for no more.
        sent = re.compile(r"reducer-[0-9a-f]+\.zip")
        sys.path[:] = [entry for entry in sys.path if not sent.fullmatch(os.path.basename(entry))]
        sys.path.insert(0, os.path.join(server.local_directory, name))
    # From here on nothing else may run: a long-lived process may hold another version than it would find now.
    for module in [module for module in sys.modules if module == "reducer" or module.startswith("reducer.")]:
        del sys.modules[module]
    importlib.invalidate_caches()
    if digest_of_package() != digest:
        raise RuntimeError(f"{name} has come, and another version of reducer is found all the same")
    importlib.import_module("reducer")._verified = digest  # type: ignore[attr-defined]


class ShipCode(UploadFile):
    """The worker's half of `Client.upload_file`, for workers that lack this very code; late joiners get it too."""

    def __init__(self, path: str, digest: str, home: str, client: str) -> None:
        super().__init__(path, load=False)
        self.name = f"{PLUGIN}{digest}-{client}"
        self.digest, self.home = digest, home

    async def setup(self, worker: Any) -> None:
        """Run on each worker that is there, and on each that joins."""
        await install(worker, self.filename, self.data, self.digest, self.home)


async def _install_on_scheduler(
    name: str, data: bytes, digest: str, home: str, plugin: str, dask_scheduler: Any = None
) -> str | None:
    """Return the client of a run that is under way with another version, instead of installing: both cannot work."""
    for other in dask_scheduler.worker_plugins:
        if str(other).startswith(plugin):
            other_digest, _, client = str(other).removeprefix(plugin).partition("-")
            if other_digest != digest and client in dask_scheduler.clients:
                return client
    await install(dask_scheduler, name, data, digest, home)
    return None


@contextmanager
def same_code(client: Client, ship_code: str) -> Iterator[None]:
    """Make the scheduler and all workers, late ones too, run the code that this process runs.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster.
    ship_code : {"auto", "never"}
        Send it where that very version is missing, or refuse.

    Raises
    ------
    InputError
        If a worker lacks it, and gets none or cannot load it.
    """
    sent = (sys.modules[__name__], code)
    for module in sent:
        cloudpickle.register_pickle_by_value(module)
    plugin = None
    try:
        if ship_code == "never":
            _refuse_others(client)
        else:
            plugin = _ship(client)
        for module in sent:
            cloudpickle.unregister_pickle_by_value(module)
        _check_imports(client)
        yield
    except ClusterError:
        plugin = None  # the scheduler may never answer again
        raise
    finally:
        for module in sent:
            with suppress(ValueError):  # done already
                cloudpickle.unregister_pickle_by_value(module)
        if plugin is not None:
            with suppress(Exception):  # the cluster may be gone
                client.unregister_worker_plugin(plugin)


def _ship(client: Client) -> str:
    """Send the code, and return the name of the plugin that serves late joiners."""
    digest = code_digest()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"reducer-{digest}.zip")
        with open(path, "wb") as file:
            file.write(package_zip())
        plugin = ShipCode(path, digest, HOME, client.id)
    try:
        other = client.run_on_scheduler(_install_on_scheduler, plugin.filename, plugin.data, digest, HOME, PLUGIN)
        if other is None:
            client.register_plugin(plugin, name=plugin.name)
            return plugin.name
    except OSError as error:
        raise ClusterError(f"a worker or the scheduler went away: {one_line(error)}; run this again") from None
    except Exception as error:
        raise InputError(
            f"our code could not be sent to the workers ({one_line(error)}): install reducer {__version__} "
            "where they run, and give workers: {ship_code: never}"
        ) from None
    raise InputError(
        f"another version of reducer is at work on this scheduler (client {other}): two cannot share its workers; wait "
        "for its end, or use the same version"
    )


def _refuse_others(client: Client) -> None:
    digests = {f"worker {worker}": digest for worker, digest in sorted(client.run(digest_of_package).items())}
    digests["the scheduler"] = client.run_on_scheduler(digest_of_package)
    for who, digest in digests.items():
        if digest != code_digest():
            what = "no reducer" if digest is None else f"another version of reducer than this one ({digest})"
            raise InputError(
                f"{who} has {what}: install reducer {__version__} ({code_digest()}) there, or leave "
                "workers: ship_code at auto"
            )


def _check_imports(client: Client) -> None:
    """Import now what tasks need, so that a package which is missing somewhere is found before the run."""
    answers: dict[str, Exception | None] = client.run(_import_all, on_error="return")
    failures = {f"worker {worker}": failure for worker, failure in sorted(answers.items())}
    try:
        client.run_on_scheduler(_import_all)
    except Exception as error:
        failures["the scheduler"] = error
    for who, failure in failures.items():
        if failure is not None:
            raise InputError(
                f"{who} cannot import what reducer needs ({one_line(failure)}): install reducer's "
                "dependencies where the scheduler and the workers run"
            )


def _import_all() -> None:
    import reducer.run.dask.worker  # noqa: F401
