"""RandAugment on the host: uint8 RGB images in and out, as timm's `rand-m9-mstd0.5-inc1`.

It is a transform in the sense of `mae_jax.data.transforms`, and stands after the crop and the flip.
Erasing and mixing of images are done on the device: `mae_jax.tasks.erasing`, `mae_jax.tasks.mixup`.

Source: RandAugment, arXiv 1909.13719; the operations and their ranges are those of timm 0.3.2
(timm/data/auto_augment.py, the "increasing" set), which the official fine-tuning of MAE uses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mae_jax.errors import ConfigError

MAX_MAGNITUDE = 10.0  # what a level of 1 is called in the text of a policy


def _posterize(image: Image.Image, level: float) -> Image.Image:
    kept_bits = 4 - int(4 * level)  # none at level 1: black, where ImageOps.posterize would refuse
    mask = 256 - 2 ** (8 - kept_bits)
    return image.point(lambda value: value & mask)


def _solarize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * level))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    added = int(110 * level)  # 127 + 110 stays below 256
    return image.point(lambda value: value + added if value < 128 else value)


# Level 0 ... 1. The first three have no strength.
PLAIN: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "invert": lambda image, level: ImageOps.invert(image),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
}
# Level -1 ... 1: the factor is 1 + 0.9 x level, 1 being the image as it is.
ENHANCE: dict[str, Callable[[Image.Image], Any]] = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}
# Level -1 ... 1, width, height -> (a, b, c, d, e, f): the pixel at (x, y) of the result is read at
# (a x + b y + c, d x + e y + f).
AFFINE: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "shear_x": lambda level, width, height: (1, 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda level, width, height: (1, 0, 0, 0.3 * level, 1, 0),
    "translate_x": lambda level, width, height: (1, 0, 0.45 * level * width, 0, 1, 0),
    "translate_y": lambda level, width, height: (1, 0, 0, 0, 1, 0.45 * level * height),
}
OPERATIONS = (*PLAIN, *ENHANCE, *AFFINE, "rotate")


def apply_operation(
    name: str,
    image: Image.Image,
    level: float,
    *,
    fill: tuple[int, int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Apply one operation to an RGB image.

    Args:
      name: one of `OPERATIONS`.
      image: of mode RGB.
      level: -1 ... 1, magnitude / 10 with a sign; the operations of `PLAIN` have none and take its
        absolute value.
      fill: colour of what `AFFINE` and "rotate" bring in from outside the image.
      resample: interpolation of these.
    """
    if name in PLAIN:
        return PLAIN[name](image, abs(level))
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(1 + 0.9 * level)
    if name == "rotate":  # counter-clockwise where positive
        return image.rotate(30 * level, resample, fillcolor=fill)
    coefficients = AFFINE[name](level, *image.size)
    method = Image.Transform.AFFINE
    return image.transform(image.size, method, coefficients, resample, fillcolor=fill)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Apply a few operations drawn uniformly, with replacement, each with some probability.

    The magnitude is drawn anew for each operation and clipped to 0 ... 10; signs are a coin's.

    Attributes:
      magnitude: mean of the magnitude, 0 ... 10.
      magnitude_std: its standard deviation.
      count: operations drawn for an image.
      probability: that an operation which was drawn is applied.
      fill: see `apply_operation`.
      resample: interpolations of which one is drawn for each operation. The official fine-tuning
        asks timm for bicubic; timm unasked takes bilinear or bicubic.
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    count: int = 2
    probability: float = 0.5
    fill: tuple[int, int, int] = (128, 128, 128)
    resample: tuple[Image.Resampling, ...] = (Image.Resampling.BICUBIC,)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment one image uint8 [H, W, 3].

        Raises:
          ConfigError: if the image has other than three channels.
        """
        if image.shape[2] != 3:
            raise ConfigError(
                f"model.channels: expected 3 with RandAugment, got {image.shape[2]}; its operations"
                " are those of colour images"
            )
        augmented = picture = Image.fromarray(image)
        for name in rng.choice(OPERATIONS, size=self.count):
            if rng.random() < self.probability:
                resample = self.resample[rng.integers(len(self.resample))]
                level = self.level(rng)
                augmented = apply_operation(
                    name, augmented, level, fill=self.fill, resample=resample
                )
        return image if augmented is picture else np.asarray(augmented)

    def level(self, rng: np.random.Generator) -> float:
        """Draw a level, -1 ... 1."""
        magnitude = np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, MAX_MAGNITUDE)
        sign = -1 if rng.random() < 0.5 else 1
        return sign * float(magnitude) / MAX_MAGNITUDE


def parse_rand_augment(text: str, mean: Sequence[float]) -> RandAugment:
    """Return the RandAugment that timm's name for it describes.

    Args:
      text: "rand-m9-mstd0.5-inc1", the recipe of MAE, or the like: m, the mean magnitude (0 ... 10,
        timm's default 10), mstd, its standard deviation (0), n, operations an image (2), p,
        probability of each (0.5), in any order; inc1, operations that grow with the magnitude,
        must be there, since timm's other set is not offered.
      mean: of the normalisation, for each of three channels, in 0 ... 1: the fill colour, as in
        timm (124, 116, 104 for ImageNet's).

    Raises:
      ConfigError: if `text` is something else, or `mean` has not three values.
    """
    sections = text.split("-")
    matches = [
        re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", section) for section in sections[1:]
    ]
    fields = {match[1]: match[2] for match in matches if match}
    magnitude, count = fields.get("m", "10"), fields.get("n", "2")
    std, probability = float(fields.get("mstd", "0")), float(fields.get("p", "0.5"))
    if (
        sections[0] != "rand"
        or len(fields) != len(matches)  # one is unknown, or comes twice
        or fields.get("inc") != "1"
        or not (magnitude.isdigit() and int(magnitude) <= MAX_MAGNITUDE and count.isdigit())
        or std > 100  # to timm, this asks for uniform magnitudes
        or probability > 1
    ):
        raise ConfigError(
            "data.rand_augment: expected the like of rand-m9-mstd0.5-inc1 (m 0 ... 10, mstd, n, p;"
            f" inc1), got {text!r}"
        )
    if len(mean) != 3:
        raise ConfigError(f"data.mean: expected 3 values with RandAugment, got {len(mean)}")
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    return RandAugment(float(magnitude), std, int(count), probability, fill=(red, green, blue))
