"""The vision transformer as an encoder of units and their positions."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.encoder import Encoder
from mae_jax.nn.attention import AttentionFn, SelfAttention
from mae_jax.nn.blocks import block_flops
from mae_jax.nn.layers import (
    NORMAL_002,
    XAVIER,
    Dtype,
    Initializer,
    TokenDense,
    fan_in_uniform,
    layer_norm,
)
from mae_jax.nn.pos_embed import sincos_2d


class ViTEncoder(Encoder):
    """Embed the units to be seen, add their positions, and run the transformer.

    Parameters: `patch_embed`, `block_00` ..., `norm`, and where used `cls_token` [1, 1, D],
    `mask_token` [1, 1, D] and `pos_embed` [1, c + N, D].

    Attributes:
      grid_size: units (down, across); indices count in raster order.
      embed_dim: width D.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_ratio: width of the MLP over D.
      use_cls_token: put a learned token in front. It has no position.
      positions: "fixed" (sine-cosine table, no variable) or "learned" (a parameter that starts
        as that table, with a row of zeros in front for the class token).
      drop_path_rate: of the last block; grows linearly from 0 at the first.
      final_norm: norm the tokens at the end; a classifier by mean pooling norms later.
      qkv_bias: see `SelfAttention`.
      embed_init: of the weight that embeds units.

    Source: MAE, arXiv 2111.06377, section 3; facebookresearch/mae `forward_encoder`.
    """

    grid_size: tuple[int, ...]
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    use_cls_token: bool = True
    positions: str = "fixed"
    drop_path_rate: float = 0.0
    final_norm: bool = True
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    remat: str = "none"
    qkv_bias: str = "full"
    embed_init: Initializer = XAVIER

    tanh_gelu = False

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage: there is one."""
        return (self.depth,)

    @property
    def output_dim(self) -> int:
        """D, the width of the tokens that come out."""
        return self.embed_dim

    @nn.compact
    def __call__(
        self,
        units: jax.Array,
        ids: jax.Array,
        *,
        replaced: jax.Array | None = None,
        drop_path_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Encode the units that are to be seen.

        Args:
          units: [B, K, U].
          ids: int [R, K] their places in the grid, R = B or 1.
          replaced: bool [R, K], where the embedding of a unit gives way to a learned token, its
            position staying; None: nowhere, and there is no such token.
          drop_path_rng: key of drop path; None: none (evaluation).

        Returns:
          [B, c + K, D] in `dtype`, after the final norm if there is one, in the order given; c = 1
          with a class token, which comes first, else 0.
        """
        x = TokenDense(
            self.embed_dim,
            kernel_init=self.embed_init,
            bias_init=fan_in_uniform(units.shape[-1]),
            dtype=self.dtype,
            name="patch_embed",
        )(units)
        if replaced is not None:
            mask_token = self.param("mask_token", NORMAL_002, (1, 1, self.embed_dim))
            x = jnp.where(replaced[..., None], mask_token.astype(self.dtype), x)
        table = self.position_table()
        offset = int(self.use_cls_token)
        positions = jnp.take(table, ids + offset, axis=0, mode="clip")  # [R, K, D], R = B or 1
        x = x + positions.astype(self.dtype)
        if self.use_cls_token:
            # Not len(x): the batch of an exported program is a symbol, no number.
            x = jnp.concatenate([self._cls_tokens(table, x.shape[0]), x], axis=1)
        return self._transform(x, drop_path_rng)

    def _cls_tokens(self, table: jax.Array, batch_size: int) -> jax.Array:
        """Return the class token at its place in the table of positions, [B, 1, D]."""
        cls_token = self.param("cls_token", NORMAL_002, (1, 1, self.embed_dim))
        first = (cls_token + table[None, :1]).astype(self.dtype)
        return jnp.broadcast_to(first, (batch_size, *first.shape[1:]))

    def _transform(
        self, x: jax.Array, drop_path_rng: jax.Array | None, **context: jax.Array
    ) -> jax.Array:
        """Return tokens after the blocks, which all get `context`, and the final norm."""
        for i in range(self.depth):
            rate, rng = self.drop_path(i, drop_path_rng)
            block = self.block(
                i,
                rate,
                self.num_heads,
                mlp_ratio=self.mlp_ratio,
                make_attention=functools.partial(SelfAttention, qkv_bias=self.qkv_bias),
                tanh_gelu=self.tanh_gelu,
            )
            x = block(x, rng, **context)
        return layer_norm(self.dtype, "norm")(x) if self.final_norm else x

    @nn.nowrap
    def fixed_table(self) -> np.ndarray:
        """Return float32 [1, c + N, D], the sine-cosine table with zeros for the class token."""
        rows, columns = self.grid_size
        table = sincos_2d(self.embed_dim, (rows, columns))
        return np.pad(table, ((int(self.use_cls_token), 0), (0, 0)))[None]

    @nn.nowrap
    def flops(self, units: int, unit_size: int) -> tuple[int, int]:
        """Return forward FLOPs of (embedding, blocks) for one image of which `units` are seen."""
        tokens = units + int(self.use_cls_token)
        blocks = self.depth * block_flops(tokens, self.embed_dim, self.mlp_ratio)
        return 2 * units * unit_size * self.embed_dim, blocks
