"""Images as sequences of patches, without parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, Self

import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError

NORM_PIX_EPS = 1e-6


class Unit(Protocol):
    """How an example is cut into the units that are hidden and predicted, pure, no parameters.

    A unit is a vector of pixels, channel fastest, and units are in raster order.
    """

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        ...

    @property
    def channels(self) -> int:
        """Channels of an image."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a unit in pixels."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an example: (H, W, C), or (F, H, W, C) of a clip."""
        ...

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Units (down, across), or (time, down, across)."""
        ...

    @property
    def count(self) -> int:
        """N, the number of units of an example."""
        ...

    @property
    def size(self) -> int:
        """U, the number of values of a unit."""
        ...

    def resized(self, image_size: tuple[int, int], frames: int | None = None) -> Self:
        """Return the same units of images of another size; `frames` of clips, None: as many.

        Raises:
          ConfigError: if they do not fit, or there are no frames.
        """
        ...

    def split(self, images: jax.Array) -> jax.Array:
        """Cut examples [B, ...] into units [B, N, U]."""
        ...

    def join(self, units: jax.Array) -> jax.Array:
        """Put units [B, N, U] in raster order together to examples [B, ...]."""
        ...


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
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return (*self.image_size, self.channels)

    def resized(self, image_size: tuple[int, int], frames: int | None = None) -> PatchUnit:
        """Return the same patches of images of another size (height, width).

        Raises:
          ConfigError: if the patch does not divide it, or frames are asked for.
        """
        if frames is not None:
            raise ConfigError(f"frames {frames}: expected none, the model takes single images")
        return dataclasses.replace(self, image_size=image_size)

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
        if images.shape[1:] != self.shape:
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
        return x.swapaxes(2, 3).reshape(-1, *self.shape)


def check_spread(count: int) -> None:
    """Refuse targets of which `count` values are normalised together, if that is one.

    Raises:
      ConfigError: names the fields.
    """
    if count < 2:
        raise ConfigError(
            f"model.norm_pix_loss True: expected at least 2 values to normalise together, got"
            f" {count}; take False, or a larger model.patch_size"
        )


def unit_statistics(units: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean and standard deviation of each unit [..., U], both float32 [..., 1].

    All pixels and channels count together, and the variance is the unbiased one (divided by
    U - 1), as in the official code; 1e-6 is added to it, so a flat patch has a small finite scale.

    Raises:
      ConfigError: if U is 1: one value has no deviation.

    Source: facebookresearch/mae `forward_loss`.
    """
    check_spread(units.shape[-1])
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


def subdivide(units: jax.Array, side: int, channels: int) -> jax.Array:
    """Cut units [B, K, U] into side x side patches each: [B, K, side, side, U / side^2].

    The values of a patch are in the order of a unit's: (row, column, channel), channel fastest.

    Raises:
      ConfigError: if a unit has not a multiple of `side` pixels a side.
    """
    b, k, size = units.shape
    pixels = math.isqrt(size // channels)
    if pixels % side or pixels**2 * channels != size:
        raise ConfigError(
            f"units of {size} values and {channels} channels cannot be cut into {side} x {side}"
        )
    x = units.reshape(b, k, side, pixels // side, side, pixels // side, channels)
    return x.swapaxes(3, 4).reshape(b, k, side, side, size // side**2)


def to_grid(x: jax.Array, grid_size: tuple[int, int]) -> jax.Array:
    """Put units of tokens [B, h w, t, t, D] in raster order together to a grid [B, h t, w t, D]."""
    b, _, side, _, d = x.shape
    rows, columns = grid_size
    x = x.reshape(b, rows, columns, side, side, d).swapaxes(2, 3)
    return x.reshape(b, rows * side, columns * side, d)


def from_grid(x: jax.Array, side: int) -> jax.Array:
    """Cut a grid [B, h t, w t, D] into units [B, h w, t, t, D]: undoes `to_grid`."""
    b, height, width, d = x.shape
    x = x.reshape(b, height // side, side, width // side, side, d).swapaxes(2, 3)
    return x.reshape(b, -1, side, side, d)
