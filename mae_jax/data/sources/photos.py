"""Ten colour photographs inside the wheels of scikit-learn and scikit-image: no download.

`docs/data.md` has the licence of each. Three whole photographs are held out, chosen by name once
and for all, so that nothing of them is ever trained on.

An example is a view: a square window of a photograph, uint8 [S, S, 3]. Its side is a quarter to
three quarters of the photograph's shorter one. Side and place follow from the number of the view:
the fractional parts of its multiples of three irrational numbers, which cover all sizes and places
evenly (a Kronecker sequence). There are as many views of each photograph, however large it is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mae_jax.data.sources import is_training, refuse_other_data
from mae_jax.errors import ConfigError

# Package, name for pip, folder in it.
SKLEARN = ("sklearn", "scikit-learn", "datasets/images")
SKIMAGE = ("skimage", "scikit-image", "data")
TRAIN = {
    "china.jpg": SKLEARN,
    "flower.jpg": SKLEARN,
    "astronaut.png": SKIMAGE,
    "hubble_deep_field.jpg": SKIMAGE,
    "ihc.png": SKIMAGE,
    "motorcycle_left.png": SKIMAGE,
    "retina.jpg": SKIMAGE,
}
VAL = {"chelsea.png": SKIMAGE, "coffee.png": SKIMAGE, "rocket.jpg": SKIMAGE}
HELD_OUT = 0.3
VIEWS = {"train": 512, "val": 64}  # of each photograph
SIDES = (0.25, 0.75)  # of a window, in shorter sides of the photograph

# The root of x^4 = x + 1. The irrational numbers are its first inverse powers (M. Roberts, "The
# unreasonable effectiveness of quasirandom sequences", 2018).
ROOT = 1.2207440846057596


class Photos:
    """Views of photographs; see the module.

    Attributes:
      photographs: name -> uint8 [H, W, 3].
      views: number of views of each.
    """

    num_classes = 0
    exif = False

    def __init__(self, photographs: Mapping[str, np.ndarray], views: int):
        self.photographs = dict(photographs)
        self.views = views
        self._names = list(photographs)

    def __len__(self) -> int:
        return self.views * len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, view = self._find(index)
        photograph = self.photographs[name]
        top, left, side = window(photograph.shape[0], photograph.shape[1], view)
        return {"image": photograph[top : top + side, left : left + side], "label": -1}

    def describe(self, index: int) -> str:
        """Name the photograph and the view."""
        return "{}, view {}".format(*self._find(index))

    def fingerprint(self) -> str:
        """Digest the pixels and the number of views."""
        digest = hashlib.blake2b(b"%d" % self.views, digest_size=8)
        for name, photograph in self.photographs.items():
            digest.update(name.encode() + photograph.tobytes())
        return digest.hexdigest()

    def _find(self, index: int) -> tuple[str, int]:
        """Return photograph and view, one photograph after the other.

        So a few examples at even distances, which is what a picture shows, are of all of them.
        """
        photograph, view = divmod(index, self.views)
        return self._names[photograph], view


def window(height: int, width: int, view: int) -> tuple[int, int, int]:
    """Return (top, left, side) in pixels of a square window that lies within the photograph."""
    size, down, right = ((view + 1) * ROOT**-power % 1.0 for power in (1, 2, 3))
    side = round(min(height, width) * (SIDES[0] + (SIDES[1] - SIDES[0]) * size))
    return int(down * (height - side + 1)), int(right * (width - side + 1)), side


def make(split: str, *, path: str = "", held_out: float = HELD_OUT) -> Photos:
    """Return the views of the 7 photographs of "train" or of the 3 of "val".

    Raises:
      ConfigError: if a package or a file of it is missing, or `path` or `held_out` ask for other
        data.
    """
    training = is_training(split)
    refuse_other_data("photos", path, held_out, HELD_OUT)
    files = TRAIN if training else VAL
    photographs = {name: _load(name, *place) for name, place in files.items()}
    return Photos(photographs, VIEWS["train" if training else "val"])


@functools.cache
def _load(name: str, package: str, distribution: str, folder: str) -> np.ndarray:
    spec = importlib.util.find_spec(package)  # does not import it
    if spec is None or spec.origin is None:
        raise ConfigError(
            f'data.source: photos needs the package {distribution}: pip install "mae_jax[demo]"'
        )
    file = os.path.join(os.path.dirname(spec.origin), folder, name)
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ConfigError(
            f"data.source: photos expected {folder}/{name} in the package {distribution}, got"
            f" {error}"
        ) from error
