"""Photos, manifests and run folders on S3: the same results as on a local disk, whatever the network does."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import faultproxy
import fsspec
import pytest
from commands import flags, invoke
from faultproxy import Fault, FaultProxy, Plan, one_in
from jobs import IN_PROCESS, READERS, SERIAL, ledger, reduced_files, run_on
from s3server import S3Server
from waiting import wait_for

import reducer.photos.reader
import reducer.run.dask.worker
from reducer import ClusterError, InputError, Job, reduce_images, resume
from reducer.api.result import Result
from reducer.config.resolved import resolve
from reducer.config.settings import Source
from reducer.errors import StoreError
from reducer.photos.reader import read_all
from reducer.photos.requests import PhotoFile
from reducer.run.folder import RunFolder
from reducer.run.plan.plan import make_plan
from reducer.run.tasks.tasks import PartitionTasks
from reducer.storage.location import Location
from reducer.storage.remote import parse_options
from reducer.storage.schemas import ListForm

#: Files that name the run or its times; columns in which the same photo differs on a disk and in a bucket.
OF_THE_RUN = {"summary.json", "plan.parquet"}
OF_THE_PLACE = ["path", "mtime", "etag"]


def s3_run(s3: S3Server, output: Path | str, endpoint: str | None = None, **others: Any) -> Result:
    """A serial run on the bucket, with the manifest there."""
    opened = s3.options(endpoint_url=endpoint or s3.endpoint)
    settings: dict[str, Any] = {
        "keep": 8,
        "manifest": "s3://trial/train.csv",
        "report": False,
        "storage_options": opened,
        "manifest_storage_options": s3.options(),
        **others,
    }
    return reduce_images(Job("s3://trial/train", str(output), **settings), SERIAL, progress=False)


def same_but_for_the_place(run: Path | Location, reference: Path | Location) -> bool:
    same = ledger(run).drop_columns(OF_THE_PLACE).equals(ledger(reference).drop_columns(OF_THE_PLACE))
    folders = [RunFolder(place if isinstance(place, Location) else str(place)) for place in (run, reference)]
    lists = [folder.lists.reduced(ListForm("id", "landmark_id")).drop_columns(["path"]) for folder in folders]
    return same and lists[0].equals(lists[1])


def photo_requests(proxy: FaultProxy) -> Counter[str]:
    """How often each photo was asked for."""
    paths = (unquote(path.partition("?")[0]) for method, path, _ in proxy.log if method == "GET")
    return Counter(path for path in paths if path.endswith(".jpg"))


def on_photos(plan: Plan) -> Plan:
    return lambda method, path, number: plan(method, path, number) if ".jpg" in path else None


@pytest.fixture(scope="module")
def local(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the local disk."""
    run = tmp_path_factory.mktemp("local") / "run"
    run_on(collection, run)
    return run


