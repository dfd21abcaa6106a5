"""Clips as sequences of cubes, without parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.nn.patches import check_spread

NORM_PIX_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class CubeUnit:
    """Cubes of a clip, a few frames long, in raster order: the unit that is hidden and predicted.

    A unit is the vector of its pixels in the order (frame, row, column, channel), channel fastest.

    Attributes:
      clip_size: (frames, height, width) of a clip.
      tubelet_size: frames of a cube; divides those of a clip.
      patch_size: side of a cube in pixels; divides height and width.
      channels: channels of a frame.

    Raises:
      ConfigError: if a size is not positive or a cube does not divide the clip.

    Source: VideoMAE, arXiv 2203.12602, section 3.2; order as in MCG-NJU/VideoMAE
    `engine_for_pretraining.py`.
    """

    clip_size: tuple[int, int, int]
    tubelet_size: int = 2
    patch_size: int = 16
    channels: int = 3

    def __post_init__(self) -> None:
        frames, height, width = self.clip_size
        sizes = (*self.clip_size, self.tubelet_size, self.patch_size, self.channels)
        if min(sizes) < 1:
            raise ConfigError(
                f"frames {frames}, image_size {height}x{width}, tubelet_size {self.tubelet_size},"
                f" patch_size {self.patch_size} and channels {self.channels} must all be at least 1"
            )
        if frames % self.tubelet_size:
            raise ConfigError(
                f"frames {frames} is not a multiple of tubelet_size {self.tubelet_size}"
            )
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"image_size {height}x{width} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        return self.clip_size[1:]

    @property
    def frames(self) -> int:
        """F, the frames of a clip."""
        return self.clip_size[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, C) of a clip."""
        return (*self.clip_size, self.channels)

    def resized(self, image_size: tuple[int, int], frames: int | None = None) -> CubeUnit:
        """Return the same cubes of clips of another size (height, width), with `frames` or as many.

        Raises:
          ConfigError: if a cube does not divide such a clip.
        """
        frames = self.frames if frames is None else frames
        return dataclasses.replace(self, clip_size=(frames, *image_size))

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Cubes (time slots, down, across)."""
        frames, height, width = self.clip_size
        p = self.patch_size
        return frames // self.tubelet_size, height // p, width // p

    @property
    def count(self) -> int:
        """N, the number of units of a clip."""
        slots, rows, columns = self.grid_size
        return slots * rows * columns

    @property
    def size(self) -> int:
        """U, the number of values of a unit."""
        return self.tubelet_size * self.patch_size**2 * self.channels

    def split(self, images: jax.Array) -> jax.Array:
        """Cut clips [B, F, H, W, C] into units [B, N, U].

        Raises:
          ValueError: if the clips have another size or number of channels.
        """
        if images.shape[1:] != self.shape:
            sizes = ", ".join(map(str, self.shape))
            raise ValueError(f"expected clips [B, {sizes}], got {list(images.shape)}")
        (slots, rows, columns), d, p = self.grid_size, self.tubelet_size, self.patch_size
        x = images.reshape(-1, slots, d, rows, p, columns, p, self.channels)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)  # [B, t, h, w, d, p, p, C]
        return x.reshape(-1, self.count, self.size)

    def join(self, units: jax.Array) -> jax.Array:
        """Put units [B, N, U] in raster order together to clips [B, F, H, W, C]."""
        if units.shape[1:] != (self.count, self.size):
            raise ValueError(
                f"expected units [B, {self.count}, {self.size}], got {list(units.shape)}"
            )
        d, p = self.tubelet_size, self.patch_size
        x = units.reshape(-1, *self.grid_size, d, p, p, self.channels)
        return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *self.shape)


def channel_statistics(units: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
    """Return mean and scale of each channel of each unit [..., U], both float32 [..., 1, C].

    The scale is the unbiased standard deviation (variance divided by U / C - 1) with 1e-6 added to
    it, outside the root. So little is added that a cube of one colour becomes rounding noise.

    Raises:
      ConfigError: if U / C is 1: one value has no deviation.

    Source: MCG-NJU/VideoMAE `engine_for_pretraining.py`.
    """
    values = _by_channel(units, channels)
    check_spread(values.shape[-2])
    mean = values.mean(axis=-2, keepdims=True)
    return mean, jnp.std(values, axis=-2, keepdims=True, ddof=1) + NORM_PIX_EPS


def normalize_channels(units: jax.Array, channels: int) -> jax.Array:
    """Normalise each channel of each unit [..., U] with its own statistics; returns float32."""
    mean, scale = channel_statistics(units, channels)
    return ((_by_channel(units, channels) - mean) / scale).reshape(units.shape)


def denormalize_channels(values: jax.Array, units: jax.Array, channels: int) -> jax.Array:
    """Undo `normalize_channels` on `values` [..., U] with the statistics of true `units`."""
    mean, scale = channel_statistics(units, channels)
    return (_by_channel(values, channels) * scale + mean).reshape(values.shape)


def _by_channel(units: jax.Array, channels: int) -> jax.Array:
    """Return [..., U] as float32 [..., U / C, C]."""
    return units.astype(jnp.float32).reshape(*units.shape[:-1], -1, channels)
