from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import imagehash
import PIL
import pytest
from machine import ROOT
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import reducer.run.tasks.environment
from reducer import Job
from reducer.config.resolved import resolve
from reducer.config.settings import DECODE_NAMES, HASH_NAMES, PhotoSettings
from reducer.photos.hashing import HASHES
from reducer.photos.progressive import first_scan_only
from reducer.run.tasks.environment import (
    FIRST_SCAN_PROBE,
    Environment,
    compare_with,
    differences,
    environment,
    probe_files,
    versions,
)

PROBES = ROOT / "reducer" / "run" / "tasks" / "probes"
SETTINGS = resolve(Job("-", "-")).photo_settings
DIGEST = "import sys, reducer; from reducer import Job; from reducer.config.resolved import resolve; "
DIGEST += "from reducer.run.tasks.environment import environment; "
DIGEST += "print(environment(resolve(Job('-', '-')).photo_settings).digest, reducer.__file__, 'dask' in sys.modules, "
DIGEST += "sep='\\n')"


def settings(**options: object) -> PhotoSettings:
    return resolve(Job("-", "-", **options)).photo_settings  # type: ignore[arg-type]


def here(probes: dict[str, str] | None = None, **changed: str) -> Environment:
    """This process's environment, with other versions or hashes."""
    own = environment(SETTINGS)
    return Environment(own.versions | changed, own.probes | (probes or {}))


def test_probes_are_few_small_and_of_all_kinds() -> None:
    found = probe_files()
    assert sorted(found) == list(found) == sorted(path.name for path in PROBES.iterdir())
    assert sum(map(len, found.values())) < 45_000
    opened = {name: Image.open(PROBES / name) for name in found}
    for image in opened.values():
        image.load()
    assert {image.format for image in opened.values()} == {"JPEG", "PNG", "WEBP"}
    assert opened["transparent.png"].mode == "P"
    assert "transparency" in opened["transparent.png"].info
    assert opened["large-progressive.jpg"].info["progressive"]
    assert "progressive" not in opened["large.jpg"].info
    assert [layer[1:3] for layer in opened["large.jpg"].layer] == [(2, 2), (1, 1), (1, 1)]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", HASH_NAMES)
def test_probes_hash_as_imagehash_does(name: str) -> None:
    for size in (8, 16):
        probes = environment(settings(hash=name, hash_size=size, decode="exact")).probes
        for file, found in probes.items():
            with Image.open(PROBES / file) as image:
                expected = getattr(imagehash, HASHES[name].function)(image, hash_size=size)
            assert found == str(expected), file
            assert 0.15 < expected.hash.mean() < 0.85, file


@pytest.mark.parametrize("decode", DECODE_NAMES)
def test_probes_go_both_ways_of_decoding(decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = {}
    draft = JpegImageFile.draft

    def record(image: JpegImageFile, mode: str, size: tuple[int, int]) -> object:
        before = image.size
        result = draft(image, mode, size)
        drafted[before] = (image.size, image.mode)
        return result

    monkeypatch.setattr(JpegImageFile, "draft", record)
    environment.cache_clear()
    environment(settings(decode=decode))
    if decode == "exact":
        assert not drafted
    else:
        assert drafted == {(1056, 1056): ((264, 264), "L")}
    # A finer grid needs more pixels.
    environment(settings(decode=decode, hash="phash"))
    assert drafted.get((1056, 1056)) == (None if decode == "exact" else ((528, 528), "L"))


def test_one_probe_is_there_for_first_scans() -> None:
    assert FIRST_SCAN_PROBE not in environment(settings(decode="fast")).probes
    fastest = environment(settings(decode="fastest")).probes
    content = probe_files()[FIRST_SCAN_PROBE]
    assert first_scan_only(content, (9, 8), 10**8) is not None
    exact = imagehash.dhash(Image.open(io.BytesIO(content)))
    assert 0 < imagehash.hex_to_hash(fastest[FIRST_SCAN_PROBE]) - exact < 8
    assert set(fastest) == set(probe_files())


def test_settings_decide() -> None:
    plain = environment(SETTINGS)
    assert environment(SETTINGS) is plain
    other = environment(settings(hash="phash"))
    assert all(plain.probes[name] != other.probes[name] for name in plain.probes)
    assert all(len(found) == 64 for found in environment(settings(hash_size=16)).probes.values())
    assert environment(settings(drop_flat=True, seed=9)) == plain
    limit = Image.MAX_IMAGE_PIXELS
    assert environment(settings(max_pixels=1)) == plain
    assert limit == Image.MAX_IMAGE_PIXELS
    assert pickle.loads(pickle.dumps(plain)) == plain


def test_a_probe_that_cannot_be_decoded_is_an_error_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducer.run.tasks.environment, "probe_files", lambda: {"odd.xyz": b"what is this"})
    environment.cache_clear()
    found = environment(SETTINGS).probes
    environment.cache_clear()
    assert found["odd.xyz"].startswith("not an image: ")


