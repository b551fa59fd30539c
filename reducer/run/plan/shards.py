"""Which tar shards IMAGES names, and the MD5 sums that were published of them."""

from __future__ import annotations

import glob
import logging
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any

from reducer.config.job import Job
from reducer.errors import InputError
from reducer.photos.formats import is_photo
from reducer.storage.location import Location, Shard, absolute, explaining_errors, is_url
from reducer.storage.remote import nanoseconds
from reducer.storage.tables import EXAMPLES, read_lines

log = logging.getLogger("reducer")

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
    place = job.images_location
    with explaining_errors(place, f"IMAGES {place.path} cannot be listed"):
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


def _local_files(images: str) -> list[Shard] | None:
    if os.path.isdir(images):
        names = (f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(images))
        found = _names_of_shards(images, names)
        paths = None if found is None else [os.path.join(images, name) for name in found]
    elif glob.has_magic(images):
        paths = _checked(images, [path for path in glob.glob(images, recursive=True) if not os.path.isdir(path)])
    elif _is_shard(images) and os.path.exists(images):
        paths = _checked(images, [images])
    else:
        return None  # what is wrong with it is told where folders are looked into
    if paths is None:
        return None
    states = [(path, os.stat(path)) for path in map(absolute, paths)]
    return [Shard(0, path, state.st_size, state.st_mtime_ns) for path, state in states]


def _remote_files(place: Location) -> list[Shard] | None:
    system, root = place.open()
    if glob.has_magic(root) and not system.isdir(root):
        details = system.glob(root, detail=True)
        files = [path for path, known in details.items() if known["type"] == "file"]
        paths = _checked(place.path, [path for path in files if not posixpath.basename(path).startswith(".")])
    elif _is_shard(root) and system.isfile(root):
        details = {root: system.info(root)}
        paths = _checked(place.path, [root])
    else:
        if _names_of_shards(place.path, _first_names(place)) is None:
            return None
        details = {known["name"]: known for known in system.ls(root, detail=True) if known["type"] == "file"}
        names = {posixpath.basename(path): path for path in details}
        paths = [names[name] for name in _names_of_shards(place.path, names) or ()]
    # Not all listings tell sizes: those of web servers do not.
    known = {path: details[path] if details[path]["size"] is not None else system.info(path) for path in paths}
    return [_remote_shard(system.unstrip_protocol(path), known[path]) for path in paths]


def _first_names(place: Location) -> list[str]:
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
    if known["size"] is None:
        raise InputError(f"IMAGES: the size of {path} is not told there, so it cannot be read as a shard")
    changed, etag = known.get("LastModified"), known.get("ETag")
    mtime_ns = nanoseconds(changed) if isinstance(changed, datetime) else None
    return Shard(0, path, known["size"], mtime_ns, etag and etag.strip('"'))


def _is_shard(name: str) -> bool:
    """Whether a file is called as tars are, compressed ones too, which are refused then."""
    return name.lower().endswith((EXTENSION, *COMPRESSED))


def _names_of_shards(images: str, names: Iterable[str]) -> list[str] | None:
    """Names of the shards in a folder, given all of its names; None if it holds photos or folders, or no shard."""
    shards, single = [], False
    for name in names:
        if name.startswith(".") or not name:
            continue
        if name.endswith("/") or is_photo(name):
            single = True
        elif _is_shard(name):
            shards.append(name)
    if single and shards:
        log.warning(
            "IMAGES %s holds %d tar files, %s say, beside photos or folders: it is taken for a folder of single files. "
            "If the tars are meant, give a glob of them, such as '%s/*%s'",
            images,
            len(shards),
            min(shards),
            images.rstrip("/"),
            EXTENSION,
        )
    return None if single or not shards else _checked(images, shards)


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
    stems = [_stem(shard.path) for shard in shards]
    missing = [shard.path for shard, stem in zip(shards, stems, strict=True) if stem not in sums]
    if missing:
        shown = ", ".join(missing[:EXAMPLES]) + (" ..." if len(missing) > EXAMPLES else "")
        raise InputError(f"--md5 {job.md5} has no sum of {len(missing)} of {len(shards)} shards: {shown}")
    twice = [stem for stem, count in Counter(stems).items() if count > 1 or len(sums[stem]) > 1]
    if twice:
        raise InputError(
            f"--md5 {job.md5}: shards are told by their names, and more than one is called {twice[0]}: give those of "
            "one folder at a time"
        )
    return [replace(shard, md5=min(sums[stem])) for shard, stem in zip(shards, stems, strict=True)]


def _published(job: Job) -> dict[str, set[str]]:
    """Sums by the stems of the shards' names; more than one where they contradict each other."""
    where = f"--md5 {job.md5}"
    place = Location(job.md5 or "", job.storage_options if is_url(job.md5 or "") else {})
    with explaining_errors(place, f"{where} cannot be read"):
        system, root = place.open()
        if system.isdir(root):
            files = sorted(path for path in system.ls(root, detail=False) if path.endswith((".txt", ".md5")))
            if not files:
                raise InputError(f"{where} holds no file that ends in .txt or .md5")
            contents = {path: content.decode() for path, content in system.cat(files).items()}
        else:
            contents = {root: "\n".join(read_lines(where, place))}
    sums: defaultdict[str, set[str]] = defaultdict(set)
    for path, text in contents.items():
        for line in filter(None, map(str.strip, text.splitlines())):
            found = BSD_MD5.fullmatch(line) or MD5SUM.fullmatch(line)
            if found is None:
                raise InputError(f"{where}: {path} holds {line[:80]!r}: expected what md5sum writes (a sum and a name)")
            sums[_stem(found["name"] or _shard_of(path))].add(found["sum"].lower())
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
