"""Vectors that a model makes: what it is given, what it may give, and whole runs with it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from commands import invoke
from jobs import job_on, kept_vectors, reduced_files, run_on
from PIL import Image, ImageOps

from reducer import ClusterSpec, InputError, Job, TooManyFailuresError, embed, reduce_images, resume
from reducer.config.resolved import resolve
from reducer.config.settings import EMBED_MEAN, EMBED_STD, PhotoSettings
from reducer.photos.model import PATHS, Model, loaded, picture_of, vectors_of
from reducer.run.tasks.tasks import PartitionTasks
from reducer.storage.codecs import from_lists

OWN = {"embed_size": 32, "embed_batch": 8}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.small(tmp_path_factory.mktemp("models") / "small.onnx")


@pytest.fixture(scope="session")
def embedded_run(tiny: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the model, in this process, which nothing has disturbed."""
    run = tmp_path_factory.mktemp("embedded") / "run"
    run_on(tiny, run, embed=str(model), rank_all=True, **OWN)
    return run


def settings_of(model: Path, **options: object) -> PhotoSettings:
    settings = resolve(Job("photos", "run", embed=str(model), **{**OWN, **options})).with_model().photo_settings  # type: ignore[arg-type]
    assert settings.embed is not None
    PATHS.setdefault(settings.embed.model, []).append(str(model))
    return settings


