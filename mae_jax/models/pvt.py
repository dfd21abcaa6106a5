"""The pyramid vision transformer, with attention to averages of squares of tokens."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.encoder import POSITIONS
from mae_jax.models.fields import check_choice
from mae_jax.models.pyramid import BLOCK_EPSILON, PyramidEncoder
from mae_jax.nn.attention import AttentionFn
from mae_jax.nn.blocks import TransformerBlock, block_flops
from mae_jax.nn.layers import XAVIER, Dtype, Initializer, fan_out_normal, layer_norm, linear
from mae_jax.nn.pos_embed import sincos_2d


class ReducedAttention(nn.Module):
    """Tokens look at averages of squares of tokens, mapped and normed.

    Parameters: `q`, `reduce`, `norm`, `kv` [D, 2 D] laid out (k, v) x head x head_dim, `proj`.

    Attributes:
      num_heads: divides the width.
      attention: see `mae_jax.nn.attention.AttentionFn`.
      kernel_init: of the weights, but for `reduce`.
      reduction: side of a square; 1: the tokens themselves, mapped and normed all the same.

    Source: PVT, arXiv 2102.12122, section 3.3; with the average as in implus/UM-MAE.
    """

    num_heads: int
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    kernel_init: Initializer = XAVIER
    reduction: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, H, W, D] to [B, H, W, D]."""
        _, rows, columns, d = x.shape
        if d % self.num_heads:
            raise ConfigError(f"num_heads {self.num_heads} does not divide embed_dim {d}")
        head_dim, r = d // self.num_heads, self.reduction
        q = linear(d, self.dtype, "q", kernel_init=self.kernel_init)(x)
        seen = x.reshape(-1, rows // r, r, columns // r, r, d).mean(axis=(2, 4))
        seen = linear(d, self.dtype, "reduce", kernel_init=fan_out_normal(d))(seen)
        seen = layer_norm(self.dtype, "norm", epsilon=BLOCK_EPSILON)(seen)
        kv = linear(2 * d, self.dtype, "kv", kernel_init=self.kernel_init)(seen)
        kv = kv.reshape(-1, (rows // r) * (columns // r), 2, self.num_heads, head_dim)
        q = q.reshape(-1, rows * columns, self.num_heads, head_dim)
        out = self.attention(q, kv[:, :, 0], kv[:, :, 1]).reshape(-1, rows, columns, d)
        return linear(d, self.dtype, "proj", kernel_init=self.kernel_init)(out)


class PVTEncoder(PyramidEncoder):
    """Global attention in all stages, affordable because it looks at averages.

    Parameters: those of a pyramid and `pos_embed` [1, P, E] where positions are learned.

    Attributes:
      positions: "fixed" (sine-cosine table of the full grid of tokens) or "learned" (a parameter
        that starts as that table).
      reductions: side of the squares of each stage, on the full grid; on the compact one half.
      mlp_ratios: of each stage, width of the MLP over that of the tokens.

    Source: PVT, arXiv 2102.12122, table 1 (small); implus/UM-MAE `models_mae_pvt.py`.
    """

    positions: str = "fixed"
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)

    growth = (1, 2, 5, 8)

    @property
    def position_grid(self) -> tuple[int, int]:
        """The grid (down, across) of the table of positions, that of all tokens."""
        return self.token_grid

    @nn.nowrap
    def fixed_table(self) -> np.ndarray:
        """Return float32 [1, P, E], the sine-cosine table."""
        return sincos_2d(self.embed_dim, self.token_grid)[None]

    @nn.nowrap
    def check(self, units: int) -> None:
        """Refuse what could not be run with `units` units.

        Raises:
          ConfigError: if a grid cannot be halved or averaged, or positions are unknown.
        """
        check_choice("positions", self.positions, POSITIONS)
        for stage, grid in enumerate(self.stage_grids(units)):
            r = self.reach(self.reductions[stage], self.is_full(units))
            if grid[0] % r or grid[1] % r:
                raise ConfigError(
                    f"image_size: stage {stage} of {grid[0]} x {grid[1]} tokens cannot be averaged"
                    f" over squares of {r} x {r}"
                )

    def _add_positions(self, x: jax.Array, places: jax.Array) -> jax.Array:
        """Add each token's row of the table."""
        ids = (places[..., 0] * self.token_grid[1] + places[..., 1]).astype(jnp.int32)
        return x + jnp.take(self.position_table(), ids, axis=0, mode="clip").astype(self.dtype)

    @nn.nowrap
    def _block_fields(self, stage: int, full: bool) -> dict[str, Any]:
        """Return `mlp_ratio` and `make_attention` of the blocks of a stage."""
        r = self.reach(self.reductions[stage], full)
        return {
            "mlp_ratio": self.mlp_ratios[stage],
            "make_attention": functools.partial(ReducedAttention, reduction=r),
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
        """Run a block on tokens [B, H, W, D]."""
        return block(x, rng)

    @nn.nowrap
    def block_flops(self, stage: int, grid: tuple[int, int], full: bool) -> int:
        """Return forward FLOPs of a block of a stage on one image's grid of tokens."""
        tokens, width = math.prod(grid), self.width(stage)
        attended = tokens // self.reach(self.reductions[stage], full) ** 2
        block = block_flops(tokens, width, self.mlp_ratios[stage], attended=attended)
        # Keys and values are of the averages, which are mapped once more.
        return block - 2 * (2 * tokens - 3 * attended) * width**2
