"""Connecting to clusters, and what a failure leaves behind."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import Client, Worker, get_worker
from machine import ROOT
from waiting import wait_for

from reducer import ClusterError, ClusterSpec, InputError
from reducer.run.dask.check import _on_hosts
from reducer.run.dask.connect import _worth_saying, connect


def test_a_failed_connection_leaves_no_client_behind() -> None:
    """One that is collected later, while another cluster starts, would stop that one from starting."""

    def clients() -> int:
        # By type(): isinstance() asks a weak proxy for what it stands for, and raises where that is gone.
        return sum(issubclass(type(thing), Client) for thing in gc.get_objects())

    gc.disable()
    try:
        before = clients()
        with (
            pytest.raises(InputError, match="no Dask scheduler answers") as caught,
            connect(ClusterSpec(address="tcp://127.0.0.1:1", timeout=1)),
        ):
            pass
        assert clients() <= before
        assert caught.value.__context__ is None
    finally:
        gc.enable()


def test_what_a_worker_of_ours_says_when_the_client_stops() -> None:
    """Dask's own words, from its own code: a heartbeat to a scheduler that is gone."""
    source = inspect.getsource(Worker.heartbeat)
    said = re.findall(r'logger\.exception\("([^"]+)"\)', source)
    dropped = [text for text in said if not _worth_saying(logging.makeLogRecord({"msg": text}))]
    assert len(said) == 2
    assert len(dropped) == 1
    assert source.index("except OSError") < source.index(dropped[0]) < source.index("except Exception:")


def test_a_worker_that_goes_while_it_is_asked_is_left_out(dask_cluster: Callable[..., str]) -> None:
    with Client(dask_cluster(workers=2), set_as_default=False) as client:
        wait_for(lambda: len(client.nthreads()) == 2, "the workers")
        stays, goes = sorted(client.nthreads())
        workers_on, stop = {stays: [stays], goes: [goes]}, time.monotonic() + 60

        def answer(last: str) -> str:
            worker = str(get_worker().address)
            if worker == last:
                os._exit(1)
            return worker

        # Each answers for itself, and no other takes its place: not even the one that its nanny starts.
        assert _on_hosts(client, workers_on, stop, answer, "nobody") == {stays: stays, goes: goes}
        assert _on_hosts(client, workers_on, stop, answer, goes) == {stays: stays}
        busy = client.submit(time.sleep, 600, workers=[stays])
        with pytest.raises(ClusterError, match=r"do not answer in time \(workers: wait\)"):
            _on_hosts(client, {stays: [stays]}, time.monotonic() + 2, answer, "nobody")
        busy.cancel()


SHIPPED_TWICE = """
import asyncio, os, sys, types
from reducer.run.dask import code, ship_code

folder = sys.argv[1]

async def upload_file(filename, data, load):
    with open(os.path.join(folder, filename), "wb") as file:
        file.write(data)

server = types.SimpleNamespace(local_directory=folder, upload_file=upload_file)
files, real = code.package_files(), code.package_files
for version in (b"one", b"two"):
    code.package_files = ship_code.package_files = lambda: files | {"extra.txt": version}
    digest, data = code.digest_of_package(), ship_code.package_zip()
    code.package_files = real
    asyncio.run(ship_code.install(server, f"reducer-{digest}.zip", data, digest, "another process"))
    import reducer
    assert reducer.__file__.startswith(os.path.join(folder, f"reducer-{digest}.zip")), reducer.__file__
print(sum(entry.endswith(".zip") and entry.startswith(folder) for entry in sys.path))
"""


def test_code_of_earlier_runs_is_looked_for_no_more(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHIPPED_TWICE, str(tmp_path)]
    shown = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    assert shown.stdout == "1\n"
