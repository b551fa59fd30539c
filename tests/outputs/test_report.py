"""The report of a run, as it is written. How it looks in a browser: tests/outputs/test_browser.py."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from commands import invoke, reduce
from distributed import Client, LocalCluster
from jobs import SERIAL, job_on, run_on
from killing import killed_before
from machine import small_disk
from PIL import Image
from s3server import S3Server
from shardjobs import run_of

from reducer import ClusterSpec, InputError, Job, reduce_images, resume, write_report
from reducer.config.resolved import resolve
from reducer.errors import LostLockError
from reducer.formatting import format_bytes
from reducer.outputs.report.page import PICTURES_BYTES, draw_report
from reducer.outputs.report.rendering import as_html
from reducer.outputs.report.sections import command_of
from reducer.run.folder import RunFolder
from reducer.run.summary import job_figures

NASTY = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What of a page matters here."""

    VOID = ("meta", "link", "img", "br")
    INLINE = ("a", "code", "span", "strong")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        assert not self.open, "tags that are not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.apart(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.apart(tag)

    def apart(self, tag: str) -> None:
        if tag not in self.INLINE:
            self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[bytes]:
        return [base64.b64decode(str(image["src"]).partition("base64,")[2]) for image in self.all("img")]

    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report, near copies across labels among it."""
    folder = tmp_path_factory.mktemp("report")
    table = pd.read_csv(tiny / "train.csv", dtype=str)
    twice = table.head(3).assign(landmark_id="twice")
    pd.concat([table, twice]).to_csv(folder / "train.csv", index=False)
    run_on(tiny, folder / "run", manifest=str(folder / "train.csv"), cross_label=True, rank_all=True, report=True)
    return folder / "run"


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


def test_a_page_is_whole_and_needs_no_network(page: Page, run: Path) -> None:
    text = (run / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(link["href"])[1:] for link in page.all("a")}
    assert links <= set(ids)
    assert {"labels", "distances", "photos", "failures", "cross-label"} <= links


def test_it_tells_what_the_run_came_to(page: Page, run: Path) -> None:
    summary, words = json.loads((run / "summary.json").read_text()), page.words()
    assert f"Kept {summary['photos_kept']} of 243 photos" in words
    assert f"243 → {summary['photos_kept']}" in words
    assert "Labels 13 all of them ranked" in words
    assert "reducer run" in words
    for shown in ("--keep 8", "--cross-label", "--rank-all", f"--manifest {summary['job']['manifest']}"):
        assert shown in words
    assert "--seed" not in words
    for side in ("selection", "random"):
        assert f"{summary['quality'][side]['mean_pair_distance']:.1f}" in words
    assert "Every one of the 13 labels is in the result." in words
    assert "No photo failed." in words
    assert f"{summary['cross_label_pairs']:,} pairs of photos are almost the same" in words
    # The same figures as Python's own count of the ledger.
    ledger = RunFolder(str(run)).parts.ledger().to_pandas()
    at = ledger[ledger["rank"] == 8]["insertion_distance"]
    assert f"After 8 photos of a label the next one is {at.median():g} bits away" in words
    assert f"median of the {len(at)} ranked labels that have one" in words
    photos = ledger.groupby("label").size().clip(upper=5).sum()
    assert re.search(rf"\b5 [\d.]+ [\d.]+ to [\d.]+ \d+ {photos}\b", words)


def test_with_a_budget_k_is_told_by_what_labels_keep(tiny: Path, tmp_path: Path) -> None:
    run_on(tiny, tmp_path / "run", keep=None, total=60, report=True)
    words = Page(tmp_path / "run" / "report.html").words()
    ledger = RunFolder(str(tmp_path / "run")).parts.ledger().to_pandas()
    kept = int(ledger.groupby("label")["kept"].sum().median())
    median = ledger[ledger["rank"] == kept]["insertion_distance"].median()
    assert f"After {kept} photos of a label the next one is {median:g} bits away" in words
    assert "--total 60" in words
    # What a budget has dropped stands under what was kept in its place.
    largest = ledger[ledger["label"] == ledger.groupby("label").size().idxmax()]
    dropped = largest[largest["reason"] == "budget"].groupby("nearest_kept").size()
    assert len(dropped) > 1
    for name, count in dropped.items():
        assert f"{name} in place of {count}" in words
    before, after = format_bytes(int(ledger["bytes"].sum())), format_bytes(int(ledger[ledger["kept"]]["bytes"].sum()))
    assert before != after
    assert f"Bytes {before} → {after} of all photos" in words
    medians = ledger[ledger["rank"] > 0].groupby("rank")["insertion_distance"].median()
    first = medians[medians <= 6].index[0]
    assert f"After {first} photos it is for the first time a near copy, at most 6 bits away," in words


def test_copies_of_one_photo(tiny: Path, tmp_path: Path) -> None:
    photo = next((tiny / "train").rglob("*.jpg")).read_bytes()
    (tmp_path / "in" / "grey").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "in" / "grey" / f"{number}.jpg").write_bytes(photo)
    job = Job(str(tmp_path / "in"), str(tmp_path / "run"), keep=3)
    reduce_images(job, SERIAL, progress=False)
    (pairs,) = (svg["aria-label"] for svg in Page(tmp_path / "run" / "report.html").all("svg") if "pairs" in str(svg))
    assert "are 100 % of the pairs of kept photos and 100 % of those of a random choice" in str(pairs)


def test_one_label_and_one_photo(tiny: Path, tmp_path: Path) -> None:
    table = pd.read_csv(tiny / "train.csv", dtype=str)
    largest = table["landmark_id"].value_counts().idxmax()
    table[table["landmark_id"] == largest].to_csv(tmp_path / "label.csv", index=False)
    table.head(1).to_csv(tmp_path / "photo.csv", index=False)
    run_on(tiny, tmp_path / "label", manifest=str(tmp_path / "label.csv"), report=True)
    assert "(in the one label that has so many)" in Page(tmp_path / "label" / "report.html").words()
    for options, said in (({}, "No label was ranked: "), ({"rank_all": True}, "No label has two photos with a rank.")):
        run_on(tiny, tmp_path / "photo", manifest=str(tmp_path / "photo.csv"), report=True, overwrite=True, **options)
        page = Page(tmp_path / "photo" / "report.html")
        assert "Kept 1 of 1 photo " in page.words()
        assert said in page.words()
        assert len(page.all("img")) == 1


def test_pictures_are_the_photos(page: Page, run: Path) -> None:
    images, pictures = page.all("img"), page.pictures()
    assert 50 < len(images) <= 400
    for image, content in zip(images, pictures, strict=True):
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "JPEG"
            assert (image["width"], image["height"]) == tuple(map(str, picture.size))
        assert image["alt"]
    # A picture's average colours are those of the photo that its title names.
    for image, content in list(zip(images, pictures, strict=True))[::10]:
        with Image.open(io.BytesIO(content)) as picture, Image.open(str(image["title"])) as photo:
            own, its = (
                list(one.convert("RGB").resize((3, 3), Image.Resampling.BOX).tobytes()) for one in (picture, photo)
            )
        assert max(abs(a - b) for a, b in zip(own, its, strict=True)) < 12


def test_kept_photos_stand_in_the_order_of_their_ranks(page: Page, run: Path) -> None:
    ledger = RunFolder(str(run)).parts.ledger().to_pandas()
    sizes = ledger.groupby("label").size()
    largest = sizes.idxmax()
    words = page.words()
    start = words.index(f"Label {largest}: the largest label")
    section = words[start : words.index(" Label ", start + 10)]
    rows = ledger[(ledger["label"] == largest) & ledger["kept"]].sort_values("rank")
    shown = re.findall(r"rank (\d+), (the first|\d+ bits) (\w+) ", section)
    expected = [
        (str(row.rank), "the first" if row.rank == 0 else f"{row.insertion_distance:g} bits", row.id)
        for row in rows.itertuples()
    ]
    assert shown == [(rank, distance, name[:16]) for rank, distance, name in expected]
    for row in rows.itertuples():
        own = ledger[(ledger["nearest_kept"] == row.id) & ~ledger["kept"] & (ledger["label"] == largest)]
        if len(own):
            assert f"{row.id} in place of {len(own)}" in section
            assert f"{own['nearest_kept_distance'].min():g} bits" in section
    assert re.search(r"The closest two: \d+ bits? apart .*The farthest two: \d+ bits apart", section)


def test_it_is_accessible(page: Page) -> None:
    (html,) = page.all("html")
    assert html["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len([tag for tag, _ in page.tags if tag in ("main", "header", "nav", "footer")]) == 4
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert len(str(svg["aria-label"])) > 40
    assert all(th.get("scope") for th in page.all("th"))
    assert all(image["alt"] for image in page.all("img"))


def luminance(colour: str) -> float:
    """Of WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_its_colours_have_contrast(run: Path) -> None:
    text = (run / "report.html").read_text()
    themes = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)]
    assert len(themes) == 2
    for theme in themes:
        colours = {
            name: code if len(code) == 7 else "#" + "".join(2 * digit for digit in code[1:])
            for name, code in theme.items()
        }
        for ground in ("paper", "card"):
            for name, least in [("ink", 7), ("soft", 4.5), ("kept", 4.5), ("bad", 4.5), ("before", 3), ("random", 3)]:
                pair = sorted(luminance(colours[colour]) for colour in (ground, name))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, (ground, name)


