"""Photos on S3 and in tar shards, and copies of them."""

from __future__ import annotations

import functools
import itertools
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.codec import as_progressive
from benchmarks.common import PROCESSES, machine, measured, pack, reduced, say, small_photos, table, timed

from reducer import ClusterSpec, Job, reduce_images
from reducer.api.sample import write_sample
from reducer.config.settings import READER_NAMES

if TYPE_CHECKING:
    from faultproxy import FaultProxy

#: For all that can be told, it is not the store that the photos come from.
OTHER_STORE = "--target-storage-option=region=us-east-1"
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))


def rate_of(folder: Path, images: str, keys: dict[str, object], photos: int, **options: object) -> float:
    """Photos a second of a run that reads so many photos."""
    job = Job(images, str(folder / "run"), overwrite=True, report=False, rank_all=True, storage_options=keys, **options)
    summary = reduced(job)
    assert (summary["photos_read"], summary["photos_failed"]) == (photos, 0)
    return float(summary["photos_per_second"])


def delayed(proxy: FaultProxy, way: Callable[[], float]) -> Callable[[], float]:
    """The same with 40 ms on every GET."""

    def late() -> float:
        proxy.delay_get = 0.04
        try:
            return way()
        finally:
            proxy.delay_get = 0.0

    return late


def tar(photos: int, repetitions: int) -> None:
    """The same photos as single files and in tar shards, on disk and on a real S3 server, with and without 40 ms."""
    from faultproxy import FaultProxy
    from s3server import S3Server

    shards = 12
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = small_photos(folder, photos)
        paths = sorted((folder / "train").rglob("*.jpg"))
        with open(folder / "train.csv", "w") as manifest:
            manifest.write("id,landmark_id\n" + "".join(f"{path.stem},{path.parent.name}\n" for path in paths))
        random.Random(0).shuffle(paths)
        pack(paths, folder / "tars", shards)
        with S3Server(folder / "server") as server:
            server.make_bucket("photos")
            server.upload_folder(folder / "train", "photos", "train/")
            server.upload_folder(folder / "tars", "photos", "tars/")
            with FaultProxy(server.endpoint) as proxy:

                def rate(images: str, endpoint: str | None = None, **options: object) -> float:
                    if images.endswith("train"):
                        options["path_template"] = "{label}/{id}.jpg"
                    keys = server.options(endpoint_url=endpoint) if endpoint else {}
                    return rate_of(folder, images, keys, photos, manifest=str(folder / "train.csv"), **options)

                ways = {
                    "single files on disk": lambda: rate(str(folder / "train")),
                    "tar shards on disk": lambda: rate(str(folder / "tars")),
                }
                base = dict.fromkeys(ways, "single files on disk")
                for reader in READER_NAMES:
                    for where, endpoint in (("S3", server.endpoint), ("S3 through a proxy", proxy.endpoint)):
                        for what, kind in (("single files", "train"), ("tar shards", "tars")):
                            name = f"{what} on {where}, {reader}"
                            ways[name] = functools.partial(rate, f"s3://photos/{kind}", endpoint, reader=reader)
                            base[name] = f"single files on {where}, {reader}"
                    late = f"tar shards through it, 40 ms on every GET, {reader}"
                    ways[late] = delayed(proxy, ways[f"tar shards on {where}, {reader}"])
                    base[late] = f"tar shards on {where}, {reader}"
                found = measured(ways, repetitions)
    say(
        f"{photos} photos of {size / photos / 1e3:.0f} KB on average, or {shards} shards of {size / shards / 1e6:.0f} "
        f"MB, {PROCESSES} workers, server on the same machine, median of {repetitions} rounds, {machine()}"
    )
    disk = found["single files on disk"]
    table(
        ["photos lie in", "photos/s", "of single files on disk", "of", "ratio"],
        [[name, rate, rate / disk, base[name], rate / found[base[name]]] for name, rate in found.items()],
    )


