"""The README's examples, executed: every ```sh and ```python block, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from reducer.cli import main

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_examples_run(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
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
    for run in ("run", "trial", "listed", "templated", "run-python"):
        assert (tmp_path / run / "reduced.csv").read_text().count("\n") > 2
    assert (tmp_path / "listed" / "reduced.csv").read_text().startswith("photo,class\n")


OPTIONS = {option for command in main.commands.values() for param in command.params for option in param.opts} | {
    "--help",
    "--lowest",  # scripts/test
    "--photos",
}


def test_options_that_the_readme_names_exist() -> None:
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", README)) <= OPTIONS
