"""The README's examples, executed: every ```sh and ```python block, a section a test."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import yaml
from machine import ROOT
from PIL import Image

from reducer.cli.main import main
from reducer.config.cluster import ClusterFile

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SECTIONS = {
    part.partition("\n")[0]: examples
    for part in re.split(r"^## ", README, flags=re.MULTILINE)
    if (examples := re.findall(r"^```(sh|python)\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL))
}
#: The commands that begin the first section of examples; every other section goes on from what they leave.
BEGINNING = (
    "reducer sample photos --labels 30 --images 600\n",
    "reducer run photos/train --manifest photos/train.csv --output run --dry-run\n",
    "reducer run photos/train --manifest photos/train.csv --output run\n",
)
#: Lines of other sections that a section goes on from.
NEEDED = {"Take the photos": ("reducer resume run --rank-all", "reducer cut run --output ten.csv --keep 10")}


def run_example(kind: str, block: str, folder: Path, *, report: bool = False) -> None:
    """Run a block as a reader would; without ``report``, `reducer run` draws none, which takes a second each."""
    tools = Path(sys.executable).parent
    path = os.pathsep.join([*([] if report else [str(folder / "bin")]), str(tools), os.environ["PATH"]])
    (folder / "bin").mkdir(exist_ok=True)
    wrapper = folder / "bin" / "reducer"
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = run ] && set -- "$@" --no-report\nexec {tools / "reducer"} "$@"\n')
    wrapper.chmod(0o755)
    program = ["bash", "-euc", block] if kind == "sh" else [sys.executable, "example.py"]
    if kind == "python":
        (folder / "example.py").write_text(block)
    environment = os.environ | {"PATH": path}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    models.small(folder / "model.onnx")
    for block in BEGINNING:
        assert ("sh", block) in SECTIONS["Use"]
        run_example("sh", block, folder, report=True)
    assert (folder / "run" / "report.html").exists()
    return folder


@pytest.mark.parametrize("title", SECTIONS)
def test_the_examples_of_a_section_run(title: str, begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(begun, folder)
    for line in NEEDED.get(title, ()):
        assert line in README
        run_example("sh", line, folder)
    for kind, block in SECTIONS[title]:
        if block not in BEGINNING:
            run_example(kind, block, folder)
    for name, holds in LEFT[title].items():
        assert holds(folder / name), name


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def reduced(run: Path) -> bool:
    return len(lines(run / "reduced.csv")) > 2


def picture(path: Path) -> bool:
    with Image.open(path) as opened:
        return opened.width > 300


#: Files that the examples of each section leave, and what is true of them.
LEFT: dict[str, dict[str, Callable[[Path], object]]] = {
    "Use": {
        **dict.fromkeys(("run", "trial", "templated", "by-model", "test-set", "clean", "run-python"), reduced),
        "listed": lambda run: lines(run / "reduced.csv")[0] == "photo,class,file" and reduced(run),
    },
    "See it": dict.fromkeys(("counts.png", "closest.png", "kept.png"), picture),
    "Read each photo once": {
        "few.csv": lambda path: len(lines(path)) == 301,
        "other": lambda run: reduced(run) and (run / "cross_label.parquet").exists(),
    },
    "Take the photos": {
        "kept": lambda kept: lines(kept / "train.csv") == lines(kept.parent / "linked" / "train.csv"),
        "kept-shards": lambda kept: len(list(kept.glob("*.tar"))) > 1,
        "kept-512": lambda kept: max(Image.open(next(kept.rglob("*.jpg"))).size) == 512,
    },
    "See what is in the picture": {"by-vectors": reduced},
    "Photos in tar shards": {"from-shards": reduced},
}


def test_it_opens_with_a_picture_of_a_report() -> None:
    first = README.split("\n\n")[1]
    found = re.fullmatch(r"!\[(?P<alt>[^\]]{40,})\]\((?P<path>\.github/report\.png)\)", first)
    assert found is not None
    path = ROOT / found["path"]
    assert path.stat().st_size < 300_000
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000


OPTIONS = {
    option
    for command in main.commands.values()
    for param in command.params
    for option in (*param.opts, *param.secondary_opts)
} | {
    "--help",
    *("--lowest", "--tools"),  # scripts/test
    "--photos",
    "--nthreads",  # dask worker
    *("--folder", "--json"),  # scripts/bench.py
    *("--benchmark-enable", "--benchmark-save"),  # pytest-benchmark
}


def test_options_that_the_readme_names_exist() -> None:
    assert set(re.findall(r"--[a-z][a-z0-9]*(?:-[a-z0-9]+)*", README)) <= OPTIONS


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "yaml"])
def test_the_cluster_files_are_right(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as can be told without the cluster: their keys are known, the classes are there and take the arguments."""
    monkeypatch.chdir(tmp_path)
    for name in ("ca.pem", "cert.pem", "key.pem"):
        Path(name).write_text("-")
    for name in ("USER", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "me")
    Path("cluster.yaml").write_text(block)
    spec = ClusterFile.read("cluster.yaml").spec
    if spec.class_path is None or spec.class_path.startswith("dask_cloudprovider"):  # an address; not installed here
        return
    monkeypatch.setattr("dask.config.PATH", str(tmp_path))  # where dask-kubernetes and dask-jobqueue write defaults
    module, _, name = spec.class_path.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    takers = [made, *(made.job_cls.__mro__[:-1] if hasattr(made, "job_cls") else ())]  # dask-jobqueue hands them on
    known = {argument for taker in takers for argument in inspect.signature(taker).parameters}
    assert set(spec.kwargs) - known <= {"memory_limit"}  # LocalCluster hands it on to each worker


def test_there_is_a_cluster_file_of_each_kind() -> None:
    files = [yaml.safe_load(block)["cluster"] for kind, block in BLOCKS if kind == "yaml"]
    classes = [file.get("class", "address").partition(".")[0] for file in files]
    assert classes == [
        "distributed",
        "address",
        "distributed",
        *("dask_jobqueue", "dask_kubernetes", "dask_cloudprovider"),
    ]