def test_whatever_comes_from_outside_is_text(tiny: Path, tmp_path: Path) -> None:
    photos = sorted((tiny / "train").rglob("*.jpg"))[:30]
    folder = tmp_path / "in"
    folder.mkdir()
    lines = ["id,landmark_id,file"]
    for number, photo in enumerate(photos):
        name = f'"><img src=x onerror=alert({number})>.jpg'
        (folder / name).write_bytes(photo.read_bytes() if number < 20 else b"<b>no photo</b>")
        label = NASTY if number % 2 else "{{ 7*7 }}"
        lines.append(f'"{NASTY}{number}","{label}","{name.replace(chr(34), 2 * chr(34))}"')
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    code, _, err = invoke(
        *["run", folder, "--manifest", tmp_path / "m.csv", "--path-column", "file", "--output", tmp_path / "run"],
        *["--keep", 3, "--workers", 0, "--max-failures", 1, "--quiet", "--report"],
    )
    assert (code, err) == (0, "")
    page = Page(tmp_path / "run" / "report.html")
    assert "script" not in {tag for tag, _ in page.tags}
    assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert f"Label {NASTY}" in page.words()
    assert "<img src=x onerror=alert(21)>.jpg" in page.words()
    assert "not an image: 10 photos" in page.words()
    assert "10 not an image (the column error" in page.words()
    write_report(tmp_path / "run", labels=["{{ 7*7 }}"], progress=False)
    assert "Label {{ 7*7 }}: asked for" in Page(tmp_path / "run" / "report.html").words()


