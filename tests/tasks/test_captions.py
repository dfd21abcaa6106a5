"""Pictures of captions: what is hidden, what is predicted, right and wrong apart without colour."""

from __future__ import annotations

import numpy as np
import pytest

from mae_jax.tasks import captions, pictures

WIDTH = 4 * (112 + pictures.GAP) + pictures.GAP


def images(count: int) -> dict[str, np.ndarray]:
    shades = np.random.default_rng(0).integers(0, 256, (count, 56, 56, 3), dtype=np.uint8)
    return dict.fromkeys(("masked", "reconstruction", "pasted", "original"), shades)


def strip(true: str, predicted: str = "", hidden: str = "") -> np.ndarray:
    """Draw one caption; hidden: a letter h for each word that is."""
    columns = images(1)
    words = true.split()
    others = predicted.split() if predicted else words
    flags = [letter == "h" for letter in hidden.ljust(len(words))]
    whole = captions.grid(columns, [words], [others], [flags])
    above = pictures.grid(columns)
    np.testing.assert_array_equal(whole[: len(above)], above)
    return whole[len(above) :]


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


def test_words_that_are_seen_are_black_on_one_line():
    picture = strip("a small seven")
    assert picture.shape == (captions.LINE + 2 * pictures.GAP, WIDTH, 3)
    assert count(picture, (0, 0, 0)) > 20
    for colour in (captions.BOX, captions.RIGHT, captions.WRONG):
        assert count(picture, colour) < 10  # the edge of a letter may have any grey


def test_hidden_words_have_a_box_and_below_what_was_predicted():
    picture = strip("a small seven", "a large seven", " hh")
    assert picture.shape[0] == 2 * captions.LINE + 2 * pictures.GAP
    upper, lower = np.split(picture, [pictures.GAP + captions.LINE])
    assert count(upper, captions.BOX) > 500
    assert count(lower, captions.BOX) < 10
    right = np.argwhere((lower == captions.RIGHT).all(axis=-1))[:, 1]
    wrong = np.argwhere((lower == captions.WRONG).all(axis=-1))[:, 1]
    assert len(right) > 20
    assert len(wrong) > 20
    assert wrong.max() < right.min()  # the second word, then the third
    assert not count(upper, captions.RIGHT)


def test_each_hidden_word_has_a_box_of_its_own():
    row = pictures.GAP + 1  # above the letters
    boxes = (strip("one two three four", hidden="hh h")[row] == captions.BOX).all(axis=-1)
    begins = np.flatnonzero(np.diff(boxes.astype(int)) == 1)
    assert len(begins) == 3
    assert boxes.sum() > 3 * 20


def test_right_and_wrong_differ_in_print_without_colour():
    # One and the same prediction; the sign before it, as ink or none.
    right, wrong = (
        strip(true, "seven", "h")[pictures.GAP + captions.LINE :] for true in ("seven", "three")
    )
    sign = slice(None, pictures.GAP + captions.MARK + 1)
    ink = [(half < 128).any(axis=-1)[:, sign] for half in (right, wrong)]
    assert all(mark.sum() > 8 for mark in ink)
    assert (ink[0] != ink[1]).sum() > 8


def test_pieces_that_go_on_a_word_follow_without_a_gap_or_the_sign():
    apart, joined = strip("play s"), strip("play ##s")
    ends = [np.argwhere((one < 128).any(axis=-1))[:, 1].max() for one in (apart, joined)]
    assert ends[0] - ends[1] == captions.SPACE


def test_a_long_caption_is_broken_and_nothing_is_cut():
    picture = strip(" ".join(["seventeen"] * 20), "x " * 19 + "x", "h" * 20)
    lines = (picture.shape[0] - 2 * pictures.GAP) / (2 * captions.LINE)
    assert lines > 2
    assert lines == int(lines)
    assert (picture[:, -1] == 255).all()
    assert (picture[-1] == 255).all()


def test_an_image_without_a_caption_has_an_empty_strip():
    picture = strip("")
    assert (picture == 255).all()
    assert picture.shape == (2 * pictures.GAP, WIDTH, 3)


def test_each_row_has_its_own_caption_and_headings_stand_once():
    columns = images(3)
    true = [["one"], ["two", "three"], []]
    hidden = np.array([[True, False, False], [False, False, True], [True, True, True]])
    picture = captions.grid(columns, true, true, hidden)  # flags go on where captions end
    one = captions.grid({k: v[:1] for k, v in columns.items()}, true[:1], true[:1], hidden[:1])
    np.testing.assert_array_equal(picture[: len(one)], one)
    headings = pictures.grid(columns).shape[0] - pictures.grid(columns, captions=False).shape[0]
    plain = [pictures.grid({k: v[:1] for k, v in columns.items()}, captions=False).shape[0]] * 3
    strips = [2 * captions.LINE, captions.LINE, 0]
    assert len(picture) == headings + sum(plain) + sum(strips) + 3 * 2 * pictures.GAP


def test_as_many_predictions_as_pieces_are_expected():
    with pytest.raises(ValueError, match="zip"):
        captions.grid(images(1), [["one", "two"]], [["one"]], [[True, True]])
