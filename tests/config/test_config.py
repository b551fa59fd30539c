from __future__ import annotations

import pytest

from reducer import InputError, Job
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