def test_a_photo_that_cannot_be_read_shows_its_error(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "in")
    run_on(tmp_path / "in", tmp_path / "run")
    ledger = RunFolder(str(tmp_path / "run")).parts.ledger().to_pandas()
    largest = ledger.groupby("label").size().idxmax()
    gone = ledger[(ledger["label"] == largest) & ledger["kept"]].sort_values("rank").iloc[0]
    Path(gone["path"]).write_bytes(b"")
    write_report(tmp_path / "run", progress=False)
    page = Page(tmp_path / "run" / "report.html")
    assert "empty: the file has 0 bytes rank 0, the first " in page.words()
    assert len(page.all("img")) > 50


def test_pictures_are_as_many_as_are_asked_for(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for most in (0, 1, 10, 100):
        code, out, err = invoke("report", tmp_path / "run", "--gallery-photos", most, "--quiet")
        assert (code, out, err) == (0, "", "")
        found = len(Page(tmp_path / "run" / "report.html").all("img"))
        assert most / 2 - 1 <= found <= most
    code, out, err = invoke("report", tmp_path / "run", "--labels", "twice,unknown", "--quiet")
    assert (code, "no photo of the run has the label 'unknown'" in err) == (2, True)
    code, out, _ = invoke("report", tmp_path / "run", "--labels", "twice", "--gallery-photos", 60)
    assert (code, out) == (0, f"Report: {tmp_path / 'run' / 'report.html'}\n")
    assert "Label twice: asked for" in Page(tmp_path / "run" / "report.html").words()
    for wrong in (-1, 2001):
        code, _, err = invoke("report", tmp_path / "run", "--gallery-photos", wrong)
        assert (code, f"--gallery-photos is {wrong}: expected a whole number from 0 to 2000" in err) == (2, True)
    code, _, err = invoke("report", tmp_path / "run", "--threads", 2)
    assert (code, "--threads goes with --workers" in err) == (2, True)
    with pytest.raises(InputError, match="at most 100"):
        write_report(tmp_path / "run", labels=list(map(str, range(101))))
    with pytest.raises(InputError, match="give a list of labels"):
        write_report(tmp_path / "run", labels="twice")


def test_a_page_stays_small_however_much_is_asked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "run")
    sizes = []
    for most in (PICTURES_BYTES, 100_000):
        monkeypatch.setattr("reducer.outputs.report.page.PICTURES_BYTES", most)
        write_report(tmp_path / "run", progress=False)
        sizes.append(sum(map(len, Page(tmp_path / "run" / "report.html").pictures())))
    assert sizes[1] <= 100_000 < sizes[0]


