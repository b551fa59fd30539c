"""Find the tar shards that IMAGES names, and the MD5 sums that were published of them."""

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
#: Names of a folder in a store that are listed to tell whether it holds shards or photos.
FIRST_NAMES = 1000
#: Lines of md5sum(1), and of BSD's md5; a file of one sum may hold the sum alone.
MD5SUM = re.compile(r"(?P<sum>[0-9a-fA-F]{32})(?:\s+\*?(?P<name>.+))?")
BSD_MD5 = re.compile(r"MD5 \((?P<name>.+)\) = (?P<sum>[0-9a-fA-F]{32})")
#: Names of files of one sum: GLDv2's ``md5.images_000.txt``, ``images_000.tar.md5`` and the like.
MD5_NAME = re.compile(r"(?:md5\.)?(?P<stem>.+?)(?:\.tar)?(?:\.md5|\.txt|\.md5\.txt)?")


def find_shards(job: Job) -> list[Shard] | None:
    """Find the shards that IMAGES names: a ``.tar`` file, a glob of them, or a folder that holds them and no photos.

    Parameters
    ----------
    job : Job
        Job whose ``images`` it is.

    Returns
    -------
    list of Shard or None
        Shards, sorted and numbered by path; None if IMAGES is a folder of single files.

    Raises
    ------
    InputError
        If there are none where there should be some, they are compressed, IMAGES cannot be listed, or a published MD5
        sum is missing.
    """
    location = job.images_location
    with explaining_errors(location, f"IMAGES {location.path} cannot be listed"):
        files = _remote_files(location) if location.remote else _local_files(location.path)
    if files is None:
        for name in ("md5", "label_field"):
            if getattr(job, name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} goes with tar shards, and IMAGES {job.images} is a folder of single "
                    "files: leave it out, or give a glob such as 'DIR/*.tar'"
                )
        return None
    if job.exclude is not None:
        raise InputError(f"--exclude goes with single files, and IMAGES {job.images} is tar shards: leave it out")
    shards = [replace(shard, number=number) for number, shard in enumerate(sorted(files, key=lambda file: file.path))]
    return shards if job.md5 is None else _with_sums(job, shards)


def _local_files(images: str) -> list[Shard] | None:
    """Find shards on a disk, not numbered yet; None if there are single files."""
    if os.path.isdir(images):
        names = (f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(images))
        shard_names = _names_of_shards(images, names)
        paths = None if shard_names is None else [os.path.join(images, name) for name in shard_names]
    elif glob.has_magic(images):
        paths = _checked(images, [path for path in glob.glob(images, recursive=True) if not os.path.isdir(path)])
    elif _is_shard(images) and os.path.exists(images):
        paths = _checked(images, [images])
    else:
        return None  # `check_images` refuses it
    if paths is None:
        return None
    states = [(path, os.stat(path)) for path in map(absolute, paths)]
    return [Shard(0, path, state.st_size, state.st_mtime_ns) for path, state in states]


def _remote_files(location: Location) -> list[Shard] | None:
    """Find shards in a store, not numbered yet; None if there are single files."""
    system, root = location.open()
    if glob.has_magic(root) and not system.isdir(root):
        details = system.glob(root, detail=True)
        files = [path for path, known in details.items() if known["type"] == "file"]
        paths = _checked(location.path, [path for path in files if not posixpath.basename(path).startswith(".")])
    elif _is_shard(root) and system.isfile(root):
        details = {root: system.info(root)}
        paths = _checked(location.path, [root])
    else:
        if _names_of_shards(location.path, _first_names(location)) is None:
            return None
        details = {known["name"]: known for known in system.ls(root, detail=True) if known["type"] == "file"}
        names = {posixpath.basename(path): path for path in details}
        paths = [names[name] for name in _names_of_shards(location.path, names) or ()]
    # Not all listings hold sizes: those of web servers do not.
    known = {path: details[path] if details[path]["size"] is not None else system.info(path) for path in paths}
    return [_remote_shard(system.unstrip_protocol(path), known[path]) for path in paths]


