"""Texts without an image, one a line of a file."""

import pickle

import pytest

from mae_jax.data.lines import open_lines
from mae_jax.errors import ConfigError


def test_lines_are_read_one_by_one_without_those_that_are_blank(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("one owl\r\n\n  \nzwei Käuze\nlast".encode())
    lines = pickle.loads(pickle.dumps(open_lines(str(path), "data.unpaired_text")))
    assert [lines[i] for i in range(len(lines))] == ["one owl", "zwei Käuze", "last"]


def test_bytes_that_are_no_text_stand_out(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"an \xff owl\n")
    assert open_lines(str(path), "x")[0] == "an � owl"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "got No such file"), (b" \n\n", "on each line, got none in")]
)
def test_a_file_without_texts_is_refused(tmp_path, content, message):
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^data.unpaired_text: expected a file .*{message}"):
        open_lines(str(path), "data.unpaired_text")