def test_a_run_draws_it_and_one_without_can_later(tiny: Path, tmp_path: Path) -> None:
    code, out, err = reduce(tiny, tmp_path / "run", "--report", "--quiet")
    assert (code, out, err) == (0, "", "")
    first = (tmp_path / "run" / "report.html").read_bytes()
    code, out, _ = reduce(tiny, tmp_path / "run", "--overwrite")  # which gives --no-report
    assert code == 0
    assert "report.html" not in out
    assert not (tmp_path / "run" / "report.html").exists()  # it was of another run
    code, out, err = invoke("report", tmp_path / "run")
    assert (code, out) == (0, f"Report: {tmp_path / 'run' / 'report.html'}\n")
    assert "pictures" in err
    assert pictures_of(tmp_path / "run" / "report.html") == [hashlib.sha256(p).digest() for p in pictures_in(first)]
    code, out, _ = invoke("resume", tmp_path / "run", "--workers", 0)
    assert "summary.json, report.html)" in out


def pictures_in(page: bytes) -> list[bytes]:
    return re.findall(rb"data:image/jpeg;base64,([^\"]+)", page)


def pictures_of(path: Path) -> list[bytes]:
    return [hashlib.sha256(picture).digest() for picture in pictures_in(path.read_bytes())]


def test_a_run_that_was_stopped_before_its_report_draws_it_when_it_goes_on(tiny: Path, tmp_path: Path) -> None:
    arguments = [tiny / "train", "--manifest", tiny / "train.csv", "--keep", 8, "--workers", 0, "--quiet"]
    assert killed_before("report.html", 1, "run", *arguments, "--output", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"
    assert not (tmp_path / "run" / "report.html").exists()
    code, _, err = invoke("resume", tmp_path / "run", "--workers", 0, "--quiet")
    assert (code, err) == (0, "")
    assert Page(tmp_path / "run" / "report.html").all("img")


def test_a_report_that_does_not_hold_any_more_is_taken_out(tiny: Path, tmp_path: Path) -> None:
    run_on(tiny, tmp_path / "run", report=True)
    before = Page(tmp_path / "run" / "report.html").words()
    resume(tmp_path / "run", SERIAL, rank_all=True, report=False, progress=False)
    assert not (tmp_path / "run" / "report.html").exists()
    resume(tmp_path / "run", SERIAL, report=True, progress=False)
    after = Page(tmp_path / "run" / "report.html").words()
    assert "Labels 12 all of them ranked" in after
    assert re.search(r"Labels 12 \d+ ranked, the others kept whole", before)


def test_a_report_that_there_is_no_room_for_does_not_undo_the_run(tiny: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "160k") as enlarge:
        code, out, err = reduce(tiny, disk / "run", "--report")
        assert code == 0, err
        assert re.search(r"WARNING: the report was not drawn: .*report\.html cannot be written: No space left on", err)
        assert err.rstrip().endswith(f"To try again: reducer report {disk / 'run'}")
        assert "summary.json)" in out
        assert not [path.name for path in (disk / "run").iterdir() if path.name.startswith((".", "report"))]
        code, _, err = invoke("report", disk / "run", "--quiet")
        assert (code, "report.html cannot be written: No space left on device" in err) == (1, True)
        enlarge("10m")
        code, _, err = invoke("report", disk / "run", "--quiet")
        assert (code, err) == (0, "")
        assert Page(disk / "run" / "report.html").all("img")


def test_what_cannot_be_reported(run: Path, tmp_path: Path) -> None:
    code, _, err = invoke("report", tmp_path)
    assert (code, "is no run folder" in err) == (2, True)
    shutil.copytree(run, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"status": "stopped"}))
    code, _, err = invoke("report", tmp_path / "run")
    assert (code, "is not finished" in err) == (2, True)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    next((tmp_path / "run" / "images").iterdir()).unlink()
    code, _, err = invoke("report", tmp_path / "run")
    assert (code, "part files are missing" in err) == (2, True)


