"""Addresses that are no scheduler, and clusters of another Python."""

from __future__ import annotations

import http.server
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from jobs import job_on

from reducer import ClusterSpec, InputError, reduce_images
from reducer.run.dask import connect
from reducer.run.dask.connect import _check_python


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(params=["mute", "http"])
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a port that takes connections and is no scheduler."""
    if request.param == "mute":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_that_is_no_scheduler_is_told_in_time(
    stranger: str,
    collection: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connect, "SIGN_OF_LIFE", 0.5)
    begun = time.monotonic()
    with pytest.raises(
        InputError, match=f"no Dask scheduler answers at {stranger}: .*another program's port|Timed out"
    ):
        reduce_images(job_on(collection, tmp_path / "run"), ClusterSpec(address=stranger, timeout=2), progress=False)
    assert time.monotonic() - begun < 10
    assert f"waiting for the scheduler at {stranger}, up to 2 s" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("who", ["scheduler", "workers"])
def test_another_python_is_refused_before_anything_is_sent(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        _check_python(client)
        get_versions = client.get_versions

        def of_another(**options: Any) -> Any:
            found: Any = get_versions(**options)
            others = [found["scheduler"]] if who == "scheduler" else found["workers"].values()
            for versions in others:
                versions["host"]["python"] = "3.99.1.final.0"
            return found

        monkeypatch.setattr(client, "get_versions", of_another)
        with pytest.raises(InputError, match=r"runs Python 3\.99, and this is Python 3\.\d+: .*Use Python 3\.99 here"):
            _check_python(client)


def test_workers_with_too_little_memory_are_refused(collection: Path, tmp_path: Path) -> None:
    kwargs = {"n_workers": 1, "memory_limit": "150MiB", "dashboard_address": None}
    spec = ClusterSpec(class_path="distributed.LocalCluster", kwargs=kwargs)
    with pytest.raises(InputError, match=r"may take 157\.3 MB of memory, .*: give each worker at least 400\.0 MB"):
        reduce_images(job_on(collection, tmp_path / "run"), spec, progress=False)


def test_a_limit_of_memory_is_told_where_a_cluster_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connect._limit_hint() == ""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (600_000_000, 600_000_000))
    assert "a process may take only 600.0 MB here (ulimit -v)" in connect._limit_hint()
