"""Swin with biases made of the tokens' true places, so that they may be any one of four."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.pyramid import PyramidEncoder
from mae_jax.nn.attention import SelfAttention
from mae_jax.nn.blocks import TransformerBlock, block_flops
from mae_jax.nn.layers import fan_out_normal, linear
from mae_jax.nn.windows import partition, unpartition


class PositionMlp(nn.Module):
    """A bias for each head from the log-spaced difference of two places: Linear, ReLU, Linear.

    Parameters: `fc1` [2, hidden], `fc2` [hidden, heads]. Computed in float32.

    Attributes:
      num_heads: heads.
      hidden: width in between.

    Source: Swin Transformer V2, arXiv 2111.09883, section 3.3, as in implus/UM-MAE.
    """

    num_heads: int
    hidden: int

    @nn.compact
    def __call__(self, places: jax.Array) -> jax.Array:
        """Return the biases float32 [..., heads, T, T] of tokens at `places` [..., T, 2].

        Of query i and key j counts sign(d) log(1 + |d|), d = place j - place i, the row first.
        """
        d = places[..., None, :, :] - places[..., :, None, :]
        x = jnp.sign(d) * jnp.log1p(jnp.abs(d))
        fc1 = linear(self.hidden, jnp.float32, "fc1", kernel_init=fan_out_normal(self.hidden))
        fc2 = linear(self.num_heads, jnp.float32, "fc2", kernel_init=fan_out_normal(self.num_heads))
        return jnp.moveaxis(fc2(nn.relu(fc1(x))), -1, -3)


class SwinEncoder(PyramidEncoder):
    """Windows of attention, in every second block shifted by half their side.

    Attributes:
      window_size: side of a window in tokens of the full grid; on the compact grid half of it. A
        side of the grid that is no longer than the window is one window, which is not shifted.
      bias_dim: width inside `PositionMlp`.
      mlp_ratio: width of the MLP over that of the tokens.

    Source: Swin Transformer, arXiv 2103.14030, section 3; implus/UM-MAE `models_mae_swin.py`.
    """

    window_size: int = 16
    bias_dim: int = 32
    mlp_ratio: float = 4.0

    stem_norm = True
    classifier_positions = "none"

    @nn.nowrap
    def window(self, grid: tuple[int, int], full: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return a stage's window and the shift of every second block, both (down, across).

        Raises:
          ConfigError: if the window does not divide the grid.
        """
        size = self.reach(self.window_size, full)
        if any(side > size and side % size for side in grid):
            raise ConfigError(
                f"window_size {self.window_size}: a stage of {grid[0]} x {grid[1]} tokens cannot be"
                f" cut into windows of {size} x {size}"
            )
        window = min(size, grid[0]), min(size, grid[1])
        shift = tuple(size // 2 if side > size else 0 for side in grid)
        return window, (shift[0], shift[1])

    @nn.nowrap
    def check(self, units: int) -> None:
        """Refuse what could not be run with `units` units.

        Raises:
          ConfigError: if a grid cannot be halved or cut into windows, or there are to be positions.
        """
        if self.positions != "none":
            raise ConfigError(
                f"model.positions {self.positions!r}: Swin has none but its biases; expected 'none'"
            )
        for grid in self.stage_grids(units):
            self.window(grid, self.is_full(units))

    def _add_positions(self, x: jax.Array, places: jax.Array) -> jax.Array:
        """Return the tokens as they are: the biases tell of places."""
        return x

    @nn.nowrap
    def _block_fields(self, stage: int, full: bool) -> dict[str, Any]:
        """Return `mlp_ratio` and `make_attention` of the blocks of a stage."""
        bias = functools.partial(PositionMlp, hidden=self.bias_dim)
        return {
            "mlp_ratio": self.mlp_ratio,
            "make_attention": functools.partial(SelfAttention, position_bias=bias),
        }

    def _run(
        self,
        block: TransformerBlock,
        x: jax.Array,
        places: jax.Array,
        full: bool,
        *,
        shifted: bool,
        rng: jax.Array | None,
    ) -> jax.Array:
        """Run a block on tokens [B, H, W, D], cut into windows; all but attention sees no windows.

        Places go through the same shift and cut. Those of the full grid are the same for all
        images, [1, H, W, 2], and so are the biases then.
        """
        grid = (x.shape[1], x.shape[2])
        window, shift = self.window(grid, full)
        if not (shifted and any(shift)):
            x = block(partition(x, window), rng, relation=partition(places, window))
            return unpartition(x, grid, window)
        back = (-shift[0], -shift[1])
        x = block(
            partition(jnp.roll(x, back, axis=(1, 2)), window),
            rng,
            relation=partition(jnp.roll(places, back, axis=(1, 2)), window),
            mask=jnp.asarray(region_mask(grid, window, shift)),
        )
        return jnp.roll(unpartition(x, grid, window), shift, axis=(1, 2))

    @nn.nowrap
    def block_flops(self, stage: int, grid: tuple[int, int], full: bool) -> int:
        """Return forward FLOPs of a block of a stage on one image's grid of tokens.

        With the biases' on the compact grid, where each image has its own.
        """
        tokens, attended = math.prod(grid), math.prod(self.window(grid, full)[0])
        block = block_flops(tokens, self.width(stage), self.mlp_ratio, attended=attended)
        biases = 0 if full else tokens * attended * self.bias_dim * (2 + self.heads(stage))
        return block + 2 * biases


def region_mask(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> np.ndarray:
    """Return bool [n, T, T]: which tokens of a window of the shifted grid were neighbours before.

    The shift brings what leaves at the top and left in at the bottom and right, so that windows
    there hold tokens from both ends of the picture, which are not to look at each other.

    Source: Swin Transformer, arXiv 2103.14030, section 3.2, figure 4.
    """

    def region(side: int, length: int, offset: int) -> np.ndarray:
        place = np.arange(side)
        return (place >= side - length).astype(int) + (place >= side - offset)

    down, across = map(region, grid, window, shift)
    regions = np.asarray(partition((3 * down[:, None] + across)[None, :, :, None], window))
    regions = regions[0, :, :, 0]
    return regions[:, :, None] == regions[:, None, :]
