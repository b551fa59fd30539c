"""Layouts of exported photos in TARGET: as in the manifest, a folder per label, or WebDataset's shards. Pure."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from tarfile import BLOCKSIZE, LENGTH_NAME, PAX_FORMAT, RECORDSIZE, TarInfo
from typing import Any

import pyarrow as pa

from reducer.config.checks import bytes_of, check_count
from reducer.config.settings import LAYOUT_NAMES, SHARD_BYTES
from reducer.errors import InputError
from reducer.outputs.export.safe_names import distinct_names, safe_path, with_digest
from reducer.photos.formats import is_photo
from reducer.storage.location import is_url
from reducer.storage.lock_kinds import LOCK

SAME, BY_LABEL, TAR = LAYOUT_NAMES
#: Files of ours at the top of TARGET.
STATE, LIST, TABLE, LABELS, FAILURES = "export.json", "train.csv", "export.parquet", "labels.csv", "failures.csv"
OWN_FILES = (STATE, LIST, TABLE, LABELS, FAILURES)
#: Names that nothing else at the top of TARGET may have.
RESERVED = (*OWN_FILES, LOCK)
#: Extensions that torchvision's ImageFolder takes for photos (``torchvision.datasets.folder.IMG_EXTENSIONS``).
IMAGE_FOLDER = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
#: Extensions by Pillow's names of formats, where a photo's name has none; that of JPEG for all others and for unknown
#: formats.
EXTENSIONS = {"PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "GIF": ".gif", "BMP": ".bmp", "AVIF": ".avif"}
JPEG_EXTENSION = ".jpg"
#: Forbidden in keys: WebDataset's reader takes all behind a name's first dot for its extension.
NOT_IN_KEYS = "."
#: Extensions and contents of files that go with a photo into a shard.
SideFiles = tuple[tuple[str, bytes], ...]
WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes
    ----------
    layout, link, resize, shard_bytes
        Options of `reducer.export` of these names; ``shard_bytes`` becomes a number of bytes.

    Raises
    ------
    InputError
        If a value is out of its range or two contradict each other.
    """

    layout: str = SAME
    link: bool = False
    resize: int | None = None
    shard_bytes: int | str = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.layout not in LAYOUT_NAMES:
            raise InputError(f"--layout is {self.layout!r}: expected one of {', '.join(LAYOUT_NAMES)}")
        check_count("resize", self.resize)
        if isinstance(self.shard_bytes, str):
            object.__setattr__(self, "shard_bytes", bytes_of("shard_bytes", self.shard_bytes))
        check_count("shard_bytes", self.shard_bytes)
        for other, why in (
            (self.resize is not None, "--resize makes other files"),
            (self.layout == TAR, "--layout tar packs photos together"),
        ):
            if self.link and other:
                raise InputError(f"--link cannot be: {why}. Leave one of the two out")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that two exports into one folder must have in common."""
        shards = {"shard_bytes": self.shard_bytes} if self.layout == TAR else {}
        return {"layout": self.layout, "resize": self.resize, **shards}


@dataclass(frozen=True)
class Layout:
    """Paths of photos in TARGET.

    Attributes
    ----------
    paths : list of str, n
        Path of each photo below TARGET; in shards, its name there.
    folders : dict of str to str
        Folder of each label's photos; empty for ``same``.
    renamed : int
        Photos that ``same`` puts elsewhere than the manifest says, since that is not safe.
    """

    paths: list[str]
    folders: dict[str, str]
    renamed: int = 0

    @property
    def classes(self) -> dict[str, int]:
        """Numbers of the labels, as ImageFolder counts its folders."""
        by_folder = sorted((folder, label) for label, folder in self.folders.items())
        return {label: number for number, (_, label) in enumerate(by_folder)}

    @property
    def passed_over(self) -> list[str]:
        """Extensions of photos that ImageFolder passes over."""
        extensions = {posixpath.splitext(path)[1].lower() for path in self.paths}
        return sorted(extensions.difference(IMAGE_FOLDER))


def as_in_manifest(rows: pa.Table, root: str) -> Layout:
    """Lay photos out below TARGET as they lie below IMAGES.

    Parameters
    ----------
    rows : pyarrow.Table, n rows
        ``path`` and ``shard`` of the ledger.
    root : str
        IMAGES, without a slash at its end.
    """
    paths, source_of = [], dict[str, tuple[str, str | None]]()
    renamed = 0
    for path, shard in zip(rows["path"].to_pylist(), rows["shard"].to_pylist(), strict=True):
        wanted = _below(path, root) if shard is None else path.removeprefix("./")
        safe = safe_path(wanted, RESERVED)
        source = (path, shard)
        if source_of.setdefault(safe, source) != source:  # members of one name in two shards, for example
            safe = posixpath.join(posixpath.dirname(safe), with_digest(posixpath.basename(safe), f"{shard}\0{path}"))
            source_of[safe] = source
        renamed += safe != wanted
        paths.append(safe)
    return Layout(paths, {}, renamed)


def _below(path: str, root: str) -> str:
    if path.startswith(f"{root}/"):
        below = path[len(root) + 1 :]
        return below if is_url(root) else posixpath.normpath(below.replace(os.sep, "/"))
    # From elsewhere, as a column of paths in the manifest may say.
    return posixpath.normpath(path.partition("://")[2] if is_url(path) else path).lstrip("/")


def by_label(rows: pa.Table, ledger: pa.Table, *, keys: bool = False) -> Layout:
    """Lay photos out in a folder per label, named by their ids.

    Parameters
    ----------
    rows : pyarrow.Table, n rows
        ``id``, ``label``, ``path`` and ``format`` of the ledger.
    ledger : pyarrow.Table
        ``id`` and ``label`` of all its photos: names do not depend on which of them are exported.
    keys : bool
        Whether the paths become keys of WebDataset's samples.
    """
    forbidden = NOT_IN_KEYS if keys else ""
    wanted = dict.fromkeys(rows["label"].to_pylist())
    ids = defaultdict[str, list[str]](list)
    for photo, label in zip(ledger["id"].to_pylist(), ledger["label"].to_pylist(), strict=True):
        ids[label].append(photo)
    folders = distinct_names(ids, forbidden=forbidden, reserved=RESERVED)
    names = {label: distinct_names(ids[label], _shown, forbidden=forbidden) for label in wanted}
    columns = (rows[name].to_pylist() for name in ("id", "label", "path", "format"))
    paths = [
        f"{folders[label]}/{names[label][photo]}{_extension(path, form)}"
        for photo, label, path, form in zip(*columns, strict=True)
    ]
    return Layout(paths, {label: folders[label] for label in wanted})


def _shown(photo: str) -> str:
    """Return the name that a photo should have: its id, or the file's name where the id is the path of a file."""
    name = photo.rpartition("/")[2]
    return posixpath.splitext(name)[0] if is_photo(name) else name


