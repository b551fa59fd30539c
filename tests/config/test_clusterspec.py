"""Where a job runs: what is refused before anything starts, and what cluster.yaml means."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine import ROOT

from reducer import TLS, ClusterSpec, InputError, WorkerRules
from reducer.config.cluster import ClusterFile

LOCAL = "distributed.LocalCluster"
FULL = """
version: 1
cluster:
  class: dask_jobqueue.SLURMCluster
  kwargs: {queue: ci, cores: "${CORES}", memory: 2GiB, account: "${ACCOUNT}", walltime: ${WALLTIME}, processes: ${N}}
  adapt: {minimum: 2, maximum: 20}
client: {timeout: 90s}
workers: {min: 2, wait: 10m, stall: 1h, ship_code: never}
job: {keep: 12, hash: phash, labels: [a, "b,c"], storage_options: {key: "${ACCOUNT}", anon: true}}
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": "tcp://x:1", "workers": 2}, r"leave them out with --address"),
        ({"class_path": LOCAL, "threads": 2}, r"leave them out"),
        ({"address": "tcp://x:1", "class_path": LOCAL}, r"not both"),
        ({"address": ""}, r"address is empty"),
        ({"workers": -1}, r"--workers is -1"),
        ({"workers": True}, r"--workers is True"),
        ({"threads": 0}, r"--threads is 0"),
        ({"workers": 0, "threads": 2}, r"leave --threads out"),
        ({"kwargs": {"n_workers": 1}}, r"kwargs need a class"),
        ({"address": "tcp://x:1", "scale": 2}, r"scale needs a class"),
        ({"address": "tcp://x:1", "adapt": (1, 2)}, r"adapt needs a class"),
        ({"class_path": LOCAL, "scale": 2, "adapt": (1, 2)}, r"scale and adapt exclude each other"),
        ({"class_path": LOCAL, "scale": 0}, r"scale is 0"),
        ({"class_path": LOCAL, "scale": "4"}, r"scale is '4'"),
        ({"class_path": LOCAL, "adapt": (3, 2)}, r"minimum 3 and maximum 2"),
        ({"class_path": LOCAL, "adapt": (0, 0)}, r"minimum 0 and maximum 0"),
        ({"class_path": LOCAL, "adapt": (0, 2)}, r"adapt has minimum 0, and workers: min is 1"),
        ({"class_path": LOCAL, "scale": 2, "kwargs": {"n_workers": 2}}, r"scale and kwargs: n_workers both say"),
        ({"class_path": LOCAL, "adapt": (1, 2), "kwargs": {"hosts": []}}, r"adapt and kwargs: hosts both say"),
        ({"class_path": LOCAL, "scale": 2, "rules": WorkerRules(min=3)}, r"min is 3, and the cluster is asked for 2"),
        ({"workers": 2, "rules": WorkerRules(min=3)}, r"min is 3, and the cluster is asked for 2"),
        ({"class_path": LOCAL, "kwargs": {"n_workers": 2}, "rules": WorkerRules(min=3)}, r"asked for 2"),
        ({"timeout": 0}, r"client: timeout is 0: expected more than 0 seconds"),
    ],
)
def test_clusters_that_contradict_themselves(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClusterSpec(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min": 0}, r"workers: min is 0"),
        ({"min": 1.5}, r"workers: min is 1.5"),
        ({"wait": -1}, r"workers: wait is -1"),
        ({"stall": "60s"}, r"workers: stall is '60s'"),
        ({"ship_code": "always"}, r"workers: ship_code is 'always': expected one of auto, never"),
    ],
)
def test_worker_rules_that_cannot_be_meant(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WorkerRules(**options)


def test_security_that_cannot_work(tmp_path: Path) -> None:
    pem = str(tmp_path / "x.pem")
    with pytest.raises(InputError, match=r"security: ca_file .*x.pem is no file that can be read"):
        TLS(pem, pem, pem)
    (tmp_path / "x.pem").write_text("-")
    files = TLS(pem, pem, pem)
    with pytest.raises(
        InputError, match=r"the address tcp://x:1 is not encrypted: expected one that begins with tls://"
    ):
        ClusterSpec(address="tcp://x:1", security=files)
    with pytest.raises(InputError, match="exclude each other"):
        ClusterSpec(class_path=LOCAL, kwargs={"security": 1}, security=files)
    with pytest.raises(InputError, match="leave it out with --workers 0"):
        ClusterSpec(workers=0, security=files)
    ClusterSpec(address="tls://x:1", security=files)


def test_the_cluster_file_of_the_repository() -> None:
    file = ClusterFile.read(ROOT / "cluster.yaml")
    assert file.spec.class_path == LOCAL
    assert file.spec.kwargs == {"n_workers": 2, "threads_per_worker": 1}
    assert file.spec == ClusterSpec(class_path=LOCAL, kwargs=file.spec.kwargs)
    assert file.job == {}


def test_every_key_of_a_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CORES", "8"), ("ACCOUNT", "0123"), ("WALLTIME", "01:00:00"), ("N", "2")):
        monkeypatch.setenv(name, value)
    path = tmp_path / "cluster.yaml"
    path.write_text(FULL)
    file = ClusterFile.read(path)
    # Text in quotes, a number where it stands alone.
    assert file.spec.kwargs == {
        **{"queue": "ci", "cores": "8", "memory": "2GiB"},
        **{"account": "0123", "walltime": "01:00:00", "processes": 2},
    }
    assert file.spec.adapt == (2, 20)
    assert file.spec.timeout == 90
    assert file.spec.rules == WorkerRules(min=2, wait=600, stall=3600, ship_code="never")
    assert file.job == {
        **{"keep": 12, "hash": "phash", "labels": ["a", "b,c"]},
        "storage_options": {"key": "0123", "anon": True},
    }
    assert "0123" not in repr(file)
    assert ClusterSpec.from_yaml(path) == file.spec


def test_the_environment_is_never_read_as_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cluster.yaml"
    monkeypatch.setenv("ODD", "x, y: [&a")
    path.write_text("version: 1\ncluster: {address: ${ODD}}")
    assert ClusterSpec.from_yaml(path).address == "x, y: [&a"
    path.write_text("version: 1\ncluster: {address: 'a $${ODD} ${ODD}'}")
    assert ClusterSpec.from_yaml(path).address == "a ${ODD} x, y: [&a"
    monkeypatch.delenv("ODD")
    with pytest.raises(InputError, match=r"cluster: address: the environment variable 'ODD' is not set"):
        ClusterSpec.from_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version: 1\ncluster: {addres: x}", r"unknown key 'addres' \(did you mean 'address'\?\)"),
        ("version: 1\nclusters: {}", r"unknown key 'clusters' \(did you mean 'cluster'\?\)"),
        ("cluster: {address: x}", r"version is None; this Reducer reads version 1"),
        ("version: 2\ncluster: {address: x}", r"version is 2"),
        ("version: 1\ncluster: {}", r"needs a class .* or an address"),
        ("version: 1", r"cluster: expected the keys class, kwargs, address, scale, adapt; found nothing"),
        ("version: 1\ncluster: {address: x, class: y.Z}", r"an address or a class, not both"),
        ("version: 1\ncluster: {address: x, kwargs: {a: 1}}", r"kwargs need a class"),
        ("version: 1\ncluster: {class: y.Z, kwargs: 3}", r"kwargs is a int"),
        ("version: 1\ncluster: {class: y.Z, adapt: 3}", r"adapt: expected the keys minimum, maximum; found a int"),
        ("version: 1\ncluster: {class: y.Z, adapt: {minimum: 3}}", r"adapt needs a maximum"),
        ("version: 1\ncluster: {class: y.Z, adapt: {maximum: many}}", r"maximum 'many'"),
        ("version: 1\ncluster: {address: 7}", r"address is 7; expected text"),
        ("version: 1\ncluster: {address: x}\ncluster: {address: y}", r"cluster is given twice"),
        ("version: 1\ncluster: {address: x}\nclient: {time: 1}", r"unknown key 'time' \(did you mean 'timeout'\?\)"),
        ("version: 1\ncluster: {address: x}\nclient: {timeout: soon}", r"timeout is 'soon': expected a length of time"),
        ("version: 1\ncluster: {address: x}\nworkers: {wait: true}", r"wait is True: expected a length of time"),
        ("version: 1\ncluster: {address: x}\nworkers: {stall: 0s}", r"stall is 0.0: expected more than 0 seconds"),
        ("version: 1\ncluster: {address: x}\nworkers: {mins: 1}", r"unknown key 'mins' \(did you mean 'min'\?\)"),
        ("version: 1\ncluster: {address: tls://x}\nsecurity: {ca_file: a}", r"client_cert is None; expected a PEM"),
        ("version: 1\ncluster: {address: tls://x}\nsecurity: yes", r"security: expected the keys ca_file"),
        ("version: 1\ncluster: {address: x}\njob: {keeps: 1}", r"job: unknown key 'keeps' \(did you mean 'keep'\?\)"),
        ("- a\n- b", r"expected the keys version, cluster"),
        ("", r"expected the keys version, cluster"),
        ("a: [", r"is no YAML"),
        ("version: true\ncluster: {address: x}", r"version is True"),
        ("version: 1\ncluster: {class: y.Z, kwargs: []}", r"kwargs is a list"),
        ("version: 1\ncluster: {class: y.Z, kwargs: {'${A}': 1}}", r"cluster: kwargs: a key is no plain text"),
        ("version: 1\n? [a, b]\n: c", r"a key is no plain text"),
        ("version: 1\ncluster: {address: x}\nworkers: {wait: ''}", r"wait is '': expected a length of time"),
        ("version: 1\ncluster: {address: x}\nworkers: {wait: 1.0e+400}", r"wait is inf: expected a length of time"),
        ("version: 1\ncluster: {address: 2024-13-45}", r"is no YAML that can be read"),
        ("version: 1\ncluster: {address: !!int abc}", r"is no YAML that can be read"),
        ("version: 1\ncluster: {address: \x01}", r"is no YAML that can be read"),
        ("version: 1\na: " + "[" * 3000, r"is no YAML that can be read"),
    ],
)
def test_what_is_wrong_with_a_cluster_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        ClusterSpec.from_yaml(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="nowhere"):
        ClusterSpec.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "version: 1\njob: {storage_options: {secret: hunter2: x}}",
        "version: 1\njob: {storage_options: {secret: 'hunter2}}",
        "version: 1\ncluster: {class: y.Z, scale: {secret: hunter2}}",
        "version: 1\ncluster: {class: y.Z, adapt: {maximum: [hunter2]}}",
        "version: 1\ncluster: {address: [hunter2]}",
        "version: 1\ncluster: [hunter2]",
    ],
)
def test_no_message_repeats_what_may_be_a_secret(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        ClusterSpec.from_yaml(path)
    assert "hunter2" not in str(caught.value)