def shards(gigabytes: float) -> None:
    """Peak memory of one worker that reads so much tar, on disk and from S3, most of its photos in the manifest."""
    from s3server import S3Server

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sample(str(folder / "sample"), labels=60, images=2000)
        originals = sorted((folder / "sample" / "train").rglob("*.jpg"))
        (folder / "tars").mkdir()
        written, number, ids = 0, 0, []
        while written < gigabytes * 1e9:
            path = folder / "tars" / f"images_{number:03}.tar"
            with tarfile.open(path, "w") as shard:
                while shard.offset < min(1e9, gigabytes * 1e9 - written):
                    ids.append(f"{len(ids):016x}")
                    shard.add(
                        originals[len(ids) % len(originals)], f"{ids[-1][0]}/{ids[-1][1]}/{ids[-1][2]}/{ids[-1]}.jpg"
                    )
            written += path.stat().st_size
            number += 1
        wanted = [photo for i, photo in enumerate(ids) if i % 5]
        lines = "".join(f"{photo},{i % max(1, len(wanted) // 150)}\n" for i, photo in enumerate(wanted))
        (folder / "train.csv").write_text("id,landmark_id\n" + lines)
        with S3Server(folder / "server") as server:
            server.make_bucket("photos")
            client = server.client()
            for path in sorted((folder / "tars").iterdir()):
                s3_put(client, path, "photos", f"tars/{path.name}")
            keys = server.options()
            places: list[tuple[str, dict[str, object]]] = [(str(folder / "tars"), {})]
            places += [("s3://photos/tars", {"storage_options": keys, "reader": reader}) for reader in READER_NAMES]
            for images, options in places:
                given = {"manifest": str(folder / "train.csv"), "overwrite": True, "report": False, **options}
                job = Job(images, str(folder / "run"), **given)
                summary = reduced(job, workers=1)
                assert summary["photos_read"] == len(wanted)
                rate = written / 1e6 / summary["timings"]["hash_seconds"]
                peak = summary["worker_peak_memory_bytes"] / 2**20
                where = f"S3, {options['reader']}" if options else "disk"
                rows.append([where, summary["photos_per_second"], round(rate), round(peak)])
    say(
        f"{written / 1e9:.1f} GB in {number} shards, {len(ids)} photos, {len(wanted)} of them in the manifest, one "
        f"worker, server on the same machine, {machine()}"
    )
    table(["shards lie on", "photos/s", "MB of tar/s", "peak worker memory, MiB"], rows)


def s3_put(client: object, path: Path, bucket: str, key: str) -> None:
    """Put a large file in parts."""
    part = 64 * 2**20
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    where = {"Bucket": bucket, "Key": key, "UploadId": upload}
    tags = []
    with open(path, "rb") as file:
        while block := file.read(part):
            answer = client.upload_part(**where, PartNumber=len(tags) + 1, Body=block)
            tags.append({"ETag": answer["ETag"], "PartNumber": len(tags) + 1})
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": tags})


def s3(photos: int, repetitions: int) -> None:
    """Photos on a real S3 server against the local folder, each reader, with and without 40 ms on every GET."""
    from faultproxy import FaultProxy
    from s3server import S3Server

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = small_photos(folder, photos) / photos / 1e3
        large = folder / "progressive"
        originals = sorted((folder / "sample" / "train").rglob("*.jpg"))
        counts = {"train": photos, "progressive": len(originals)}
        for number, path in enumerate(originals):
            target = large / str(number % 20) / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(as_progressive(path.read_bytes(), 85))
        with S3Server(folder / "server") as server:
            server.make_bucket("photos")
            for name in counts:
                server.upload_folder(folder / name, "photos", f"{name}/")
            with FaultProxy(server.endpoint) as proxy:

                def rate(kind: str, endpoint: str, **options: object) -> float:
                    keys = server.options(endpoint_url=endpoint)
                    return rate_of(folder, f"s3://photos/{kind}", keys, counts[kind], **options)

                ways = {"local folder": lambda: rate_of(folder, str(folder / "train"), {}, photos)}
                base = {"local folder": "local folder"}
                for reader in READER_NAMES:
                    through = f"S3 through a proxy, {reader}"
                    ways[f"S3, {reader}"] = functools.partial(rate, "train", server.endpoint, reader=reader)
                    ways[through] = functools.partial(rate, "train", proxy.endpoint, reader=reader)
                    late = f"S3 through a proxy, 40 ms on every GET, {reader}"
                    ways[late] = delayed(proxy, ways[through])
                    base |= {f"S3, {reader}": "local folder", through: "local folder", late: through}
                    for decode in ("fast", "fastest"):
                        name = f"progressive JPEGs on S3, `--decode {decode}`, {reader}"
                        ways[name] = functools.partial(
                            rate, "progressive", server.endpoint, reader=reader, decode=decode
                        )
                        base[name] = f"progressive JPEGs on S3, `--decode fast`, {reader}"
                found = measured(ways, repetitions)
    say(
        f"{photos} photos of {size:.0f} KB on average, {PROCESSES} workers, server on the same machine, median of "
        f"{repetitions} rounds, {machine()}"
    )
    table(
        ["photos lie in", "photos/s", "of", "ratio"],
        [[name, rate, base[name], rate / found[base[name]]] for name, rate in found.items()],
    )


