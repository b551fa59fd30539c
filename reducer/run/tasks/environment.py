"""Whether the workers of a run hash alike: the versions that they have, and what they make of the same few pictures.

The pictures (in ``probes/``, drawn, 89 kB in all) have faint clouds under sharp coloured edges, so that many bits of
a hash hang on a level or two, and a decoder, a colour conversion or a resampler that counts otherwise shows:

- ``baseline.jpg`` (416 x 312) and ``large.jpg`` (1056 x 1056), colour, 4:2:0: the smaller is what `fast` decodes at 1/2
  for a hash of 8 by 8 bits, the larger is there for hashes with a finer grid;
- ``large-progressive.jpg``: the picture of ``large.jpg``, large enough for `fastest` to decode its first scan only;
- ``progressive.jpg`` (4:4:4), ``grey.jpg``, ``cmyk.jpg`` (as Adobe writes it), ``orientation.jpg`` (4:2:2, EXIF
  orientation 6);
- ``palette.png`` (with transparent and half transparent colours), ``alpha.png`` (RGBA), ``deep.png`` (16 bits, some
  levels above 255);
- ``lossy.webp``, ``deflate.tif`` (with a predictor), ``interlaced.gif``.

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
from reducer.photos.hashing import PhotoError, hash_photo, pillow_settings
from reducer.photos.model import probe_digest
from reducer.storage.codecs import to_hex

#: How packages are called in messages, where their key in `versions` is another.
TITLES = {"pillow": "Pillow", "python": "Python", "pywavelets": "PyWavelets", "libjpeg_turbo": "libjpeg-turbo"}
#: Probes are decoded even if ``max_pixels`` would refuse them: a limit on photos is no reason to compare nothing.
PROBE_PIXELS = 2_000_000
#: The one that only `fastest` decodes in a way of its own.
FIRST_SCAN_PROBE = "large-progressive.jpg"
#: The one that a model is tried with.
VECTOR_PROBE, WITH_MODEL = "large.jpg", " with --embed"
#: A message tells of so many different versions, and so many characters of a hash; of more only that there are more.
SHOWN_VERSIONS = 4
SHOWN_CHARACTERS = 64

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Environment:
    """What decides the hashes of one process.

    Attributes
    ----------
    versions : dict of str to str
        As `versions` gives them.
    probes : dict of str to str
        For each probe file its hash in hex, or ``kind: what was found`` if it cannot be decoded here. Where a model
        embeds photos, for one of them also a digest of its vector.
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
    """Versions of all that may decide a result.

    Returns
    -------
    dict of str to str
        Of Reducer, Python and its packages, by their names in lower case, and of the libraries that Pillow decodes
        with: ``libjpeg_turbo``, ``zlib``, ``libwebp``. What is not there, or does not tell, is left out.
    """
    found: dict[str, str | None] = {
        "reducer": __version__,
        "python": platform.python_version(),
        # What is loaded decides; on the disk there may be a newer one since this process began.
        "pillow": PIL.__version__,
        "imagehash": imagehash.__version__,
        "numpy": np.__version__,
    }
    for name in ("scipy", "PyWavelets", "pyarrow", "pandas", "dask", "distributed", "onnxruntime"):
        found[name.lower()] = _installed(name)
    found["libjpeg_turbo"] = features.version_feature("libjpeg_turbo")
    found["zlib"] = features.version_codec("zlib")
    found["libwebp"] = features.version_module("webp")
    return {name: value for name, value in found.items() if value is not None}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def probe_files() -> dict[str, bytes]:
    """The probe pictures, from wherever the package was imported (a zip file too).

    Returns
    -------
    dict of str to bytes
        Content by file name, in the order of the names.
    """
    found = files("reducer.run.tasks").joinpath("probes").iterdir()
    return {file.name: file.read_bytes() for file in sorted(found, key=lambda file: file.name) if file.is_file()}


