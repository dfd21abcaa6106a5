"""Images as sequences of patches, without parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError

NORM_PIX_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class PatchUnit:
    """Square patches of an image in raster order: the unit that is hidden and predicted.

    A unit is the vector of its pixels in the order (row, column, channel), channel fastest.

    Attributes:
      image_size: (height, width) in pixels.
      patch_size: side of a patch in pixels; divides both.
      channels: channels of the image.

    Raises:
      ConfigError: if a size is not positive or the patch does not divide the image.

    Source: MAE, arXiv 2111.06377, section 3; order as in facebookresearch/mae `patchify`.
    """

    image_size: tuple[int, int]
    patch_size: int
    channels: int = 3

    def __post_init__(self) -> None:
        height, width = self.image_size
        if min(height, width, self.patch_size, self.channels) < 1:
            raise ConfigError(
                f"image_size {height}x{width}, patch_size {self.patch_size} and channels"
                f" {self.channels} must all be at least 1"
            )
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"image_size {height}x{width} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches (down, across)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def count(self) -> int:
        """N, the number of units of an image."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def size(self) -> int:
        """U, the number of values of a unit."""
        return self.patch_size**2 * self.channels

    def split(self, images: jax.Array) -> jax.Array:
        """Cut images [B, H, W, C] into units [B, N, U].

        Raises:
          ValueError: if the images have another size or number of channels.
        """
        if images.shape[1:] != (*self.image_size, self.channels):
            raise ValueError(
                f"expected images [B, {self.image_size[0]}, {self.image_size[1]},"
                f" {self.channels}], got {list(images.shape)}"
            )
        (rows, columns), p = self.grid_size, self.patch_size
        x = images.reshape(-1, rows, p, columns, p, self.channels)
        return x.swapaxes(2, 3).reshape(
            -1, self.count, self.size
        )  # [B, h, w, p, p, C] -> [B, N, U]

    def join(self, units: jax.Array) -> jax.Array:
        """Put units [B, N, U] in raster order together to images [B, H, W, C]."""
        if units.shape[1:] != (self.count, self.size):
            raise ValueError(
                f"expected units [B, {self.count}, {self.size}], got {list(units.shape)}"
            )
        (rows, columns), p = self.grid_size, self.patch_size
        x = units.reshape(-1, rows, columns, p, p, self.channels)
        return x.swapaxes(2, 3).reshape(-1, *self.image_size, self.channels)


def unit_statistics(units: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean and standard deviation of each unit [..., U], both float32 [..., 1].

    All pixels and channels count together, and the variance is the unbiased one (divided by
    U - 1), as in the official code; 1e-6 is added to it, so a flat patch has a small finite scale.

    Source: facebookresearch/mae `forward_loss`.
    """
    units = units.astype(jnp.float32)
    mean = units.mean(axis=-1, keepdims=True)
    variance = jnp.var(units, axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + NORM_PIX_EPS)


def normalize_units(units: jax.Array) -> jax.Array:
    """Normalise each unit [..., U] with its own statistics: the "norm-pix" target."""
    mean, std = unit_statistics(units)
    return (units - mean) / std


def denormalize_units(values: jax.Array, units: jax.Array) -> jax.Array:
    """Undo `normalize_units` on predicted `values` [..., U] with the statistics of true `units`."""
    mean, std = unit_statistics(units)
    return values * std + mean
