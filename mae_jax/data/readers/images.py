"""Images: decoded, cropped, flipped, augmented."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.augment import parse_rand_augment
from mae_jax.data.readers import check_counts
from mae_jax.data.transforms import Decode, Transform, eval_transform, train_transform
from mae_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Decode `image` of an example and transform it: `image` uint8 [H, W, C].

    With several views `image` is [V, H, W, C]: each is transformed with draws of its own.

    Attributes:
      channels: see `Decode`.
      transform: what follows; all its images must have one shape.
      views: how often it does.
      decode: `Decode`, or `mae_jax.data.fast.Decode`; then there is `by_pillow` bool as well,
        whether this is a JPEG that it had to leave to Pillow.
    """

    channels: int
    transform: Transform
    views: int = 1
    decode: type[Decode] = Decode
    field = "image"

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator, *, exif: bool = False
    ) -> dict[str, np.ndarray]:
        """Return `image`; see `Reader`."""
        pixels, by_pillow = self.decode(self.channels, exif=exif).read(example["image"])
        if self.views == 1:
            image = self.transform(pixels, rng)
        else:
            image = np.stack([self.transform(pixels, rng) for _ in range(self.views)])
        if self.decode is Decode:
            return {"image": image}
        return {"image": image, "by_pillow": np.asarray(by_pillow)}


def training(config: ConfigDict) -> ImageReader:
    """Return what reads images to train on.

    Raises:
      ConfigError: naming the field, if one is out of range.
    """
    data = config.data
    check_counts(data, "crops_per_image")
    after = None
    if config.task == "finetune" and data.rand_augment:
        after = parse_rand_augment(data.rand_augment, data.mean)
    fast = _fast(data.resample)
    transform = train_transform(
        data.image_size,
        augment=data.augment,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        crop_fraction=crop_fraction(data.crop_fraction, data.image_size),
        after=after,
        **({"resample": fast.resize, "mirror": fast.mirror} if fast else {}),
    )
    decode = fast.Decode if fast else Decode
    return ImageReader(data.channels, transform, data.crops_per_image, decode)


def _fast(resample: str) -> ModuleType | None:
    """Return what decodes and resizes in place of Pillow, if `data.resample` asks for it.

    Raises:
      ConfigError: if it asks for something else.
    """
    if resample not in ("fast", "pil"):
        raise ConfigError(f"data.resample: expected fast or pil, got {resample!r}")
    if resample == "pil":
        return None
    try:
        from mae_jax.data import fast
    except ImportError as error:  # no wheel for this machine, say
        logging.warning("data.resample=fast: Pillow decodes and resizes, for %s", error)
        return None
    return fast


def evaluation(data: ConfigDict, given: float | None = None) -> ImageReader:
    """Return what reads images to evaluate on: bit for bit as Pillow decodes and resizes.

    Args:
      data: of the configuration that the model was trained with.
      given: a `crop_fraction` in place of that of `data`; None: none.

    Raises:
      ConfigError: if the one that counts is out of bounds.
    """
    fraction = crop_fraction(data.crop_fraction if given is None else given, data.image_size)
    return ImageReader(data.channels, eval_transform(data.image_size, crop_fraction=fraction))


def crop_fraction(given: float | None, image_size: tuple[int, int]) -> float:
    """Return `data.crop_fraction`, or where it is None 224 / 256 up to 224 pixels, 1 above.

    Source: facebookresearch/mae `util/datasets.py`.
    """
    if given is not None:
        return given
    return 224 / 256 if max(image_size) <= 224 else 1.0