def content_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_the_model_sees_the_middle_square(model: Path) -> None:
    settings = settings_of(model)
    wide = noise(90, 60)
    expected = wide.crop((15, 0, 75, 60)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(picture_of(content_of(wide), settings).astype(int) - np.asarray(expected)).max() <= 1
    for mode in ("L", "RGBA", "P", "CMYK", "I;16"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        image = (
            Image.fromarray(np.asarray(noise(50, 50).convert("L"), np.uint16)) if mode == "I;16" else wide.convert(mode)
        )
        assert picture_of(content_of(image, kind), settings).shape == (32, 32, 3)
    lying = content_of(wide, "JPEG", exif=_orientation(6), quality=95)
    upright = picture_of(lying, settings_of(model, exif_orientation=True)).astype(int)
    turned = np.rot90(picture_of(lying, settings).astype(int), -1)
    assert np.abs(upright - turned).mean() < 3


def _orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(model: Path) -> None:
    content = content_of(noise(1600, 1200), "JPEG", quality=92)
    fast, exact = (picture_of(content, settings_of(model, decode=way)).astype(int) for way in ("fast", "exact"))
    assert np.abs(fast - exact).mean() < 3
    whole = ImageOps.fit(Image.open(io.BytesIO(content)), (32, 32), Image.Resampling.BICUBIC)
    assert (exact == np.asarray(whole)).all()


@pytest.mark.parametrize("kind", ["small", "channels_last", "one at a time"])
def test_vectors_are_what_onnxruntime_gives(tmp_path: Path, kind: str) -> None:
    make = models.channels_last if kind == "channels_last" else models.small
    path = models.small(tmp_path / "m.onnx", batch=1) if kind == "one at a time" else make(tmp_path / "m.onnx")
    settings = settings_of(path, embed_mean="0.1,0.2,0.3", embed_std=(0.5, 0.25, 2))
    assert settings.embed is not None
    pictures = [picture_of(content_of(noise(64, 64, seed)), settings) for seed in range(11)]
    found = vectors_of(pictures, settings.embed)
    session = onnxruntime.InferenceSession(str(path))
    for picture, vector in zip(pictures, found, strict=True):
        given = ((picture / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2]).astype(np.float32)[None]
        given = given if kind == "channels_last" else given.transpose(0, 3, 1, 2)
        expected = session.run(None, {"photos": given})[0][0]
        assert isinstance(vector, bytes)
        own = np.frombuffer(vector, np.float16).astype(float)
        assert own @ expected / np.linalg.norm(expected) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("make", [models.small, models.mobilenet])
def test_a_vector_does_not_depend_on_those_that_it_comes_with(tmp_path: Path, make: Callable[..., Path]) -> None:
    settings = settings_of(make(tmp_path / "m.onnx"), embed_batch=4)
    assert settings.embed is not None
    pictures = [picture_of(content_of(noise(40, 40, seed)), settings) for seed in range(10)]
    expected = vectors_of(pictures, settings.embed)
    assert vectors_of(pictures[::-1], settings.embed)[::-1] == expected
    assert [vectors_of([picture], settings.embed)[0] for picture in pictures] == expected
    assert len(set(map(bytes, expected))) == 10  # type: ignore[arg-type]


def test_photos_that_a_model_has_no_vector_for_fail_alone(tmp_path: Path) -> None:
    path = models.no_number_for_dark_photos(tmp_path / "m.onnx")
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    levels = [250, 20, 180, 200, 10]
    for number, level in enumerate(levels):
        Image.new("RGB", (40, 40), (level, level, level)).save(folder / f"{number}.png")
    (folder / "5.png").write_bytes(b"no picture")
    job = Job(str(tmp_path / "train"), str(tmp_path / "run"), embed=str(path), rank_all=True, max_failures=0.9, **OWN)
    images = reduce_images(job, ClusterSpec(workers=0), progress=False).images.sort_values("id")
    assert images["reason"].tolist() == ["kept", "failed", "kept", "kept", "failed", "failed"]
    assert images["error"].tolist()[1] == "no vector: of the model's: its vector holds numbers that are not finite"
    assert images["error"].tolist()[5].startswith("not an image:")
    assert images["hash"].notna().tolist() == [True, False, True, True, False, False]


def test_where_a_model_has_no_vector_for_any_photo_that_is_what_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reducer.run.monitor.ALL_FAILED", 3)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "train" / "a" / f"{number}.png")
    path = models.no_number_for_dark_photos(tmp_path / "m.onnx")
    job = Job(str(tmp_path / "train"), str(tmp_path / "run"), embed=str(path), rank_all=True, **OWN)
    with pytest.raises(TooManyFailuresError, match=r"all failed.* no vector: of the model.* Check the model, --embed"):
        reduce_images(job, ClusterSpec(workers=0), progress=False)


def test_a_model_that_fails_at_a_photo_costs_that_photo(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(model)
    assert settings.embed is not None
    pictures = [picture_of(content_of(noise(64, 64, seed)), settings) for seed in range(5)]
    expected = vectors_of(pictures, settings.embed)
    run = Model._run

    def fails_at_the_third(self: Model, given: np.ndarray) -> np.ndarray:
        if any((own == pictures[2]).all() for own in given):
            raise RuntimeError("a kernel fails")
        return run(self, given)

    monkeypatch.setattr(Model, "_run", fails_at_the_third)
    found = vectors_of(pictures, settings.embed)
    assert found[2] == "the model fails: RuntimeError: a kernel fails"
    assert [*found[:2], *found[3:]] == [*expected[:2], *expected[3:]]


def test_a_model_that_has_no_memory_blames_no_photo(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(model)
    assert settings.embed is not None

    def no_memory(self: Model, given: np.ndarray) -> np.ndarray:
        raise RuntimeError("bfc_arena.cc: Failed to allocate memory for requested buffer of size 1")

    loaded(settings.embed)
    monkeypatch.setattr(Model, "_run", no_memory)
    with pytest.raises(MemoryError, match="requested buffer"):
        vectors_of([picture_of(content_of(noise(40, 40)), settings)], settings.embed)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: path.write_bytes(b"no model"), {}, r"cannot be loaded as an ONNX model"),
        (
            lambda path: models.small(path, side=64),
            {},
            r"takes photos \(photos, 3, 64, 64\) .*--embed-size is 32: give --embed-size 64",
        ),
        (models.two_outputs, {}, r"gives vectors \(photos, 16\) .*, maps \(.* say which by --embed-output NAME"),
        (models.two_outputs, {"embed_output": "map"}, r"has no output 'map' \(--embed-output\); it gives vectors"),
        (
            models.two_outputs,
            {"embed_output": "maps"},
            r"gives maps of shape \(8, 16, 8, 8\) for 8 photos: expected one vec",
        ),
        (
            models.text,
            {},
            r"takes words \(photos, 7\) tensor\(int64\): expected one input of floating",
        ),
        (
            models.less_the_mean_of_all,
            {},
            r"makes other vectors of a photo in other company, .* Give --embed-batch 1",
        ),
        (
            lambda path: models.less_the_mean_of_all(path, 8),
            {},
            r"makes other vectors of a photo in other company, .* Export it for one photo at a time",
        ),
        (models.grey, {}, r"takes photos \(photos, 1, \S+ \S+ tensor\(float\): expected 3 channels"),
    ],
)
def test_a_model_that_does_not_fit_says_so_before_the_run(
    tmp_path: Path, tiny: Path, make: Callable[[Path], object], options: dict[str, object], message: str
) -> None:
    path = tmp_path / "m.onnx"
    make(path)
    with pytest.raises(InputError, match=f"--embed {path} {message}"):
        run_on(tiny, tmp_path / "run", embed=str(path), **OWN, **options)
    assert not (tmp_path / "run").exists()


def test_weights_in_another_file_are_refused(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be on no worker, and could change unseen."""
    path = models.small(tmp_path / "m.onnx")
    whole = onnx.load(str(path))
    onnx.save_model(whole, str(path), save_as_external_data=True, location="m.data", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--embed .*m\.onnx cannot be loaded .*Its weights lie in another file"):
        run_on(tiny, tmp_path / "run", embed=str(path), **OWN)


def test_a_model_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--embed .*none\.onnx cannot be read: No such file"):
        run_on(tiny, tmp_path / "run", embed=str(tmp_path / "none.onnx"))


def test_without_onnxruntime(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(model)
    assert settings.embed is not None
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"--embed needs onnxruntime .*pip install 'reducer\[embed\]'"):
        Model(settings.embed, str(model))


def test_two_outputs_and_one_is_named(tmp_path: Path, tiny: Path) -> None:
    path = models.two_outputs(tmp_path / "m.onnx")
    run_on(tiny, tmp_path / "run", embed=str(path), embed_output="vectors", limit_labels=2, rank_all=True, **OWN)
    assert pq.read_schema(next((tmp_path / "run" / "vectors").iterdir())).field("vector").type.list_size == 16


def test_hashes_are_those_without_a_model_and_photos_are_read_once(
    tiny: Path, single: Path, embedded_run: Path, tmp_path: Path
) -> None:
    plain = run_on(tiny, tmp_path / "plain", rank_all=True)
    summary = json.loads((embedded_run / "summary.json").read_text())
    with_model = resume(embedded_run, ClusterSpec(workers=0), progress=False)
    columns = ["id", "hash", "width", "height", "format", "bytes"]
    assert with_model.images[columns].equals(plain.images[columns])
    for name in ("photos_read", "bytes_read", "photos_failed"):
        assert summary[name] == plain.summary[name]
    assert summary["job"]["strategy"] == "facility-location"
    assert summary["quality"]["unit"] == "cosine"
    assert summary["quality"]["by_hash"]["selection"]["pairs"] > 0


@pytest.mark.parametrize(
    ("spec", "options"),
    [(ClusterSpec(workers=2), {"partition_images": 20}), (ClusterSpec(workers=1, threads=3), {"partition_images": 7})],
)
def test_the_same_on_every_cluster(
    tiny: Path, model: Path, embedded_run: Path, tmp_path: Path, spec: ClusterSpec, options: dict[str, object]
) -> None:
    """Labels hashed in pieces, too, whose vectors are kept aside before they are ranked."""
    run_on(tiny, tmp_path / "run", spec, embed=str(model), rank_all=True, **OWN, **options)
    assert reduced_files(tmp_path / "run") == reduced_files(embedded_run)
    assert kept_vectors(tmp_path / "run") == kept_vectors(embedded_run)
    if spec.threads == 3:
        assert list((tmp_path / "run" / "hashes").iterdir())


def test_on_a_cluster_that_lacks_the_model(
    tiny: Path, model: Path, embedded_run: Path, tmp_path: Path, standing_cluster: ClusterSpec
) -> None:
    """It is sent to the workers, and they keep nothing of it afterwards."""
    run_on(tiny, tmp_path / "run", standing_cluster, embed=str(model), rank_all=True, **OWN)
    assert reduced_files(tmp_path / "run") == reduced_files(embedded_run)
    from distributed import Client

    with Client(standing_cluster.address, set_as_default=False) as client:
        found = client.run(lambda dask_worker: [p.name for p in Path(dask_worker.local_directory).glob("*.onnx")])
    assert list(found.values()) == [[], []]


def test_photos_in_shards(
    tars: Path, tiny: Path, model: Path, embedded_run: Path, tmp_path: Path, standing_cluster: ClusterSpec
) -> None:
    job = Job(
        str(tars),
        str(tmp_path / "run"),
        str(tiny / "train.csv"),
        keep=8,
        report=False,
        embed=str(model),
        rank_all=True,
        **OWN,
    )
    result = reduce_images(job, standing_cluster, progress=False)
    assert (tmp_path / "run" / "reduced.csv").read_bytes() == (embedded_run / "reduced.csv").read_bytes()
    assert kept_vectors(tmp_path / "run") == kept_vectors(embedded_run)
    assert result.summary["photos_failed"] == 0
    # From shards that are as they were, vectors come with the hashes.
    again = job_on(
        tiny, tmp_path / "again", embed=str(model), reuse=str(tmp_path / "run"), rank_all=True, seed=1, **OWN
    )
    again = Job(**{**again.__dict__, "images": str(tars)})
    reused = reduce_images(again, ClusterSpec(workers=0), progress=False)
    assert reused.summary["photos_read"] == 0
    assert (tmp_path / "again" / "reduced.csv").read_bytes() == (embedded_run / "reduced.csv").read_bytes()
    # Of photos that were read by range later, too.
    some = Job(**{**job.__dict__, "output": str(tmp_path / "some"), "rank_all": False})
    reduce_images(some, ClusterSpec(workers=0), progress=False)
    resume(tmp_path / "some", ClusterSpec(workers=0), rank_all=True, progress=False)
    last = Job(**{**job.__dict__, "output": str(tmp_path / "last"), "reuse": str(tmp_path / "some")})
    assert reduce_images(last, ClusterSpec(workers=0), progress=False).summary["photos_read"] == 0
    assert (tmp_path / "last" / "reduced.csv").read_bytes() == (embedded_run / "reduced.csv").read_bytes()
    assert kept_vectors(tmp_path / "last") == kept_vectors(embedded_run)


def test_vectors_are_reused(
    tiny: Path, model: Path, embedded_run: Path, tmp_path: Path, standing_cluster: ClusterSpec
) -> None:
    options = {"embed": str(model), "rank_all": True, "reuse": str(embedded_run), **OWN}
    result = run_on(tiny, tmp_path / "run", standing_cluster, strategy="random", partition_images=20, **options)
    assert result.summary["photos_read"] == 0
    assert result.summary["photos_reused"] == 240
    assert kept_vectors(tmp_path / "run") == kept_vectors(embedded_run)
    run_on(tiny, tmp_path / "fresh", embed=str(model), rank_all=True, strategy="random", **OWN)
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "fresh")
    other = models.small(tmp_path / "other.onnx", seed=1)
    for changed in ({"embed": str(other)}, {"embed_size": 48}, {"embed_mean": "0,0,0"}):
        with pytest.raises(InputError, match="has no vectors of this model as it is used here"):
            run_on(tiny, tmp_path / "refused", **options | changed)
    plain = run_on(tiny, tmp_path / "plain", rank_all=True, reuse=str(embedded_run))  # its hashes alone
    assert plain.summary["photos_read"] == 0


def test_kept_vectors_can_be_given(tiny: Path, embedded_run: Path, tmp_path: Path) -> None:
    run_on(tiny, tmp_path / "run", vectors=str(embedded_run / "vectors"), near_copy=6, rank_all=True)
    assert reduced_files(tmp_path / "run") == reduced_files(embedded_run)
    assert kept_vectors(tmp_path / "run") == kept_vectors(embedded_run)


def test_what_failed_is_tried_again(tiny: Path, model: Path, embedded_run: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.csv").write_bytes((tiny / "train.csv").read_bytes())
    for path in (tiny / "train").rglob("*.jpg"):
        target = own / path.relative_to(tiny)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    broken = sorted((own / "train").rglob("*.jpg"))[::60]
    for path in broken:
        path.write_bytes(b"broken")
    options = {"embed": str(model), "rank_all": True, "partition_images": 20, **OWN}
    run_on(own, tmp_path / "run", **options)
    for path in broken:
        path.write_bytes((tiny / path.relative_to(own)).read_bytes())
    result = resume(tmp_path / "run", ClusterSpec(workers=0), retry_failed=True, progress=False)
    assert result.summary["photos_failed"] == 0
    assert (tmp_path / "run" / "reduced.csv").read_bytes() == (embedded_run / "reduced.csv").read_bytes()
    assert kept_vectors(tmp_path / "run") == kept_vectors(embedded_run)
    told = json.loads((embedded_run / "summary.json").read_text())["quality"]
    assert result.summary["quality"] == told


def test_another_model_does_not_go_on_with_a_run(tiny: Path, tmp_path: Path) -> None:
    path = models.small(tmp_path / "m.onnx")
    run_on(tiny, tmp_path / "run", embed=str(path), rank_all=True, **OWN)
    path.unlink()  # what is done needs it no more
    assert resume(tmp_path / "run", ClusterSpec(workers=0), progress=False).summary["resumed"] == 0
    assert invoke("report", tmp_path / "run", "--quiet", "--gallery-photos", 4)[0] == 0
    assert invoke("export", tmp_path / "run", tmp_path / "kept", "--quiet")[0] == 0
    next((tmp_path / "run" / "images").glob("part-*")).unlink()
    models.small(path, seed=1)
    with pytest.raises(InputError, match=r"begun otherwise: --embed .* has another content"):
        resume(tmp_path / "run", ClusterSpec(workers=0), progress=False)


# Vectors alone


def rows_of(path: Path) -> tuple[list[str], list[str | None], list[bytes | None]]:
    table = pq.read_table(path)
    return table["id"].to_pylist(), table["error"].to_pylist(), from_lists(table["vector"]).to_pylist()


def test_embedding_alone(tiny: Path, model: Path, embedded_run: Path, tmp_path: Path) -> None:
    command = [
        "embed",
        tiny / "train",
        "--manifest",
        tiny / "train.csv",
        "--embed",
        model,
        "--embed-size",
        32,
        "--embed-batch",
        8,
    ]
    code, printed, _ = invoke(*command, "--output", tmp_path / "v.parquet", "--workers", 0)
    assert code == 0
    assert "Embedded 240 of 240 photos" in printed
    assert "16 dimensions, float16" in printed
    ids, errors, vectors = rows_of(tmp_path / "v.parquet")
    assert ids == [line.partition(",")[0] for line in (tiny / "train.csv").read_text().splitlines()[1:]]
    assert errors == [None] * 240
    assert dict(zip(ids, vectors, strict=True)) == kept_vectors(embedded_run)
    assert not (tmp_path / "v.parquet.parts").exists()
    assert pq.read_schema(tmp_path / "v.parquet").names == ["id", "landmark_id", "error", "vector"]
    code, _, errors_printed = invoke(*command, "--output", tmp_path / "v.parquet", "--workers", 0)
    assert code == 2
    assert "is there already: give another name, or --overwrite" in errors_printed
    before = (embedded_run / "reduced.parquet").read_bytes()
    for output in (embedded_run / "reduced.parquet", next((embedded_run / "vectors").iterdir())):
        code, _, errors_printed = invoke(*command, "--output", output, "--overwrite", "--workers", 0)
        assert code == 2
        assert f"--output {output} is a file of the run in {embedded_run}" in errors_printed
    assert (embedded_run / "reduced.parquet").read_bytes() == before
    manifest = tmp_path / "list.parquet"
    pq.write_table(pa.csv.read_csv(tiny / "train.csv"), manifest)
    given = [manifest if part == tiny / "train.csv" else part for part in command]
    code, _, errors_printed = invoke(*given, "--output", manifest, "--overwrite", "--workers", 0)
    assert code == 2
    assert f"--output {manifest} would overwrite --manifest {manifest}, an input" in errors_printed
    code, _, _ = invoke(*command, "--output", tmp_path / "w.parquet", "--workers", 2, "--partition-images", 50)
    assert code == 0
    assert (tmp_path / "w.parquet").read_bytes() == (tmp_path / "v.parquet").read_bytes()
    run_on(tiny, tmp_path / "run", vectors=str(tmp_path / "v.parquet"), near_copy=6, rank_all=True)
    assert reduced_files(tmp_path / "run") == reduced_files(embedded_run)


def test_embedding_goes_on_where_it_was(
    tiny: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    from reducer.run.folder.pieces import PieceFiles

    job = job_on(tiny, tmp_path / "v.parquet", embed=str(model), partition_images=50, **OWN)
    write_piece, written = PieceFiles.write, []

    def stop_at_the_third(self: PieceFiles, number: int, *rest: object) -> None:
        if len(written) == 2:
            raise Stop
        written.append(number)
        write_piece(self, number, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(PieceFiles, "write", stop_at_the_third)
        with pytest.raises(Stop):
            embed(job, ClusterSpec(workers=0), progress=False)
    assert len(list((tmp_path / "v.parquet.parts" / "hashes").iterdir())) == 2
    other = job_on(tiny, tmp_path / "v.parquet", embed=str(model), **OWN | {"embed_size": 40})
    with pytest.raises(InputError, match=r"--embed-size was 32 and is 40\. To begin again, remove .*v\.parquet\.parts"):
        embed(other, ClusterSpec(workers=0), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            PartitionTasks,
            "task",
            lambda self, index, task=PartitionTasks.task: written.append(index) or task(self, index),
        )
        found = embed(job, ClusterSpec(workers=0), progress=False)
    assert sorted(written) == [0, 1, 2, 3, 4]
    assert (found.photos, found.failed, found.dimensions) == (240, 0, 16)
    embed(job_on(tiny, tmp_path / "w.parquet", embed=str(model), **OWN), ClusterSpec(workers=0), progress=False)
    assert (tmp_path / "v.parquet").read_bytes() == (tmp_path / "w.parquet").read_bytes()


def test_embedding_does_not_go_on_with_other_photos(
    tiny: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    for number in range(3):
        noise(40, 40, number).save(folder / f"{number}.png")
    job = Job(str(tmp_path / "photos"), str(tmp_path / "v.parquet"), embed=str(model), **OWN)
    with monkeypatch.context() as patch:
        patch.setattr("reducer.api.embed._write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(job, ClusterSpec(workers=0), progress=False)
    noise(40, 40, 9).save(folder / "9.png")
    with pytest.raises(
        InputError, match=r"are not those of which vectors were being made: .*remove .*v\.parquet\.parts"
    ):
        embed(job, ClusterSpec(workers=0), progress=False)
    (folder / "9.png").unlink()
    assert embed(job, ClusterSpec(workers=0), progress=False).photos == 3


def test_embedding_shards_and_bad_photos(tars: Path, tiny: Path, model: Path, tmp_path: Path) -> None:
    job = Job(str(tars), str(tmp_path / "v.parquet"), str(tiny / "train.csv"), embed=str(model), **OWN)
    assert embed(job, ClusterSpec(workers=0), progress=False).failed == 0
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    noise(40, 40).save(folder / "good.png")
    (folder / "bad.jpg").write_bytes(b"nothing")
    job = Job(str(tmp_path / "photos"), str(tmp_path / "w.parquet"), embed=str(model), **OWN)
    with pytest.raises(TooManyFailuresError, match="1 of 2 photos have failed"):
        embed(job, ClusterSpec(workers=0), progress=False)
    ids, errors, vectors = rows_of(tmp_path / "w.parquet")
    assert ids == ["a/bad.jpg", "a/good.png"]
    assert errors[1] is None is vectors[0]
    assert str(errors[0]).startswith("not an image")
    found = run_on_folder(tmp_path, tmp_path / "w.parquet")
    assert found["error"].tolist()[0].startswith("no vector: ")


def run_on_folder(tmp_path: Path, vectors: Path) -> pa.Table:
    job = Job(
        str(tmp_path / "photos"),
        str(tmp_path / "run"),
        vectors=str(vectors),
        rank_all=True,
        max_failures=1.0,
        report=False,
    )
    return reduce_images(job, ClusterSpec(workers=0), progress=False).images


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("v.csv", {}, r"the name must end in \.parquet"),
        ("nowhere/v.parquet", {}, "there is no folder"),
        ("folder.parquet", {"overwrite": True}, r"\.parquet is a folder: give the name of a file"),
        ("v.parquet", {"embed": None}, r"embed needs a model: give --embed MODEL\.onnx"),
    ],
)
def test_embedding_refuses_what_cannot_be(
    tiny: Path, model: Path, tmp_path: Path, output: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(InputError, match=message):
        embed(
            job_on(tiny, tmp_path / output, **{"embed": str(model), **options}), ClusterSpec(workers=0), progress=False
        )


def test_the_model_is_loaded_once_a_process(model: Path) -> None:
    settings = settings_of(model)
    assert settings.embed is not None
    assert loaded(settings.embed) is loaded(settings.embed)
    assert (settings.embed.mean, settings.embed.std) == (EMBED_MEAN, EMBED_STD)