def _first_names(location: Location) -> list[str]:
    """List the first names in a folder of a store; those of folders end in a slash."""
    system, root = location.open()
    if not location.on_s3:
        entries = system.ls(root, detail=True)
        return [posixpath.basename(entry["name"]) + "/" * (entry["type"] == "directory") for entry in entries]
    bucket, prefix, _ = system.split_path(root)
    page = system.call_s3(
        "list_objects_v2", Bucket=bucket, Prefix=prefix and f"{prefix}/", Delimiter="/", MaxKeys=FIRST_NAMES
    )
    files = [posixpath.basename(entry["Key"]) for entry in page.get("Contents", ())]
    return files + [f"{posixpath.basename(entry['Prefix'].rstrip('/'))}/" for entry in page.get("CommonPrefixes", ())]


def _remote_shard(path: str, known: dict[str, Any]) -> Shard:
    """Return a shard in a store from its entry in a listing."""
    if known["size"] is None:
        raise InputError(f"IMAGES: the size of {path} is not told there, so it cannot be read as a shard")
    changed, etag = known.get("LastModified"), known.get("ETag")
    mtime_ns = nanoseconds(changed) if isinstance(changed, datetime) else None
    return Shard(0, path, known["size"], mtime_ns, etag and etag.strip('"'))


def _is_shard(name: str) -> bool:
    """Tell whether a file has the name of a tar; also of a compressed one, which is refused later."""
    return name.lower().endswith((EXTENSION, *COMPRESSED))


def _names_of_shards(images: str, names: Iterable[str]) -> list[str] | None:
    """Choose the shards among the names in a folder; None if it holds photos or folders, or no shard."""
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
    """Return paths of shards, and refuse any that is no uncompressed tar."""
    if not paths:
        raise InputError(f"IMAGES {images} matches nothing: give a folder, or a glob of {EXTENSION} files")
    for path in paths:
        if path.lower().endswith(COMPRESSED):
            raise InputError(f"IMAGES: {path} is compressed, so no part of it can be read alone: unpack it first")
        if not path.lower().endswith(EXTENSION):
            raise InputError(f"IMAGES {images} is taken for a glob of tar shards, and {path} is none (*{EXTENSION})")
    return paths


def _with_sums(job: Job, shards: list[Shard]) -> list[Shard]:
    """Add to shards the sums that were published of them."""
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
    """Read sums by the stems of the shards' names; more than one where they contradict each other."""
    where = f"--md5 {job.md5}"
    location = Location(job.md5 or "", job.storage_options if is_url(job.md5 or "") else {})
    with explaining_errors(location, f"{where} cannot be read"):
        system, root = location.open()
        if system.isdir(root):
            files = sorted(path for path in system.ls(root, detail=False) if path.endswith((".txt", ".md5")))
            if not files:
                raise InputError(f"{where} holds no file that ends in .txt or .md5")
            contents = {path: _text_of(where, path, content) for path, content in system.cat(files).items()}
        else:
            contents = {root: "\n".join(read_lines(where, location))}
    sums: defaultdict[str, set[str]] = defaultdict(set)
    for path, text in contents.items():
        for line in filter(None, map(str.strip, text.splitlines())):
            match = BSD_MD5.fullmatch(line) or MD5SUM.fullmatch(line)
            if match is None:
                raise InputError(f"{where}: {path} holds {line[:80]!r}: expected what md5sum writes (a sum and a name)")
            sums[_stem(match["name"] or _shard_of(path))].add(match["sum"].lower())
    return sums


def _text_of(where: str, path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {path} is not UTF-8 text ({error})") from None


def _shard_of(path: str) -> str:
    """Return the name of the shard that a file with nothing but a sum is about, by its own name."""
    match = MD5_NAME.fullmatch(posixpath.basename(path))
    assert match is not None
    return match["stem"]


def _stem(path: str) -> str:
    """Return the name of a shard without folders and extension, as lists of sums are matched by it."""
    name = posixpath.basename(path.replace(os.sep, "/"))
    return name[: -len(EXTENSION)] if name.lower().endswith(EXTENSION) else name