def test_shards_on_s3_and_a_run_there(tars: Path, tiny: Path, s3: S3Server, tmp_path: Path) -> None:
    s3.make_bucket("reported")
    s3.upload_folder(tars, "reported", "tars/")
    opened = s3.options()
    given = {"storage_options": opened, "output_storage_options": opened, "report": True}
    run_of("s3://reported/tars", "s3://reported/run", tiny / "train.csv", **given)  # type: ignore[arg-type]
    run_of(tars, tmp_path / "run", tiny / "train.csv", report=True)
    page = s3.client().get_object(Bucket="reported", Key="run/report.html")["Body"].read()
    found = pictures_in(page)
    assert len(found) > 50
    assert found == pictures_in((tmp_path / "run" / "report.html").read_bytes())
    assert s3.secret.encode() not in page
    flags = [word for key, value in opened.items() for word in ("--output-storage-option", f"{key}={value}")]
    code, _, err = invoke("report", "s3://reported/run", *flags)
    assert (code, "was opened with --storage-option endpoint_url, key, secret" in err) == (2, True)
    code, _, err = invoke("report", "s3://reported/run", *flags, "--gallery-photos", 0, "--quiet")
    assert (code, err) == (0, "")
    photos = [word.replace("--output-", "--") for word in flags]
    code, out, _ = invoke("report", "s3://reported/run", *flags, *photos, "--quiet")
    assert (code, out) == (0, "")
    again = s3.client().get_object(Bucket="reported", Key="run/report.html")["Body"].read()
    assert pictures_in(again) == found


def test_pictures_drawn_on_a_cluster_are_the_same(tiny: Path, tmp_path: Path) -> None:
    run_on(tiny, tmp_path / "run", ClusterSpec(workers=2), report=True)
    assert not (tmp_path / "run" / "lock.json").exists()
    drawn = pictures_of(tmp_path / "run" / "report.html")
    assert len(drawn) > 50
    write_report(tmp_path / "run", progress=False)
    assert pictures_of(tmp_path / "run" / "report.html") == drawn
    threads = {"n_workers": 1, "processes": False, "dashboard_address": None}
    spec = ClusterSpec(class_path="distributed.LocalCluster", kwargs=threads)
    write_report(tmp_path / "run", cluster=spec, progress=False)
    assert pictures_of(tmp_path / "run" / "report.html") == drawn


def test_where_no_worker_is_left_pictures_are_drawn_here(tiny: Path, tmp_path: Path) -> None:
    run_on(tiny, tmp_path / "run", report=True)
    drawn = pictures_of(tmp_path / "run" / "report.html")
    folder, job = RunFolder(str(tmp_path / "run")), job_on(tiny, tmp_path / "run")
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        (worker,) = client.scheduler_info()["workers"]
        for avoid in ([], [worker]):
            (tmp_path / "run" / "report.html").unlink()
            draw_report(folder, resolve(job), client=client, avoid=avoid)
            assert pictures_of(tmp_path / "run" / "report.html") == drawn


