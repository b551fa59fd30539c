"""Whole runs that rank by vectors which are given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import invoke
from jobs import job_on, kept_vectors, reduced_files, run_on
from s3server import S3Server
from vectorcases import apart
from waiting import when_begun

from reducer import ClusterSpec, InputError, Job, TooManyFailuresError, cut, explain, reduce_images, resume, status
from reducer.config.resolved import resolve
from reducer.selection.distance import COSINE_STEPS
from reducer.storage.codecs import as_units

DIMENSIONS = 24


@pytest.fixture(scope="session")
def vectors(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of the collection's photos in several row groups, near ones for photos of one view, in no order."""
    photos = pd.read_csv(collection / "truth.csv", dtype=str)
    generator = np.random.default_rng(0)
    view = pd.factorize(photos["view"])[0]
    found = generator.normal(size=(view.max() + 1, DIMENSIONS))[view] + 0.1 * generator.normal(
        size=(len(photos), DIMENSIONS)
    )
    path = tmp_path_factory.mktemp("vectors") / "vectors.parquet"
    order = generator.permutation(len(photos))
    write(path, photos["id"].to_numpy()[order], found[order])
    return path


def write(path: Path, ids: np.ndarray, found: np.ndarray) -> None:
    values = pa.FixedSizeListArray.from_arrays(pa.array(found.astype(np.float32).ravel()), found.shape[1])
    pq.write_table(pa.table({"id": ids, "vector": values}), path, row_group_size=37)


