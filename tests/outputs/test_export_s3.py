"""Photos exported from and to S3: the bytes of the sources, whatever the network and the workers do."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import s3fs
from commands import flags, invoke
from deployments import DaskProcesses
from exports import collection_of, exported, files_below, photos_of
from faultproxy import Fault, FaultProxy, one_in
from fsspec.asyn import sync_wrapper
from jobs import run_on
from PIL import Image
from s3server import S3Server
from shardjobs import run_of
from tarfiles import packed, write_tars
from waiting import wait_for

from reducer import ClusterSpec, InputError, Job, ReducerError, WorkerRules, reduce_images
from reducer.errors import LostLockError
from reducer.outputs.export.target import ExportFolder
from reducer.outputs.export.write import PUTS
from reducer.photos.requests import CannotCopy
from reducer.storage.location import Location
from reducer.storage.lock_kinds import LOCK, Holder

SERIAL = ClusterSpec(workers=0)


def objects(s3: S3Server, prefix: str, bucket: str = "exports") -> dict[str, bytes]:
    """What lies below a prefix."""
    client = s3.client()
    keys = s3.list_keys(bucket, f"{prefix}/")
    return {key[len(prefix) + 1 :]: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def of_photos(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if name.endswith(".jpg")}


@pytest.fixture(scope="module")
def server(s3: S3Server, tiny: Path) -> S3Server:
    """With a bucket ``exports`` to write to, and the thumbnails in ``tiny``."""
    s3.make_bucket("exports")
    s3.make_bucket("tiny")
    s3.upload_folder(tiny / "train", "tiny", "train/")
    return s3


def job_there(server: S3Server, tiny: Path, output: Path, **others: Any) -> Job:
    settings: dict[str, Any] = {"keep": 15, "manifest": str(tiny / "train.csv"), "report": False, **others}
    return Job("s3://tiny/train", str(output), storage_options=server.options(), **settings)


@pytest.fixture(scope="module")
def remote(server: S3Server, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the thumbnails in the bucket."""
    run = tmp_path_factory.mktemp("export-remote") / "run"
    reduce_images(job_there(server, tiny, run), SERIAL, progress=False)
    return run


