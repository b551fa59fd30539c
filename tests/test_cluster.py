"""Connecting to clusters, and what a failure leaves behind."""

from __future__ import annotations

import gc
import inspect
import logging
import re

import pytest
from distributed import Client, Worker

from reducer import ClusterSpec, InputError
from reducer.cluster import _worth_saying, connect


def test_a_failed_connection_leaves_no_client_behind() -> None:
    """One that is collected later, while another cluster starts, would stop that one from starting."""
    gc.disable()
    try:
        before = sum(isinstance(thing, Client) for thing in gc.get_objects())
        with (
            pytest.raises(InputError, match="no Dask scheduler answers") as caught,
            connect(ClusterSpec(address="tcp://127.0.0.1:1", timeout=1)),
        ):
            pass
        assert sum(isinstance(thing, Client) for thing in gc.get_objects()) <= before
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