def of(vectors: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(vectors)
    units = as_units(np.stack(table["vector"].to_numpy()))[0]
    return dict(zip(table["id"].to_pylist(), units, strict=True))


@pytest.fixture(scope="session")
def by_vectors(collection: Path, vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by vectors alone, in this process, which nothing has disturbed."""
    run = tmp_path_factory.mktemp("by-vectors") / "run"
    run_on(collection, run, vectors=str(vectors), keep=8)
    return run


def test_vectors_alone_rank_and_no_photo_is_read(collection: Path, vectors: Path, tmp_path: Path) -> None:
    job = Job(
        str(tmp_path / "nowhere"), str(tmp_path / "run"), str(collection / "train.csv"), vectors=str(vectors), keep=6
    )
    result = reduce_images(job, ClusterSpec(workers=0), progress=False)
    summary, images = result.summary, result.images
    assert summary["job"]["strategy"] == "facility-location"
    assert summary["photos_read"] == summary["bytes_read"] == summary["photos_failed"] == 0
    assert summary["quality"]["unit"] == "cosine"
    assert summary["quality"]["by_hash"] is None
    assert images["hash"].isna().all()
    assert images["bytes"].isna().all()
    units = of(vectors)
    for _, label in images[images["rank"].notna()].groupby("label"):
        ranked = label.sort_values("rank")
        ids = ranked["id"].tolist()
        assert ranked["kept"].tolist() == [rank < 6 for rank in range(len(ids))]
        for place in range(1, len(ids)):
            nearest = min(apart(units[ids[place]], units[other]) for other in ids[:place])
            assert ranked["insertion_distance"].iloc[place] == nearest / COSINE_STEPS
        for name, nearest_id, distance in zip(
            ids, ranked["nearest_kept"], ranked["nearest_kept_distance"], strict=True
        ):
            steps = {other: apart(units[name], units[other]) for other in ids[:6]}
            assert distance == steps[nearest_id] / COSINE_STEPS == min(steps.values()) / COSINE_STEPS
    for name in ("images", "vectors"):
        schema = pq.read_schema(next((tmp_path / "run" / name).glob("*.parquet")))
        if name == "images":
            assert schema.field("insertion_distance").metadata[b"unit"] == b"cosine"
            assert schema.field("nearest_kept_distance").metadata[b"unit"] == b"cosine"
            assert schema.field("insertion_distance").type == pa.float64()
        else:
            assert schema.field("vector").type == pa.list_(pa.float16(), DIMENSIONS)
    reduced = pq.read_schema(tmp_path / "run" / "reduced.parquet")
    assert reduced.field("insertion_distance").metadata[b"unit"] == b"cosine"
    ranked_ids = images[images["rank"].notna()]["id"]
    assert kept_vectors(tmp_path / "run") == {name: units[name].tobytes() for name in ranked_ids}


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (ClusterSpec(workers=2), {"partition_images": 20}),
        (ClusterSpec(workers=1, threads=3), {}),
        (ClusterSpec(workers=0), {"partition_images": 1}),
    ],
)
def test_the_same_on_every_cluster(
    collection: Path, vectors: Path, by_vectors: Path, tmp_path: Path, spec: ClusterSpec, options: dict[str, object]
) -> None:
    run_on(collection, tmp_path / "run", spec, vectors=str(vectors), keep=8, **options)
    assert reduced_files(tmp_path / "run") == reduced_files(by_vectors)
    assert kept_vectors(tmp_path / "run") == kept_vectors(by_vectors)
    quality = [json.loads((run / "summary.json").read_text())["quality"] for run in (tmp_path / "run", by_vectors)]
    assert quality[0] == quality[1]


def test_a_worker_that_dies_with_vectors_of_its_partitions_costs_nothing(
    collection: Path, vectors: Path, by_vectors: Path, tmp_path: Path, dask_cluster: Callable[..., str]
) -> None:
    import psutil

    address = dask_cluster(workers=3)
    workers = [p for p in psutil.Process().children(recursive=True) if "dask worker" in " ".join(p.cmdline())]
    killer = when_begun(tmp_path / "run", workers[0].kill)
    # With hashes too, so that it lasts.
    spec = ClusterSpec(address=address)
    options = {"vectors": str(vectors), "keep": 8, "near_copy": 6, "decode": "exact", "partition_images": 5}
    run_on(collection, tmp_path / "run", spec, **options)
    killer.join()
    run_on(collection, tmp_path / "whole", **options)
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "whole")


def test_vectors_on_s3(collection: Path, vectors: Path, by_vectors: Path, tmp_path: Path, s3: S3Server) -> None:
    table = pq.read_table(vectors)
    found = np.stack(table["vector"].to_numpy())
    columns = {f"d{i}": found[:, i] for i in range(DIMENSIONS)}
    pq.write_table(pa.table({"id": table["id"], **columns}), tmp_path / "columns.parquet", row_group_size=100)
    for key, path in (("lists/v.parquet", vectors), ("columns/v.parquet", tmp_path / "columns.parquet")):
        s3.client().put_object(Bucket="trial", Key=f"vectors/{key}", Body=path.read_bytes())
    options = s3.options()
    for number, url in enumerate(["s3://trial/vectors/columns/v.parquet", "s3://trial/vectors/lists"]):
        run = tmp_path / f"run{number}"
        spec = ClusterSpec(workers=2 if number else 0)
        run_on(collection, run, spec, vectors=url, keep=8, storage_options=options)
        assert reduced_files(run) == reduced_files(by_vectors)
    with pytest.raises(InputError, match=r"--vectors s3://trial/vectors/none\.parquet"):
        run_on(collection, tmp_path / "none", vectors="s3://trial/vectors/none.parquet", storage_options=options)


def test_photos_without_a_vector_fail_and_say_why(collection: Path, vectors: Path, tmp_path: Path) -> None:
    table = pq.read_table(vectors)
    ids, found = table["id"].to_numpy(zero_copy_only=False), np.stack(table["vector"].to_numpy())
    found[3], found[4] = np.nan, 0
    write(tmp_path / "v.parquet", ids[:-2], found[:-2])
    for name, options in (("alone", {}), ("both", {"near_copy": 6})):
        result = run_on(
            collection, tmp_path / name, vectors=str(tmp_path / "v.parquet"), rank_all=True, keep=8, **options
        )
        failed = result.images[result.images["reason"] == "failed"].set_index("id")
        assert set(failed.index) == {ids[3], ids[4], ids[-1], ids[-2]}
        assert failed["error"].str.startswith("no vector: --vectors").all()
        assert failed.loc[ids[3], "error"].endswith("its vector holds numbers that are not finite")
        assert failed.loc[ids[4], "error"].endswith("its vector is all zeros")
        assert failed.loc[ids[-1], "error"].endswith("it has none for its id")
        assert result.summary["failures"] == {"no vector": 4}
        assert not failed["kept"].any()
        assert result.summary["photos_read"] == (236 if options else 0)  # what cannot be ranked is not read
        stored = kept_vectors(tmp_path / name)
        assert {name for name, vector in stored.items() if vector is None} == set(failed.index)


def test_too_many_without_a_vector(collection: Path, vectors: Path, tmp_path: Path) -> None:
    table = pq.read_table(vectors)
    ids, found = table["id"].to_numpy(zero_copy_only=False), np.stack(table["vector"].to_numpy())
    write(tmp_path / "half.parquet", ids[::2], found[::2])
    with pytest.raises(TooManyFailuresError, match=r"120 of 240 photos .* no vector: .* it has none for its id"):
        run_on(collection, tmp_path / "run", vectors=str(tmp_path / "half.parquet"), rank_all=True)
    assert (tmp_path / "run" / "reduced.csv").exists()
    write(tmp_path / "others.parquet", np.array([f"x{i}" for i in range(240)]), found)
    with pytest.raises(TooManyFailuresError, match=r"the first \d+ photos have all failed.*--id-column"):
        run_on(collection, tmp_path / "none", vectors=str(tmp_path / "others.parquet"), rank_all=True)


def test_hashes_and_vectors_together(collection: Path, vectors: Path, tmp_path: Path) -> None:
    """Near copies by hash come last, the quality is told by both."""
    by_hash = run_on(collection, tmp_path / "hash", rank_all=True, strategy="random").images.set_index("id")["hash"]
    result = run_on(collection, tmp_path / "both", vectors=str(vectors), near_copy=6, rank_all=True, keep=8)
    images = result.images
    assert images.set_index("id")["hash"].equals(by_hash)
    assert result.summary["photos_read"] == 240
    waited = 0
    for _, label in images.groupby("label"):
        ranked = label.sort_values("rank")
        values = [int(text, 16) for text in ranked["hash"]]
        copy = [any((a ^ b).bit_count() <= 6 for b in values[:i]) for i, a in enumerate(values)]
        assert copy == sorted(copy)  # all that are none come first
        waited += sum(copy)
    assert waited > 20
    quality = result.summary["quality"]
    assert quality["unit"] == "cosine"
    assert quality["by_hash"]["unit"] == "bits"
    assert quality["by_hash"]["selection"]["near_copy_pairs"] <= quality["by_hash"]["random"]["near_copy_pairs"]
    assert quality["selection"]["near_copy_pairs"] is None
    assert quality["selection"]["pairs"] == quality["by_hash"]["selection"]["pairs"] > 0


def test_filters_and_cuts_go_by_cosine(collection: Path, vectors: Path, by_vectors: Path, tmp_path: Path) -> None:
    run_on(collection, tmp_path / "all", vectors=str(vectors), rank_all=True, keep=8)
    for name, rules in (("near", {"min_distance": 0.3, "keep": 100}), ("budget", {"total": 60}), ("keep", {"keep": 3})):
        found = cut(tmp_path / "all", tmp_path / f"{name}.csv", **rules)
        options = {"keep": None} | rules
        result = run_on(collection, tmp_path / name, vectors=str(vectors), rank_all=True, **options)
        assert (tmp_path / f"{name}.csv").read_bytes() == (tmp_path / name / "reduced.csv").read_bytes()
        assert found.unit == "cosine"
        units, images = of(vectors), result.images
        for _, label in images.groupby("label"):
            kept = label[label["kept"]]["id"].tolist()
            for own, nearest, distance in zip(
                label["id"], label["nearest_kept"], label["nearest_kept_distance"], strict=True
            ):
                assert distance == min(apart(units[own], units[k]) for k in kept) / COSINE_STEPS
                assert nearest in kept
    with pytest.raises(InputError, match=r"--min-distance is 8, .* are a cosine distance, from 0 to 2"):
        cut(tmp_path / "all", min_distance=8)
    with pytest.raises(InputError, match=r"--max-bytes counts bytes, and the sizes of 240 photos are not known"):
        cut(tmp_path / "all", max_bytes="1GB")
    parquet = tmp_path / "cut.parquet"
    cut(tmp_path / "all", parquet, keep=2)
    assert pq.read_schema(parquet).field("insertion_distance").metadata[b"unit"] == b"cosine"
    code, printed, _ = invoke("cut", str(tmp_path / "all"), "--output", str(tmp_path / "x.csv"), "--keep", "4")
    assert code == 0
    assert "bits" not in printed
    code, printed, _ = invoke("explain", str(by_vectors), str(result.images["id"][0]))
    assert code == 0
    assert "bits" not in printed
    assert explain(by_vectors, result.images["id"][0])[0].unit == "cosine"


def test_a_stopped_run_goes_on(collection: Path, vectors: Path, by_vectors: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        from reducer.run.folder.parts import LedgerParts

        write_part, written = LedgerParts.write, []

        def stop_at_the_third(self: LedgerParts, index: int, *rest: object) -> None:
            if len(written) == 2:
                raise Stop
            written.append(index)
            write_part(self, index, *rest)  # type: ignore[arg-type]

        patch.setattr(LedgerParts, "write", stop_at_the_third)
        with pytest.raises(Stop):
            run_on(collection, tmp_path / "run", vectors=str(vectors), keep=8, partition_images=20)
    assert status(tmp_path / "run").partitions_done == 2
    assert len(list((tmp_path / "run" / "vectors").iterdir())) == 2
    result = resume(tmp_path / "run", ClusterSpec(workers=0), progress=False)
    assert result.summary["photos_failed"] == 0
    assert reduced_files(tmp_path / "run") == reduced_files(by_vectors)
    assert kept_vectors(tmp_path / "run") == kept_vectors(by_vectors)
    again = resume(tmp_path / "run", ClusterSpec(workers=0), progress=False, rank_all=True)
    run_on(collection, tmp_path / "all", vectors=str(vectors), keep=8, rank_all=True)
    assert reduced_files(tmp_path / "run") == reduced_files(tmp_path / "all")
    assert again.summary["quality"] == json.loads((tmp_path / "all" / "summary.json").read_text())["quality"]


def test_a_run_does_not_go_on_with_other_vectors(collection: Path, vectors: Path, tmp_path: Path) -> None:
    own = tmp_path / "v.parquet"
    own.write_bytes(vectors.read_bytes())
    run_on(collection, tmp_path / "run", vectors=str(own), keep=8)
    next((tmp_path / "run" / "images").glob("part-0*")).unlink()
    table = pq.read_table(own)
    write(own, table["id"].to_numpy(zero_copy_only=False), np.stack(table["vector"].to_numpy())[::-1])
    with pytest.raises(InputError, match=r"begun otherwise: --vectors .* has another content"):
        resume(tmp_path / "run", ClusterSpec(workers=0), progress=False)


def test_vectors_of_photos_in_shards(tars: Path, collection: Path, tiny: Path, vectors: Path, tmp_path: Path) -> None:
    """Shards are looked through for where photos lie, and none of them is decoded."""
    options = {"vectors": str(vectors), "keep": 8, "rank_all": True}
    result = reduce_images(
        Job(str(tars), str(tmp_path / "run"), str(tiny / "train.csv"), report=False, **options),
        ClusterSpec(workers=2),
        progress=False,
    )
    assert result.summary["photos_read"] == 0
    assert result.images["shard"].notna().all()
    assert result.images["hash"].isna().all()
    single = run_on(collection, tmp_path / "single", **options)
    columns = ["id", "rank", "insertion_distance", "nearest_kept", "kept", "reason"]
    assert result.images[columns].equals(single.images[columns])


def test_labels_too_large_for_one_step_are_named(
    collection: Path, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reducer.selection.facility_location.FACILITY_LOCATION_CANDIDATES", 20)
    monkeypatch.setattr("reducer.run.summary.FACILITY_LOCATION_CANDIDATES", 20)
    result = run_on(collection, tmp_path / "run", vectors=str(vectors), keep=3)
    counts = result.images["label"].value_counts()
    assert result.summary["labels_partitioned"] == sorted(counts[counts > 20].index)
    assert result.summary["labels_partitioned"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": "v", "embed": "m"}, "--vectors and --embed exclude each other"),
        ({"vectors": "v", "strategy": "pairs"}, "--strategy pairs compares hashes"),
        ({"near_copy": 3}, "--near-copy says which photos come last when they are ranked by vectors"),
        ({"vectors": "v", "near_copy": 65}, "--near-copy is 65: expected a whole number of bits from 0 to 64"),
        ({"embed_output": "x"}, "--embed-output is about a model: give --embed too, or leave it out"),
        ({"embed_size": 64}, "--embed-size is about a model: give --embed too"),
        ({"vectors": "v", "embed_mean": "0,0,0"}, "--embed-mean is about a model"),
        ({"embed": "m", "embed_mean": "1,2"}, "--embed-mean is '1,2': expected three numbers"),
        ({"embed": "m", "embed_std": (1, 0, 1)}, "--embed-std is 1.0,0.0,1.0: nothing can be divided by 0"),
        ({"embed": "m", "embed_batch": 0}, "--embed-batch is 0: expected a whole number of 1 or more"),
        ({"embed": "s3://b/m.onnx"}, "--embed s3://b/m.onnx is a URL; it is read from local paths only"),
        ({"vectors": ""}, "--vectors is empty"),
        ({"vectors": "v", "min_distance": 2.1}, "--min-distance is 2.1, .* a cosine distance, from 0 to 2"),
        ({"hash_size": 4, "min_distance": 17}, "--min-distance is 17, .* bits of a hash, from 0 to 16"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Job("photos", "run", **options)  # type: ignore[arg-type]


def test_a_run_never_writes_over_what_it_reads(collection: Path, by_vectors: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(by_vectors, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for option, path in (
        ("--vectors", run / "vectors"),
        ("--manifest", run / "reduced.csv"),
        ("--always-keep", run / "reduced.csv"),
        ("--avoid", run),
    ):
        for dry in ([], ["--dry-run"]):
            code, _, err = invoke("run", collection / "train", option, path, "--output", run, "--overwrite", *dry)
            assert code == 2
            assert f"{option} {path} lies in --output {run}" in err
    for output in (run / "vectors" / "part-00000.parquet", run / "reduced.parquet"):
        code, _, err = invoke("cut", by_vectors, "--output", output)
        assert code == 2
        assert f"--output {output} is a file of the run in {run}: give another name" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_list_is_written_over_no_vectors(collection: Path, vectors: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    folder.mkdir()
    shutil.copy(vectors, folder / "v.parquet")
    before = (folder / "v.parquet").read_bytes()
    for number, given in enumerate((folder, folder / "v.parquet")):
        run = tmp_path / str(number)
        run_on(collection, run, vectors=str(given), keep=2)
        code, _, err = invoke("cut", run, "--output", folder / "v.parquet", "--keep", 1)
        assert code == 2
        assert f"would overwrite --vectors {given}, an input" in err
    assert (folder / "v.parquet").read_bytes() == before


def test_the_command_line(collection: Path, vectors: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["run", str(collection / "train"), "--manifest", str(collection / "train.csv"), "--output", str(run)]
    code, printed, errors = invoke(
        *command, "--vectors", str(vectors), "--keep", "8", "--workers", "0", "--strategy", "farthest-first", "--report"
    )
    assert code == 0
    assert "Cosine distances" in printed
    assert "--strategy farthest-first on vectors seeks out what is odd" in errors
    assert "Distances in bits" not in printed
    page = (run / "report.html").read_text()
    assert "Cosine distances" in page
    assert "next is away, cosine" in page
    code, printed, errors = invoke(
        *command, "--vectors", str(tmp_path / "none.parquet"), "--workers", "0", "--overwrite"
    )
    assert code == 2
    assert f"--vectors {tmp_path / 'none.parquet'}" in errors
    code, printed, errors = invoke(*command, "--vectors", str(vectors), "--dry-run", "--rank-all", "--overwrite")
    assert code == 0
    assert "photos to rank: 240, by their vectors; none is decoded" in printed
    assert "Nothing was written" in printed


def test_the_job_is_told_as_it_is(collection: Path, vectors: Path, tmp_path: Path) -> None:
    job = job_on(collection, tmp_path / "run", vectors=str(vectors))
    assert not job.hashes_photos
    assert resolve(job).photo_settings.unit == "cosine"
    for options in ({"near_copy": 0}, {"drop_flat": True}, {"cross_label": True}, {"max_bytes": "1GB"}):
        job = job_on(collection, tmp_path / "run", vectors=str(vectors), **options)
        assert job.hashes_photos
        # What else needs hashes does not change which photos are kept.
        assert resolve(job).photo_settings.near_copy == options.get("near_copy")
    assert resolve(job_on(collection, tmp_path / "run")).photo_settings.near_copy is None