def test_versions() -> None:
    found = versions()
    assert list(found)[:5] == ["reducer", "python", "pillow", "imagehash", "numpy"]
    assert {"scipy", "pywavelets", "pyarrow", "pandas", "dask", "distributed"} < set(found)
    assert (found["reducer"], found["pillow"]) == (reducer.__version__, PIL.__version__)
    assert all(found.values())


def test_the_digest_is_the_same_in_another_process() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", DIGEST]
    found = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    # Workers and the driver have imported Dask anyway, but what they compare must not need it.
    assert found == [environment(SETTINGS).digest, str(ROOT / "reducer" / "__init__.py"), "False"]


def test_works_from_a_zip_file(tmp_path: Path) -> None:
    archive = tmp_path / "code.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in (ROOT / "reducer").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                out.write(path, path.relative_to(ROOT))
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(archive)!r}); {DIGEST}"]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    assert found[:2] == [environment(SETTINGS).digest, str(archive / "reducer" / "__init__.py")]


def test_the_digest_is_of_what_must_be_equal() -> None:
    own = environment(SETTINGS)
    numpy = own.versions["numpy"]
    major = int(numpy.partition(".")[0])
    assert len(own.digest) == 16 and int(own.digest, 16)
    assert here(python="3.99.0", scipy="0.1", numpy=f"{major}.99.9", libjpeg_turbo="9").digest == own.digest
    backwards = Environment(dict(reversed(own.versions.items())), dict(reversed(own.probes.items())))
    assert backwards.digest == own.digest
    others = [
        here(pillow="99.0.0"),
        here(imagehash="99.0"),
        here(numpy=f"{major + 1}.0.0"),
        here({"transparent.png": "0" * 16}),
    ]
    assert len({own.digest, *(other.digest for other in others)}) == 5


def test_alike_is_neither_error_nor_warning() -> None:
    assert differences({}) == ([], [])
    assert differences({f"worker {i}": here() for i in range(3)}) == ([], [])
    assert compare_with(here(), here(), "worker C") is None


@pytest.mark.parametrize(
    ("package", "title", "advice"),
    [
        ("pillow", "Pillow", "one version of Pillow"),
        ("imagehash", "imagehash", "one version of imagehash"),
        ("numpy", "numpy", "one major version of numpy"),
    ],
)
def test_another_version_that_decides_is_an_error(package: str, title: str, advice: str) -> None:
    own = here()
    # Its hashes differ too; that is the same fault.
    other = here({"transparent.png": "0" * 16}, **{package: "99.1.2"})
    line = (
        f"worker A has {title} {own.versions[package]}, worker B has {title} 99.1.2: photos may not be hashed alike; "
        f"install {advice} on all"
    )
    assert differences({"worker A": own, "worker B": other}) == ([line], [])
    assert compare_with(own, other, "worker B") == line.replace("worker A", "the first worker of the run")


def test_several_errors_are_told_in_one_line_to_one_that_joins() -> None:
    told = compare_with(here(), here(pillow="99.0.0", imagehash="98.0"), "worker B")
    assert told is not None
    assert "worker B has Pillow 99.0.0" in told
    assert "worker B has imagehash 98.0" in told
    assert "\n" not in told


