"""What of a configuration's `data` a source gets."""

import pytest
from ml_collections import ConfigDict

from mae_jax.data.sources import open_split, other_data, source_fields
from mae_jax.errors import ConfigError


def data(source, **fields):
    """Return `data` of a configuration: of a reader, too."""
    return ConfigDict(
        {
            "source": source,
            "path": "",
            "split": "train",
            "eval_split": "val",
            "held_out": 0.2,
            "image_size": (8, 8),
            **fields,
        }
    )


def test_a_source_gets_those_that_it_names():
    assert source_fields(data("digits")) == {"path": "", "held_out": 0.2}
    clips = data("moving_digits", frames=4, stride=2)
    assert source_fields(clips) == {"path": "", "held_out": 0.2, "frames": 4, "stride": 2}
    assert open_split(clips, "val").span == 7
    assert source_fields(data("digits", held_out=None)) == {"path": ""}
    with pytest.raises(ConfigError, match=r"^data\.source"):
        source_fields(data("digit"))


def test_other_examples_of_the_same_source_keep_the_rest():
    clips = data("moving_digits", frames=4, stride=2)
    assert other_data(clips, {"source": None, "eval_split": "train"}) == ConfigDict(
        clips.to_dict() | {"eval_split": "train"}
    )
    assert other_data(clips, {"source": "moving_digits"}) == clips
    assert clips.eval_split == "val"


def test_another_source_keeps_how_examples_are_read():
    films = other_data(data("moving_digits", frames=4, path="x"), {"source": "clips", "path": "y"})
    assert (films.path, films.eval_split, films.held_out) == ("y", "validation", None)
    assert (films.frames, films.image_size) == (4, (8, 8))
    assert other_data(data("digits"), {"source": "clips", "held_out": 0.5}).held_out == 0.5
