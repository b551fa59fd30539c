"""URLs with secrets in them are refused before anything is written or shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import invoke

from reducer import ClusterSpec, InputError, Job, cut, export, open_run, resume, status
from reducer.storage.location import SECRET_URL

SECRET = "planted5ecret"
WITH_SECRET = [
    f"s3://key:{SECRET}@bucket/photos",
    f"https://{SECRET}@host/photos/1.jpg",
    f"https://bucket.s3.amazonaws.com/1.jpg?X-Amz-Algorithm=A&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/1.jpg?sv=2020&sig={SECRET}",
    f"https://host/1.jpg?token={SECRET}",
    f"https://bucket.s3.amazonaws.com/1.jpg?AWSAccessKeyId=A&Expires=1&Signature={SECRET}",
]
WITHOUT = [
    *("s3://bucket/a@b.jpg", "https://host/a.jpg?size=big", "photos/key:secret@place/1.jpg", "s3://bucket/sig=1/a.jpg"),
    *("tcp://10.0.0.1:8786", "https://host/signature.jpg?v=2", "photos/a?sig=b.jpg"),
]


def test_what_is_a_secret() -> None:
    assert [url for url in WITH_SECRET if not re.match(SECRET_URL, url)] == []
    assert [url for url in WITHOUT if re.match(SECRET_URL, url)] == []


@pytest.mark.parametrize("url", WITH_SECRET)
def test_options_with_a_secret_are_refused_by_name(url: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for what, option, use in [
        ("IMAGES", "--storage-option", lambda: Job(url, run)),
        ("--manifest", "--manifest-storage-option", lambda: Job("photos", run, manifest=url)),
        ("--output", "--output-storage-option", lambda: Job("photos", url)),
        ("--reuse", "--output-storage-option", lambda: Job("photos", run, reuse=url)),
        ("--vectors", "--storage-option", lambda: Job("photos", run, vectors=url)),
        ("--md5", "--storage-option", lambda: Job("photos", run, md5=url)),
        ("--address", "security", lambda: ClusterSpec(address=url)),
        ("--list", "--output-storage-option", lambda: export(run, "target", list_file=url)),
        ("the folder", "storage options", lambda: resume(url)),
        ("the folder", "storage options", lambda: status(url)),
        ("the folder", "storage options", lambda: open_run(url)),
        ("the folder", "storage options", lambda: cut(url)),
    ]:
        with pytest.raises(InputError) as caught:
            use()
        message = str(caught.value)
        assert message.startswith(f"{what} is a URL with a secret")
        assert option in message
        assert SECRET not in message
    for arguments in (
        ["run", url, "--output", run],
        ["status", url],
        ["run", "photos", "--output", run, "--address", url],
    ):
        code, out, err = invoke(*arguments)
        assert code == 2
        assert SECRET not in out + err


def test_paths_of_a_manifest_with_a_secret_are_refused_by_row(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    rows = [*(f"{number},x,{number}.jpg" for number in range(3)), f"9,x,{WITH_SECRET[2]}", f"10,x,{WITH_SECRET[0]}"]
    (tmp_path / "list.csv").write_text("id,landmark_id,file\n" + "\n".join(rows) + "\n")
    arguments = ["run", tmp_path / "photos", "--manifest", tmp_path / "list.csv", "--path-column", "file"]
    code, out, err = invoke(*arguments, "--output", tmp_path / "run", "--workers", 0)
    assert code == 2
    assert "the path of 2 photos, first in row 4, is a URL with a secret" in err
    assert "--storage-option KEY=VALUE" in err
    assert SECRET not in out + err
    assert not (tmp_path / "run").exists()