@pytest.fixture(scope="module")
def remote(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the bucket, without a fault."""
    run = tmp_path_factory.mktemp("remote") / "run"
    s3_run(s3, run)
    return run


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as started:
        yield started


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own."""
    name = "t" + re.sub("[^a-z0-9]", "", request.node.name.lower())[-40:]
    s3.make_bucket(name)
    return name


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(name)
    return name


# The same results


def test_a_bucket_gives_what_a_folder_gives(local: Path, s3: S3Server, tmp_path: Path, reader: str) -> None:
    s3_run(s3, tmp_path / "run", reader=reader)
    assert (tmp_path / "run" / "reduced.csv").read_bytes() == (local / "reduced.csv").read_bytes()
    assert same_but_for_the_place(tmp_path / "run", local)
    # The files say where the photos are, in the form that was given.
    assert all(path.startswith("s3://trial/train/") for path in ledger(tmp_path / "run")["path"].to_pylist())


def test_the_manifest_may_be_elsewhere(
    collection: Path, remote: Path, s3: S3Server, tmp_path: Path, reader: str
) -> None:
    # On the disk, with the photos in the bucket; and the column of paths may name photos anywhere.
    local_manifest = str(collection / "train.csv")
    s3_run(s3, tmp_path / "local", manifest=local_manifest, manifest_storage_options={}, reader=reader)
    assert reduced_files(tmp_path / "local") == reduced_files(remote)
    header, *lines = (collection / "train.csv").read_text().splitlines()
    paths = ["/".join((*line[:3], line.split(",")[0])) + ".jpg" for line in lines]
    places = ("s3://trial/train/", f"{collection}/train/", "")
    rows = [f"{line},{places[i % 3]}{path}" for i, (line, path) in enumerate(zip(lines, paths, strict=True))]
    (tmp_path / "paths.csv").write_text("\n".join([f"{header},path", *rows]) + "\n")
    settings = {"manifest": str(tmp_path / "paths.csv"), "manifest_storage_options": {}, "path_column": "path"}
    s3_run(s3, tmp_path / "mixed", reader=reader, **settings)
    assert same_but_for_the_place(tmp_path / "mixed", remote)


def test_a_bucket_without_a_manifest_is_listed_as_a_folder_is(
    collection: Path, s3: S3Server, tmp_path: Path, reader: str
) -> None:
    run_on(collection, tmp_path / "local", manifest=None)
    s3_run(s3, tmp_path / "run", manifest=None, manifest_storage_options={}, reader=reader)
    assert (tmp_path / "run" / "reduced.csv").read_bytes() == (tmp_path / "local" / "reduced.csv").read_bytes()
    # Photos that are not read have their size too, from the listing.
    assert ledger(tmp_path / "run")["bytes"].null_count == 0
    assert same_but_for_the_place(tmp_path / "run", tmp_path / "local")


def test_any_name_that_a_file_may_have_is_found_and_read(
    collection: Path, s3: S3Server, bucket: str, tmp_path: Path, reader: str
) -> None:
    photos = sorted((collection / "train").rglob("*.jpg"))
    names = ["a b.jpg", "é.jpg", "1+1.jpg", "100%.jpg", "%20.jpg", "#1.jpg", "what?.jpg", "a&b=c.JPG", "top.jpg"]
    folder = tmp_path / "photos"
    for name, photo in zip(names, photos, strict=False):
        path = folder / ("" if name == "top.jpg" else "label é + %") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.read_bytes())
    for name in (".hidden.jpg", "notes.txt"):
        (folder / name).write_bytes(b"no photo")
    s3.upload_folder(folder, bucket, "odd/")
    s3.client().put_object(Bucket=bucket, Key="odd/marker/", Body=b"")  # as consoles do it: "a folder"
    given: dict[str, Any] = {"rank_all": True, "keep": 4}
    reduce_images(Job(str(folder), str(tmp_path / "local"), **given), SERIAL, progress=False)
    job = Job(f"s3://{bucket}/odd/", str(tmp_path / "run"), storage_options=s3.options(), reader=reader, **given)
    summary = reduce_images(job, SERIAL, progress=False).summary
    assert (summary["photos_read"], summary["photos_failed"]) == (len(names), 0)
    assert summary["manifest"]["skipped_files"]["hidden file"] == 1
    assert same_but_for_the_place(tmp_path / "run", tmp_path / "local")


def test_the_ledger_has_what_the_bucket_says(s3: S3Server, tmp_path: Path, reader: str) -> None:
    rows = s3_run(s3, tmp_path / "run", reader=reader, rank_all=True, limit_labels=6).images
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket="trial", Prefix="train/")
    listed = {f"s3://trial/{entry['Key']}": entry for page in pages for entry in page["Contents"]}
    assert len(rows) > 50
    for row in rows.itertuples():
        entry = listed[row.path]
        assert (row.etag, row.bytes) == (entry["ETag"].strip('"'), entry["Size"])
        # The head of an answer knows whole seconds.
        assert int(row.mtime.timestamp()) == int(entry["LastModified"].timestamp())


def test_a_dry_run_reads_a_sample_from_the_bucket(s3: S3Server, reader: str) -> None:
    paths = ["s3://trial/train", "--manifest", "s3://trial/train.csv", "--output", "s3://trial/never", "--keep", 8]
    every = [part for name in ("", "manifest-", "output-") for part in flags(s3.options(), f"--{name}storage-option")]
    code, out, err = invoke("run", *paths, *every, "--workers", 0, "--reader", reader, "--dry-run")
    assert (code, err) == (0, "")
    assert re.search(r"photos to read: \d+, about \d+\.\d MB", out)
    assert "failed" not in out
    assert s3.list_keys("trial", "never") == []


