"""The one submit loop, on a cluster whose workers are threads."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from distributed import Client, LocalCluster

from reducer import ClusterError
from reducer.run.dask.pool import WINDOW, NothingCame, map_unordered


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def half(number: int, divisor: int) -> float:
    return number / (divisor if number != 5 else 0)


def test_items_are_read_as_there_is_room_for_them(client: Client) -> None:
    read = []

    def items() -> Iterator[int]:
        for number in range(40):
            read.append(number)
            yield number

    done = {}
    for outcome in map_unordered(client, half, items(), 2, name="half"):
        assert len(read) <= len(done) + 2 * WINDOW + 1
        done[outcome.item] = outcome
    assert sorted(done) == list(range(40))
    assert isinstance(done.pop(5).error, ZeroDivisionError)
    assert all(outcome.error is None and outcome.result == number / 2 for number, outcome in done.items())
    assert list(map_unordered(client, half, [], 2, name="half")) == []


def test_what_is_with_the_cluster_is_cancelled_when_nobody_wants_more(client: Client) -> None:
    outcomes = map_unordered(client, half, range(100), 2, name="half")
    next(outcomes)
    outcomes.close()
    stop = time.monotonic() + 10
    while client.futures and time.monotonic() < stop:
        time.sleep(0.05)
    assert not client.futures


def test_limits(client: Client) -> None:
    with pytest.raises(NothingCame):
        list(map_unordered(client, time.sleep, [3.0], name="sleep", patience=0.2))
    (worker,) = client.scheduler_info()["workers"]
    with pytest.raises(ClusterError, match=r"no worker has been there for 0.1 s \(workers: wait\), but for those left"):
        list(map_unordered(client, half, [1], 2, name="half", avoid=[worker], wait=0.1))
