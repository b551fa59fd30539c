"""What dask-kubernetes would send to Kubernetes for us, checked by the schema that Kubernetes checks it by.

No cluster runs here: what the schema does not say, nobody has tried.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from machine import ROOT


@pytest.fixture(scope="module")
def make_cluster_spec(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    # At its import, dask-kubernetes writes a file of defaults into Dask's folder in the user's home.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dask.config.PATH", str(tmp_path_factory.mktemp("dask")))
        operator = pytest.importorskip("dask_kubernetes.operator")
    made: Callable[..., dict[str, Any]] = operator.make_cluster_spec
    return made


@functools.cache
def crd_schema() -> dict[str, Any]:
    """The schema of a DaskCluster, from the resource definition that dask-kubernetes installs on a cluster.

    A cluster drops fields that the schema does not know, without a word: here they are errors, for they are misspelled.
    """
    (path,) = (file for file in files("dask-kubernetes") or () if str(file).endswith("crds/daskcluster.yaml"))
    definition = yaml.safe_load(Path(str(path.locate())).read_text())
    (version,) = (version for version in definition["spec"]["versions"] if version["served"])
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    # These every resource has, and no definition spells them out.
    for name, kind in {"apiVersion": "string", "kind": "string", "metadata": "object"}.items():
        schema["properties"].setdefault(name, {"type": kind})
    _close(schema)
    return schema


def _close(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            _close(part)
    elif isinstance(schema, list):
        for part in schema:
            _close(part)


def without_none(value: Any) -> Any:
    """Without the fields that are None: Kubernetes takes them for absent, JSON's schema does not."""
    if isinstance(value, dict):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_none(part) for part in value]
    return value


def errors_of(spec: dict[str, Any]) -> list[str]:
    """What is wrong with a DaskCluster, each as ``place: reason``; nothing if a cluster would take it."""
    validator = jsonschema.Draft202012Validator(crd_schema())
    return sorted(f"{error.json_path}: {error.message}" for error in validator.iter_errors(without_none(spec)))


@pytest.fixture
def spec(make_cluster_spec: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_cluster_spec(
        name="reducer",
        image="registry.example/reducer:0.1.0",
        n_workers=4,
        worker_command="dask worker --nthreads 1",
        env={"OMP_NUM_THREADS": "1"},
        # Quantities are strings: this schema takes no number for "int-or-string".
        resources={"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1500m", "memory": "2Gi"}},
    )


def test_good_spec(spec: dict[str, Any], make_cluster_spec: Callable[..., dict[str, Any]]) -> None:
    assert errors_of(spec) == []
    container = spec["spec"]["worker"]["spec"]["containers"][0]
    assert container["args"][:4] == ["dask", "worker", "--nthreads", "1"]
    assert container["image"] == "registry.example/reducer:0.1.0"
    # With all defaults, many of which are None.
    assert errors_of(make_cluster_spec(name="reducer")) == []


def test_the_cluster_of_the_readme(make_cluster_spec: Callable[..., dict[str, Any]]) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "KubeCluster" in block)
    made = make_cluster_spec(**yaml.safe_load(block)["cluster"]["kwargs"])
    assert errors_of(made) == []
    container = made["spec"]["worker"]["spec"]["containers"][0]
    assert container["args"][:2] == ["dask", "worker"]
    assert "imagehash" in next(entry["value"] for entry in container["env"] if entry["name"] == "EXTRA_PIP_PACKAGES")


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"n_workers": "4"}, "$.spec.worker.replicas: '4' is not of type 'integer'"),
        ({"env": {"OMP_NUM_THREADS": 1}}, "env[0].value: 1 is not of type 'string'"),
        ({"env": [{"value": "1"}]}, "env[0]: 'name' is a required property"),
        ({"image": ["reducer"]}, "containers[0].image: ['reducer'] is not of type 'string'"),
        ({"resources": {"limits": {"memory": 1.5}}}, "limits.memory: 1.5 is not of type 'string'"),
        ({"resources": {"limit": {"memory": "2Gi"}}}, "'limit' was unexpected"),
        ({"idle_timeout": "5 minutes"}, "$.spec.idleTimeout: '5 minutes' is not of type 'integer'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_options(make_cluster_spec: Callable[..., dict[str, Any]], options: dict[str, Any], place: str) -> None:
    errors = errors_of(make_cluster_spec(name="reducer", **options))
    assert errors
    assert all(place in error for error in errors)


@pytest.mark.parametrize(
    "path",
    [
        ("spec",),
        ("spec", "worker"),
        ("spec", "scheduler", "service"),
        ("spec", "worker", "spec", "containers"),
        ("spec", "worker", "spec", "containers", 0, "name"),
        ("spec", "worker", "spec", "containers", 0, "ports", 0, "containerPort"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_missing_field(spec: dict[str, Any], path: tuple[str | int, ...]) -> None:
    broken = copy.deepcopy(spec)
    place: Any = broken
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    (error,) = errors_of(broken)
    assert error.endswith(f": '{path[-1]}' is a required property")
