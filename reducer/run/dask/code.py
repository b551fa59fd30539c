"""Read the code of this package as bytes, and digest it.

Workers that lack the package run this too: it travels by value (cloudpickle), and imports inside, from Python's own
library.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return the digest of the code that this process has, in hex."""
    return digest_of_package() or ""


def digest_of_package() -> str | None:
    """Return the digest of the names and contents of the package's files; None if this process finds no package."""
    import hashlib

    files = package_files()
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16] if files else None


def package_files() -> dict[str, bytes]:
    """Read the files of the package by name, from a folder or a zip file; empty if this process finds no package."""
    import importlib.util
    import pathlib
    import zipfile

    try:
        spec = importlib.util.find_spec("reducer")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return {}
    archive = getattr(spec.loader, "archive", None)
    top: Any = zipfile.Path(archive, "reducer/") if archive else pathlib.Path(spec.submodule_search_locations[0])
    files: dict[str, bytes] = {}
    folders = [("", top)]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.name.startswith((".", "__pycache__")) or entry.name.endswith((".pyc", "~")):
                continue
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            else:
                files[prefix + entry.name] = entry.read_bytes()
    return files


def minor_version(version: str | None = None) -> str:
    """Return the first two numbers of a version of Python; default that of this process."""
    return ".".join((version or platform.python_version()).split(".")[:2])