def test_any_other_url_goes_the_same_way(collection: Path, local: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{collection}/train", "/trial/train", recursive=True)
    memory.put(f"{collection}/train.csv", "/trial/train.csv")
    try:
        job = Job("memory://trial/train", "memory://trial/run", manifest="memory://trial/train.csv", keep=8)
        reduce_images(job, SERIAL, progress=False)
        assert memory.cat_file("/trial/run/reduced.csv") == (local / "reduced.csv").read_bytes()
        assert same_but_for_the_place(job.output_location, local)
        run_on(collection, tmp_path / "local", manifest=None)
        job = Job("memory://trial/train", str(tmp_path / "run"), keep=8)
        reduce_images(job, SERIAL, progress=False)
        assert same_but_for_the_place(tmp_path / "run", tmp_path / "local")
    finally:
        memory.rm("/trial", recursive=True)


# A network that fails


@pytest.mark.parametrize("kind", ["reset", "truncate", "status-503", "status-500", "refuse"])
def test_a_request_that_fails_is_made_again(
    remote: Path, s3: S3Server, proxy: FaultProxy, tmp_path: Path, reader: str, kind: Any
) -> None:
    proxy.plan = on_photos(one_in(8, kind))
    summary = s3_run(s3, tmp_path / "run", proxy.endpoint, reader=reader).summary
    asked, faults = photo_requests(proxy), proxy.counts[kind]
    assert faults >= 0.05 * summary["photos_read"]
    assert asked.total() == summary["photos_read"] + faults
    assert Counter(asked.values()) == {1: summary["photos_read"] - faults, 2: faults}
    assert reduced_files(tmp_path / "run") == reduced_files(remote)
    assert ledger(tmp_path / "run").equals(ledger(remote))


def test_a_request_that_fails_for_ever_is_a_failed_photo(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reducer.storage.remote.RETRY_SECONDS", 0.5)
    proxy.plan = on_photos(one_in(8, "status-503", attempts=1000))
    result = s3_run(s3, tmp_path / "run", proxy.endpoint, reader=reader, limit_labels=2, max_failures=1.0)
    failed = result.images[result.images.reason == "failed"]
    assert 0 < len(failed) == result.summary["photos_failed"] < result.summary["photos_read"]
    assert failed.error.str.startswith("unreadable: ").all()
    assert not failed.error.str.contains("\n").any()
    assert photo_requests(proxy).most_common(1)[0][1] >= 2


def test_an_object_that_is_not_there_is_asked_for_once(
    collection: Path, local: Path, s3: S3Server, proxy: FaultProxy, tmp_path: Path, reader: str
) -> None:
    content = (collection / "train.csv").read_text()
    label = content.splitlines()[1].split(",")[1]
    (tmp_path / "train.csv").write_text(f"{content}feedbeef,{label}\n")
    given = {"manifest": str(tmp_path / "train.csv"), "manifest_storage_options": {}, "rank_all": True}
    rows = s3_run(s3, tmp_path / "run", proxy.endpoint, reader=reader, labels=(label,), **given).images
    row = rows.set_index("id").loc["feedbeef"]
    assert (row.reason, row.kept) == ("failed", False)
    assert row.error.startswith("missing: ")
    assert (rows.reason == "failed").sum() == 1
    assert photo_requests(proxy)["/trial/train/f/e/e/feedbeef.jpg"] == 1


def test_credentials_that_are_wrong_end_the_run_and_no_photo_fails(
    collection: Path,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    reader: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As when a key is taken back between the look at the bucket and the first photo.
    monkeypatch.setattr("reducer.run.plan.plan.find_shards", lambda job: None)
    monkeypatch.setattr("reducer.run.plan.listing._check_remote", lambda place: None)
    wrong = s3.options(endpoint_url=proxy.endpoint, secret="a-planted-wrong-secret")
    given: dict[str, Any] = {"manifest": str(collection / "train.csv"), "limit_labels": 4, "max_failures": 1.0}
    job = Job("s3://trial/train", str(tmp_path / "run"), keep=8, storage_options=wrong, reader=reader, **given)
    with pytest.raises(StoreError, match=r"SignatureDoesNotMatch|credentials no more|reducer resume") as caught:
        reduce_images(job, SERIAL, progress=False)
    assert "a-planted-wrong-secret" not in str(caught.value)
    assert s3.secret not in str(caught.value)
    assert set(photo_requests(proxy).values()) == {1}
    assert ledger(tmp_path / "run").num_rows == 0


ENDINGS = {
    "expired": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    "unknown key": ("403 Forbidden", "InvalidAccessKeyId", "The key is not known."),
    "clock": ("403 Forbidden", "RequestTimeTooSkewed", "The time is too far off."),
    "refused": ("403 Forbidden", "AccessDenied", "Access Denied"),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_access_that_ends_in_a_run_ends_it_and_it_goes_on_later(
    s3: S3Server,
    remote: Path,
    proxy: FaultProxy,
    tmp_path: Path,
    reader: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(faultproxy.ERRORS, "status-500", ENDINGS[how])
    counted = itertools.count()

    def plan(method: str, path: str, number: int) -> Fault | None:
        return Fault("status-500") if ".jpg" in path and next(counted) >= 60 else None

    proxy.plan = plan
    with pytest.raises(StoreError, match=f"reducer resume {tmp_path / 'run'}"):
        s3_run(s3, tmp_path / "run", proxy.endpoint, partition_images=20, reader=reader)
    assert "failed" not in set(ledger(tmp_path / "run")["reason"].to_pylist())
    proxy.plan = None
    given = {"storage_options": s3.options(), "manifest_storage_options": s3.options()}
    resume(tmp_path / "run", SERIAL, progress=False, **given)
    assert reduced_files(tmp_path / "run") == reduced_files(remote)


def test_one_key_that_is_refused_is_that_photos_fault(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(faultproxy.ERRORS, "status-500", ENDINGS["refused"])
    system = fsspec.filesystem("s3", **s3.options(skip_instance_cache=True))
    photos = sorted(system.find("trial/train"))
    names = {Path(photos[number]).name for number in (0, 100, 200)}  # the first of all among them
    proxy.plan = lambda method, path, number: (
        Fault("status-500") if Path(path.partition("?")[0]).name in names else None
    )
    result = s3_run(s3, tmp_path / "run", proxy.endpoint, rank_all=True, reader=reader)
    failed = result.images[result.images["reason"] == "failed"]
    assert {f"{photo}.jpg" for photo in failed["id"]} == names
    assert failed["error"].str.startswith("unreadable: access is refused").all()


def test_a_store_that_is_gone_ends_the_run(
    s3: S3Server, remote: Path, proxy: FaultProxy, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reducer.storage.remote.RETRY_SECONDS", 3.0)
    counted = itertools.count()
    proxy.plan = lambda method, path, number: Fault("refuse") if ".jpg" in path and next(counted) >= 60 else None
    with pytest.raises(StoreError, match="the store gives no photo, not even one that was read before"):
        s3_run(s3, tmp_path / "run", proxy.endpoint, partition_images=20, reader=reader)
    assert "failed" not in set(ledger(tmp_path / "run")["reason"].to_pylist())


def test_workers_tell_that_the_store_takes_the_credentials_no_more(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(faultproxy.ERRORS, "status-500", ENDINGS["expired"])
    counted = itertools.count()
    proxy.plan = lambda method, path, number: Fault("status-500") if ".jpg" in path and next(counted) >= 60 else None
    given: dict[str, Any] = {"manifest": "s3://trial/train.csv", "manifest_storage_options": s3.options()}
    opened = s3.options(endpoint_url=proxy.endpoint)
    job = Job("s3://trial/train", str(tmp_path / "run"), storage_options=opened, reader=reader, rank_all=True, **given)
    with pytest.raises(StoreError, match="the store takes the credentials no more"):
        reduce_images(job, IN_PROCESS, progress=False)
    assert "failed" not in set(ledger(tmp_path / "run")["reason"].to_pylist())


def test_colons_in_keys_and_paths_are_no_chain(
    photos: dict[str, bytes], s3: S3Server, bucket: str, tmp_path: Path, reader: str
) -> None:
    client = s3.client()
    names = ["a/0 gothic::church.jpg", "a/[1].jpg", "a/2.jpg", "b::c/3.jpg", "b::c/4.jpg", "b::c/5 ü+%20.jpg"]
    for name, content in zip(names, photos.values(), strict=False):
        client.put_object(Bucket=bucket, Key=f"photos::of/{name}", Body=content)
        path = tmp_path / "photos::of [1]" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    given: dict[str, Any] = {"keep": 2, "report": False}
    stored = Job(
        f"s3://{bucket}/photos::of", str(tmp_path / "a::b"), storage_options=s3.options(), reader=reader, **given
    )
    result = reduce_images(stored, SERIAL, progress=False)
    assert result.summary["failures"] == {}
    assert set(result.images["id"]) == set(names)
    local = reduce_images(Job(str(tmp_path / "photos::of [1]"), str(tmp_path / "c"), **given), SERIAL, progress=False)
    assert local.images["hash"].equals(result.images["hash"])
    assert (tmp_path / "a::b" / "reduced.csv").read_bytes() == (tmp_path / "c" / "reduced.csv").read_bytes()


def test_both_readers_find_the_store_as_aws_tools_do(
    s3: S3Server, remote: Path, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / ".aws"
    home.mkdir(parents=True)
    (home / "config").write_text(f"[profile lab]\nendpoint_url = {s3.endpoint}\nregion = eu-central-1\n")
    (home / "credentials").write_text(f"[lab]\naws_access_key_id = {s3.key}\naws_secret_access_key = {s3.secret}\n")
    code = (
        "import sys; from reducer import ClusterSpec, Job, reduce_images\n"
        "run, reader, *profile = sys.argv[1:]\n"
        "opened = {'profile': profile[0]} if profile else {}\n"
        "job = Job('s3://trial/train', run, manifest='s3://trial/train.csv', keep=8, report=False, reader=reader,\n"
        "    storage_options=opened, manifest_storage_options=opened)\n"
        "reduce_images(job, ClusterSpec(workers=0), progress=False)\n"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    keys = {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret, "AWS_ENDPOINT_URL": s3.endpoint}
    for name, environment, profile in (
        ("env", plain | keys, []),
        ("profile", plain | {"HOME": str(tmp_path / "home")}, ["lab"]),
    ):
        command = [sys.executable, "-c", code, str(tmp_path / name), reader, *profile]
        subprocess.run(command, check=True, timeout=60, env=environment)
        assert reduced_files(tmp_path / name) == reduced_files(remote)


def test_photos_stay_in_order_and_at_most_so_many_are_under_way(
    remote: Path, s3: S3Server, proxy: FaultProxy, tmp_path: Path, reader: str
) -> None:
    under_way: list[int] = []

    def watch(method: str, path: str, number: int) -> None:
        if ".jpg" in path:
            under_way.append(proxy.counts["GET"] - sum(entry[0] == "GET" for entry in list(proxy.log)))

    proxy.plan, proxy.delay_get = watch, 0.04
    summary = s3_run(s3, tmp_path / "run", proxy.endpoint, reader=reader, read_ahead=4).summary
    assert len(under_way) == summary["photos_read"]
    assert max(under_way) == 4
    assert reduced_files(tmp_path / "run") == reduced_files(remote)
    assert ledger(tmp_path / "run").equals(ledger(remote))


# Memory


def test_the_budget_is_kept_but_for_the_photo_that_is_next_up() -> None:
    async def race() -> None:
        budget = reducer.photos.reader._Budget(100)
        draw = random.Random(0)
        sizes = [draw.choice((1, 30, 60, 100, 250)) for _ in range(200)]
        hashed = 0
        peak = 0
        ready = [asyncio.Event() for _ in sizes]

        async def read(number: int) -> None:
            nonlocal peak
            await asyncio.sleep(draw.random() / 1000)
            await budget.take(sizes[number], lambda: number <= hashed)
            assert budget.used <= budget.limit or number <= hashed
            peak = max(peak, budget.used)
            ready[number].set()

        readers = [asyncio.create_task(read(number)) for number in range(len(sizes))]
        for number, size in enumerate(sizes):
            await ready[number].wait()
            hashed += 1
            await budget.give_back(size)
        await asyncio.gather(*readers)
        assert budget.used == 0
        assert peak <= budget.limit + max(sizes)

    asyncio.run(asyncio.wait_for(race(), 20))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[int]]]:
    """Set the budget; gives a list that grows by the bytes in use."""
    used: list[int] = []

    class Watched(reducer.photos.reader._Budget):
        async def take(self, size: int, next_up: Callable[[], bool]) -> None:
            await super().take(size, next_up)
            used.append(self.used)

    def limit(size: int) -> list[int]:
        monkeypatch.setattr(reducer.photos.reader, "READ_AHEAD_BYTES", size)
        monkeypatch.setattr(reducer.photos.reader, "_Budget", Watched)
        reducer.photos.reader._shared.cache_clear()
        return used

    yield limit
    reducer.photos.reader._shared.cache_clear()


@pytest.mark.parametrize("limit", [1, 200_000])
def test_photos_that_wait_to_be_hashed_take_little_memory(
    remote: Path,
    s3: S3Server,
    tmp_path: Path,
    reader: str,
    little_memory: Callable[[int], list[int]],
    limit: int,
) -> None:
    used = little_memory(limit)
    result = s3_run(s3, tmp_path / "run", reader=reader)
    assert len(used) == result.summary["photos_read"]
    # The photo that is next up may be taken before the one just hashed is given back.
    assert max(used) <= limit + 2 * result.images.bytes.max()
    assert reducer.photos.reader._shared().budget.used == 0
    assert reduced_files(tmp_path / "run") == reduced_files(remote)


# What is wrong before a run begins

ADVICE = {
    "refused": "Access is refused: check the credentials",
    "bucket": "Check the bucket's name, the region and the endpoint_url",
    "server": "Check the endpoint_url and the region, and that the server is up",
}


def free_port() -> int:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port: int = nobody.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("where", "wrong", "advice"),
    [
        *((where, "key", "refused") for where in ("IMAGES", "--manifest", "--output")),
        *((where, "secret", "refused") for where in ("IMAGES", "--manifest", "--output")),
        *((where, "anonymous", "refused") for where in ("IMAGES", "--manifest", "--output")),
        *((where, "bucket", "bucket") for where in ("IMAGES", "--manifest", "--output")),
        *((where, "object", "") for where in ("IMAGES", "--manifest")),
        ("IMAGES", "server", "server"),
    ],
)
def test_what_is_wrong_with_a_place_is_said_before_the_start(
    s3: S3Server, tmp_path: Path, where: str, wrong: str, advice: str
) -> None:
    changed: dict[str, dict[str, Any]] = {
        "key": {"key": "a-planted-key"},
        "secret": {"secret": "a-planted-secret"},
        "anonymous": {"anon": True},
        "server": {"endpoint_url": f"http://127.0.0.1:{free_port()}"},
    }
    given = s3.options(**changed.get(wrong, {}))
    if wrong == "anonymous":
        del given["key"], given["secret"]
    places = {"IMAGES": "s3://trial/train", "--manifest": "s3://trial/train.csv", "--output": "s3://trial/wrong"}
    if wrong in ("bucket", "object"):
        places[where] = {"bucket": "s3://nowhere/at-all", "object": "s3://trial/nothing-here"}[wrong]
    if where != "--output":
        places["--output"] = str(tmp_path / "run")
    every: list[str] = []
    for name, prefix in (("IMAGES", "--"), ("--manifest", "--manifest-"), ("--output", "--output-")):
        if "://" in places[name]:
            every += flags(given if name == where else s3.options(), f"{prefix}storage-option")
    paths = [places["IMAGES"], "--manifest", places["--manifest"], "--output", places["--output"], "--workers", 0]
    begin = time.monotonic()
    code, out, err = invoke("run", *paths, *every)
    print(f"{where}, {wrong}, {time.monotonic() - begin:.1f} s: {err}")
    assert (code, out) == (2, "")
    assert time.monotonic() - begin < 30
    assert f"{where} {places[where]}" in err
    assert ADVICE.get(advice, "") in err
    assert err.count("\n") == 1
    for secret in (s3.secret, "a-planted-key", "a-planted-secret"):
        assert secret not in err
    assert not (tmp_path / "run").exists()


def test_a_read_only_key_is_told_of_before_the_first_photo(s3: S3Server, bucket: str, proxy: FaultProxy) -> None:
    read_only = s3.options(key=s3.ro_key, secret=s3.ro_secret)
    output = {"output": f"s3://{bucket}/run", "output_storage_options": read_only}
    with pytest.raises(InputError, match=rf"the run folder s3://{bucket}/run cannot be used") as caught:
        s3_run(s3, endpoint=proxy.endpoint, **output)
    assert s3.ro_secret not in str(caught.value)
    assert photo_requests(proxy).total() == 0
    assert s3.list_keys(bucket) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--storage-option", "a-planted-value"], "--storage-option: expected KEY=VALUE"),
        (["--storage-option", "=a-planted-value"], "--storage-option: expected KEY=VALUE"),
        (["--manifest-storage-option", "a-planted-value"], "--manifest-storage-option: expected KEY=VALUE"),
        (["--output-storage-option", "a-planted-value"], "--output-storage-option: expected KEY=VALUE"),
        (
            ["--storage-option", "secret=a-planted-value", "--storage-option", "secret=a-planted-value"],
            "--storage-option secret is given twice",
        ),
        (["--storage-option", "client_kwargs={a-planted-value"], "--storage-option client_kwargs: the value begins"),
        (["--output-storage-option", "secret=a-planted-value"], "--output-storage-option says how a URL is opened"),
        (["--manifest-storage-option", "secret=a-planted-value"], "--manifest-storage-option says how a URL is opened"),
        (
            ["--reader", "obstore", "--storage-option", 'client_kwargs={"a": "a-planted-value"}'],
            "--reader obstore has no storage option 'client_kwargs'",
        ),
        (["--reader", "a-reader"], "--reader"),
        (["--read-ahead", "0"], "--read-ahead is 0: expected a whole number of 1 or more"),
        (["--storage-option", "no_such_option=a-planted-value"], "IMAGES s3://trial/train"),
    ],
)
def test_options_that_are_wrong_are_exit_2_and_not_repeated(tmp_path: Path, given: list[str], message: str) -> None:
    pytest.importorskip("obstore")
    code, out, err = invoke("run", "s3://trial/train", "--output", tmp_path / "run", "--workers", 0, *given)
    assert (code, out) == (2, "")
    assert message in err
    assert "a-planted-value" not in err
    assert not (tmp_path / "run").exists()


def test_options_of_a_local_folder_are_refused(collection: Path, tmp_path: Path) -> None:
    given = ["--output", tmp_path / "run", "--storage-option", "key=a-planted-value"]
    code, out, err = invoke("run", collection / "train", *given)
    assert (code, out) == (2, "")
    assert "--storage-option says how a URL is opened, and IMAGES is none" in err
    assert "a-planted-value" not in err


def test_option_values_are_text_but_for_true_false_and_braces() -> None:
    pairs = ["a=true", "b=false", 'c={"x": 1}', "d=1", "e=True", "f=null", "g=", "h=x=y", "i=[1]", 'j="x"']
    assert parse_options("--storage-option", pairs) == {
        **{"a": True, "b": False, "c": {"x": 1}, "d": "1", "e": True},
        **{"f": "null", "g": "", "h": "x=y", "i": "[1]", "j": '"x"'},
    }
    assert parse_options("--storage-option", []) == {}


@pytest.mark.parametrize(
    ("text", "value"), [("False", False), ("no", False), ("0", False), ("TRUE", True), ("on", True)]
)
def test_options_that_are_true_or_false_take_the_usual_spellings(text: str, value: bool) -> None:
    assert parse_options("--storage-option", [f"anon={text}", f"use_ssl={text}"]) == {"anon": value, "use_ssl": value}


def test_an_option_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(InputError, match="--storage-option anon: expected true or false"):
        parse_options("--storage-option", ["anon=maybe"])


def test_what_is_no_url_to_open_is_told(tmp_path: Path) -> None:
    for url in ("nonsense://trial/train", "ftps-no://x"):
        code, _, err = invoke("run", url, "--output", tmp_path / "run", "--workers", 0)
        assert code == 2
        assert f"{url} cannot be" in err
        assert "Traceback" not in err


# Secrets


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def planted(s3: S3Server, **others: Any) -> dict[str, Any]:
    """Options with one more secret, further in; the server's key is a word that stands everywhere."""
    return s3.options(config_kwargs={"user_agent_extra": "a-planted-value"}, **others)


def hidden(s3: S3Server, *texts: str | bytes) -> bool:
    """Whether none of the texts holds a secret."""
    found = [text if isinstance(text, bytes) else text.encode() for text in texts]
    # Among options the key would stand in quotes, or behind its name.
    shown = (s3.secret, "a-planted-value", f"'key': '{s3.key}'", f"key={s3.key}", f"key='{s3.key}'")
    return not any(secret.encode() in text for secret in shown for text in found)


def content_of(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in files(run)]


def test_no_secret_is_shown_or_stored_and_workers_give_the_same(
    remote: Path, s3: S3Server, bucket: str, tmp_path: Path, clean_env: dict[str, str]
) -> None:
    output = f"s3://{bucket}/run"
    command = [sys.executable, "-m", "reducer", "run", "s3://trial/train", "--manifest", "s3://trial/train.csv"]
    command += ["--output", output, "--keep", "8", "--workers", "2", "--partition-images", "40"]
    command += ["--no-report", "--log-level", "debug"]
    for prefix in ("--", "--manifest-", "--output-"):
        command += flags(planted(s3), f"{prefix}storage-option")
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=clean_env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hidden(s3, done.stdout, done.stderr)
    client = s3.client()
    stored = {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in s3.list_keys(bucket)}
    assert {"run/summary.json", "run/reduced.csv", "run/reduced.parquet"} < set(stored)
    assert hidden(s3, *stored.values(), str(ledger(Location(output, s3.options())).to_pydict()))
    job = json.loads(stored["run/summary.json"])["job"]
    for name in ("storage_options", "manifest_storage_options", "output_storage_options"):
        assert job[name] == ["config_kwargs", "endpoint_url", "key", "secret"]
    for name, content in reduced_files(remote).items():
        assert stored[f"run/{name}"] == content
    assert ledger(Location(output, s3.options())).equals(ledger(remote))
    assert list(tmp_path.iterdir()) == []


def test_no_secret_is_in_a_repr_or_a_local_run(s3: S3Server, tmp_path: Path) -> None:
    every = {f"{name}storage_options": planted(s3) for name in ("", "manifest_", "output_")}
    job = Job("s3://trial/train", "s3://trial/run", manifest="s3://trial/train.csv", keep=8, **every)
    plan = make_plan(resolve(job))
    task = PartitionTasks(plan.job, plan.numbered(1).partitions()).task(0)
    shown = [
        repr(thing) for thing in (job, task, task.source, plan, job.images_location, RunFolder(job.output_location))
    ]
    assert hidden(s3, *shown)
    every = {name: given for name, given in every.items() if name != "output_storage_options"}
    s3_run(s3, tmp_path / "run", limit_labels=3, **every)
    assert hidden(s3, *content_of(tmp_path / "run"))


def test_no_secret_is_shown_when_a_partition_fails_on_a_cluster(
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(reducer.run.dask.worker, "run_partition", breaks)
    every = {f"{name}storage_options": planted(s3) for name in ("", "manifest_")}
    job = Job("s3://trial/train", str(tmp_path / "run"), manifest="s3://trial/train.csv", keep=8, **every)
    with pytest.raises(ClusterError, match="RuntimeError: a bug") as caught:
        reduce_images(job, IN_PROCESS, progress=False)
    shown = capfd.readouterr()
    assert "a bug" in shown.err + caplog.text
    assert hidden(s3, shown.out, shown.err, caplog.text, str(caught.value), repr(caught.getrepr(style="long")))
    assert hidden(s3, *content_of(tmp_path / "run"))


# Run folders in a bucket


def stored_in(s3: S3Server, bucket: str, prefix: str = "run/") -> dict[str, bytes]:
    client = s3.client()
    return {
        key.removeprefix(prefix): client.get_object(Bucket=bucket, Key=key)["Body"].read()
        for key in s3.list_keys(bucket, prefix)
    }


def test_a_run_folder_in_a_bucket_is_that_on_a_disk(remote: Path, s3: S3Server, bucket: str) -> None:
    result = s3_run(s3, f"s3://{bucket}/deep/run", output_storage_options=s3.options())
    stored = stored_in(s3, bucket, "deep/run/")
    on_disk = {path.relative_to(remote).as_posix(): path.read_bytes() for path in files(remote)}
    assert set(stored) == set(on_disk)
    for name in set(stored) - OF_THE_RUN:
        assert stored[name] == on_disk[name], name
    assert s3.list_keys(bucket) == sorted(f"deep/run/{name}" for name in stored)
    assert json.loads(stored["summary.json"]) == result.summary
    assert (result.output, result.summary["status"]) == (f"s3://{bucket}/deep/run", "done")
    assert len(result.reduced) == result.summary["photos_kept"]


def test_a_run_in_a_bucket_is_replaced_only_when_asked(s3: S3Server, bucket: str) -> None:
    output = f"s3://{bucket}/run"
    given: dict[str, Any] = {"limit_labels": 4, "output_storage_options": s3.options()}
    s3_run(s3, output, partition_images=10, **given)
    client = s3.client()
    client.put_object(Bucket=bucket, Key="run/notes.txt", Body=b"mine")
    client.put_object(Bucket=bucket, Key="run/images/notes.txt", Body=b"mine")
    client.put_object(Bucket=bucket, Key="run2/notes.txt", Body=b"a neighbour")
    before = stored_in(s3, bucket, "")
    with pytest.raises(InputError, match=f"--output {output} holds a run with other settings: --seed.*--overwrite"):
        s3_run(s3, output, seed=1, **given)
    s3_run(s3, output, **given)  # the same again shows what is there
    assert stored_in(s3, bucket, "") == before
    s3_run(s3, output, keep=2, format="csv", overwrite=True, **{**given, "limit_labels": 2})
    after = stored_in(s3, bucket, "")
    others = {"run/notes.txt", "run/images/notes.txt", "run2/notes.txt"}
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    parts = {name for name in after if name.startswith("run/images/part-")}
    assert set(after) == others | parts | {"run/summary.json", "run/plan.parquet", "run/reduced.csv"}
    assert 0 < len(parts) < sum(name.startswith("run/images/part-") for name in before)
    assert after["run/reduced.csv"] != before["run/reduced.csv"]


@pytest.mark.parametrize("key", ["notes.txt", "sub/deep.txt", "summary.json"])
def test_a_prefix_that_holds_something_else_is_not_touched(s3: S3Server, bucket: str, key: str) -> None:
    prefix = key.partition(".")[0]
    s3.client().put_object(Bucket=bucket, Key=f"{prefix}/run/{key}", Body=b'{"mine": 1}')
    before = stored_in(s3, bucket, "")
    output = {"output_storage_options": s3.options(), "overwrite": True, "limit_labels": 2}
    with pytest.raises(InputError, match="is not empty and is no run folder"):
        s3_run(s3, f"s3://{bucket}/{prefix}/run", **output)
    assert {name: content for name, content in stored_in(s3, bucket, "").items() if prefix in name} == {
        name: content for name, content in before.items() if prefix in name
    }


@pytest.mark.parametrize("kind", ["status-500", "reset"])
def test_a_put_that_fails_is_made_again(
    s3: S3Server, bucket: str, proxy: FaultProxy, kind: Any, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"limit_labels": 2, "partition_images": 40}
    s3_run(s3, tmp_path / "run", **given)
    proxy.plan = one_in(1, kind, ["PUT"])
    opened = s3.options(endpoint_url=proxy.endpoint)
    s3_run(s3, f"s3://{bucket}/run", output_storage_options=opened, **given)
    stored = stored_in(s3, bucket)
    # The first and the last summary have one path, and so one fault; and there was a lock.
    assert proxy.counts[kind] == len(stored) + 1 >= 5
    on_disk = {path.relative_to(tmp_path / "run").as_posix(): path.read_bytes() for path in files(tmp_path / "run")}
    assert set(stored) == set(on_disk)
    for name in set(stored) - OF_THE_RUN:
        assert stored[name] == on_disk[name], name
    assert json.loads(stored["summary.json"])["status"] == "done"


# Last, as it takes the server of all tests away for a while


def test_a_server_that_is_killed_and_comes_again_costs_time_and_nothing_else(
    collection: Path, s3: S3Server, tmp_path: Path
) -> None:
    header, *lines = (collection / "train.csv").read_text().splitlines()
    rows = [f"{line}-{i}" for i in range(2) for line in lines]
    (tmp_path / "train.csv").write_text("\n".join([header, *rows]) + "\n")
    given = {"manifest": str(tmp_path / "train.csv"), "manifest_storage_options": {}, "partition_images": 40}
    s3_run(s3, tmp_path / "reference", **given)
    killed: list[float] = []

    def kill() -> None:
        wait_for(lambda: len(list((tmp_path / "run" / "images").glob("part-*"))) > 1, "the first parts")
        s3.kill()
        killed.append(time.monotonic())
        time.sleep(2)
        s3.start()

    killer = threading.Thread(target=kill)
    killer.start()
    result = s3_run(s3, tmp_path / "run", **given)
    done = time.monotonic()
    killer.join()
    assert done - killed[0] > 2
    assert result.summary["photos_failed"] == 0
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "reference")
    assert ledger(tmp_path / "run").equals(ledger(tmp_path / "reference"))


@pytest.mark.parametrize("reader", READERS)
def test_what_was_read_ahead_is_given_back_when_nobody_wants_it(
    remote: Path, s3: S3Server, proxy: FaultProxy, reader: str, little_memory: Callable[[int], list[int]]
) -> None:
    little_memory(200_000)
    source = Source(s3.options(endpoint_url=proxy.endpoint), reader, 16)
    proxy.plan = on_photos(one_in(4, "latency", delay=0.2))
    photos = read_all(ledger(remote)["path"].to_pylist(), source, max_pixels=10**8)
    assert all(isinstance(next(photos), PhotoFile) for _ in range(20))
    photos.close()
    wait_for(lambda: reducer.photos.reader._shared().budget.used == 0, "the budget", 10)
