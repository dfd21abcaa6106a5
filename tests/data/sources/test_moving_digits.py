"""Motions are what their class says, and one frame does not tell which."""

import pickle

import numpy as np
import pytest

from mae_jax.data.sources import class_names, labels_of, moving_digits, open_source
from mae_jax.data.sources.digits import Digits
from mae_jax.errors import ConfigError

SIDE = moving_digits.SIDE


@pytest.fixture(autouse=True, scope="module")
def blobs():
    """Replace the digits, which take seconds to load, by as many blobs beside the middle."""
    image = np.zeros((28, 28, 1), np.uint8)
    image[8:12, 12:16] = 255  # above the middle: its place says the angle

    def make(split):
        count = {"train": 4000, "val": 1000}[split]
        return Digits(split, np.broadcast_to(image, (count, 28, 28, 1)), np.zeros(count, np.int32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_digits.digits, "make", make)
        yield


@pytest.fixture(scope="module")
def source(blobs):
    return moving_digits.make("val")


def angles(positions):
    """Return the angle of positions on the circle of the field's side, radians."""
    return 2 * np.pi * np.asarray(positions) / SIDE


def centre(frame):
    """Return (down, right) of what is bright in a frame [SIDE, SIDE], whose edges meet."""
    weight = frame / frame.sum()
    turned = np.exp(1j * angles(np.arange(SIDE)))
    mean = np.array([weight.sum(1) @ turned, weight.sum(0) @ turned])
    return np.angle(mean) * SIDE / (2 * np.pi) % SIDE


def test_classes_are_equally_frequent_and_mixed(source):
    assert len(source) == 1000
    assert source.num_classes == len(class_names(source)) == 10
    labels = labels_of(source)
    np.testing.assert_array_equal(np.bincount(labels), [100] * 10)
    for step in (1, 10, 100):  # what evaluations take
        assert len(np.unique(labels[::step][:60])) >= 5


def test_an_example_is_a_grey_film_and_its_motion(source):
    example = source[3]
    assert example["video"].shape == (16, 64, 64, 1)
    assert example["video"].dtype == np.uint8
    assert example["label"] == source.labels[3]
    name = source.classes[source.labels[3]]
    assert source.describe(3) == f"digit 3 of split val, moving {name}"
    np.testing.assert_array_equal(example["video"], source[3]["video"])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[3]["video"], example["video"])


@pytest.mark.parametrize("name", moving_digits.DIRECTIONS)
def test_what_goes_somewhere_goes_there(source, name):
    towards = np.array(moving_digits.DIRECTIONS[name])
    for index in np.flatnonzero(source.labels == source.classes.index(name))[:5]:
        video = source[index]["video"][..., 0].astype(float)
        places = np.array([centre(frame) for frame in video])
        steps = (np.diff(places, axis=0) + SIDE / 2) % SIDE - SIDE / 2  # the short way round
        speed = steps.mean(0)
        assert 1.4 < np.linalg.norm(speed) < 3.1
        np.testing.assert_allclose(
            speed / np.linalg.norm(speed), towards / np.linalg.norm(towards), atol=0.1
        )


@pytest.mark.parametrize(("name", "sign"), moving_digits.TURNS.items())
def test_what_turns_turns_in_its_sense_about_a_point(source, name, sign):
    for index in np.flatnonzero(source.labels == source.classes.index(name))[:5]:
        motion = source.motion(index)
        middle = np.array(motion.begin[:2]).round() + 13.5
        video = source[index]["video"][..., 0].astype(float)
        arms = np.array([(centre(frame) - middle + SIDE / 2) % SIDE - SIDE / 2 for frame in video])
        np.testing.assert_allclose(np.linalg.norm(arms, axis=1), 4, atol=0.6)
        angle = np.unwrap(np.arctan2(-arms[:, 0], arms[:, 1]))  # down is negative
        turns = np.degrees(np.diff(angle)) * sign
        assert 9 < turns.mean() < 21
        assert (turns > 0).all()


def test_place_and_angle_in_a_frame_are_uniform_whatever_the_class(blobs):
    source = moving_digits.make("train")
    motions = [source.motion(index) for index in range(len(source))]
    for t in (0, 15):
        state = np.array([np.add(m.begin, np.multiply(t, m.change)) for m in motions])
        state %= (SIDE, SIDE, 360)
        for label in range(10):
            for values, period in zip(
                state[source.labels == label].T, (SIDE, SIDE, 360), strict=True
            ):
                counts, _ = np.histogram(values, 8, (0, period))
                chi_square = ((counts - 50.0) ** 2 / 50).sum()
                assert chi_square < 30  # 7 degrees of freedom: p = 1e-4


def test_films_are_as_long_as_a_clip_needs():
    assert len(moving_digits.make("val", frames=8, stride=3)[0]["video"]) == 22
    whole, part = moving_digits.make("val", frames=22), moving_digits.make("val", frames=8)
    np.testing.assert_array_equal(whole[5]["video"][:8], part[5]["video"])
    assert whole.fingerprint() != part.fingerprint()


def test_other_data_are_refused():
    for fields, message in (
        ({"path": "x"}, "data.path: expected '' with data.source=moving_digits"),
        ({"held_out": 0.5}, "data.held_out: expected 0.2"),
        ({"frames": 0}, "data.frames, data.stride: expected at least 1, got 0, 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source("moving_digits", "train", **fields)
