"""The light decoder: from encoded units to the values of all or of the hidden ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.nn.attention import AttentionFn, SelfAttention
from mae_jax.nn.blocks import TransformerBlock, block_flops
from mae_jax.nn.layers import (
    LAYER_NORM_EPS,
    NORMAL_002,
    XAVIER,
    Dtype,
    Initializer,
    layer_norm,
    linear,
)
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.types import MaskPlan


def pixel_shuffle(x: jax.Array, grid_size: tuple[int, int], r: int) -> jax.Array:
    """Make r x r tokens of each one, in a grid `grid_size` (down, across) of tokens made.

    Value c r^2 + y r + x of a token becomes value c of the token at (y, x) in its square, as in
    PyTorch's PixelShuffle.

    Args:
      x: [B, h w / r^2, d r^2], raster order.
      grid_size: (h, w).
      r: side of the square.

    Returns:
      [B, h w, d], raster order.

    Raises:
      ConfigError: if the grid is not one of multiples of r, or not that of `x`.
    """
    rows, columns = grid_size[0] // r, grid_size[1] // r
    if (rows * r, columns * r) != tuple(grid_size) or rows * columns != x.shape[1]:
        raise ConfigError(
            f"kept_grid {grid_size}: expected {x.shape[1]} squares of {r} x {r} units"
        )
    x = x.reshape(-1, rows, columns, x.shape[2] // r**2, r, r).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(-1, rows * r * columns * r, x.shape[-1])


class Decoder(nn.Module):
    """Fill the gaps with a mask token, add fixed positions, run a few blocks, predict values.

    Tokens stay in kept-then-hidden order and get the positions of that order: attention does not
    see the order, so this equals un-shuffling them first, without a gather of activations.

    Parameters: `embed`, `mask_token` [1, 1, d] if units are hidden, `block_00` ..., `norm`, `pred`.

    Attributes:
      grid_size: units (down, across), or whatever `make_table` takes.
      unit_size: U, values to predict for each unit.
      embed_dim: width d.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_ratio: width of the MLP over d.
      upsample: side of the square of kept units that a token of the encoder becomes, by a pixel
        shuffle: `embed` maps it to d upsample^2 values. The kept units, in the order given, are the
        raster order of a grid `kept_grid`, the tokens that of one `upsample` times smaller.
      kept_grid: kept units (down, across); needed to upsample.
      epsilon: of the norms.
      kernel_init: of the weights.
      qkv_bias: see `SelfAttention`.
      embed_bias: `embed` has a bias.
      embed_init: of the weight of `embed`; None: as the others.
      token_init: of the mask token.
      make_table: (d, grid_size) -> positions float32 [N, d]; None: `sincos_2d`.

    Source: MAE, arXiv 2111.06377, section 3; facebookresearch/mae `forward_decoder`.
    """

    grid_size: tuple[int, ...]
    unit_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    remat: str = "none"
    upsample: int = 1
    kept_grid: tuple[int, int] | None = None
    epsilon: float = LAYER_NORM_EPS
    kernel_init: Initializer = XAVIER
    qkv_bias: str = "full"
    embed_bias: bool = True
    embed_init: Initializer | None = None
    token_init: Initializer = NORMAL_002
    make_table: Callable[[int, tuple[int, ...]], np.ndarray] | None = None

    @nn.compact
    def __call__(self, latent: jax.Array, plan: MaskPlan, *, skip: int | None = None) -> jax.Array:
        """Predict units from the encoder's output.

        Args:
          latent: [B, c + K, D]; what comes before the K units (a class token) has no position.
            To be upsampled: [B, K / upsample^2, D].
          plan: the mask under which `latent` was made.
          skip: how many units, in kept-then-hidden order, to make no prediction for; None: the K
            kept ones, 0: none, for pictures.

        Returns:
          float32 [B, N - skip, U] in kept-then-hidden order.
        """
        keep, hidden = plan.ids_keep.shape[1], plan.ids_mask.shape[1]
        r = self.upsample
        embed = linear(
            self.embed_dim * r**2,
            self.dtype,
            "embed",
            kernel_init=self.embed_init or self.kernel_init,
            use_bias=self.embed_bias,
        )
        x = embed(latent)
        if r > 1:
            x = pixel_shuffle(x, self.kept_grid or (0, 0), r)
        prefix = x.shape[1] - keep
        if hidden:
            mask_token = self.param("mask_token", self.token_init, (1, 1, self.embed_dim))
            gaps = jnp.broadcast_to(
                mask_token.astype(self.dtype), (x.shape[0], hidden, self.embed_dim)
            )
            x = jnp.concatenate([x, gaps], axis=1)
        table = jnp.asarray(self.fixed_table())
        ids = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)
        positions = jnp.take(table, ids, axis=0, mode="clip")  # [R, N, d], R = B or 1
        positions = jnp.pad(positions, ((0, 0), (prefix, 0), (0, 0)))
        x = x + positions.astype(self.dtype)
        for i in range(self.depth):
            x = TransformerBlock(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                dtype=self.dtype,
                attention=self.attention,
                remat=self.remat,
                epsilon=self.epsilon,
                kernel_init=self.kernel_init,
                make_attention=functools.partial(SelfAttention, qkv_bias=self.qkv_bias),
                name=f"block_{i:02d}",
            )(x)
        x = x[:, prefix + (keep if skip is None else skip) :]
        x = layer_norm(self.dtype, "norm", epsilon=self.epsilon)(x)
        pred = linear(self.unit_size, self.dtype, "pred", kernel_init=self.kernel_init)
        return pred(x).astype(jnp.float32)

    @nn.nowrap
    def fixed_table(self) -> np.ndarray:
        """Return float32 [N, d], the positions of the units."""
        if self.make_table is not None:
            return self.make_table(self.embed_dim, self.grid_size)
        rows, columns = self.grid_size
        return sincos_2d(self.embed_dim, (rows, columns))

    @nn.nowrap
    def flops(self, tokens: int, latent: int, latent_dim: int, predicted: int) -> int:
        """Return forward FLOPs for one image: bridge from the encoder, blocks, and head.

        Args:
          tokens: in the blocks, class token included.
          latent: tokens that come from the encoder.
          latent_dim: their width.
          predicted: units that the head is applied to.
        """
        bridge = 2 * latent * latent_dim * self.embed_dim * self.upsample**2
        blocks = self.depth * block_flops(tokens, self.embed_dim, self.mlp_ratio)
        return bridge + blocks + 2 * predicted * self.embed_dim * self.unit_size
