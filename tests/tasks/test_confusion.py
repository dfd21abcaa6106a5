"""The picture of a confusion matrix: where its cells are, their colours, and what is written."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from mae_jax.tasks import confusion
from mae_jax.tasks.confusion import DARK, LONGEST_NAME, MIN_CELL, class_name, picture
from mae_jax.tasks.pictures import FONT_SIZE, GAP

DARKEST = DARK.astype(int).tolist()


def cells(image: np.ndarray, count: int, side: int) -> np.ndarray:
    """Return the cells, uint8 [count, count, side, side, 3], from the lower right corner."""
    size = count * side
    inner = image[-size - GAP : -GAP, -size - GAP : -GAP]
    return inner.reshape(count, side, count, side, 3).transpose(0, 2, 1, 3, 4)


def test_rows_are_true_classes_and_each_is_divided_by_its_own_number():
    # Two classes with 4 and 40 examples: of each, half are taken for the other or for what it is.
    matrix = np.array([[0, 4, 0], [20, 20, 0], [0, 0, 0]])
    drawn = cells(picture(matrix), 3, MIN_CELL)
    colours = drawn[:, :, 2, 2].astype(int)  # beside the line, where nothing is written
    half = np.rint((255 + DARK) / 2).astype(int).tolist()
    white = [255, 255, 255]
    assert colours.tolist() == [
        [white, DARKEST, white],
        [half, half, white],
        [white, white, white],
    ]


def test_counts_are_written_where_there_are_any():
    matrix = np.array([[7, 0, 3], [0, 5, 0], [1, 0, 9]])
    inner = cells(picture(matrix), 3, MIN_CELL)[:, :, 2:-2, 2:-2]
    background = inner[:, :, :1, :1]
    assert ((inner != background).any(axis=(2, 3, 4)) == (matrix > 0)).all()


def test_cells_hold_the_largest_count():
    matrix = np.diag([1_234_567, 3])
    font = ImageFont.load_default(FONT_SIZE)
    side = int(font.getlength("1234567")) + 2 * GAP
    assert side > MIN_CELL
    drawn = cells(picture(matrix), 2, side)
    assert drawn[0, 0, 2, 2].tolist() == drawn[0, 0, -2, -2].tolist() == DARKEST
    # Nothing is written over the edge of its cell.
    assert (drawn[0, 1, :, 1:] == 255).sum() > 0.9 * side * side * 3


@pytest.mark.parametrize("count", [2, 10, 30])
def test_few_classes_have_room_for_their_names_at_both_edges(count):
    image = picture(np.eye(count, dtype=np.int64))
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    size = count * MIN_CELL
    upper = image[: -size - GAP, -size - GAP : -GAP]
    left = image[-size - GAP : -GAP, : -size - GAP]
    beside = upper[-GAP - FONT_SIZE - 3 : -GAP].reshape(-1, count, MIN_CELL, 3)
    assert (beside < 100).any(axis=(0, 2, 3)).all(), "a name over each column"
    names = left[:, -GAP - 16 : -GAP].reshape(count, MIN_CELL, -1, 3)
    assert (names < 100).any(axis=(1, 2, 3)).all(), "a name beside each row"


def test_a_single_class_has_room_for_the_captions():
    image = picture(np.array([[5]]))
    assert min(image.shape[:2]) > MIN_CELL + 2 * GAP
    assert (image.reshape(-1, 3) == DARKEST).all(axis=1).sum() > MIN_CELL**2 / 2


def test_long_names_are_turned_and_cut_and_keep_their_beginning():
    names = ["a", "b" * 200]
    image = picture(np.eye(2, dtype=np.int64), names)
    size = 2 * MIN_CELL
    captions = FONT_SIZE + 3 + GAP
    assert LONGEST_NAME - 20 < image.shape[0] - size - captions - 2 * GAP <= LONGEST_NAME
    assert image.shape[0] == image.shape[1]
    # The long name reads upwards over the second column: dark pixels over its whole height.
    column = image[captions : -size - GAP, -MIN_CELL - GAP : -GAP]
    assert (column < 128).any(axis=(1, 2)).mean() > 0.6
    # Turned to read from below: what stands beside the rows is the same, turned back.
    row = image[-MIN_CELL - GAP : -GAP, captions : -size - GAP]
    assert ((row < 128).sum(axis=(1, 2)).sum()) == (column < 128).sum()


def test_captions_stand_above_and_at_the_left():
    image = picture(np.zeros((40, 40), np.int64))
    upper, left = image[: FONT_SIZE + 3], image[:, : FONT_SIZE + 3]
    assert (upper < 100).any()
    assert (left < 100).any()
    across = np.flatnonzero((upper < 100).any(axis=(0, 2)))
    down = np.flatnonzero((left < 100).any(axis=(1, 2)))
    assert across.mean() == pytest.approx(image.shape[1] / 2, abs=20)
    assert down.mean() == pytest.approx(image.shape[0] / 2, abs=20)


@pytest.mark.parametrize(("count", "side"), [(31, 32), (200, 5), (999, 1), (1000, 1)])
def test_many_classes_are_a_map_without_text(count, side):
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 3, (count, count)) * rng.integers(0, 2, (count, count))
    matrix += np.diag(np.full(count, 5 * count))
    image = picture(matrix, ["name"] * count)
    edge = FONT_SIZE + 3 + GAP
    assert image.shape == (edge + count * side + GAP, edge + count * side + GAP, 3)
    drawn = cells(image, count, side)
    assert (drawn == drawn[:, :, :1, :1]).all()
    darkness = 1 - (drawn[:, :, 0, 0, 0] - DARK[0]) / (255 - DARK[0])
    shares = matrix / matrix.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(darkness**2, shares, atol=0.006)


def test_of_very_many_classes_neighbours_are_counted_together():
    count = 2 * 1000 + 1  # blocks of three
    matrix = np.zeros((count, count), np.int64)
    matrix[3, 5] = 1  # in the second block of rows and columns
    matrix[2000, 0] = 1  # in the last and first
    image = picture(matrix)
    assert image.shape[0] == FONT_SIZE + 3 + GAP + 667 + GAP
    drawn = cells(image, 667, 1)[:, :, 0, 0]
    dark = np.argwhere((drawn == DARKEST).all(axis=2)).tolist()
    assert dark == [[1, 1], [666, 0]]


def test_neighbours_are_added_up():
    matrix = np.arange(25).reshape(5, 5)
    together = confusion._neighbours_together(matrix, 2)
    assert together.tolist() == [[12, 20, 13], [52, 60, 33], [41, 45, 24]]


def test_classes_without_a_name_are_numbers():
    assert [class_name(k, ("cat", "dog")) for k in range(3)] == ["cat", "dog", "2"]