def test_a_stop_while_it_is_drawn_leaves_the_run_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("reducer.outputs.report.page.as_html", stopped)
    code, _, err = reduce(tiny, tmp_path / "run", "--report", "--quiet")
    folder = tmp_path / "run"
    said = f"Stopped; the run in {folder} is whole, but its report is not drawn: reducer report {folder}\n"
    assert (code, err) == (130, said)
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert not (folder / "lock.json").exists()


def test_a_run_whose_folder_another_one_has_taken_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object, **__: object) -> str:
        lock = tmp_path / "run" / "lock.json"
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "another"}))
        return "page"

    monkeypatch.setattr("reducer.outputs.report.page.as_html", taken)
    with pytest.raises(LostLockError):
        run_on(tiny, tmp_path / "run", report=True)
    assert not (tmp_path / "run" / "report.html").exists()


def test_secrets_in_urls_are_not_shown() -> None:
    # Of a run that was begun before such URLs were refused.
    job = job_figures(resolve(Job("s3://bucket/x", "out", manifest="https://host/p.csv")))
    job |= {"images": "s3://key:PLANTED@bucket/x", "manifest": "https://host/p.csv?X-Amz-Signature=PLANTED"}
    shown = as_html("report.html", **page_of(job))
    assert "PLANTED" not in shown
    assert "s3://bucket/x" in shown
    assert "https://host/p.csv?…" in shown


def page_of(job: dict[str, object]) -> dict[str, object]:
    """What a page needs, of a run of whose summary only the job matters."""
    zeros = ("photos_kept", "photos", "resumed", "labels", "labels_ranked", "photos_read", "bytes_read")
    summary = dict.fromkeys(zeros, 0) | {
        "job": job,
        "started": "2026-01-01T00:00:00",
        "timings": {},
        "photos_per_second": None,
        "reasons": {},
        "quality": {"selection": {"pairs": 0}},
        "versions": {"reducer": "0"},
    }
    lists = ("remarks", "missing_labels", "galleries", "failures", "cross_label")
    return {name: [] for name in lists} | {
        "summary": summary,
        "command": command_of(job),
        "run": "run",
        "name": "run",
        "bytes": {"before": "", "after": "", "unknown_before": 0},
        "certificate": None,
        "figures": {"counts": ""},
        "choice": {"rows": [], "at": None},
        "near": 6,
        "unit": "bits",
        "compared_by": "dhash, 64 bits",
        "distance": str,
        "number_of": str,
        "largest": 100,
        "most_named": 20,
        "picture": None,
    }


def test_characters_that_control_others_are_not_in_the_page(tiny: Path, tmp_path: Path) -> None:
    table = pd.read_csv(tiny / "train.csv", dtype=str).head(20)
    table.assign(landmark_id="a\u202eb\x01c").to_csv(tmp_path / "m.csv", index=False)
    run_on(tiny, tmp_path / "run", manifest=str(tmp_path / "m.csv"), report=True)
    page = Page(tmp_path / "run" / "report.html")
    assert "Label a\ufffdb\ufffdc" in page.words()
    assert not {"\u202e", "\x01"} & set((tmp_path / "run" / "report.html").read_text())


def test_a_page_is_under_15_mb_with_the_longest_ids(tiny: Path, tmp_path: Path) -> None:
    """Of as many pictures as can be, which can hardly be made smaller, and ids that need escaping."""
    noise = [Image.effect_noise((240, 180), 100 + number) for number in range(20)]
    lines = ["id,landmark_id,file"]
    for number in range(2500):
        name = f"{number:04}" + 996 * "&"
        lines.append(f"{name},label{number % 60},{number % 20}.png")
    for number, picture in enumerate(noise):
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    settings = {"manifest": str(tmp_path / "m.csv"), "path_column": "file", "keep": 30, "rank_all": True}
    reduce_images(Job(str(tmp_path), str(tmp_path / "run"), report=False, **settings), SERIAL, progress=False)
    write_report(tmp_path / "run", labels=[f"label{i}" for i in range(60)], gallery_photos=2000, progress=False)
    assert (tmp_path / "run" / "report.html").stat().st_size < 15_000_000
    assert len(Page(tmp_path / "run" / "report.html").all("img")) > 1900


