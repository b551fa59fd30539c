"""A run does not end because nobody reads what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import reduced_files, run_on


@pytest.mark.parametrize(
    "how",
    ["2>&-", ">&-", ">&- 2>&-", "2>&1 | true", "2> >(true) > >(true)", "> /dev/full 2> /dev/full", "<&- >&- 2>&-"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_where_nobody_reads(collection: Path, tmp_path: Path, how: str, workers: int) -> None:
    run = tmp_path / "run"
    command = f"{sys.executable} -m reducer run {collection}/train --manifest {collection}/train.csv --output {run}"
    script = f"set -o pipefail; {command} --keep 8 --no-report --workers {workers} --log-level info {how}"
    done = subprocess.run(["bash", "-c", script], timeout=120, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Exception ignored" not in done.stderr
    assert reduced_files(run) == reduced_files(Path(run_on(collection, tmp_path / "other").output))


def test_an_error_keeps_its_exit_code_where_nobody_reads(tmp_path: Path) -> None:
    command = f"{sys.executable} -m reducer run {tmp_path}/none --output {tmp_path}/run"
    for how in ("2>&-", "2>&1 | true", "2> /dev/full"):
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {how}"], timeout=60, check=False)
        assert done.returncode == 2


def test_names_that_would_be_read_wrongly_are_told(collection: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reducer", "run", f"{collection}/train", "--output", str(tmp_path / "run")]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: names of files are ascii here, by the locale")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", ["distributed: [broken: {", "- a list"])
def test_settings_of_dask_that_are_broken_are_named(collection: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "dask").mkdir()
    (tmp_path / "dask" / "own.yaml").write_text(content)
    command = [sys.executable, "-m", "reducer", "run", f"{collection}/train", "--output", str(tmp_path / "run")]
    environment = {"PATH": "/usr/bin:/bin", "DASK_CONFIG": str(tmp_path / "dask")}
    done = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "Error: Dask's own settings cannot be read" in done.stderr
    assert "own.yaml" in done.stderr
    assert "Traceback" not in done.stderr
