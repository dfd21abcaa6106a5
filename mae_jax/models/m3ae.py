"""M3AE's encoder: one transformer over the patches of an image and the words beside it."""

from __future__ import annotations

from typing import Any, Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.models.vit import ViTEncoder
from mae_jax.nn import masking
from mae_jax.nn.blocks import block_flops
from mae_jax.nn.layers import NORMAL_002, linear
from mae_jax.nn.pos_embed import sincos_1d


class Words(flax.struct.PyTreeNode):
    """Words to be seen.

    Attributes:
      ids: int32 [B, K] which word of the vocabulary each is.
      places: int32 [R, K] their places in the text, R = B or 1.
      padding: bool [B, K], True where there is no word: whatever stands there, nothing looks at it.
    """

    ids: jax.Array
    places: jax.Array
    padding: jax.Array


class M3AEEncoder(ViTEncoder):
    """A ViT that sees patches, words, or both, each with a vector of its kind.

    The sequence is the class token, which has neither position nor kind, patches, words. Without
    words it is a ViT with `image_type` and the tanh GELU, and has no parameters of words; that is
    what a classifier has.

    Parameters: those of `ViTEncoder`, `image_type` [1, 1, D], and with words
    `text_embed/embedding` [V, D] and `text_type` [1, 1, D].

    Attributes:
      vocabulary_size: V; 0: it sees no words.
      text_length: how many places of words there are, of the longest text.
      use_type_vectors: have the vectors that tell patches from words.

    Source: M3AE, arXiv 2205.14204, section 3; young-geng/m3ae_public. There the tables of positions
    are computed in float32; ours, in float64, differ by up to 1e-6 for patches, 5e-6 for 64 words
    and 2e-5 for 256.
    """

    vocabulary_size: int = 0
    text_length: int = 0
    use_type_vectors: bool = True

    tanh_gelu = True
    # The authors' classifier norms the tokens, and what is pooled of them once more.
    norms_before_pooling = True
    norms_after_pooling = True
    classifier_positions = "fixed"

    @nn.compact
    def __call__(
        self,
        units: jax.Array | None,
        ids: jax.Array | None,
        *,
        replaced: jax.Array | None = None,
        drop_path_rng: jax.Array | None = None,
        words: Words | None = None,
    ) -> jax.Array:
        """Encode patches, words, or both.

        Args:
          units: [B, K, U]; None: there is no image.
          ids: int [R, K] their places in the grid, R = B or 1.
          replaced: must be None: the encoder has no token to put there.
          drop_path_rng: key of drop path; None: none (evaluation).
          words: K' words; None: there is no text.

        Returns:
          [B, 1 + K + K', D] in `dtype`, after the final norm if there is one: the class token,
          patches and words in the order given. Where padding stands there is a token too.

        Raises:
          ConfigError: if positions are unknown, `replaced` is given, or words to an encoder that
            has no vocabulary.
        """
        if replaced is not None:
            raise ConfigError("replaced: expected None, for M3AE's encoder has no mask token")
        table = self.position_table()
        parts: list[jax.Array] = []
        if units is not None and ids is not None:
            embed = linear(self.embed_dim, self.dtype, "patch_embed", kernel_init=self.embed_init)
            x = embed(units)
            positions = jnp.take(table, ids + 1, axis=0, mode="clip")
            parts.append(x + positions.astype(self.dtype) + self._type("image_type"))
        if words is not None:
            parts.append(self._embedded(words))
        x = jnp.concatenate([self._cls_tokens(table, parts[0].shape[0]), *parts], axis=1)
        context = {} if words is None else {"mask": key_mask(x.shape[1], words.padding)}
        return self._transform(x, drop_path_rng, **context)

    def _embedded(self, words: Words) -> jax.Array:
        """Return words as tokens [B, K', D]."""
        if not self.vocabulary_size:
            raise ConfigError("model.vocabulary_size 0: this M3AE takes images alone, got words")
        embed = nn.Embed(
            self.vocabulary_size,
            self.embed_dim,
            # Not 0.02, as everywhere else.
            embedding_init=nn.initializers.normal(1.0),
            # Words are many and each is rare: the gradient of the table is summed in float32.
            dtype=jnp.float32,
            name="text_embed",
        )
        # Where padding stands any number may, also one that is no word.
        x = embed(jnp.where(words.padding, 0, words.ids)).astype(self.dtype)
        table = jnp.asarray(sincos_1d(self.embed_dim, self.text_length, interleaved=False))
        positions = jnp.take(table, words.places, axis=0, mode="clip")
        return x + positions.astype(self.dtype) + self._type("text_type")

    def _type(self, name: str) -> jax.Array | float:
        """Return the vector [1, 1, D] of a kind of token."""
        if not self.use_type_vectors:
            return 0.0
        return self.param(name, NORMAL_002, (1, 1, self.embed_dim)).astype(self.dtype)

    @nn.nowrap
    def drop_path(self, i: int, rng: jax.Array | None) -> tuple[float, jax.Array | None]:
        """Return rate and key of block i: the authors drop from all blocks alike."""
        return self.drop_path_rate, None if rng is None else jax.random.fold_in(rng, i)

    @nn.nowrap
    def as_backbone(self, **fields: Any) -> Self:
        """Return the encoder as a classifier has it, of images alone, with other `fields`."""
        return super().as_backbone(**{"vocabulary_size": 0, "text_length": 0} | fields)

    @nn.nowrap
    def flops(self, units: int, unit_size: int, words: int = 0) -> tuple[int, int]:
        """Return forward FLOPs of (embedding, blocks) for what is seen of one example."""
        blocks = self.depth * block_flops(1 + units + words, self.embed_dim, self.mlp_ratio)
        return 2 * units * unit_size * self.embed_dim, blocks


def key_mask(tokens: int, padding: jax.Array) -> jax.Array:
    """Return bool [B, 1, T], True where any token may look: everywhere but at padding.

    Args:
      tokens: T.
      padding: bool [B, K], of the last K of them.
    """
    before = tokens - padding.shape[1]
    return jnp.pad(~padding, ((0, 0), (before, 0)), constant_values=True)[:, None]


def take_words(text: jax.Array, ids: jax.Array) -> jax.Array:
    """Gather [B, L] (words, padding) at `ids` [R, K], R = B or 1; returns [B, K]."""
    return masking.take(text[..., None], ids)[..., 0]