@pytest.fixture(scope="module")
def local(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("export-local") / "run"
    run_on(tiny, run, keep=15)
    return run


@pytest.fixture(scope="module")
def wanted(local: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The photos that are to be there, from the disk."""
    target = tmp_path_factory.mktemp("export-wanted") / "out"
    exported(local, target)
    return photos_of(target)


def both(server: S3Server, **others: Any) -> dict[str, Any]:
    """What opens photos and target."""
    return {"storage_options": server.options(**others), "target_storage_options": server.options()}


def names_read(run: Path) -> list[str]:
    """Kept photos whose sizes the run knows, by their names below ``IMAGES``."""
    frame = pd.read_parquet(run / "reduced.parquet")
    return ["/".join(path.split("/")[-4:]) for path in frame["path"][frame["bytes"].notna()]]


@pytest.mark.parametrize("reader", ["s3fs", "obstore"])
def test_from_s3_to_a_folder(
    server: S3Server, tiny: Path, remote: Path, wanted: dict[str, bytes], tmp_path: Path, reader: str
) -> None:
    run = remote
    if reader == "obstore":
        run = tmp_path / "run"
        reduce_images(job_there(server, tiny, run, reader=reader), SERIAL, progress=False)
    code, out, err = invoke("export", run, tmp_path / "out", *flags(server.options()))
    assert (code, "Traceback" in err) == (0, False)
    assert photos_of(tmp_path / "out") == wanted
    assert (tmp_path / "out" / "train.csv").read_bytes() == (run / "reduced.csv").read_bytes()
    code, out, _ = invoke("export", run, tmp_path / "out", *flags(server.options()))
    assert f"; {len(wanted)} of them were there already" in out
    name = next(iter(wanted))
    (tmp_path / "out" / name).write_bytes(b"x" * len(wanted[name]))
    result = exported(run, tmp_path / "out", storage_options=server.options())
    assert result.written == 1
    assert photos_of(tmp_path / "out") == wanted
    with pytest.raises(InputError, match="which a run folder does not keep: give them again"):
        exported(run, tmp_path / "other")
    code, _, err = invoke("export", run, tmp_path / "other", "--link", *flags(server.options()))
    assert (code, "hard links are of files of one disk" in err) == (2, True)


def test_from_a_folder_to_s3(server: S3Server, local: Path, wanted: dict[str, bytes]) -> None:
    given = {"target_storage_options": server.options()}
    first = exported(local, "s3://exports/up", **given)
    found = objects(server, "up")
    assert of_photos(found) == wanted
    assert sorted(set(found) - set(wanted)) == ["export.json", "export.parquet", "train.csv"]
    name, other = list(wanted)[:2]
    client = server.client()
    client.put_object(Bucket="exports", Key=f"up/{name}", Body=b"x" * len(wanted[name]))
    client.delete_object(Bucket="exports", Key=f"up/{other}")
    assert (first.written, exported(local, "s3://exports/up", **given).written) == (len(wanted), 2)
    assert of_photos(objects(server, "up")) == wanted
    with pytest.raises(InputError, match="holds another export"):
        exported(local, "s3://exports/up", layout="by-label", **given)
    result = exported(local, "s3://exports/up", layout="by-label", overwrite=True, **given)
    found = objects(server, "up")
    assert len(of_photos(found)) == result.photos
    assert not set(found) & set(wanted)
    with pytest.raises(InputError, match="is not empty and is no export"):
        exported(local, "s3://tiny/train", overwrite=True, **given)


def test_what_is_taken_out_of_a_bucket(
    server: S3Server, some: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = collection_of(tmp_path, [(f"IMG [{number}] 100%+#&", "l[1]", some[number]) for number in range(4)])
    given = {"target_storage_options": server.options(), "layout": "by-label"}
    exported(run, "s3://exports/odd", resize=60, **given)
    mine = "odd/l[1]/IMG 3 100%+#&.jpg"
    server.client().put_object(Bucket="exports", Key=mine, Body=b"mine")
    server.client().put_object(Bucket="exports", Key="odd2/l[1]/IMG [3] 100%+#&.jpg", Body=b"mine")
    result = exported(run, "s3://exports/odd", resize=40, overwrite=True, **given)
    found = of_photos(objects(server, "odd"))
    assert (result.written, found.pop(mine.partition("/")[2]), len(found)) == (4, b"mine", 4)
    assert {max(Image.open(io.BytesIO(content)).size) for content in found.values()} == {40}
    assert objects(server, "odd2") == {"l[1]/IMG [3] 100%+#&.jpg": b"mine"}
    # Who may write may not always delete.
    real = s3fs.S3FileSystem._call_s3

    async def refuses(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        return {} if method == "delete_objects" else await real(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refuses)
    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", sync_wrapper(refuses))
    with pytest.raises(InputError, match="cannot be cleared: 5 of 7 files are still there"):
        exported(run, "s3://exports/odd", resize=30, overwrite=True, **given)
    assert of_photos(objects(server, "odd")) == found | {mine.partition("/")[2]: b"mine"}


@pytest.mark.parametrize("workers", [0, 2])
def test_from_s3_to_s3(
    server: S3Server, remote: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("reducer.outputs.export.export.GROUP", 20)
    target = f"s3://exports/there{workers}"
    spec = ClusterSpec(workers=workers)
    result = exported(remote, target, cluster=spec, **both(server))
    assert (result.photos, result.written, len(result.failures)) == (len(wanted), len(wanted), 0)
    assert of_photos(objects(server, f"there{workers}")) == wanted
    name = next(iter(wanted))
    server.client().put_object(Bucket="exports", Key=f"there{workers}/{name}", Body=b"x" * len(wanted[name]))
    assert exported(remote, target, cluster=SERIAL, **both(server)).written == 1
    assert of_photos(objects(server, f"there{workers}")) == wanted


def test_a_store_copies_itself(
    server: S3Server, remote: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [one_in(9, "status-503", ("HEAD", "PUT")), one_in(8, "reset", ("HEAD", "PUT"))]
    with FaultProxy(server.endpoint, lambda *request: next(filter(None, (p(*request) for p in plans)), None)) as proxy:
        opened = server.options(endpoint_url=proxy.endpoint)
        given = {"storage_options": opened, "target_storage_options": opened, "cluster": SERIAL}
        result = exported(remote, "s3://exports/itself", **given)
        requests = [(method, path) for method, path, _ in proxy.log if ".jpg" in path]
    assert {method for method, _ in requests} == {"HEAD", "PUT"}  # no photo has come here
    assert len(proxy.counts) > 1
    assert (result.photos, result.bytes) == (len(wanted), sum(map(len, wanted.values())))
    assert of_photos(objects(server, "itself")) == wanted
    # One that does not do it, or not for us, is read and written.
    asked = []

    async def refuses(path: str, *_: object) -> int:
        asked.append(path)
        raise CannotCopy

    monkeypatch.setattr("reducer.photos.reader.copy_object", refuses)
    exported(remote, "s3://exports/refuses", cluster=SERIAL, **both(server))
    assert of_photos(objects(server, "refuses")) == wanted
    assert 0 < len(asked) <= PUTS


def test_made_smaller_on_a_cluster(server: S3Server, remote: Path, tmp_path: Path) -> None:
    code, out, err = invoke(
        *("export", remote, "s3://exports/small", "--resize", 40, "--workers", 2),
        *flags(server.options()),
        *flags(server.options(), "--target-storage-option"),
    )
    assert code == 0, err
    assert "Before: " in out
    exported(remote, tmp_path / "small", resize=40, storage_options=server.options())
    assert of_photos(objects(server, "small")) == photos_of(tmp_path / "small")
    again = exported(remote, "s3://exports/small", resize=40, cluster=SERIAL, **both(server))
    assert again.written == 0


def test_from_tars_on_s3_to_tars_on_s3(server: S3Server, photos: dict[str, bytes], tiny: Path, tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", packed(photos, 4))
    server.upload_folder(tars, "tiny", "tars/")
    manifest = tiny / "train.csv"
    run_of(tars, tmp_path / "run", manifest)
    run_of("s3://tiny/tars/*.tar", tmp_path / "run-s3", manifest, storage_options=server.options())
    given = {"layout": "tar", "shard_bytes": "150kB"}
    exported(tmp_path / "run", tmp_path / "out", **given)
    shards = {name: content for name, content in files_below(tmp_path / "out").items() if name.endswith(".tar")}
    assert len(shards) > 2
    with FaultProxy(server.endpoint) as proxy:
        spec = ClusterSpec(workers=2)
        opened = both(server, endpoint_url=proxy.endpoint)
        result = exported(tmp_path / "run-s3", "s3://exports/tars", cluster=spec, **given, **opened)
        read = [head for method, head, _ in proxy.log if method == "GET"]
    found = objects(server, "tars")
    assert {name: content for name, content in found.items() if name.endswith(".tar")} == shards
    assert len(read) == result.photos  # each by a range of its own, and nothing else
    assert result.bytes == sum(len(photos[name]) for name in pd.read_csv(tmp_path / "run" / "reduced.csv")["id"])
    assert exported(tmp_path / "run-s3", "s3://exports/tars", cluster=SERIAL, **given, **both(server)).written == 0
    server.client().delete_object(Bucket="exports", Key="tars/photos-000001.tar")
    again = exported(tmp_path / "run-s3", "s3://exports/tars", cluster=SERIAL, **given, **both(server))
    assert 0 < again.written < result.photos
    assert {name: content for name, content in objects(server, "tars").items() if name.endswith(".tar")} == shards


def test_a_large_shard_goes_to_s3_in_parts(server: S3Server, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reducer.storage.atomic.PART", 5 * 2**20)
    big = (("big", b"\1" * (11 * 2**20)),)
    monkeypatch.setattr(
        "reducer.outputs.export.plan.ExportPlan._side_files", lambda *_: tuple((f".{name}", part) for name, part in big)
    )
    few = local.parent / "few.csv"
    few.write_text("".join((local / "reduced.csv").read_text().splitlines(keepends=True)[:3]))
    result = exported(local, "s3://exports/parts", layout="tar", list_file=few, target_storage_options=server.options())
    assert result.photos == 2
    head = server.client().head_object(Bucket="exports", Key="parts/photos-000000.tar")
    assert head["ContentLength"] > 22 * 2**20
    assert "-" in head["ETag"]  # of parts


def test_interrupted_and_gone_on_with(server: S3Server, remote: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    with FaultProxy(server.endpoint, delay_get=0.3) as proxy:
        command = [
            *(sys.executable, "-m", "reducer", "export", str(remote), "s3://exports/cut-off", "--workers", "0"),
            *flags(server.options(endpoint_url=proxy.endpoint)),
            *flags(server.options(), "--target-storage-option"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: len(server.list_keys("exports", "cut-off/")) > 30, "some photos")
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = of_photos(objects(server, "cut-off"))
    assert 0 < len(there) < len(wanted)
    assert all(wanted[name] == content for name, content in there.items())
    with pytest.raises(InputError, match=f"locked by another export: host .*, process {process.pid}, .* --break-lock"):
        exported(remote, "s3://exports/cut-off", **both(server))
    result = exported(remote, "s3://exports/cut-off", cluster=ClusterSpec(workers=2), break_lock=True, **both(server))
    assert (result.photos, result.written) == (len(wanted), len(wanted) - len(there))
    assert of_photos(objects(server, "cut-off")) == wanted


def test_requests_that_fail_are_made_again(server: S3Server, remote: Path, wanted: dict[str, bytes]) -> None:
    def faults(method: str, path: str, number: int) -> Fault | None:
        return next((fault for plan in plans if (fault := plan(method, path, number)) is not None), None)

    plans = [
        one_in(9, "status-503", ("GET", "PUT"), attempts=2),
        one_in(7, "truncate", ("GET",)),
        one_in(6, "reset", ("GET", "PUT")),
    ]
    with FaultProxy(server.endpoint, faults) as proxy:
        opened = server.options(endpoint_url=proxy.endpoint)
        # For all that can be told they are two stores.
        there = opened | {"region": "us-east-1"}
        result = exported(
            remote, "s3://exports/faults", cluster=SERIAL, storage_options=opened, target_storage_options=there
        )
        failed = proxy.counts
    assert (result.photos, len(result.failures)) == (len(wanted), 0)
    assert of_photos(objects(server, "faults")) == wanted
    assert sum(failed.values()) > 15, failed


def test_photos_that_are_gone_from_the_bucket(
    server: S3Server, tiny: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    server.upload_folder(tiny / "train", "tiny", "gone/")
    job = Job(
        "s3://tiny/gone",
        str(tmp_path / "run"),
        keep=15,
        manifest=str(tiny / "train.csv"),
        storage_options=server.options(),
        report=False,
    )
    reduce_images(job, SERIAL, progress=False)
    names = list(wanted)[:3]
    for name in names:
        server.client().delete_object(Bucket="tiny", Key=f"gone/{name}")
    changed, other = [name for name in names_read(tmp_path / "run") if name not in names][:2]
    server.client().put_object(Bucket="tiny", Key=f"gone/{changed}", Body=wanted[changed] + b"more")
    server.client().put_object(Bucket="tiny", Key=f"gone/{other}", Body=b"x" * len(wanted[other]))
    for target in (str(tmp_path / "out"), "s3://exports/gone"):
        code, out, err = invoke(
            *("export", tmp_path / "run", target, "--workers", 0),
            *flags(server.options()),
            *(flags(server.options(), "--target-storage-option") if "://" in target else ()),
        )
        assert code == 3, err
        assert f"Exported {len(wanted) - 5} photos" in out
        assert "5 photos are not in" in err
    there = {name: content for name, content in wanted.items() if name not in (*names, changed, other)}
    assert photos_of(tmp_path / "out") == of_photos(objects(server, "gone")) == there
    failures = pd.read_csv(tmp_path / "out" / "failures.csv")
    size = len(wanted[changed])
    why = f"changed: it has {size + 4:,} bytes, and had {size:,} when the run read or listed it"
    whole = "changed: it is not the object that the run read: its etag is another"
    assert sorted(failures["error"]) == [why, whole, *["missing: no such object"] * 3]
    assert objects(server, "gone")["failures.csv"] == (tmp_path / "out" / "failures.csv").read_bytes()


def test_a_target_that_may_not_be_written(server: S3Server, local: Path, remote: Path) -> None:
    read_only = server.options(key=server.ro_key, secret=server.ro_secret)
    code, _, err = invoke("export", local, "s3://exports/no", *flags(read_only, "--target-storage-option"))
    assert code == 2
    assert "TARGET s3://exports/no cannot be used: PermissionError: " in err
    assert "Access is refused" in err
    assert "Traceback" not in err
    code, _, err = invoke("export", local, "s3://nowhere/no", *flags(server.options(), "--target-storage-option"))
    assert code == 2
    assert "Traceback" not in err
    assert server.secret not in err


def test_two_exports_into_one_prefix(server: S3Server, local: Path, wanted: dict[str, bytes]) -> None:
    url, options = "s3://exports/both", {"target_storage_options": server.options()}
    first = ExportFolder(Location(url, server.options()))
    with first.held():
        with pytest.raises(InputError, match=f"{url} is locked by another export: .* give --break-lock"):
            exported(local, url, **options)
        assert [*objects(server, "both")] == [LOCK]
    assert exported(local, url, **options).written == len(wanted)
    # As after `kill -9`.
    server.client().put_object(Bucket="exports", Key=f"both/{LOCK}", Body=Holder("gone", 7, "2026", "token").to_json())
    opened = flags(server.options(), "--target-storage-option")
    code, _, err = invoke("export", local, url, *opened)
    assert (code, "locked by another export: host gone, process 7" in err) == (2, True), err
    code, _, err = invoke("export", local, url, *opened, "--break-lock")
    assert code == 0, err
    assert LOCK not in objects(server, "both")
    with first.held():
        exported(local, url, break_lock=True, **options)
        with pytest.raises(LostLockError, match=f"the lock of {url} was taken by another export"):
            first.write_state({})


def test_workers_that_are_killed(
    server: S3Server, remote: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reducer.outputs.export.export.GROUP", 10)
    (tmp_path / "dask").mkdir()
    with DaskProcesses(tmp_path / "dask") as dask, FaultProxy(server.endpoint, delay_get=0.2) as proxy:
        address = dask.scheduler()
        workers = [dask.worker(address, nanny=False) for _ in range(2)]
        dask.registered(*workers)

        def kill_one() -> None:
            wait_for(lambda: len(server.list_keys("exports", "killed/")) > 20, "some photos")
            dask.worker(address, nanny=False)
            workers[0].kill()

        thread = threading.Thread(target=kill_one)
        thread.start()
        opened = both(server, endpoint_url=proxy.endpoint)
        result = exported(remote, "s3://exports/killed", cluster=ClusterSpec(address=address), **opened)
        thread.join()
    assert (result.photos, len(result.failures)) == (len(wanted), 0)
    assert of_photos(objects(server, "killed")) == wanted


def test_no_worker_left(
    server: S3Server, remote: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reducer.outputs.export.export.GROUP", 10)
    monkeypatch.setattr("reducer.run.dask.pool.TICK", 0.5)
    monkeypatch.setattr("reducer.run.dask.pool.ANSWER", 2.0)
    (tmp_path / "dask").mkdir()
    with DaskProcesses(tmp_path / "dask") as dask, FaultProxy(server.endpoint, delay_get=0.2) as proxy:
        address = dask.scheduler()
        worker = dask.worker(address, nanny=False)
        dask.registered(worker)

        def kill() -> None:
            wait_for(lambda: len(server.list_keys("exports", "alone/")) > 20, "some photos")
            worker.kill()

        thread = threading.Thread(target=kill)
        thread.start()
        spec = ClusterSpec(address=address, rules=WorkerRules(wait=2))
        with pytest.raises(ReducerError, match="no worker has been there for 2 s"):
            exported(remote, "s3://exports/alone", cluster=spec, **both(server, endpoint_url=proxy.endpoint))
        thread.join()
    there = of_photos(objects(server, "alone"))
    assert 0 < len(there) < len(wanted)
    assert all(wanted[name] == content for name, content in there.items())
    assert exported(remote, "s3://exports/alone", cluster=SERIAL, **both(server)).photos == len(wanted)
