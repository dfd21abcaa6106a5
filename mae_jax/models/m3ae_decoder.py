"""M3AE's decoder: from the tokens of what was kept to pixels and words of what was hidden."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.m3ae import key_mask, take_words
from mae_jax.nn.attention import AttentionFn
from mae_jax.nn.blocks import TransformerBlock, block_flops
from mae_jax.nn.layers import NORMAL_002, Dtype, layer_norm, linear
from mae_jax.nn.pos_embed import sincos_1d, sincos_2d
from mae_jax.types import MaskPlan

MODALITIES = ("image", "text")
"""In the order of their tokens."""


class PredictionHead(nn.Module):
    """From tokens to the values of what they stand for: an MLP, or one linear layer.

    Parameters: `pred`, and with a depth n `norm` and `fc_0`, `norm_0` ... of n layers.

    Attributes:
      output_dim: values to predict.
      depth: n, layers before the last.
    """

    output_dim: int
    depth: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, M, d] to float32 [B, M, output_dim]."""
        if self.depth:
            x = layer_norm(self.dtype, "norm")(x)
        for i in range(self.depth):
            y = nn.gelu(linear(x.shape[-1], self.dtype, f"fc_{i}")(x), approximate=True)
            y = layer_norm(self.dtype, f"norm_{i}")(y)
            x = x + y if i else y
        return linear(self.output_dim, self.dtype, "pred")(x).astype(jnp.float32)


class M3AEDecoder(nn.Module):
    """Fill the gaps of image and text with a token of each, run a few blocks, predict both.

    Tokens stay in kept-then-hidden order, as in `mae_jax.models.decoder.Decoder`, and the heads see
    the hidden ones alone: with a vocabulary of 30,000 the logits are most of the decoder's memory.

    Parameters: `embed`, `block_00` ..., `norm`, and for each modality that it is called with
    `image_mask` [1, 1, d], `image_type` [1, 1, d], `image_head`, and the same of `text`.

    Attributes:
      grid_size: patches (down, across).
      unit_size: U, values of a patch.
      vocabulary_size: V, words to choose from.
      text_length: how many places of words there are, of the longest text.
      embed_dim: width d.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_ratio: width of the MLP over d.
      head_depth: layers of each head before the last.
      use_type_vectors: have the vectors that tell patches from words.

    Source: M3AE, arXiv 2205.14204, section 3; young-geng/m3ae_public.
    """

    grid_size: tuple[int, int]
    unit_size: int
    vocabulary_size: int
    text_length: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    head_depth: int = 0
    use_type_vectors: bool = True
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        latent: jax.Array,
        plan: Mapping[str, MaskPlan],
        padding: jax.Array | None = None,
        *,
        everything: Collection[str] = (),
    ) -> dict[str, jax.Array]:
        """Predict from the encoder's output.

        Args:
          latent: [B, 1 + K, D], a class token and what was kept of each modality, in their order.
          plan: by modality, one or both.
          padding: bool [B, L], True where there is no word; needed with text.
          everything: modalities of which the kept places are to be predicted too.

        Returns:
          By modality, float32 [B, M, U] pixels and float32 [B, M', V] logits of the hidden places,
          in the order of the plan; after those of the kept ones, if of everything. A modality of
          which nothing is to be predicted is left out.
        """
        latent = linear(self.embed_dim, self.dtype, "embed")(latent)
        tokens, start = [latent[:, :1]], 1
        for name in MODALITIES:
            if name in plan:
                stop = start + plan[name].ids_keep.shape[1]
                tokens.append(self._completed(name, latent[:, start:stop], plan[name]))
                start = stop
        x = jnp.concatenate(tokens, axis=1)
        context = {}
        if "text" in plan:
            if padding is None:
                raise ValueError("padding: expected bool [B, L] with a text, got None")
            ids = jnp.concatenate([plan["text"].ids_keep, plan["text"].ids_mask], axis=1)
            context = {"mask": key_mask(x.shape[1], take_words(padding, ids))}
        for i in range(self.depth):
            x = TransformerBlock(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                dtype=self.dtype,
                attention=self.attention,
                remat=self.remat,
                tanh_gelu=True,
                name=f"block_{i:02d}",
            )(x, **context)
        norm = layer_norm(self.dtype, "norm")
        outputs, start = {}, 1
        for name in MODALITIES:
            if name in plan:
                keep, hidden = plan[name].ids_keep.shape[1], plan[name].ids_mask.shape[1]
                skip = 0 if name in everything else keep
                if keep + hidden > skip:
                    wanted = x[:, start + skip : start + keep + hidden]
                    head = PredictionHead(
                        self._output_dim(name), self.head_depth, self.dtype, name=f"{name}_head"
                    )
                    outputs[name] = head(norm(wanted))
                start += keep + hidden
        return outputs

    def _completed(self, name: str, x: jax.Array, plan: MaskPlan) -> jax.Array:
        """Return the tokens [B, N, d] of a modality from the kept ones [B, K, d]."""
        shape = (1, 1, self.embed_dim)
        if hidden := plan.ids_mask.shape[1]:
            token = self.param(f"{name}_mask", NORMAL_002, shape).astype(self.dtype)
            gaps = jnp.broadcast_to(token, (x.shape[0], hidden, self.embed_dim))
            x = jnp.concatenate([x, gaps], axis=1)
        table = self._table(name)
        ids = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)
        x = x + jnp.take(table, ids, axis=0, mode="clip").astype(self.dtype)
        if self.use_type_vectors:
            x = x + self.param(f"{name}_type", NORMAL_002, shape).astype(self.dtype)
        return x

    @nn.nowrap
    def fixed_table(self) -> np.ndarray:
        """Return float32 [N, d], the positions of the patches."""
        return sincos_2d(self.embed_dim, self.grid_size)

    @nn.nowrap
    def _table(self, name: str) -> jax.Array:
        """Return the positions [N, d] of a modality."""
        if name == "image":
            return jnp.asarray(self.fixed_table())
        return jnp.asarray(sincos_1d(self.embed_dim, self.text_length, interleaved=False))

    @nn.nowrap
    def _output_dim(self, name: str) -> int:
        """Return how many values are predicted for a place of a modality."""
        return self.unit_size if name == "image" else self.vocabulary_size

    @nn.nowrap
    def flops(self, latent: int, latent_dim: int, tokens: int, predicted: Mapping[str, int]) -> int:
        """Return forward FLOPs for one example: bridge from the encoder, blocks, and heads.

        Args:
          latent: tokens that come from the encoder.
          latent_dim: their width.
          tokens: in the blocks, class token included.
          predicted: by modality, the places that its head is applied to.
        """
        bridge = 2 * latent * latent_dim * self.embed_dim
        blocks = self.depth * block_flops(tokens, self.embed_dim, self.mlp_ratio)
        heads = sum(
            2 * count * self.embed_dim * (self.head_depth * self.embed_dim + self._output_dim(name))
            for name, count in predicted.items()
        )
        return bridge + blocks + heads
