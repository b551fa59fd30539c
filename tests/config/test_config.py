from __future__ import annotations

import builtins
import os
from dataclasses import fields, replace
from typing import NoReturn

import pytest

from reducer import InputError, Job
from reducer.config.resolved import ResolvedJob, resolve
from reducer.storage.location import template_fields


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"--keep is 0: expected a whole number of 1 or more"),
        ({"keep": 2.5}, r"--keep is 2.5"),
        ({"candidates": 24}, r"--candidates 24 is less than --keep 25"),
        ({"strategy": "farthest"}, r"--strategy 'farthest' \(did you mean 'farthest-first'\?\)"),
        ({"decode": "slow"}, r"expected one of fast, fastest, exact"),
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
    ("before", "change"),
    [
        ({}, {"total": 300}),
        ({"total": 300}, {"total": None}),
        ({}, {"max_bytes": "20GB"}),
        ({"max_bytes": "20GB"}, {"max_bytes": None}),
        ({"max_bytes": "20GB"}, {"max_bytes": None, "total": 9}),
        ({}, {"min_distance": 4}),
        ({"min_distance": 4}, {"min_distance": None}),
        ({"rank_all": True, "total": 9}, {"total": None}),
        ({"keep": 7, "total": 9}, {"total": None}),
        ({"keep": 7}, {"keep": None}),
        ({}, {"vectors": "v.parquet"}),
        ({"vectors": "v.parquet"}, {"vectors": None}),
        ({"vectors": "v.parquet", "strategy": "random"}, {"vectors": None}),
        ({"vectors": "v.parquet", "near_copy": 3}, {"vectors": None, "embed": "m.onnx"}),
        ({}, {"embed": "m.onnx", "embed_size": 32}),
        ({"embed": "m.onnx"}, {"embed": None}),
        ({"avoid": "old", "avoid_distance": 3}, {"avoid_distance": None}),
        ({"avoid": "old"}, {"hash_size": 16}),
        ({"drop_flat": True}, {"drop_flat": False}),
        ({"manifest": "m.csv"}, {"manifest": None}),
        ({"manifest": "m.csv", "path_template": "{id}"}, {"path_template": None}),
    ],
)
def test_a_replaced_job_is_the_job_that_would_have_been_asked_for(
    before: dict[str, object], change: dict[str, object]
) -> None:
    replaced, fresh = replace(Job("photos", "run", **before), **change), Job("photos", "run", **before | change)
    assert replaced == fresh
    assert resolve(replaced) == resolve(fresh)


def test_a_job_holds_what_was_asked() -> None:
    job = Job("photos", "run", max_bytes="20GB", vectors="v.parquet")
    assert (job.keep, job.strategy, job.rank_all, job.max_bytes) == (None, None, False, "20GB")


@pytest.mark.parametrize(
    ("options", "in_force"),
    [
        ({}, {"keep": 25, "strategy": "farthest-first", "rank_all": False, "max_bytes": None}),
        ({"total": 300}, {"keep": None, "rank_all": True}),
        ({"max_bytes": "20GB", "keep": 3}, {"keep": 3, "rank_all": True, "max_bytes": 20 * 10**9}),
        ({"min_distance": 4}, {"keep": 25, "rank_all": True}),
        ({"vectors": "v.parquet"}, {"strategy": "facility-location"}),
        ({"embed": "m.onnx", "strategy": "random"}, {"strategy": "random"}),
    ],
)
def test_a_resolved_job_holds_what_is_in_force(options: dict[str, object], in_force: dict[str, object]) -> None:
    job = resolve(Job("photos", "run", **options))
    assert {name: getattr(job, name) for name in in_force} == in_force
    assert resolve(job) == job
    # A run folder stores these values; the job that is made of them is the same.
    assert resolve(Job(**job.as_asked())) == job
    assert list(job.as_asked()) == [field.name for field in fields(Job)]


def test_a_job_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> NoReturn:
        raise AssertionError(f"opened or asked for: {args}")

    job = Job("/nowhere/photos", "/nowhere/run", embed="/nowhere/m.onnx", avoid="/nowhere/old", reuse="/nowhere/older")
    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(os, "stat", refuse)
    resolved = resolve(replace(job, total=3))
    for name in dir(job):
        if not name.startswith("_"):
            getattr(job, name)
    for name in set(dir(ResolvedJob)) - {"photo_settings"}:
        if not name.startswith("_"):
            getattr(resolved, name)
    assert resolved.settings_without_model.near_copy == 6
    with pytest.raises(RuntimeError, match="the model is not read yet"):
        _ = resolved.photo_settings


def test_a_model_that_cannot_be_read_is_told_when_it_is_read() -> None:
    job = resolve(Job("photos", "run", embed="/nowhere/m.onnx"))
    with pytest.raises(InputError, match=r"--embed /nowhere/m\.onnx cannot be read: No such file"):
        job.with_model()
