"""The package as a house: what it exports, what its rooms say of themselves, what its wheel holds."""

import importlib
import os
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from machine import ROOT

import reducer

PUBLIC = {
    *("TLS", "ClusterError", "ClusterSpec", "CutResult", "EmbedResult", "ExportResult", "InputError", "Job"),
    *("ReducerError", "Result", "Status", "Story", "TooManyFailuresError", "WorkerRules", "__version__"),
    *("cut", "embed", "explain", "export", "open_run", "reduce_images", "resume", "status", "write_report"),
}


MODULES = list(pkgutil.walk_packages(reducer.__path__, "reducer."))


def test_the_names_that_are_exported_are_those_meant() -> None:
    assert set(reducer.__all__) == PUBLIC


def test_no_module_hides_a_public_name() -> None:
    code = (
        "import importlib, reducer, sys\n"
        "before = {name: getattr(reducer, name) for name in reducer.__all__}\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "for name, value in before.items(): assert getattr(reducer, name) is value, name\n"
    )
    names = [found.name for found in MODULES if not found.name.endswith("__main__")]
    assert len(names) > 50
    subprocess.run([sys.executable, "-c", code, *names], check=True)
    rooms = {found.name for found in pkgutil.iter_modules(reducer.__path__)}
    assert not rooms & PUBLIC


def test_workers_need_no_packages_of_the_client() -> None:
    """Reducer is sent to workers that have Dask, Pillow, imagehash, pyarrow and s3fs: no more is imported there."""
    code = (
        "import importlib, sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('tqdm', 'pathspec', 'matplotlib', 'jinja2'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    of_tasks = ["run.dask.worker", "photos.presence", "outputs.report.thumbnails", "outputs.export.batches"]
    subprocess.run([sys.executable, "-c", code, *(f"reducer.{name}" for name in of_tasks)], check=True)


@pytest.mark.parametrize("name", [found.name for found in MODULES if found.ispkg])
def test_every_room_says_what_it_is_for_and_what_it_may_not_know(name: str) -> None:
    room = importlib.import_module(name)
    first, empty, *rest = (room.__doc__ or "").strip().splitlines()
    assert first.endswith(".") and not empty and rest, name
    assert not [value for value in vars(room).values() if isinstance(value, types.FunctionType)], "rooms have no code"


def test_the_wheel_holds_all_that_a_run_needs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    for file in files:
        if file.startswith("reducer/") or file in ("pyproject.toml", "README.md", "LICENSE"):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", source], check=True)

    def command(*words: object) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        return subprocess.check_output(
            [sys.executable, "-m", "reducer", *map(str, words)], cwd=tmp_path, env=environment, text=True
        )

    where = subprocess.check_output(
        [sys.executable, "-c", "import reducer; print(reducer.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        text=True,
    )
    assert Path(where).is_relative_to(tmp_path)
    command("sample", "photos", "--labels", 6, "--images", 60)
    out = command(
        *("run", "photos/train", "--manifest", "photos/train.csv", "--output", "run", "--keep", 3, "--workers", 1)
    )
    assert "Kept" in out
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
