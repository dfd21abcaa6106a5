"""Pictures of images with what has been predicted of their captions, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mae_jax.tasks import pictures

CONTINUES = "##"  # what a word piece begins with that goes on a word
FONT_SIZE = 13
LINE = FONT_SIZE + 5  # pixels from one line of text to the next
SPACE = 7  # between words
MARK = 8  # side of the check or cross before a predicted word
BOX = (208, 208, 208)
RIGHT, WRONG = (0, 110, 0), (190, 0, 0)


class Word(NamedTuple):
    """A word of a caption.

    Attributes:
      true: what it is.
      predicted: what the network takes it for; None: it has seen it.
    """

    true: str
    predicted: str | None

    @property
    def is_right(self) -> bool:
        """Whether it has been predicted, and well."""
        return self.predicted == self.true


def grid(
    columns: Mapping[str, np.ndarray],
    true: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    hidden: Sequence[Sequence[bool]] | np.ndarray,
) -> np.ndarray:
    """Lay out rows of images, each over its caption.

    A word that was hidden stands in a grey box, and under it what was predicted: after a check, and
    green, where that is right, after a cross, and red, where it is not.

    Args:
      columns: heading -> uint8 [B, H, W, 3]; see `mae_jax.tasks.pictures.grid`.
      true: word pieces of each of the B captions, padding left out; none: no caption.
      predicted: as many pieces.
      hidden: which of them were hidden; may go on where the pieces end.

    Returns:
      uint8 [height, width, 3].
    """
    bands = []
    for row, pieces in enumerate(true):
        images = {name: values[row : row + 1] for name, values in columns.items()}
        bands.append(pictures.grid(images, captions=not row))
        words = [
            Word(piece, other if is_hidden else None)
            for piece, other, is_hidden in zip(
                pieces, predicted[row], list(hidden[row])[: len(pieces)], strict=True
            )
        ]
        bands.append(_strip(words, bands[-1].shape[1]))
    return np.concatenate(bands)


def _strip(words: Sequence[Word], width: int) -> np.ndarray:
    """Draw a caption, with predictions under its lines, uint8 [height, width, 3]."""
    font = ImageFont.load_default(FONT_SIZE)
    lines = _lines(words, font, width - 2 * pictures.GAP)
    # A line without a hidden word needs no second one for predictions.
    heights = [
        LINE * (2 if any(word.predicted is not None for _, word in line) else 1) for line in lines
    ]
    canvas = Image.new("RGB", (width, sum(heights) + 2 * pictures.GAP), "white")
    draw = ImageDraw.Draw(canvas)
    top = pictures.GAP
    for line, height in zip(lines, heights, strict=True):
        for x, word in line:
            _draw_word(draw, font, pictures.GAP + x, top, word)
        top += height
    return np.asarray(canvas)


def _lines(
    words: Sequence[Word], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[list[tuple[int, Word]]]:
    """Place words on lines: (pixels from the left, word); no gap before what goes on a word."""
    lines: list[list[tuple[int, Word]]] = []
    x = 0
    for word in words:
        needed = _width(word, font)
        if word.true.startswith(CONTINUES) and lines:
            x -= SPACE
        if not lines or x + needed > width:
            lines.append([])
            x = 0
        lines[-1].append((x, word))
        x += needed + SPACE
    return lines


def _width(word: Word, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    below = 0 if word.predicted is None else MARK + 3 + font.getlength(word.predicted)
    return int(np.ceil(max(font.getlength(_shown(word)), below)))


def _shown(word: Word) -> str:
    return word.true.removeprefix(CONTINUES) or word.true


def _draw_word(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    x: int,
    y: int,
    word: Word,
) -> None:
    if word.predicted is not None:
        draw.rectangle((x - 2, y, x + _width(word, font) + 1, y + LINE - 2), fill=BOX)
    draw.text((x, y), _shown(word), fill="black", font=font)
    if word.predicted is None:
        return
    y += LINE
    colour = RIGHT if word.is_right else WRONG
    # Drawn, for the font may lack such signs.
    low, middle = y + 4 + MARK, y + 4 + MARK // 2
    if word.is_right:
        draw.line([(x, middle), (x + 3, low), (x + MARK, low - MARK)], fill=colour, width=2)
    else:
        draw.line([(x, low - MARK), (x + MARK, low)], fill=colour, width=2)
        draw.line([(x, low), (x + MARK, low - MARK)], fill=colour, width=2)
    draw.text((x + MARK + 3, y), word.predicted, fill=colour, font=font)
