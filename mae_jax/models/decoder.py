"""The light decoder: from encoded units to the values of all or of the hidden ones."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.nn.blocks import (
    AttentionFn,
    Dtype,
    TransformerBlock,
    block_flops,
    layer_norm,
    linear,
)
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.types import MaskPlan


class Decoder(nn.Module):
    """Fill the gaps with a mask token, add fixed positions, run a few blocks, predict values.

    Tokens stay in kept-then-hidden order and get the positions of that order: attention does not
    see the order, so this equals un-shuffling them first, without a gather of activations.

    Parameters: `embed`, `mask_token` [1, 1, d] if units are hidden, `block_00` ..., `norm`, `pred`.

    Attributes:
      grid_size: units (down, across).
      unit_size: U, values to predict for each unit.
      embed_dim: width d.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_ratio: width of the MLP over d.

    Source: MAE, arXiv 2111.06377, section 3; facebookresearch/mae `forward_decoder`.
    """

    grid_size: tuple[int, int]
    unit_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention

    @nn.compact
    def __call__(self, latent: jax.Array, plan: MaskPlan, *, skip: int | None = None) -> jax.Array:
        """Predict units from the encoder's output.

        Args:
          latent: [B, c + K, D]; what comes before the K units (a class token) has no position.
          plan: the mask under which `latent` was made.
          skip: how many units, in kept-then-hidden order, to make no prediction for; None: the K
            kept ones, 0: none, for pictures.

        Returns:
          float32 [B, N - skip, U] in kept-then-hidden order.
        """
        keep, hidden = plan.ids_keep.shape[1], plan.ids_mask.shape[1]
        x = linear(self.embed_dim, self.dtype, "embed")(latent)
        prefix = x.shape[1] - keep
        if hidden:
            mask_token = self.param(
                "mask_token", nn.initializers.normal(0.02), (1, 1, self.embed_dim)
            )
            gaps = jnp.broadcast_to(
                mask_token.astype(self.dtype), (x.shape[0], hidden, self.embed_dim)
            )
            x = jnp.concatenate([x, gaps], axis=1)
        table = jnp.asarray(sincos_2d(self.embed_dim, self.grid_size))
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
                name=f"block_{i:02d}",
            )(x)
        x = x[:, prefix + (keep if skip is None else skip) :]
        x = layer_norm(self.dtype, "norm")(x)
        return linear(self.unit_size, self.dtype, "pred")(x).astype(jnp.float32)

    @nn.nowrap
    def flops(self, tokens: int, latent: int, latent_dim: int, predicted: int) -> int:
        """Return forward FLOPs for one image: bridge from the encoder, blocks, and head.

        Args:
          tokens: in the blocks, class token included.
          latent: tokens that come from the encoder.
          latent_dim: their width.
          predicted: units that the head is applied to.
        """
        bridge = 2 * latent * latent_dim * self.embed_dim
        blocks = self.depth * block_flops(tokens, self.embed_dim, self.mlp_ratio)
        return bridge + blocks + 2 * predicted * self.embed_dim * self.unit_size
