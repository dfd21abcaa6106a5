"""A file is there in full or not at all."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mae_jax.errors import ConfigError, StopError
from mae_jax.files import (
    completed,
    create_text,
    encode_picture,
    is_local,
    needs_to_write,
    read_locally,
    require_bucket,
    write_text,
    writing,
    written_locally,
)
from tests.bucket import Bucket, served


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = epath.Path(tmp_path / "made" / "a.bin")
    with completed(path) as temporary:
        temporary.write_bytes(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with completed(path) as temporary:
        temporary.write_bytes(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = epath.Path(tmp_path / "a.bin")
    path.write_bytes(b"old")

    def write() -> None:
        with completed(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def fail_in_a_folder(path):
    with completed(path, field="DST", replace=False) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise RuntimeError


def test_a_folder_that_fails_is_removed_with_what_is_in_it(tmp_path):
    with pytest.raises(RuntimeError):
        fail_in_a_folder(epath.Path(tmp_path / "deep" / "new"))
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "old").write_text("half")
    with completed(epath.Path(tmp_path / "new"), replace=False) as temporary:
        temporary.mkdir()
    assert list((tmp_path / "new").iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_what_is_there_is_refused_where_it_may_not_be_replaced(tmp_path, kind):
    path = epath.Path(tmp_path / "there")
    if kind == "file":
        path.write_text("old")
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "there").symlink_to(tmp_path / "nowhere")
    place = completed(path, field="DST", replace=False)
    with pytest.raises(ConfigError, match=r"^DST: .*there is there already; expected the name of"):
        place.__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_place_that_cannot_be_written_is_named():
    place = completed(epath.Path("/dev/null/a"))
    with pytest.raises(ConfigError, match="--out: cannot write /dev/null/a: File exists"):
        place.__enter__()


def test_a_picture_is_a_png_and_a_film_a_gif():
    film = np.zeros((5, 40, 30, 3), np.uint8)
    film[np.arange(5), :, np.arange(5) * 6] = 255  # a bar that moves
    encoded, suffix = encode_picture(film[2])
    assert suffix == ".png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), film[2])
    encoded, suffix = encode_picture(film)
    assert suffix == ".gif"
    with Image.open(io.BytesIO(encoded)) as shown:
        assert shown.n_frames == 5
        assert shown.info["loop"] == 0  # for ever
        for number in range(5):
            shown.seek(number)
            np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), film[number])


@pytest.fixture
def bucket(monkeypatch) -> Iterator[Bucket]:
    """Return a stand-in of a bucket, which libraries take for one."""
    pytest.importorskip("gcsfs", reason='buckets need gcsfs: pip install "mae_jax[gcs]"')
    with served() as bucket:
        for name, value in bucket.environment().items():
            monkeypatch.setenv(name, value)
        yield bucket


def folder(where: str, tmp_path, request) -> epath.Path:
    """Return a folder on a disk or on a bucket."""
    if where == "disk":
        return epath.Path(tmp_path)
    return epath.Path(request.getfixturevalue("bucket").path("folder"))


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_text_is_written_and_replaced_and_nothing_stays_beside_it(where, tmp_path, request):
    path = folder(where, tmp_path, request) / "a.json"
    for text in ("one", "another"):
        write_text(path, text)
        assert path.read_text() == text
        assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_an_object_is_written_once_and_not_renamed(bucket, monkeypatch):
    monkeypatch.setattr(bucket, "move", None)
    write_text(epath.Path(bucket.path("folder/a.json")), "one")
    assert bucket.objects["folder/a.json"].content == b"one"


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_of_many_that_make_a_file_one_succeeds(where, tmp_path, request):
    path = folder(where, tmp_path, request) / "lock"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: create_text(path, f"of {number}"), range(8)))
    assert made.count(True) == 1
    assert path.read_text() == f"of {made.index(True)}"
    assert not create_text(path, "of another")


def test_what_a_disk_says_is_one_line_and_a_mistake_of_ours_a_crash(tmp_path):
    path = epath.Path(tmp_path / "there")
    with pytest.raises(StopError) as stopped, writing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(stopped.value) == f"{path} cannot be written: No space left on device"
    with pytest.raises(RuntimeError, match=r"^a mistake$"), writing(path):
        raise RuntimeError("a mistake")


def test_whatever_a_storage_says_is_one_line():
    bucket = "gs://bucket/run"
    with pytest.raises(StopError) as stopped, writing(bucket):
        raise RuntimeError("503, Service Unavailable\n<html>...")
    assert str(stopped.value) == f"{bucket} cannot be written: 503, Service Unavailable"
    with pytest.raises(ConfigError) as refused, needs_to_write(bucket):
        raise RuntimeError("403, Forbidden")
    expected = f"--workdir={bucket}: expected a folder to write to, got: 403, Forbidden"
    assert str(refused.value) == expected
    with pytest.raises(ConfigError, match=r"^in use$"), needs_to_write(bucket):
        raise ConfigError("in use")


def test_what_others_write_to_a_bucket_after_a_look_into_it_is_seen(bucket):
    path = epath.Path(bucket.path("folder"))
    bucket.write("folder/lock", b"short")
    assert [p.name for p in path.iterdir()] == ["lock"]
    bucket.write("folder/lock", b"longer than before")
    bucket.write("folder/new", b"")
    assert (path / "lock").read_text() == "longer than before"
    assert (path / "new").exists()
    assert sorted(p.name for p in path.iterdir()) == ["lock", "new"]


def test_a_bucket_that_is_not_there_is_refused_in_one_line(bucket, tmp_path):
    require_bucket(tmp_path, "--workdir")
    require_bucket(bucket.path("folder/not/yet/there"), "--workdir")
    with pytest.raises(ConfigError) as caught:
        require_bucket("gs://no-such-bucket/run", "--workdir")
    message = "--workdir: expected a bucket that is there and may be read, got gs://no-such-bucket"
    assert str(caught.value) == message


def test_a_storage_whose_library_is_missing_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError) as caught:
        require_bucket("s3://runs/demo", "--workdir")
    message = "--workdir: expected a bucket that is there and may be read, got s3://runs: "
    assert str(caught.value) == message + "Install s3fs to access S3"


def test_several_may_write_the_same_file_at_once_with_names_in_a_scratch_folder(tmp_path):
    path, scratch = epath.Path(tmp_path) / "file", epath.Path(tmp_path) / "scratch"
    with completed(path, scratch=scratch) as first, completed(path, scratch=scratch) as second:
        first.write_text("the same")
        second.write_text("the same")
        assert not path.exists()
    assert path.read_text() == "the same"
    assert list(scratch.iterdir()) == []


def test_local_files_are_written_and_read_where_they_are(tmp_path):
    path = epath.Path(tmp_path) / "file"
    with written_locally(path) as local:
        assert local == str(tmp_path / "file")
        path.write_text("text")
    with read_locally(path) as local:
        assert local == str(tmp_path / "file")
    assert is_local(path)
    assert not is_local(epath.Path("gs://bucket/file"))
