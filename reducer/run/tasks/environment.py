"""Find out whether the workers of a run hash alike: their versions, and what they make of the same few pictures.

The pictures (in ``probes/``, drawn, 40 kB in all) have faint clouds under sharp coloured edges, so that many bits of
a hash hang on a level or two, and a decoder, a colour conversion or a resampler that counts otherwise shows:

- ``large.jpg`` (1056 x 1056, 4:2:0), which `fast` decodes at a fraction of its size;
- ``large-progressive.jpg``, the same picture, of which `fastest` decodes the first scan only;
- ``lossy.webp``, which a Pillow without WebP cannot decode;
- ``transparent.png``, a palette with transparent and half transparent colours (called ``palette.png`` before policy 2
  of `reducer.photos.seen`, which hashes it otherwise).

There are no hashes to expect: only the processes of one run are compared, with each other.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import TypeVar

import imagehash
import numpy as np
import PIL
from PIL import features

from reducer._version import __version__
from reducer.config.settings import PhotoSettings
from reducer.formatting import clip
from reducer.photos.formats import PLUGINS
from reducer.photos.hashing import PhotoError, hash_photo, pillow_settings
from reducer.photos.model import probe_digest
from reducer.storage.codecs import to_hex

#: How packages are called in messages, where their key in `versions` is another.
TITLES = {"pillow": "Pillow", "python": "Python", "pywavelets": "PyWavelets", "libjpeg_turbo": "libjpeg-turbo"}
#: Probes are decoded even if ``max_pixels`` would refuse them: a limit on photos is no reason to compare nothing.
PROBE_PIXELS = 2_000_000
#: The probe that only `fastest` decodes in a way of its own.
FIRST_SCAN_PROBE = "large-progressive.jpg"
#: The probe that a model is tried with, and what its name ends in then.
VECTOR_PROBE, WITH_MODEL = "large.jpg", " with --embed"
#: Packages of whose versions hashes depend; of numpy only the major version counts.
DECISIVE = ("pillow", "imagehash", "numpy", *PLUGINS)
#: A message tells of this many different versions; of more only that there are more.
SHOWN_VERSIONS = 4
#: Characters of a probe's hash that a message shows.
SHOWN_CHARACTERS = 64

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Environment:
    """All that decides the hashes of one process.

    Attributes
    ----------
    versions : dict of str to str
        As `versions` returns them.
    probes : dict of str to str
        Hash of each probe in hex, or ``kind: what was found`` if it cannot be decoded here. Where a model embeds
        photos, for one of them also a digest of its vector.
    """

    versions: dict[str, str]
    probes: dict[str, str]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that are the same for processes which may work on one run.

        They stand for all that `differences` takes for an error: Pillow, imagehash, numpy's major version, the probes.
        """
        content = json.dumps([*_decisive(self), sorted(self.probes.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of all that may decide a result.

    Returns
    -------
    dict of str to str
        Of Reducer, Python and its packages, by their names in lower case, and of the libraries that Pillow decodes
        with: ``libjpeg_turbo``, ``zlib``, ``libwebp``. A package that is missing, or has no version, is left out.
    """
    known: dict[str, str | None] = {
        "reducer": __version__,
        "python": platform.python_version(),
        # The loaded package decides; on the disk there may be a newer one since this process began.
        "pillow": PIL.__version__,
        "imagehash": imagehash.__version__,
        "numpy": np.__version__,
    }
    for name in ("scipy", "PyWavelets", "pyarrow", "pandas", "dask", "distributed", "onnxruntime", *PLUGINS):
        known[name.lower()] = _installed(name)
    known["libjpeg_turbo"] = features.version_feature("libjpeg_turbo")
    known["zlib"] = features.version_codec("zlib")
    known["libwebp"] = features.version_module("webp")
    return {name: value for name, value in known.items() if value is not None}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def probe_files() -> dict[str, bytes]:
    """Read the probe pictures, from wherever the package was imported (a zip file too).

    Returns
    -------
    dict of str to bytes
        Content by file name, in the order of the names.
    """
    folder = files("reducer.run.tasks").joinpath("probes").iterdir()
    return {file.name: file.read_bytes() for file in sorted(folder, key=lambda file: file.name) if file.is_file()}


@lru_cache(maxsize=16)
def environment(settings: PhotoSettings) -> Environment:
    """Find out what decides the hashes of this process; once per settings.

    Parameters
    ----------
    settings : PhotoSettings
        The probes are hashed with its ``hash``, ``hash_size``, ``decode`` and ``exif_orientation``.

    Returns
    -------
    Environment
        A shared object: do not change its dicts.

    Raises
    ------
    InputError
        If there is a model, and it cannot be loaded here.
    """
    settings = replace(settings, drop_flat=False, max_pixels=max(settings.max_pixels, PROBE_PIXELS))
    probes = {}
    with pillow_settings(settings.max_pixels):
        for name, content in probe_files().items():
            if name == FIRST_SCAN_PROBE and settings.decode != "fastest":
                continue  # decoded as others are
            try:
                probes[name] = to_hex(hash_photo(content, settings).bits, settings.bits)
            except PhotoError as error:  # a Pillow built without WebP, say
                probes[name] = str(error)
            if settings.embed is not None and name == VECTOR_PROBE:
                probes[name + WITH_MODEL] = probe_digest(content, settings)
    return Environment(versions(), probes)


def without_model(process: Environment) -> Environment:
    """Return what decides the hashes alone, and not the vectors."""
    probes = {name: shown for name, shown in process.probes.items() if not name.endswith(WITH_MODEL)}
    return replace(process, probes=probes)


def differences(environments: Mapping[str, Environment]) -> tuple[list[str], list[str]]:
    """Compare processes that are to hash alike.

    Parameters
    ----------
    environments : mapping of str to Environment
        By the names that messages are to use, such as ``worker tcp://10.0.0.1:333``, all of the same settings. Probes
        that only some of them have (other versions of Reducer had more) are not compared.

    Returns
    -------
    errors : list of str
        One line for Pillow, imagehash and numpy's major version if processes differ in it, and one for processes
        that have the same versions of these and still hash the probes differently. Empty if all hash alike.
    warnings : list of str
        One line for every other version that differs.
    """
    errors, warnings = [], []
    packages = (package for process in environments.values() for package in process.versions)
    for package in dict.fromkeys([*DECISIVE, *packages]):
        groups = _groups({name: _version(process, package) for name, process in environments.items()})
        title = TITLES.get(package, package)
        if package in DECISIVE and len({_decisive_part(package, value) for value in groups}) > 1:
            having = [
                f"{_who(names)} {'have' if names[1:] else 'has'} {title} {value}" for value, names in groups.items()
            ]
            one = "one major version" if package == "numpy" else "one version"
            errors.append(f"{_listed(having)}: photos may not be hashed alike; install {one} of {title} on all")
        elif len(groups) > 1:
            found = _listed([f"{value} ({_who(names)})" for value, names in groups.items()])
            warnings.append(f"{title} is not the same on all: {found}: allowed, but one version on all is safer")
    # Where versions differ hashes may differ too: that is one fault, not two.
    for names in _groups({name: _decisive(process) for name, process in environments.items()}).values():
        errors += _unlike_probes({name: environments[name] for name in names})
    return errors, warnings


def _unlike_probes(environments: Mapping[str, Environment]) -> list[str]:
    """Compare the probes of processes that have the same decisive versions; no line if they hash alike."""
    common = sorted(set.intersection(*(set(process.probes) for process in environments.values())))
    groups = _groups({name: tuple(process.probes[probe] for probe in common) for name, process in environments.items()})
    if len(groups) == 1:
        return []
    many, few = list(groups.values())[:2]
    one, other = environments[many[0]], environments[few[0]]
    probe = next(probe for probe in common if one.probes[probe] != other.probes[probe])
    hashes = ", ".join(clip(process.probes[probe], SHOWN_CHARACTERS) for process in (one, other))
    causes = [
        f"{TITLES.get(package, package)} ({_version(one, package)}, {_version(other, package)})"
        for package in dict.fromkeys([*one.versions, *other.versions])
        if _version(one, package) != _version(other, package)
    ]
    why = f"they differ in {', '.join(causes)}" if causes else "perhaps their Pillow is built differently"
    return [
        f"{_who(many)} and {_who(few)} hash the probe {probe} differently ({hashes}), although both have Pillow "
        f"{_version(one, 'pillow')} and imagehash {_version(one, 'imagehash')}; {why}: install the same builds on all, "
        "for example from one container image"
    ]


def compare_with(
    reference: Environment, own: Environment, who: str, reference_name: str = "the first worker of the run"
) -> str | None:
    """Say why a process may not join a run that has begun.

    Parameters
    ----------
    reference : Environment
        Of the workers that the run began with.
    own : Environment
        Of the process that joins, of the same settings.
    who, reference_name : str
        Their names in the message, such as ``worker tcp://10.0.0.1:333``.

    Returns
    -------
    str or None
        One line; None if it hashes alike.
    """
    errors, _ = differences({reference_name: reference, who: own})
    return "; ".join(errors) or None


def _version(process: Environment, package: str) -> str:
    return process.versions.get(package, "unknown")


def _decisive_part(package: str, value: str) -> str:
    return value.partition(".")[0] if package == "numpy" else value


def _decisive(process: Environment) -> tuple[str, ...]:
    return tuple(_decisive_part(package, _version(process, package)) for package in DECISIVE)


def _groups(values: Mapping[str, Value]) -> dict[Value, list[str]]:
    """Group names by their values, the largest group first, equal ones in the order of the names."""
    groups: dict[Value, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def _who(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - SHOWN_VERSIONS
    return ", ".join(texts[:SHOWN_VERSIONS]) + (f" and {more} more" if more > 0 else "")
