from __future__ import annotations

from pathlib import Path

import pytest

from reducer import ClusterSpec, InputError, Job
from reducer.config import template_fields

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"--keep is 0: expected a whole number of 1 or more"),
        ({"keep": 2.5}, r"--keep is 2.5"),
        ({"candidates": 24}, r"--candidates 24 is less than --keep 25"),
        ({"strategy": "farthest"}, r"--strategy 'farthest' \(did you mean 'farthest-first'\?\)"),
        ({"decode": "slow"}, r"expected one of fast, exact"),
        ({"format": "json"}, r"--format 'json'"),
        ({"max_failures": 1.5}, r"--max-failures is 1.5: expected a share from 0 to 1"),
        ({"limit_labels": 0}, r"--limit-labels is 0"),
        ({"max_pixels": -1}, r"--max-pixels is -1"),
        ({"partition_images": 0}, r"--partition-images is 0"),
        ({"label_column": "id"}, r"--id-column and --label-column are both 'id'"),
        ({"manifest": "m", "path_column": "p", "path_template": "{id}"}, r"exclude each other"),
        ({"path_template": "{id}"}, r"give --manifest"),
        ({"manifest": "m", "path_template": "{label}.jpg"}, r"must use \{id\}"),
        ({"manifest": "m", "path_template": "{id[0]}"}, r"must use \{id\}"),
        ({"manifest": "m", "path_template": "{id.__class__}"}, r"\{id.__class__\} is not known"),
        ({"manifest": "m", "path_template": "{id!r}"}, r"is not known"),
        ({"manifest": "m", "path_template": "{id:>9}"}, r"is not known"),
        ({"manifest": "m", "path_template": "{id[-1]}{id}"}, r"is not known"),
        ({"manifest": "m", "path_template": "{id"}, r"--path-template"),
        ({"avoid": "s3://bucket/x"}, r"--avoid s3://bucket/x is a URL; it is read from local paths only"),
        ({"images": "train", "storage_options": {"anon": True}}, r"--storage-option says how a URL is opened"),
        ({"output": ""}, r"output is empty"),
        ({"labels": "a,b"}, r"list of labels"),
    ],
)
def test_a_job_that_cannot_be_meant_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Job(**{"images": "photos", "output": "run", **options})


def test_template_fields() -> None:
    assert template_fields("{id[0]}/x{{}}{label}{id}.jpg") == [
        ("", "id", 0),
        ("/x{", None, None),
        ("}", None, None),
        ("", "label", None),
        ("", "id", None),
        (".jpg", None, None),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": "tcp://x:1", "workers": 2}, r"leave them out with --address"),
        ({"class_path": "distributed.LocalCluster", "threads": 2}, r"leave them out"),
        ({"address": "tcp://x:1", "class_path": "distributed.LocalCluster"}, r"not both"),
        ({"workers": -1}, r"--workers is -1"),
        ({"threads": 0}, r"--threads is 0"),
        ({"workers": 0, "threads": 2}, r"leave --threads out"),
        ({"kwargs": {"n_workers": 1}}, r"need a class"),
    ],
)
def test_clusters_that_contradict_themselves(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClusterSpec(**options)


def test_the_cluster_file_of_the_repository() -> None:
    spec = ClusterSpec.from_yaml(ROOT / "cluster.yaml")
    assert spec.class_path == "distributed.LocalCluster"
    assert spec.kwargs == {"n_workers": 2, "threads_per_worker": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version: 1\ncluster: {addres: x}", r"unknown key 'addres' \(did you mean 'address'\?\)"),
        ("version: 1\nclusters: {}", r"unknown key 'clusters' \(did you mean 'cluster'\?\)"),
        ("cluster: {address: x}", r"version is None; this Reducer reads version 1"),
        ("version: 2\ncluster: {address: x}", r"version is 2"),
        ("version: 1\ncluster: {}", r"needs a class .* or an address"),
        ("version: 1", r"cluster: expected the keys class, kwargs, address; found None"),
        ("version: 1\ncluster: {address: x, class: y.Z}", r"an address or a class, not both"),
        ("version: 1\ncluster: {address: x, kwargs: {a: 1}}", r"kwargs need a class"),
        ("version: 1\ncluster: {class: y.Z, kwargs: 3}", r"kwargs is 3"),
        ("version: 1\ncluster: {address: 7}", r"address is 7; expected text"),
        ("- a\n- b", r"expected the keys version, cluster"),
        ("a: [", r"is no YAML"),
    ],
)
def test_what_is_wrong_with_a_cluster_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        ClusterSpec.from_yaml(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="nowhere"):
        ClusterSpec.from_yaml(tmp_path / "nowhere.yaml")