@lru_cache(maxsize=16)
def environment(settings: PhotoSettings) -> Environment:
    """What decides the hashes of this process; worked out once for each settings.

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


def without_model(one: Environment) -> Environment:
    """What decides the hashes alone."""
    return replace(one, probes={name: found for name, found in one.probes.items() if not name.endswith(WITH_MODEL)})


def differences(environments: Mapping[str, Environment]) -> tuple[list[str], list[str]]:
    """What is not the same in processes that are to hash alike.

    Parameters
    ----------
    environments : mapping of str to Environment
        By the names that messages are to use, such as ``worker tcp://10.0.0.1:333``, all of the same settings.

    Returns
    -------
    errors : list of str
        One line for Pillow, imagehash and numpy's major version if processes differ in it, and one for processes
        that have the same versions of these and still hash the probes differently. Empty if all hash alike.
    warnings : list of str
        One line for every other version that differs.
    """
    errors = []
    settled = {"pillow", "imagehash"}  # reported as errors or the same everywhere
    for package in ("pillow", "imagehash", "numpy"):
        groups = _groups({name: _decisive_version(one, package) for name, one in environments.items()})
        if len(groups) > 1:
            settled.add(package)
            errors.append(_versions_error(package, groups, environments))
    # Where versions differ hashes may differ too: that is one fault, not two.
    for names in _groups({name: _decisive(one) for name, one in environments.items()}).values():
        groups_of_hashes = _groups({name: tuple(sorted(environments[name].probes.items())) for name in names})
        if len(groups_of_hashes) > 1:
            errors.append(_probes_error(list(groups_of_hashes.values()), environments))
    warnings = []
    for package in dict.fromkeys(package for one in environments.values() for package in one.versions):
        groups = _groups({name: one.versions.get(package, "unknown") for name, one in environments.items()})
        if package not in settled and len(groups) > 1:
            found = _listed([f"{value} ({_who(names)})" for value, names in groups.items()])
            warnings.append(
                f"{_title(package)} is not the same on all: {found}: allowed, but one version on all is safer"
            )
    return errors, warnings


def compare_with(
    reference: Environment, own: Environment, who: str, reference_name: str = "the first worker of the run"
) -> str | None:
    """Why a process may not join a run that has begun.

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


def _decisive_version(one: Environment, package: str) -> str:
    found = one.versions.get(package, "unknown")
    return found.partition(".")[0] if package == "numpy" else found


def _decisive(one: Environment) -> tuple[str, ...]:
    return tuple(_decisive_version(one, package) for package in ("pillow", "imagehash", "numpy"))


def _groups(values: Mapping[str, Value]) -> dict[Value, list[str]]:
    """Names by their values, the largest group first, equal ones in the order of the names."""
    groups: dict[Value, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def _who(names: Sequence[str]) -> str:
    """One name, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _title(package: str) -> str:
    return TITLES.get(package, package)


def _listed(found: Sequence[str]) -> str:
    more = len(found) - SHOWN_VERSIONS
    return ", ".join(found[:SHOWN_VERSIONS]) + (f" and {more} more" if more > 0 else "")


def _versions_error(package: str, groups: Mapping[str, list[str]], environments: Mapping[str, Environment]) -> str:
    title = _title(package)
    found = []
    for names in groups.values():
        whole = environments[names[0]].versions.get(package, "of an unknown version")
        found.append(f"{_who(names)} {'has' if len(names) == 1 else 'have'} {title} {whole}")
    one = "one major version" if package == "numpy" else "one version"
    return f"{_listed(found)}: photos may not be hashed alike; install {one} of {title} on all"


def _probes_error(groups: Sequence[list[str]], environments: Mapping[str, Environment]) -> str:
    """One line on the two largest groups of processes that hash probes differently."""
    many, few = groups[:2]
    one, other = environments[many[0]], environments[few[0]]
    names = sorted({**one.probes, **other.probes})
    unlike = [name for name in names if one.probes.get(name) != other.probes.get(name)]
    probe = unlike[0]
    values = _excerpts(one.probes.get(probe, "not there"), other.probes.get(probe, "not there"))
    # What some on both sides have is not the cause.
    causes = [
        f"{_title(key)} ({one.versions.get(key, 'unknown')}, {other.versions.get(key, 'unknown')})"
        for key in dict.fromkeys([*one.versions, *other.versions])
        if {environments[name].versions.get(key) for name in many}.isdisjoint(
            environments[name].versions.get(key) for name in few
        )
    ]
    why = f"they differ in {', '.join(causes)}" if causes else "perhaps their Pillow is built differently"
    others = sum(len(group) for group in groups[2:])
    return (
        f"{_side(many)} and {_side(few)} hash the probe {probe} differently ({', '.join(values)}), "
        f"{len(unlike)} of {len(names)} probes in all, although both have Pillow {one.versions.get('pillow')} and "
        f"imagehash {one.versions.get('imagehash')}; {why}"
        + (f"; {others} more hash{'es' if others == 1 else ''} in yet another way" if others else "")
        + ": install the same builds on all, for example from one container image"
    )


def _side(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _excerpts(one: str, other: str) -> list[str]:
    """Two texts that differ, long ones from where they begin to."""
    same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    stop = same + SHOWN_CHARACTERS
    return [
        text
        if len(text) <= SHOWN_CHARACTERS
        else ("…" if same else "") + text[same:stop] + ("…" if stop < len(text) else "")
        for text in (one, other)
    ]
