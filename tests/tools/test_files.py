"""A file is there in full or not at all."""

from __future__ import annotations

import pytest
from etils import epath

from mae_jax.errors import ConfigError
from mae_jax.tools.files import completed


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


def test_a_place_that_cannot_be_written_is_named():
    place = completed(epath.Path("/dev/null/a"))
    with pytest.raises(ConfigError, match="--out: cannot write /dev/null/a: File exists"):
        place.__enter__()
