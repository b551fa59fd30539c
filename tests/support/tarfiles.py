"""Tar shards made for tests: of a collection, packed in any way, whole or damaged."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

import reducer.photos.reader
from reducer.storage.location import Shard

BLOCK = tarfile.BLOCKSIZE
#: What a member is: its content, or an entry of its own (a link, say).
Content = bytes | tarfile.TarInfo


def tar_of(members: Iterable[tuple[str, Content]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar; names may come twice."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                tar.addfile(info)
    return sink.getvalue()


def link_to(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def write_tars(folder: Path, shards: Mapping[str, Iterable[tuple[str, Content]] | bytes]) -> Path:
    """Tars by their names, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in shards.items():
        (folder / name).write_bytes(members if isinstance(members, bytes) else tar_of(members))
    return folder


def packed(
    photos: Mapping[str, bytes],
    shards: int,
    seed: int = 0,
    named: Callable[[str], str] = lambda key: f"{key[0]}/{key[1]}/{key[2]}/{key}.jpg",
) -> dict[str, list[tuple[str, Content]]]:
    """Photos dealt out to shards at random, called as GLDv2's are: labels span shards."""
    keys = sorted(photos)
    random.Random(seed).shuffle(keys)
    return {
        f"images_{number:03d}.tar": [(named(key), photos[key]) for key in keys[number::shards]]
        for number in range(shards)
    }


def photos_below(folder: Path) -> dict[str, bytes]:
    """Photos by their ids."""
    return {path.stem: path.read_bytes() for path in folder.rglob("*.jpg")}


def thumbnail(photo: bytes) -> bytes:
    """A photo of a few kB that hashes to about the same."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(photo)) as image:
        image.draft("RGB", (96, 72))
        image.resize((96, 72)).save(small, "JPEG", quality=90)
    return small.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def spoil(path: Path, keep: Iterable[tuple[int, int]] = ()) -> None:
    """Make a shard unreadable, but for some ranges, in a way that its size and its time do not tell."""
    state, content = path.stat(), path.read_bytes()
    garbage = bytearray(b"\xaa" * len(content))
    for offset, size in keep:
        garbage[offset : offset + size] = content[offset : offset + size]
    path.write_bytes(garbage)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@contextmanager
def shards_read() -> Iterator[list[str]]:
    """Names of the shards that are read from their beginning meanwhile, in this process."""
    read: list[str] = []
    real = reducer.photos.reader.Shards.blocks_from

    def blocks_from(self: reducer.photos.reader.Shards, number: int, offset: int) -> Iterator[bytes]:
        shard: Shard = self.shards[number]
        if offset == 0:
            read.append(shard.path.rpartition("/")[2])
        yield from real(self, number, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reducer.photos.reader.Shards, "blocks_from", blocks_from)
        yield read
