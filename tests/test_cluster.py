"""Connecting to clusters, and what a failure leaves behind."""

from __future__ import annotations

import gc

import pytest
from distributed import Client

from reducer import ClusterSpec, InputError
from reducer.cluster import connect


def test_a_failed_connection_leaves_no_client_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is collected later, while another cluster starts, would stop that one from starting."""
    monkeypatch.setattr("reducer.cluster.CONNECT_TIMEOUT", 1)
    gc.disable()
    try:
        before = sum(isinstance(thing, Client) for thing in gc.get_objects())
        with (
            pytest.raises(InputError, match="no Dask scheduler answers") as caught,
            connect(ClusterSpec(address="tcp://127.0.0.1:1")),
        ):
            pass
        assert sum(isinstance(thing, Client) for thing in gc.get_objects()) <= before
        assert caught.value.__context__ is None
    finally:
        gc.enable()
