"""Which tar shards IMAGES names, and the MD5 sums that were published of them."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from reducer.config import Job
from reducer.errors import InputError
from reducer.manifest import is_photo
from reducer.objects import nanoseconds
from reducer.places import Place, absolute, explained, is_url
from reducer.tables import EXAMPLES, read_lines
from reducer.types import MemberKeys, Shard

EXTENSION = ".tar"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".tgz", ".tbz2", ".txz")
#: So many names of a folder in a store are looked at to tell whether it holds shards or photos.
FIRST_NAMES = 1000
#: What md5sum(1) writes, and what BSD's md5 does; a file of one sum may hold it alone.
MD5SUM = re.compile(r"(?P<sum>[0-9a-fA-F]{32})(?:\s+\*?(?P<name>.+))?")
BSD_MD5 = re.compile(r"MD5 \((?P<name>.+)\) = (?P<sum>[0-9a-fA-F]{32})")
#: What files of one sum are called: GLDv2's ``md5.images_000.txt``, ``images_000.tar.md5`` and the like.
MD5_NAME = re.compile(r"(?:md5\.)?(?P<stem>.+?)(?:\.tar)?(?:\.md5|\.txt|\.md5\.txt)?")


def find_shards(job: Job) -> list[Shard] | None:
    """The shards that IMAGES names: a ``.tar`` file, a glob of them, or a folder that holds them and no photos.

    Parameters
    ----------
    job : Job
        Whose ``images`` it is.

    Returns
    -------
    list of Shard or None
        By their paths; None if IMAGES is a folder of single files.

    Raises
    ------
    InputError
        If there are none where there should be some, they are compressed, IMAGES cannot be listed, or a published MD5
        sum is missing.
    """
    place = job.images_place
    with explained(place, f"IMAGES {place.path} cannot be listed"):
        files = _remote_files(place) if place.remote else _local_files(place.path)
    if files is None:
        for name in ("md5", "label_field"):
            if getattr(job, name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} goes with tar shards, and IMAGES {job.images} is a folder of single "
                    "files: leave it out, or give a glob such as 'DIR/*.tar'"
                )
        return None
    shards = [replace(shard, number=number) for number, shard in enumerate(sorted(files, key=lambda file: file.path))]
    return shards if job.md5 is None else _with_sums(job, shards)


def member_keys(job: Job) -> MemberKeys:
    """By what photos in shards are told from others."""
    if job.manifest is None:
        return MemberKeys.SAMPLE
    return MemberKeys.STEM if job.path_column is None and job.path_template is None else MemberKeys.PATH


def _local_files(images: str) -> list[Shard] | None:
    if os.path.isdir(images):
        names = _names_of_shards(entry.name if entry.is_file() else f"{entry.name}/" for entry in os.scandir(images))
        paths = None if names is None else [os.path.join(images, name) for name in names]
    elif glob.has_magic(images):
        paths = _checked(images, glob.glob(images, recursive=True))
    elif images.lower().endswith((EXTENSION, *COMPRESSED)) and os.path.exists(images):
        paths = _checked(images, [images])
    else:
        return None  # what is wrong with it is told where folders are looked into
    if paths is None:
        return None
    found = [(path, os.stat(path)) for path in map(absolute, paths)]
    return [Shard(0, path, state.st_size, state.st_mtime_ns) for path, state in found]


def _remote_files(place: Place) -> list[Shard] | None:
    system, root = place.open()
    name = posixpath.basename(root)
    if glob.has_magic(root):
        details = system.glob(root, detail=True)
        paths = _checked(place.path, [path for path, known in details.items() if known["type"] == "file"])
    elif name.lower().endswith((EXTENSION, *COMPRESSED)) and system.isfile(root):
        paths = _checked(place.path, [root])
        details = {root: system.info(root)}
    else:
        if _names_of_shards(_first_names(place)) is None:
            return None
        details = {known["name"]: known for known in system.ls(root, detail=True)}
        paths = [path for path in details if path.lower().endswith(EXTENSION)]
    return [_remote_shard(system.unstrip_protocol(path), details[path]) for path in paths]


def _first_names(place: Place) -> list[str]:
    """What lies in a folder of a store; folders end in a slash."""
    system, root = place.open()
    if not place.on_s3:
        found = system.ls(root, detail=True)
        return [posixpath.basename(k["name"]) + ("/" if k["type"] == "directory" else "") for k in found]
    bucket, prefix, _ = system.split_path(root)
    page = system.call_s3(
        "list_objects_v2", Bucket=bucket, Prefix=prefix and f"{prefix}/", Delimiter="/", MaxKeys=FIRST_NAMES
    )
    files = [posixpath.basename(found["Key"]) for found in page.get("Contents", ())]
    return files + [f"{posixpath.basename(found['Prefix'].rstrip('/'))}/" for found in page.get("CommonPrefixes", ())]


def _remote_shard(path: str, known: dict[str, Any]) -> Shard:
    changed, etag = known.get("LastModified"), known.get("ETag")
    mtime_ns = nanoseconds(changed) if isinstance(changed, datetime) else None
    return Shard(0, path, known["size"], mtime_ns, etag and etag.strip('"'))


def _names_of_shards(names: Iterator[str] | list[str]) -> list[str] | None:
    """Names of the shards in a folder, given all of its names; None if it holds photos or folders, or no shard."""
    shards = []
    for name in names:
        if name.startswith(".") or not name:
            continue
        if name.endswith("/") or is_photo(name):
            return None
        if name.lower().endswith(EXTENSION):
            shards.append(name)
    return shards or None


def _checked(images: str, paths: list[str]) -> list[str]:
    """Refuse what is no uncompressed tar."""
    if not paths:
        raise InputError(f"IMAGES {images} matches nothing: give a folder, or a glob of {EXTENSION} files")
    for path in paths:
        if path.lower().endswith(COMPRESSED):
            raise InputError(f"IMAGES: {path} is compressed, so no part of it can be read alone: unpack it first")
        if not path.lower().endswith(EXTENSION):
            raise InputError(f"IMAGES {images} is taken for a glob of tar shards, and {path} is none (*{EXTENSION})")
    return paths


def _with_sums(job: Job, shards: list[Shard]) -> list[Shard]:
    """The shards with the sums that were published of them."""
    sums = _published(job)
    missing = [shard.path for shard in shards if _stem(shard.path) not in sums]
    if missing:
        shown = ", ".join(missing[:EXAMPLES]) + (" ..." if len(missing) > EXAMPLES else "")
        raise InputError(f"--md5 {job.md5} has no sum of {len(missing)} of {len(shards)} shards: {shown}")
    return [replace(shard, md5=sums[_stem(shard.path)]) for shard in shards]


def _published(job: Job) -> dict[str, str]:
    """Sums by the stems of the shards' names."""
    where = f"--md5 {job.md5}"
    place = Place(job.md5 or "", job.storage_options if is_url(job.md5 or "") else {})
    with explained(place, f"{where} cannot be read"):
        system, root = place.open()
        if system.isdir(root):
            files = sorted(path for path in system.ls(root, detail=False) if path.endswith((".txt", ".md5")))
            if not files:
                raise InputError(f"{where} holds no file that ends in .txt or .md5")
            contents = {path: content.decode() for path, content in system.cat(files).items()}
        else:
            contents = {root: "\n".join(read_lines(where, place))}
    sums = {}
    for path, text in contents.items():
        for line in filter(None, map(str.strip, text.splitlines())):
            found = BSD_MD5.fullmatch(line) or MD5SUM.fullmatch(line)
            if found is None:
                raise InputError(f"{where}: {path} holds {line[:80]!r}: expected what md5sum writes (a sum and a name)")
            sums[_stem(found["name"] or _shard_of(path))] = found["sum"].lower()
    return sums


def _shard_of(path: str) -> str:
    """The shard that a file with nothing but a sum is about, by its name."""
    found = MD5_NAME.fullmatch(posixpath.basename(path))
    assert found is not None
    return found["stem"]


def _stem(path: str) -> str:
    """What a shard is called in lists of sums: its name without folders and extension."""
    name = posixpath.basename(path.replace(os.sep, "/"))
    return name[: -len(EXTENSION)] if name.lower().endswith(EXTENSION) else name
