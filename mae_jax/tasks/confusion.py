"""A confusion matrix as a picture: true classes down, predicted ones across."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mae_jax.tasks.pictures import FONT_SIZE, GAP

MOST_WRITTEN = 30
LARGEST_MAP = 1000
WHITE, DARK = np.array((255.0, 255.0, 255.0)), np.array((8.0, 48.0, 107.0))
LINE_GREY = (200, 200, 200)
LONGEST_NAME = 140
MIN_CELL = 28
CAPTIONS = ("true", "predicted")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def class_name(number: int, classes: Sequence[str] = ()) -> str:
    """Return what a class is called: its name if there is one, else its number."""
    return classes[number] if number < len(classes) else str(number)


def picture(confusion: np.ndarray, classes: Sequence[str] = ()) -> np.ndarray:
    """Draw a confusion matrix; a cell is white for no example of its row and dark for all.

    Up to `MOST_WRITTEN` classes have their names at the edges and their counts in the cells. More
    are a map without text, of `LARGEST_MAP` pixels or less; of more than `LARGEST_MAP` classes
    neighbours are counted together. A map is darkened as the square root of the share: one example
    of fifty would not be seen otherwise.

    Args:
      confusion: int [K, K], examples by true class (row) and predicted class (column).
      classes: names in the order of the labels; numbers stand for those that are missing.

    Returns:
      uint8 [height, width, 3].
    """
    font = ImageFont.load_default(FONT_SIZE)
    count = len(confusion)
    if count <= MOST_WRITTEN:
        names = [_label(class_name(k, classes), font) for k in range(count)]
        digits = font.getlength(str(confusion.max(initial=0)))
        side = max(MIN_CELL, int(digits) + 2 * GAP)
        cells = _with_counts(confusion, side, font)
    else:
        confusion = _neighbours_together(confusion, -(-count // LARGEST_MAP))
        names, side = [], max(1, LARGEST_MAP // len(confusion))
        cells = Image.fromarray(_enlarge(_colours(np.sqrt(_shares(confusion))), side))
    return _with_edges(cells, names, side, font)


def _neighbours_together(confusion: np.ndarray, size: int) -> np.ndarray:
    """Add up blocks of `size` x `size` classes; the last ones may be smaller."""
    starts = np.arange(0, len(confusion), size)
    return np.add.reduceat(np.add.reduceat(confusion, starts, axis=0), starts, axis=1)


def _shares(confusion: np.ndarray) -> np.ndarray:
    """Return each row divided by its sum, float64 [K, K]; zeros where there is no example."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


def _colours(darkness: np.ndarray) -> np.ndarray:
    """Return colours uint8 [K, K, 3] of numbers from 0 (white) to 1."""
    return np.rint(WHITE + darkness[..., None] * (DARK - WHITE)).astype(np.uint8)


def _enlarge(colours: np.ndarray, side: int) -> np.ndarray:
    """Return colours uint8 [K, K, 3] with `side` x `side` pixels for each."""
    return colours.repeat(side, axis=0).repeat(side, axis=1)


def _with_counts(confusion: np.ndarray, side: int, font: Font) -> Image.Image:
    """Draw the cells with lines between them and the counts that are not zero."""
    shares = _shares(confusion)
    colours = _enlarge(_colours(shares), side)
    colours[::side] = LINE_GREY
    colours[:, ::side] = LINE_GREY
    image = Image.fromarray(colours)
    draw = ImageDraw.Draw(image)
    for row, column in np.argwhere(confusion):
        draw.text(
            ((column + 0.5) * side, (row + 0.5) * side),
            str(confusion[row, column]),
            fill="white" if shares[row, column] > 0.5 else "black",
            font=font,
            anchor="mm",
        )
    return image


def _label(text: str, font: Font) -> Image.Image:
    """Write one line, cut off where it is too long, on an image of its size."""
    if font.getlength(text) > LONGEST_NAME:
        while font.getlength(f"{text}…") > LONGEST_NAME:
            text = text[:-1]
        text = f"{text}…"
    image = Image.new("RGB", (max(1, round(font.getlength(text))), FONT_SIZE + 3), "white")
    ImageDraw.Draw(image).text((0, 0), text, fill="black", font=font)
    return image


def _with_edges(
    cells: Image.Image, names: Sequence[Image.Image], side: int, font: Font
) -> np.ndarray:
    """Put the captions, and the names of the classes, to the left of the cells and above them."""
    upright = all(name.width < side for name in names)
    across = [n if upright else n.rotate(90, expand=True) for n in names]
    true, predicted = (_label(caption, font) for caption in CAPTIONS)
    true = true.rotate(90, expand=True)
    left = true.width + GAP + max((n.width + GAP for n in names), default=0)
    top = predicted.height + GAP + max((n.height + GAP for n in across), default=0)
    # A caption may be longer than a map of few classes.
    width, height = max(cells.width, predicted.width), max(cells.height, true.height)
    canvas = Image.new("RGB", (left + width + GAP, top + height + GAP), "white")
    frame = (left - 1, top - 1, left + cells.width, top + cells.height)
    ImageDraw.Draw(canvas).rectangle(frame, outline=LINE_GREY)
    canvas.paste(cells, (left, top))
    canvas.paste(true, (0, top + (height - true.height) // 2))
    canvas.paste(predicted, (left + (width - predicted.width) // 2, 0))
    for number, (down, along) in enumerate(zip(names, across, strict=True)):
        middle = number * side + side // 2
        canvas.paste(down, (left - GAP - down.width, top + middle - down.height // 2))
        canvas.paste(along, (left + middle - along.width // 2, top - GAP - along.height))
    return np.asarray(canvas)
