"""Random erasing on the device: a box of some images becomes noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError

TRIES = 10  # boxes drawn for an image until one is smaller than it


class Erasure(flax.struct.PyTreeNode):
    """Which box of each image becomes noise, and the noise.

    Attributes:
      box: int32 [B, 4], first and end row, first and end column; empty where nothing is erased.
      rng: keys [B] of the noise.
    """

    box: jax.Array
    rng: jax.Array


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Fill a random box with standard normal noise, for each pixel and channel anew.

    It works on normalised images, before they are mixed, and each image depends on its own key
    alone. A box has an area uniform in `area` x the image's and a log-uniform ratio of height to
    width; an image for which no box of ten fits stays as it is.

    Attributes:
      probability: that an image is erased.
      area: smallest and largest share of the image's area.
      ratio: smallest height / width; the largest is its inverse.

    Source: arXiv 1708.04896; the values are those of timm 0.3.2 (timm/data/random_erasing.py, mode
    "pixel", one box), with the probability of the official fine-tuning of MAE.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: float = 0.3

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
          ConfigError: if one is out of range.
        """
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"data.erasing_probability {self.probability}: expected 0 ... 1")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"erasing area: expected 0 < least <= most <= 1, got {self.area}")
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"erasing ratio: expected in (0, 1], got {self.ratio}")

    def draw(self, rng: jax.Array, batch_size: int, image_size: tuple[int, int]) -> Erasure:
        """Draw what to erase of each of B images of (height, width)."""

        def one(rng: jax.Array) -> Erasure:
            box_rng, noise_rng = jax.random.split(rng)
            return Erasure(box=self._box(box_rng, *image_size), rng=noise_rng)

        return jax.vmap(one)(jax.random.split(rng, batch_size))

    def _box(self, rng: jax.Array, image_height: int, image_width: int) -> jax.Array:
        # One draw for all: what takes time here is compiling the generator.
        uniform = jax.random.uniform(rng, (2 * TRIES + 3,))
        least, most = (share * image_height * image_width for share in self.area)
        area = least + (most - least) * uniform[:TRIES]
        ratio = jnp.exp((1 - 2 * uniform[TRIES : 2 * TRIES]) * math.log(self.ratio))
        erase_draw, top_draw, left_draw = uniform[2 * TRIES :]
        heights = jnp.rint(jnp.sqrt(area * ratio)).astype(jnp.int32)
        widths = jnp.rint(jnp.sqrt(area / ratio)).astype(jnp.int32)
        fits = (heights < image_height) & (widths < image_width)
        first = jnp.argmax(fits)
        wanted = fits[first] & (erase_draw < self.probability)
        height = jnp.where(wanted, heights[first], 0)
        width = jnp.where(wanted, widths[first], 0)
        top = (top_draw * (image_height - height + 1)).astype(jnp.int32)
        left = (left_draw * (image_width - width + 1)).astype(jnp.int32)
        return jnp.stack([top, top + height, left, left + width])


def erase(images: jax.Array, erasure: Erasure) -> jax.Array:
    """Return the images with noise in the boxes of `erasure`, row for row.

    Args:
      images: float32 [B, H, W, C]; or [B, F, H, W, C], whose frames have one box and their own
        noise.
      erasure: of B.
    """
    inside = inside_box(erasure.box, images.shape)
    noise = jax.vmap(lambda rng: jax.random.normal(rng, images.shape[1:], images.dtype))(
        erasure.rng
    )
    return jnp.where(inside, noise, images)


def inside_box(box: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return bool [B, ..., H, W, 1], true within boxes int32 [B, 4] (see `Erasure`).

    Args:
      box: of each image.
      shape: of the images, [B, H, W, C] or [B, F, H, W, C], which the result broadcasts with.
    """
    top, bottom, left, right = (edge[:, None] for edge in box.T)
    row, column = (jnp.arange(size)[None] for size in shape[-3:-1])
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return inside.reshape(-1, *(1,) * (len(shape) - 4), *inside.shape[1:])
