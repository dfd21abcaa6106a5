"""The vision transformer as an encoder of units and their positions."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.nn.blocks import (
    AttentionFn,
    Dtype,
    TokenDense,
    TransformerBlock,
    block_flops,
    layer_norm,
)
from mae_jax.nn.pos_embed import sincos_2d

POSITIONS = ("fixed", "learned")


def patch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """Return the uniform +-1/sqrt(fan_in) of PyTorch's convolution, which MAE leaves in place."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


class ViTEncoder(nn.Module):
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

    Source: MAE, arXiv 2111.06377, section 3; facebookresearch/mae `forward_encoder`.
    """

    grid_size: tuple[int, int]
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
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=patch_bias_init(units.shape[-1]),
            dtype=self.dtype,
            name="patch_embed",
        )(units)
        if replaced is not None:
            mask_token = self.param(
                "mask_token", nn.initializers.normal(0.02), (1, 1, self.embed_dim)
            )
            x = jnp.where(replaced[..., None], mask_token.astype(self.dtype), x)
        table = self._position_table()
        offset = int(self.use_cls_token)
        positions = jnp.take(table, ids + offset, axis=0, mode="clip")  # [R, K, D], R = B or 1
        x = x + positions.astype(self.dtype)
        if self.use_cls_token:
            cls_token = self.param(
                "cls_token", nn.initializers.normal(0.02), (1, 1, self.embed_dim)
            )
            first = (cls_token + table[None, :1]).astype(self.dtype)
            # Not len(x): the batch of an exported program is a symbol, no number.
            first = jnp.broadcast_to(first, (x.shape[0], *first.shape[1:]))
            x = jnp.concatenate([first, x], axis=1)
        for i in range(self.depth):
            x = TransformerBlock(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                drop_path_rate=self.drop_path_rate * i / max(1, self.depth - 1),
                dtype=self.dtype,
                attention=self.attention,
                name=f"block_{i:02d}",
            )(x, None if drop_path_rng is None else jax.random.fold_in(drop_path_rng, i))
        return layer_norm(self.dtype, "norm")(x) if self.final_norm else x

    def _position_table(self) -> jax.Array:
        """Return float32 [c + N, D]; row 0 belongs to the class token and starts as zeros."""
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions {self.positions!r} is not one of {', '.join(POSITIONS)}")
        table = jnp.pad(
            jnp.asarray(sincos_2d(self.embed_dim, self.grid_size)),
            ((int(self.use_cls_token), 0), (0, 0)),
        )
        if self.positions == "fixed":
            return table
        return self.param("pos_embed", lambda _: table[None])[0]

    def encode_all(self, units: jax.Array) -> jax.Array:
        """Encode all units [B, N, U] with nothing hidden; returns [B, c + N, D]."""
        return self(units, jnp.arange(units.shape[1])[None])

    @nn.nowrap
    def patch_tokens(self, tokens: jax.Array) -> jax.Array:
        """Return the tokens [B, c + K, D] without the class token."""
        return tokens[:, int(self.use_cls_token) :]

    @nn.nowrap
    def flops(self, units: int, unit_size: int) -> tuple[int, int]:
        """Return forward FLOPs of (embedding, blocks) for one image of which `units` are seen."""
        tokens = units + int(self.use_cls_token)
        blocks = self.depth * block_flops(tokens, self.embed_dim, self.mlp_ratio)
        return 2 * units * unit_size * self.embed_dim, blocks
