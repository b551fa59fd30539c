"""The benchmarks run, and print a row for all that they claim to measure. No figure is checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from machine import ROOT
from PIL import Image

from reducer.config.settings import HASH_NAMES, STRATEGY_NAMES


@pytest.fixture(scope="module")
def by_label(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in a folder a label, one of them with more than 25."""
    folder = tmp_path_factory.mktemp("by-label")
    for i, path in enumerate(sorted((collection / "train").rglob("*.jpg"))[:32]):
        label = folder / ("small" if i < 3 else "large")
        label.mkdir(exist_ok=True)
        (label / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "speed",
        "floor",
        "startup",
        "codec",
        "quality",
        "fidelity",
        "flat",
        "ranking",
        "mixture",
        "vectors",
        "embed",
        "plan",
        "scale",
        "scaling",
        "cut",
        "report",
    ],
)
def test_a_benchmark_prints_its_tables(command: str, by_label: Path, tmp_path: Path) -> None:
    sizes = tmp_path / "sizes.tsv"
    sizes.write_text("images_in_class\tn_classes\tstatus\n2\t9\texact\n5\t4\texact\n30\t3\texact\n1200\t1\texact\n")
    once = ["--repetitions", "1"]
    arguments = {
        "speed": ["--folder", str(by_label), "--without", "imagededup", "CleanVision", *once],
        "floor": ["--photos", "120", *once],
        "startup": once,
        "codec": [str(by_label), *once],
        "fidelity": [str(by_label), *once],
        "ranking": ["60", "130", "--repetitions", "2"],
        "mixture": ["--repetitions", "2"],
        "vectors": ["--photos", "300", "--dimensions", "8", "--labels", "4", *once],
        "embed": ["--photos", "64", *once],
        "plan": ["--photos", "3000", *once],
        "scaling": [str(sizes), "--photos", "120", "--most", "4", "--seconds", "1"],
        "scale": [str(sizes), "--times", "1", "2", "--plan-times", "2", *once],
        "cut": [str(sizes), "--keep-in", str(tmp_path / "run"), *once],
        "report": [str(sizes), *once],
    }.get(command, [str(by_label)])
    told = tmp_path / "told.json"
    program = [sys.executable, str(ROOT / "scripts" / "bench.py"), command, *arguments, "--json", str(told)]
    out = subprocess.check_output(program, text=True)
    tables = [part for part in json.loads(told.read_text())["told"] if "header" in part]
    assert sum(len(part["rows"]) + 2 for part in tables) == sum(line.startswith("|") for line in out.splitlines())
    first_cells = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    expected = {
        "speed": ["`reducer run`", "`reducer run --decode exact`", "the notebook", "the notebook's hashing alone"],
        "floor": ["fast", "exact"],
        "startup": ["`reducer --help`", "`reducer run` on 100 photos"],
        "codec": ["as they are", "saved progressively"],
        "scaling": ["1", "2", "4", "photos/s a core, real run"],
        "scale": ["1,328 rows", "2,656 rows"],
        "quality": ["the notebook as it stands", *STRATEGY_NAMES],
        "fidelity": HASH_NAMES,
        "flat": ["1", "24"],
        "ranking": ["60", "130"],
        "mixture": ["64", "512"],
        "vectors": ["facility-location"],
        "embed": ["bare processes, the model alone", "`reducer run --embed`"],
        "plan": ["train.csv", "train-with-urls.csv", "train_clean.csv", "train.csv.gz", "train.parquet"],
        "cut": [
            "`reducer cut RUN --output keep.csv --keep 25`",
            "`reducer cut RUN --output distance.csv --min-distance 12`",
            "`reducer cut RUN --output bytes.csv --max-bytes 20GB`",
            "`reducer cut RUN --output total.csv --total 500000 --min-per-label 2`",
            "`reducer cut RUN --output keep.parquet --keep 25`",
            "`cross_label_table`",
        ],
        "report": [
            "`reducer report RUN`",
            "`reducer report RUN --gallery-photos 0`",
            "`reducer report RUN --gallery-photos 2000`",
        ],
    }[command]
    assert set(expected) <= set(first_cells)


def test_a_folder_with_nothing_to_measure_is_told(tmp_path: Path) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "one.png")
    for command, message in [("quality", "no label of"), ("fidelity", "no JPEG among")]:
        program = [sys.executable, str(ROOT / "scripts" / "bench.py"), command, str(tmp_path)]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(message)
