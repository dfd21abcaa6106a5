"""An encoder with a linear head: what a pre-trained encoder is fine-tuned as."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.vit import ViTEncoder
from mae_jax.nn.blocks import Dtype, TokenDense, layer_norm
from mae_jax.nn.patches import PatchUnit
from mae_jax.types import Batch

POOLINGS = ("mean", "cls")


class ClassifierHead(nn.Module):
    """Pool the tokens and map them to logits.

    Parameters: `linear`, and with mean pooling `norm`.

    Attributes:
      num_classes: number of logits.
      pooling: "mean" of the patch tokens, then a norm; or "cls", the class token as it is.
      prefix: class tokens in front of the patches, 0 or 1.
    """

    num_classes: int
    pooling: str
    prefix: int
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Make the layers."""
        if self.pooling == "mean":
            self.norm = layer_norm(self.dtype, None)
        # Close to zero, as the official fine-tuning has it, so that training starts undecided.
        init = nn.initializers.truncated_normal(2e-5)
        self.linear = TokenDense(self.num_classes, kernel_init=init, dtype=self.dtype)

    def pool(self, tokens: jax.Array) -> jax.Array:
        """Pool tokens [B, c + N, D] to [B, D], what the linear layer sees."""
        if self.pooling == "cls":
            return tokens[:, 0]
        return self.norm(tokens[:, self.prefix :].astype(jnp.float32).mean(axis=1))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens [B, c + N, D] to logits float32 [B, classes]."""
        return self.linear(self.pool(tokens)).astype(jnp.float32)


class Classifier(nn.Module):
    """Images to logits. The parameters are `encoder` and `head`.

    With mean pooling the encoder has no final norm: its place is after the pooling, in the head.

    Attributes:
      unit: how an image is cut into units.
      encoder: sees all of them.
      num_classes: number of logits.
      pooling: a name in `POOLINGS`.

    Source: MAE, arXiv 2111.06377, appendix A.1 (end-to-end fine-tuning); facebookresearch/mae
    `models_vit.py`.
    """

    unit: PatchUnit
    encoder: ViTEncoder
    num_classes: int
    pooling: str = "mean"

    def setup(self) -> None:
        """Make the head."""
        self.head = ClassifierHead(
            self.num_classes,
            self.pooling,
            int(self.encoder.use_cls_token),
            dtype=self.encoder.dtype,
        )

    def __call__(self, images: jax.Array, *, drop_path_rng: jax.Array | None = None) -> jax.Array:
        """Classify images, normalised float32 [B, H, W, C]; returns logits float32 [B, classes]."""
        ids = jnp.arange(self.unit.count)[None]
        return self.head(self.encoder(self.unit.split(images), ids, drop_path_rng=drop_path_rng))

    def logits(self, batch: Batch) -> jax.Array:
        """Return float32 [B, classes] of `batch["image"]`, normalised float32 [B, H, W, C]."""
        return self(batch["image"])

    def features(self, batch: Batch) -> jax.Array:
        """Return float32 [B, D], what the linear layer sees."""
        tokens = self.encoder.encode_all(self.unit.split(batch["image"]))
        return self.head.pool(tokens).astype(jnp.float32)
