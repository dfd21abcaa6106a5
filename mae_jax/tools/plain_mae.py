"""MAE in Flax as figure 1 of the paper draws it, and nothing done for speed: what to compare with.

All patches are embedded and most thrown away, mask tokens are put back in their places by a gather,
the head runs on all tokens, and the mask chooses what counts in the loss. Parameters have the
names and shapes of `mae_jax.pretrain.mae`, and the loss of the same ones is the same.

Source: arXiv 2111.06377, section 3.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.nn.patches import PatchUnit, normalize_units
from mae_jax.nn.pos_embed import sincos_2d

EPS = 1e-6
XAVIER = nn.initializers.xavier_uniform()
TOKEN = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Softmax attention, written out."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] to the same."""
        b, t, d = x.shape
        head_dim = d // self.num_heads
        qkv = nn.Dense(3 * d, kernel_init=XAVIER, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(b, t, 3, self.num_heads, head_dim).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # [B, heads, T, head_dim]
        weights = nn.softmax((q @ k.swapaxes(-2, -1)) * head_dim**-0.5, axis=-1)
        x = (weights @ v).swapaxes(1, 2).reshape(b, t, d)
        return nn.Dense(d, kernel_init=XAVIER, dtype=self.dtype, name="proj")(x)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] to the same."""
        d = x.shape[-1]
        x = nn.Dense(4 * d, kernel_init=XAVIER, dtype=self.dtype, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(d, kernel_init=XAVIER, dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer block."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] to the same."""
        normed = nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm1")(x)
        x = x + Attention(self.num_heads, self.dtype, name="attn")(normed)
        normed = nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm2")(x)
        return x + Mlp(self.dtype, name="mlp")(normed)


class PlainEncoder(nn.Module):
    """Embeds all patches and encodes those that are kept."""

    embed_dim: int
    depth: int
    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, patches: jax.Array, ids_keep: jax.Array) -> jax.Array:
        """Map patches [B, N, U] to tokens [B, 1 + K, D] of those at `ids_keep` [B, K]."""
        side = int(patches.shape[1] ** 0.5)
        dense = nn.Dense(self.embed_dim, kernel_init=XAVIER, dtype=self.dtype, name="patch_embed")
        x = dense(patches) + sincos_2d(self.embed_dim, (side, side))[None].astype(self.dtype)
        x = jnp.take_along_axis(x, ids_keep[..., None], axis=1)
        token = self.param("cls_token", TOKEN, (1, 1, self.embed_dim)).astype(self.dtype)
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        for i in range(self.depth):
            x = Block(self.num_heads, self.dtype, name=f"block_{i:02d}")(x)
        return nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm")(x)


class PlainDecoder(nn.Module):
    """Puts mask tokens into the gaps and predicts all patches."""

    unit_size: int
    embed_dim: int
    depth: int
    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, ids_restore: jax.Array) -> jax.Array:
        """Map tokens [B, 1 + K, D] to patches [B, N, U]; `ids_restore` [B, N] sorts them."""
        b, count = ids_restore.shape
        side = int(count**0.5)
        x = nn.Dense(self.embed_dim, kernel_init=XAVIER, dtype=self.dtype, name="embed")(x)
        token = self.param("mask_token", TOKEN, (1, 1, self.embed_dim)).astype(self.dtype)
        gaps = jnp.tile(token, (b, count + 1 - x.shape[1], 1))
        patches = jnp.concatenate([x[:, 1:], gaps], axis=1)
        patches = jnp.take_along_axis(patches, ids_restore[..., None], axis=1)
        table = sincos_2d(self.embed_dim, (side, side))[None].astype(self.dtype)
        x = jnp.concatenate([x[:, :1], patches + table], axis=1)
        for i in range(self.depth):
            x = Block(self.num_heads, self.dtype, name=f"block_{i:02d}")(x)
        x = nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm")(x)
        dense = nn.Dense(self.unit_size, kernel_init=XAVIER, dtype=self.dtype, name="pred")
        return dense(x)[:, 1:].astype(jnp.float32)


class PlainMAE(nn.Module):
    """The whole of it: images and noise to the loss.

    Attributes:
      patch_size: pixels.
      embed_dim: of the encoder; so are `depth` and `num_heads`.
      decoder_embed_dim: of the decoder; so are `decoder_depth` and `decoder_num_heads`.
      mask_ratio: share of patches to hide.
      dtype: of the products.
    """

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    mask_ratio: float = 0.75
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, noise: jax.Array) -> jax.Array:
        """Return the loss of square images [B, S, S, C] under the masks of noise [B, N]."""
        _, rows, columns, channels = images.shape
        patches = PatchUnit((rows, columns), self.patch_size, channels).split(images)
        count = patches.shape[1]
        keep = int(count * (1 - self.mask_ratio))
        order = jnp.argsort(noise, axis=1)
        ids_restore = jnp.argsort(order, axis=1)
        encoder = PlainEncoder(
            self.embed_dim, self.depth, self.num_heads, self.dtype, name="encoder"
        )
        decoder = PlainDecoder(
            patches.shape[-1],
            self.decoder_embed_dim,
            self.decoder_depth,
            self.decoder_num_heads,
            self.dtype,
            name="decoder",
        )
        predicted = decoder(encoder(patches, order[:, :keep]), ids_restore)
        hidden = (ids_restore >= keep).astype(jnp.float32)  # [B, N]
        error = jnp.square(predicted - normalize_units(patches)).mean(axis=-1)
        return (error * hidden).sum() / hidden.sum()
