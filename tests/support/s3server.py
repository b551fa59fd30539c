"""A real S3 server on loopback: SeaweedFS, started as ``scripts/s3`` starts it."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any


def _script() -> ModuleType:
    """``scripts/s3`` as a module: it shares the start of a server with the tests, and has no ``.py`` to import by."""
    loader = SourceFileLoader("scripts_s3", str(Path(__file__).parents[2] / "scripts" / "s3"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


_s3 = _script()


class S3Server:
    """An S3 server on a folder; a context manager.

    Parameters
    ----------
    folder : path
        Where its data and its log are kept. Made if it is not there.

    Attributes
    ----------
    endpoint : str
        ``http://127.0.0.1:PORT``, once it was started; the same after another `start`.
    key, secret : str
        Those of the administrator.
    ro_key, ro_secret : str
        Those of an identity that may read and list only.
    folder : Path
        Its folder.
    """

    key: str = _s3.KEY
    secret: str = _s3.SECRET
    ro_key: str = _s3.READ_ONLY_KEY
    ro_secret: str = _s3.READ_ONLY_SECRET

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.endpoint = ""
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A clean stop takes 4 s, and loses or saves nothing.
        self.kill()

    def start(self) -> None:
        """Start it, on the ports it had before, and wait until it reads and writes.

        Raises
        ------
        RuntimeError
            If it does not come up, with the tail of its log.
        """
        assert self._process is None, "it runs"
        self._process, self._port = _s3.launch(self.folder, self._port)
        self.endpoint = f"http://127.0.0.1:{self._port}"
        atexit.register(self.kill)

    def stop(self) -> None:
        """End it cleanly, if it runs."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """``kill -9`` its process group, if it runs."""
        self._end(signal.SIGKILL)

    def _end(self, sign: signal.Signals) -> None:
        if self._process is not None:
            _s3.end(self._process, sign)
            _s3.remove_sockets(self._port)
            self._process = None
            atexit.unregister(self.kill)

    def options(self, **others: Any) -> dict[str, Any]:
        """What opens it as its administrator, as storage options; others are added or take the place of these."""
        return {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret, **others}

    def client(self, endpoint: str | None = None, **config: Any) -> Any:
        """A botocore client of the administrator, that does not retry.

        Parameters
        ----------
        endpoint : str, optional
            Another endpoint, such as that of a proxy.
        **config : object
            Settings of `botocore.config.Config`.
        """
        return _s3.client(endpoint or self.endpoint, **config)

    def make_bucket(self, name: str) -> None:
        """Make a bucket, unless it is there."""
        _s3.make_bucket(self.endpoint, name)

    def upload_folder(self, folder: str | os.PathLike[str], bucket: str, prefix: str = "") -> list[str]:
        """Put every file of a folder into a bucket.

        Parameters
        ----------
        folder : path
            The folder.
        bucket : str
            The bucket, which must be there.
        prefix : str, optional
            What each key begins with, before the relative path: ``train/``, say.

        Returns
        -------
        list of str
            The keys.
        """
        root = Path(folder)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        # botocore asks before it sends, and on a busy machine misses an answer that comes late: then it asks again.
        client = self.client(read_timeout=5, retries={"total_max_attempts": 5})

        def put(path: Path) -> str:
            key = prefix + path.relative_to(root).as_posix()
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
            return key

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(put, files))

    def list_keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys of a bucket that begin with a prefix, sorted."""
        return sorted(self._list(bucket, prefix))

    def _list(self, bucket: str, prefix: str) -> Iterator[str]:
        for page in self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                yield entry["Key"]
