"""Fixtures: a small collection, the trial photos, and a real Dask scheduler with workers."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from deployments import DaskProcesses
from jobs import run_on
from s3server import S3Server
from shardjobs import SHARDS, run_of
from tarfiles import packed, photos_below, thumbnail, write_tars

from reducer import ClusterSpec
from reducer.api.sample import write_sample


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--photos", help="folder with photos/ and malformed/: real files to try things on")
    parser.addoption("--no-skips", action="store_true", help="fail when a test is skipped")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--no-skips") and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("--no-skips: tests were skipped", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


#: Test files that show whether Reducer works with the versions of packages that are installed, below tests/.
COMPAT = (
    *("outputs/test_statistics.py", "photos/test_hashing.py", "photos/test_progressive.py", "photos/test_resize.py"),
    *("photos/test_requests.py", "photos/test_embedding.py", "run/test_folder.py", "run/plan", "run/tasks"),
    *("run/dask/test_connect.py", "selection/test_distance.py", "selection/test_strategies.py"),
    *("selection/test_facility_location.py", "selection/test_rules.py", "storage/test_codecs.py"),
    "storage/test_sorting.py",
)
#: Single tests of other files.
COMPAT_TESTS = (
    *("test_a_run_says_what_it_did", "test_every_option_reaches_the_job", "test_version_and_help_tell_what_there_is"),
    *("test_python_m_and_dask_reducer_and_run_cluster", "test_a_run_with_the_rules_does_both_at_once"),
    *("test_the_ledger_has_a_row_for_every_row_of_the_manifest", "test_the_reduced_list_drops_in_for_the_manifest"),
    *("test_worker_processes", "test_every_way_to_look_and_choose_on_every_executor", "test_the_result_in_python"),
    *("test_vectors_alone_rank_and_no_photo_is_read", "test_the_same_on_every_cluster"),
    *("test_hashes_and_vectors_together", "test_filters_and_cuts_go_by_cosine"),
    *("test_a_bucket_gives_what_a_folder_gives", "test_tars_give_what_single_files_give"),
    *("test_as_the_manifest_has_them", "test_a_folder_per_label_as_image_folder_reads_it"),
    *("test_web_datasets_shards", "test_made_smaller", "test_a_page_is_whole_and_needs_no_network"),
    "test_figures_for_notebooks",
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    assert all((here / name).exists() for name in COMPAT)
    for item in items:
        file = item.path.relative_to(here).as_posix()
        fixtures = getattr(item, "fixturenames", ())
        if file.startswith("tools/"):
            item.add_marker("tools")
        if "s3" in fixtures:
            item.add_marker("s3")
        if {"dask_cluster", "standing_cluster"} & set(fixtures) or file.startswith("run/dask/"):
            item.add_marker("cluster")
        if file.startswith(COMPAT) or getattr(item, "originalname", "") in COMPAT_TESTS:
            item.add_marker("compat")


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    """What an earlier test's command has set up for the log of this process is no matter of this one."""
    logger = logging.getLogger("reducer")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture(scope="session")
def trial_files(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--photos")
    if folder is None:
        pytest.skip("needs --photos DIR")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 photos of 12 landmarks: train/, train.csv, truth.csv."""
    folder = tmp_path_factory.mktemp("collection")
    write_sample(str(folder), labels=12, images=240, progress=False)
    return folder


@pytest.fixture(scope="session")
def slow_collection(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photos under many labels: some seconds of work."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "train").symlink_to(collection / "train")
    header, *lines = (collection / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([header, *(f"{line}-{i}" for i in range(12) for line in lines)]) + "\n")
    return folder


@pytest.fixture(scope="session")
def s3(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server whose bucket ``trial`` holds the collection: train/, train.csv."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("trial")
        server.upload_folder(collection / "train", "trial", "train/")
        server.client().put_object(Bucket="trial", Key="train.csv", Body=(collection / "train.csv").read_bytes())
        yield server


@pytest.fixture
def clean_env() -> dict[str, str]:
    """The environment without Dask's own variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}


@pytest.fixture
def dask_cluster(tmp_path: Path, clean_env: dict[str, str]) -> Iterator[Callable[..., str]]:
    """Start a real ``dask scheduler`` and ``dask worker`` processes on loopback; gives the address."""
    with DaskProcesses(tmp_path, clean_env) as dask:

        def start(workers: int = 2, threads: int = 1) -> str:
            address: str = dask.scheduler()
            for _ in range(workers):
                dask.worker(address, threads)
            return address

        yield start


@pytest.fixture(scope="session")
def standing_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSpec]:
    """A running scheduler with two workers of one thread, for tests that kill nothing and change nothing on workers."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    with DaskProcesses(tmp_path_factory.mktemp("standing"), clean) as dask:
        address = dask.scheduler()
        for _ in range(2):
            dask.worker(address, 1)
        yield ClusterSpec(address=address)


# Tar shards


@pytest.fixture(scope="session")
def tiny(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection in thumbnails: train/, train.csv. Hashing them takes next to no time."""
    folder = tmp_path_factory.mktemp("tiny")
    for path in (collection / "train").rglob("*.jpg"):
        target = folder / path.relative_to(collection)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(thumbnail(path.read_bytes()))
    (folder / "train.csv").write_bytes((collection / "train.csv").read_bytes())
    return folder


@pytest.fixture(scope="session")
def photos(tiny: Path) -> dict[str, bytes]:
    return photos_below(tiny / "train")


@pytest.fixture(scope="session")
def labels(tiny: Path) -> dict[str, str]:
    """Labels by id."""
    table = pd.read_csv(tiny / "train.csv", dtype=str)
    return dict(zip(table["id"], table["landmark_id"], strict=True))


@pytest.fixture(scope="session")
def single(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the thumbnails as single files."""
    run = tmp_path_factory.mktemp("single") / "run"
    run_on(tiny, run)
    return run


@pytest.fixture
def tars(photos: dict[str, bytes], tmp_path: Path) -> Path:
    """The thumbnails in six tars, of this test's own."""
    return write_tars(tmp_path / "tars", packed(photos, SHARDS))


@pytest.fixture(scope="session")
def whole(photos: dict[str, bytes], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on such tars that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run_of(write_tars(folder / "tars", packed(photos, SHARDS)), folder / "run", tiny / "train.csv")
    return folder / "run"


@pytest.fixture(scope="session")
def some(photos: dict[str, bytes], labels: dict[str, str]) -> list[bytes]:
    """Photos that differ."""
    largest = Counter(labels.values()).most_common(1)[0][0]
    return [photos[name] for name in sorted(photos) if labels[name] == largest]
