"""Whoever writes array_record says in one line that a disk is full."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from mae_jax.errors import ConfigError
from mae_jax.tools import array_records, features, shards
from tests.helpers import write_photographs


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_whole_at_the_end(tmp_path):
    path = str(tmp_path / "one.array_record")
    with array_records.writing(path, "group_size:1") as writer:
        writer.write(b"first")
        writer.write(b"second")
    reader = ArrayRecordReader(path)
    assert reader.read_all() == [b"first", b"second"]
    reader.close()


@pytest.mark.parametrize("kind", ["npz", "array_record"])
def test_features_do_not_fit_on_a_full_disk(tmp_path, kind):
    noise = np.random.default_rng(0).random((4, 1000))
    files = features.Shards(epath.Path(tmp_path), 4, 4, kind)
    with full_disk(), pytest.raises(ConfigError, match=r"^--out: cannot write .*/features-00000"):
        files.write(0, {"features": noise})
    assert list(tmp_path.iterdir()) == []


def test_images_do_not_fit_on_a_full_disk(tmp_path):
    write_photographs(tmp_path / "images", 4)
    plan = shards.plan(str(tmp_path / "images"), shards=1).shards[0]
    with full_disk(), pytest.raises(ConfigError, match=r"^OUT: cannot write .*/train-00000"):
        shards.write_shard(plan, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
