"""The README's examples, executed: every ```sh and ```python block, in order, in one folder."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
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


def test_the_examples_run(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    models.small(tmp_path / "model.onnx")
    ran = []
    for kind, block in BLOCKS:
        if kind not in ("sh", "python"):
            continue
        program = ["bash", "-euc", block] if kind == "sh" else [sys.executable, "example.py"]
        if kind == "python":
            (tmp_path / "example.py").write_text(block)
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        ran.append(kind)
    assert ran.count("sh") >= 5
    assert ran.count("python") >= 1
    assert (tmp_path / "by-model" / "reduced.csv").read_text().count("\n") > 2
    for run in ("run", "trial", "listed", "templated", "run-python", "other", "by-vectors"):
        assert (tmp_path / run / "reduced.csv").read_text().count("\n") > 2
        assert (tmp_path / run / "report.html").exists()
    assert (tmp_path / "listed" / "reduced.csv").read_text().startswith("photo,class\n")
    assert (tmp_path / "few.csv").read_text().count("\n") == 301
    assert (tmp_path / "other" / "cross_label.parquet").exists()
    lists = [(tmp_path / kept / "train.csv").read_text() for kept in ("kept", "linked")]
    assert len(set(lists)) == 1 < len(lists[0].splitlines())
    assert len(list((tmp_path / "kept-shards").glob("*.tar"))) > 1
    assert max(Image.open(next((tmp_path / "kept-512").rglob("*.jpg"))).size) == 512
    for name in ("counts", "closest", "kept"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 300


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
    "--lowest",  # scripts/test
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