def _extension(path: str, form: str | None) -> str:
    extension = posixpath.splitext(path)[1].lower()
    return extension if is_photo(path) else EXTENSIONS.get(form or "", JPEG_EXTENSION)


def shard_name(number: int) -> str:
    """Return the name of a shard."""
    return f"photos-{number:06d}.tar"


def index_name(shard: str) -> str:
    """Return the name of the index of a shard, which lists its photos."""
    return f"{shard.removesuffix('.tar')}.parquet"


def into_shards(sizes: Sequence[int], most: int) -> list[int]:
    """Return the number of the shard that each photo goes to, in their order.

    Parameters
    ----------
    sizes : sequence of int, n
        Bytes that each photo takes in a shard, from `size_in_shard`.
    most : int
        Bytes per shard at most; a photo that takes more gets a shard of its own.
    """
    end = 2 * BLOCKSIZE  # a tar ends with two empty blocks, and is filled up to a record
    shards, number, used = [], 0, 0
    for size in sizes:
        if used and -(-(used + size + end) // RECORDSIZE) * RECORDSIZE > most:
            number, used = number + 1, 0
        used += size
        shards.append(number)
    return shards


def size_in_shard(*files: tuple[str, int]) -> int:
    """Return the bytes that files take in a tar, given by their names there and their sizes in bytes."""
    return sum(_header(name) + -(-size // BLOCKSIZE) * BLOCKSIZE for name, size in files)


def _header(name: str) -> int:
    """Return the bytes of a member's header, which is longer where its name is long or not ASCII."""
    if name.isascii() and len(name) <= LENGTH_NAME:
        return BLOCKSIZE
    return len(TarInfo(name).tobuf(PAX_FORMAT))


def in_shard(path: str, ending: str) -> str:
    """Return the name of a file that goes with a photo into its shard, by its extension."""
    return path.rpartition(".")[0] + ending


def side_files(photo: str, label: str, number: int) -> SideFiles:
    """Return the files that go with a photo into its shard: extensions and contents.

    Parameters
    ----------
    photo, label : str
        Id and label of the photo.
    number : int
        Content of ``KEY.cls``, a whole number for all of WebDataset's readers.
    """
    both = json.dumps({"id": photo, "label": label}, ensure_ascii=False)
    return ((".cls", str(number).encode()), (".json", both.encode("utf-8", "surrogatepass")))


def class_numbers(labels: Sequence[str], classes: dict[str, int]) -> list[int]:
    """Return the contents of ``KEY.cls``: the labels if all are whole numbers, else their numbers as classes."""
    if all(map(WHOLE_NUMBER.fullmatch, classes)):
        return list(map(int, labels))
    return [classes[label] for label in labels]