def test_figures_for_notebooks(tiny: Path, tmp_path: Path) -> None:
    result = run_on(tiny, tmp_path / "run")
    ledger = result.images
    label = ledger.groupby("label").size().idxmax()
    kept = ledger[(ledger["label"] == label) & ledger["kept"]].sort_values("rank")
    counts = result.plot_counts()
    (axes,) = counts.axes
    assert axes.get_yscale() == "log"
    before, after = (patch.get_data().values.sum() for patch in axes.patches)
    assert (before, after) == (12, 12)
    figures = [counts]
    for which in ("closest", "farthest"):
        figure = result.plot_pair(label, which=which)
        assert len(figure.axes) == 2
        assert all(one.images for one in figure.axes)
        title = figure.get_suptitle()
        assert re.fullmatch(rf"{label}, the {which} two: hash difference \d+ of 64 bits", title)
        ids = [one.get_title() for one in figure.axes]
        words = [int(ledger.set_index("id").loc[name, "hash"], 16) for name in ids]
        assert f"difference {(words[0] ^ words[1]).bit_count()} of" in title
        figures.append(figure)
    figure = result.show(label)
    shown = [one.get_title().splitlines()[0] for one in figure.axes if one.images]
    assert shown == kept["id"].tolist()
    assert len([one for one in result.show(int(label), most=3).axes if one.images]) == 3
    figures.append(figure)
    for figure in figures:
        with Image.open(io.BytesIO(figure._repr_png_())) as picture:
            assert picture.width > 300
    with pytest.raises(InputError, match="has the label 'nowhere'"):
        result.show("nowhere")
    with pytest.raises(InputError, match="which is 'nearest': expected 'closest' or 'farthest'"):
        result.plot_pair(label, which="nearest")
    with pytest.raises(InputError, match="most is 0: expected a whole number of 1 or more"):
        result.show(label, most=0)
    html = result._repr_html_()
    assert f"Kept {result.summary['photos_kept']} of 240 photos" in html
    assert "report.html" not in html
    write_report(tmp_path / "run", gallery_photos=0, progress=False)
    assert str(tmp_path / "run" / "report.html") in result._repr_html_()


def test_a_grey_photo_is_grey_in_a_notebook(tmp_path: Path) -> None:
    (tmp_path / "in" / "grey").mkdir(parents=True)
    for number in range(2):
        Image.effect_noise((200, 150), 50 + number).save(tmp_path / "in" / "grey" / f"{number}.png")
    job = Job(str(tmp_path / "in"), str(tmp_path / "run"), rank_all=True, report=False)
    result = reduce_images(job, SERIAL, progress=False)
    for figure in (result.plot_pair("grey"), result.show("grey")):
        for axes in figure.axes:
            pixels = axes.images[0].get_array()
            assert pixels.shape[2] == 3
            assert (pixels[..., 0] == pixels[..., 2]).all()


def test_a_label_with_dollar_signs_is_no_formula(tiny: Path, tmp_path: Path) -> None:
    table = pd.read_csv(tiny / "train.csv", dtype=str)
    table.head(12).assign(landmark_id=r"$\frac{$").to_csv(tmp_path / "m.csv", index=False)
    result = run_on(tiny, tmp_path / "run", manifest=str(tmp_path / "m.csv"))
    assert result.show(r"$\frac{$")._repr_png_()
    assert result.plot_pair(r"$\frac{$")._repr_png_()


def test_a_backend_that_a_notebook_names_is_of_no_matter(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    subprocess.run(
        [sys.executable, "-m", "reducer", "report", str(tmp_path / "run"), "--gallery-photos", "0", "--quiet"],
        env=os.environ | {"MPLBACKEND": "module://not_installed.backend_inline"},
        check=True,
    )
    assert (tmp_path / "run" / "report.html").exists()


def test_workers_need_no_matplotlib_and_runs_load_it_last() -> None:
    code = (
        "import sys, reducer.run.dask.worker, reducer.outputs.report.thumbnails, reducer.api.reduce\n"
        "print(sorted({'matplotlib', 'jinja2'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "matplotlib" not in loaded