def test_another_hash_of_a_probe_is_an_error() -> None:
    own = here()
    other = here({"transparent.png": "0" * 16, "lossy.webp": "broken: OSError: no"}, libjpeg_turbo="1.0")
    errors, warnings = differences({"worker A": own, "worker B": other})
    had = own.versions
    assert errors == [
        f"worker A and worker B hash the probe lossy.webp differently ({own.probes['lossy.webp']}, broken: OSError: "
        f"no), although both have Pillow {had['pillow']} and imagehash {had['imagehash']}; "
        f"they differ in libjpeg-turbo ({had.get('libjpeg_turbo', 'unknown')}, 1.0): install the same builds on all, "
        "for example from one container image"
    ]
    assert len(warnings) == 1 and warnings[0].startswith("libjpeg-turbo is not the same on all: ")
    told = compare_with(own, here({"lossy.webp": "broken: OSError: no"}), "worker B")
    assert told is not None
    assert "perhaps their Pillow is built differently" in told


def test_runs_of_older_versions_had_more_probes() -> None:
    """Their folders are gone on with: what both have is compared."""
    older = here({"grey.jpg": "0" * 16, "cmyk.jpg": "1" * 16})
    assert compare_with(older, here(), "this computer") is None
    told = compare_with(here({"grey.jpg": "0" * 16, "large.jpg": "2" * 16}), here(), "this computer")
    assert told is not None
    assert "hash the probe large.jpg differently" in told


def test_hashes_are_compared_among_those_of_one_version_too() -> None:
    """Who has mended the versions is not to find the next fault only then."""
    found = differences({"A": here(), "B": here(pillow="99.0"), "C": here({"transparent.png": "0" * 16}), "D": here()})
    assert found[1] == []
    assert len(found[0]) == 2
    assert found[0][0].startswith(f"A and 2 more have Pillow {PIL.__version__}, B has Pillow 99.0: ")
    assert found[0][1].startswith("A and 1 more and C hash the probe transparent.png differently ")


def test_long_hashes_are_shown_in_part() -> None:
    told = compare_with(here({"transparent.png": "a" * 300}), here({"transparent.png": "b" * 300}), "worker B")
    assert told is not None
    assert f"({'a' * 32}…{'a' * 32}, {'b' * 32}…{'b' * 32})" in told


def test_other_versions_are_warnings() -> None:
    own = here()
    major, _, minor = own.versions["numpy"].partition(".")
    newer = f"{major}.{int(minor.partition('.')[0]) + 1}.0"
    for package, title, value in (
        ("python", "Python", "3.99.1"),
        ("numpy", "numpy", newer),
        ("scipy", "scipy", "0.1"),
        ("dask", "dask", "1999.1.0"),
        ("libjpeg_turbo", "libjpeg-turbo", "0.9"),
    ):
        found = differences({"A": own, "B": here(**{package: value}), "C": own})
        line = f"{title} is not the same on all: {own.versions.get(package, 'unknown')} (A and 1 more), {value} (B): "
        assert found == ([], [line + "allowed, but one version on all is safer"])
        assert compare_with(own, here(**{package: value}), "B") is None
    without = Environment({k: v for k, v in own.versions.items() if k != "scipy"}, own.probes)
    assert "unknown (B)" in differences({"A": own, "B": without})[1][0]


def test_messages_on_hundreds_of_workers_stay_short() -> None:
    workers = {
        f"worker tcp://10.0.{i // 250}.{i % 250}:40000": here(
            {"transparent.png": f"{i % 7:016x}"}, pillow=f"9{i % 11}.0.0", python=f"3.{i % 30}.0"
        )
        for i in range(1000)
    }
    errors, warnings = differences(workers)
    assert len(errors) == 1 + 11 and len(warnings) == 1
    assert all(len(line) < 500 for line in (*errors, *warnings))
    assert "worker tcp://10.0.0.0:40000 and 90 more have Pillow 90.0.0" in errors[0]
    assert "and 7 more: " in errors[0]
    assert "and 26 more: " in warnings[0]
