"""An encoder with a linear head: what a pre-trained encoder is fine-tuned as."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.vit import ViTEncoder
from mae_jax.nn.blocks import Dtype, TokenDense, layer_norm
from mae_jax.nn.patches import PatchUnit

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

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens [B, c + N, D] to logits float32 [B, classes]."""
        if self.pooling == "mean":
            pooled = tokens[:, self.prefix :].astype(jnp.float32).mean(axis=1)
            pooled = layer_norm(self.dtype, "norm")(pooled)
        else:
            pooled = tokens[:, 0]
        # Close to zero, as the official fine-tuning has it, so that training starts undecided.
        init = nn.initializers.truncated_normal(2e-5)
        linear = TokenDense(self.num_classes, kernel_init=init, dtype=self.dtype, name="linear")
        return linear(pooled).astype(jnp.float32)


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

    @nn.compact
    def __call__(self, images: jax.Array, *, drop_path_rng: jax.Array | None = None) -> jax.Array:
        """Classify images, normalised float32 [B, H, W, C]; returns logits float32 [B, classes]."""
        units = self.unit.split(images)
        ids = jnp.arange(self.unit.count)[None]
        tokens = self.encoder(units, ids, drop_path_rng=drop_path_rng)
        head = ClassifierHead(
            self.num_classes,
            self.pooling,
            int(self.encoder.use_cls_token),
            dtype=self.encoder.dtype,
            name="head",
        )
        return head(tokens)