def export(photos: int, repetitions: int) -> None:
    """`reducer export` against `cp -r` and against an S3 server's own copy; commands, their start included."""
    from s3server import S3Server

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = small_photos(folder, photos)
        paths = sorted((folder / "train").rglob("*.jpg"))
        for path in paths:  # links to a few files would be copied faster
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        with open(folder / "train.csv", "w") as manifest:
            manifest.write("id,landmark_id\n" + "".join(f"{path.stem},{path.parent.name}\n" for path in paths))
        pack(paths, folder / "tars", 12)
        with S3Server(folder / "server") as server:
            keys = server.options()
            for bucket in ("photos", "copies"):
                server.make_bucket(bucket)
            server.upload_folder(folder / "train", "photos", "train/")
            server.upload_folder(folder / "tars", "photos", "tars/")

            def run(name: str, images: str) -> None:
                options = {"keep": photos, "candidates": None, "report": False}
                if images.endswith("/train"):
                    options["path_template"] = "{label}/{id}.jpg"
                if "://" in images:
                    options["storage_options"] = keys
                job = Job(images, str(folder / name), manifest=str(folder / "train.csv"), **options)
                reduce_images(job, ClusterSpec(workers=0), progress=False)

            def exported(run: str, target: str, *given: str) -> float:
                whose = ["--storage-option"] if run != "local" else []
                whose += ["--target-storage-option"] if "://" in target else []
                flags = [f"{name}={key}={value}" for key, value in keys.items() for name in whose]
                command = [sys.executable, "-m", "reducer", "export", str(folder / run), target, "--quiet", *given]
                return timed(lambda: subprocess.run([*command, *flags], check=True))

            def served(prefix: str, target: str) -> float:
                """The server's own copy, 32 requests at a time."""
                client = server.client(max_pool_connections=32)
                found = server.list_keys("photos", prefix)

                def copy(key: str) -> None:
                    client.copy_object(
                        Bucket="copies", Key=f"{target}/{key}", CopySource={"Bucket": "photos", "Key": key}
                    )

                with ThreadPoolExecutor(32) as pool:
                    return timed(lambda: list(pool.map(copy, found)))

            run("local", str(folder / "train"))
            run("there", "s3://photos/train")
            run("shards", "s3://photos/tars")

            numbers = itertools.count()

            def once(name: str, way: Callable[[Path], float]) -> Callable[[], float]:
                """The same into a new place each time: what is there already is not written again."""
                return lambda: way(folder / f"{name}-{next(numbers)}")

            def copied(target: Path) -> float:
                return emptied(target, lambda: subprocess.run(["cp", "-r", folder / "train", target], check=True))

            def emptied(target: Path, way: Callable[[], object]) -> float:
                seconds = timed(way)
                shutil.rmtree(target)
                return seconds

            ways: dict[str, Callable[[], float]] = {"`cp -r`": once("cp", copied)}
            for given in ("", "--link", "--layout by-label", "--layout tar", "--resize 512"):
                ways[f"folder to folder {given}".strip()] = once(
                    "out",
                    lambda to, given=given: emptied(to, lambda: exported("local", str(to), *given.split())),
                )
            ways["folder to S3"] = once("up", lambda to: exported("local", f"s3://copies/{to.name}"))
            ways["S3 to folder"] = once("down", lambda to: emptied(to, lambda: exported("there", str(to))))
            own = "the server's own copy"
            ways[own] = once("own", lambda to: served("train/", to.name))
            for what, given in (("by the server's own copy", ""), ("through the workers", OTHER_STORE)):
                for workers in (0, PROCESSES):
                    ways[f"S3 to S3 {what}, {workers or 'no'} workers"] = once(
                        "there",
                        lambda to, given=given, workers=workers: exported(
                            "there", f"s3://copies/{to.name}", "--workers", str(workers), *given.split()
                        ),
                    )
            tars = ("--layout", "tar", "--shard-bytes", f"{size // 12}", "--workers", str(PROCESSES))
            ways[f"tar on S3 to tar on S3, {PROCESSES} workers"] = once(
                "tars", lambda to: exported("shards", f"s3://copies/{to.name}", *tars)
            )
            found = measured(ways, repetitions)
    say(
        f"{photos} photos of {size / photos / 1e3:.0f} KB on average, all exported, server on the same machine, median "
        f"of {repetitions} rounds, {machine()}"
    )
    rows = []
    for name, seconds in found.items():
        base = own if "on S3 to" in name or "S3 to S3" in name or name == own else "`cp -r`"
        rows.append([name, seconds, photos / seconds, size / 1e6 / seconds, base, found[base] / seconds])
    table(["what", "seconds", "photos/s", "MB/s", "against", "its rate, times"], rows)
