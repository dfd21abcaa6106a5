"""Canvases with two digits: the captions are true, and the splits share nothing."""

import pickle
import re

import numpy as np
import pytest

from mae_jax.data.sources import digits, open_source
from mae_jax.data.sources.captioned_digits import GROUNDS, SIZES, WORDS
from mae_jax.errors import ConfigError

MEMBERS = 2  # of each class in the fake digits
SPLIT_SHADES = {"train": 0, "val": 8}


def shade(split, number, member):
    return 60 + 19 * number + 4 * member + SPLIT_SHADES[split]


def fake(split, **_):
    """Return digits that are squares of one shade, which says class, member and split."""
    classes = np.repeat(np.arange(10), MEMBERS)
    shades = [shade(split, k, i % MEMBERS) for i, k in enumerate(classes)]
    images = (
        np.ones((len(classes), 28, 28, 1), np.uint8)
        * np.array(shades, np.uint8)[:, None, None, None]
    )
    return digits.Digits(split, images, classes.astype(np.int32))


@pytest.fixture(scope="module")
def sources():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "make", fake)
        return {split: open_source("captioned_digits", split) for split in ("train", "val")}


FORMS = (
    r"a (?P<s>\w+) (?P<a>\w+) left of a (?P<t>\w+) (?P<b>\w+) on (?P<g>\w+)",
    r"a (?P<t>\w+) (?P<b>\w+) right of a (?P<s>\w+) (?P<a>\w+) on (?P<g>\w+)",
    r"a (?P<s>\w+) (?P<a>\w+) above a (?P<t>\w+) (?P<b>\w+) on (?P<g>\w+)",
    r"a (?P<t>\w+) (?P<b>\w+) below a (?P<s>\w+) (?P<a>\w+) on (?P<g>\w+)",
)


def said(caption):
    """Return what a caption says: ((word, size), (word, size)), beside, ground; and its form."""
    for number, form in enumerate(FORMS):
        if match := re.fullmatch(form, caption):
            found = match.groupdict()
            digits_said = (found["a"], found["s"]), (found["b"], found["t"])
            return (digits_said, number < 2, found["g"]), number
    raise AssertionError(caption)


def seen(image, split):
    """Return the same of the pixels of a canvas of fake digits."""
    ground = int(image[0, 0, 0])
    strokes = image[..., 0].astype(int) - ground
    beside = not strokes[:16].any()
    halves = np.split(strokes, 2, axis=1 if beside else 0)
    found = []
    for half in halves:
        inside = half[half != 0]
        number, rest = divmod(round(inside.mean() * 255 / (255 - ground)) - 60 + 1, 19)
        assert (rest >= 7) == (split == "val")  # of the split's own digits
        size = {side**2: name for name, side in SIZES.items()}[inside.size]
        found.append((WORDS[number], size))
    return tuple(found), beside, {v: k for k, v in GROUNDS.items()}[ground]


@pytest.mark.parametrize("split", ["train", "val"])
def test_captions_say_what_is_there(sources, split):
    source, forms, contents = sources[split], set(), set()
    for index in range(400):
        example = source[index]
        assert example["image"].shape == (64, 64, 1)
        assert example["image"].dtype == np.uint8
        what, form = said(example["caption"])
        assert what == seen(example["image"], split), example["caption"]
        assert example["label"] == WORDS.index(what[0][0][0]) == source.labels[index]
        forms.add(form)
        contents.add((what[0][0][1], what[0][1][1], what[2]))
    assert forms == set(range(4))
    assert len(contents) == 8


def test_no_pair_of_classes_is_in_both_splits(sources):
    train, val = (
        {source.canvas(index).classes for index in range(len(source))}
        for source in sources.values()
    )
    assert len(train) == 80
    assert len(val) == 20
    assert not train & val


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_class_is_as_frequent_on_each_place(sources, split):
    source = sources[split]
    pairs = np.array([source.canvas(index).classes for index in range(1000)])
    for place in (0, 1):
        assert np.bincount(pairs[:, place], minlength=10).min() > 60
    assert len(source) == {"train": 20_000, "val": 1_000}[split]


def test_captions_are_those_of_the_examples_and_fit_10_words(sources):
    source = sources["val"]
    captions = list(source.captions())
    assert len(captions) == len(source)
    assert captions[:5] == [source[index]["caption"] for index in range(5)]
    assert max(len(caption.split()) for caption in captions) == 10


def test_canvases_are_pinned(sources):
    assert {name: source.fingerprint() for name, source in sources.items()} == {
        "train": "f592208c20c64083",
        "val": "7b831fb05494067b",
    }
    assert sources["train"].canvas(0).caption == "a small one right of a large one on grey"


def test_workers_can_read_it(sources):
    source = sources["val"]
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[3]["image"], source[3]["image"])
    assert again.describe(3) == "canvas 3 of split val"


def test_fields_that_ask_for_other_data_are_refused():
    with pytest.raises(ConfigError, match=r"data.path: expected '' with .*captioned_digits"):
        open_source("captioned_digits", "train", path="/data")
    with pytest.raises(ConfigError, match=r"data.held_out: expected 0.2 .* got 0.5"):
        open_source("captioned_digits", "train", held_out=0.5)
