"""An encoder with a linear head: what a pre-trained encoder is fine-tuned as."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.encoder import Encoder
from mae_jax.nn.batch_norm import FeatureNorm
from mae_jax.nn.layers import Dtype, TokenDense, dropout, layer_norm
from mae_jax.nn.patches import Unit
from mae_jax.types import Batch

POOLINGS = ("mean", "cls")


class ClassifierHead(nn.Module):
    """Pool the tokens and map them to logits.

    Parameters: `linear`, and where the tokens come without one, `norm`.

    Attributes:
      num_classes: number of logits.
      pooling: "mean" of the patch tokens, or "cls", the class token.
      prefix: class tokens in front of the patches, 0 or 1.
      use_norm: norm what is pooled.
      norm_group: examples of a group of the batch norm of a linear probe; 0: there is none.
      dropout_rate: probability with which a value that the linear layer sees is 0 in training.
    """

    num_classes: int
    pooling: str
    prefix: int
    use_norm: bool
    norm_group: int = 0
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Make the layers."""
        if self.norm_group:
            self.batch_norm = FeatureNorm(self.norm_group)
        elif self.use_norm:
            self.norm = layer_norm(self.dtype, None)
        # Fine-tuning starts close to zero, undecided; the two deviations are the official ones. (A
        # normal that PyTorch truncates at -2 and 2, which is never: Flax would, at two deviations.)
        init = nn.initializers.normal(0.01 if self.norm_group else 2e-5)
        self.linear = TokenDense(self.num_classes, kernel_init=init, dtype=self.dtype)

    def pool(self, tokens: jax.Array, *, use_running_average: bool = True) -> jax.Array:
        """Pool tokens [B, c + N, D] to [B, D], what the linear layer sees."""
        patches = tokens[:, self.prefix :].astype(jnp.float32)
        pooled = tokens[:, 0] if self.pooling == "cls" else patches.mean(axis=1)
        if self.norm_group:
            return self.batch_norm(pooled, use_running_average=use_running_average)
        return self.norm(pooled) if self.use_norm else pooled

    def __call__(
        self,
        tokens: jax.Array,
        *,
        dropout_rng: jax.Array | None = None,
        use_running_average: bool = True,
    ) -> jax.Array:
        """Map tokens [B, c + N, D] to logits float32 [B, classes]."""
        pooled = self.pool(tokens, use_running_average=use_running_average)
        pooled = dropout(pooled, self.dropout_rate, dropout_rng)
        return self.linear(pooled).astype(jnp.float32)


class Classifier(nn.Module):
    """Images to logits. The parameters are `encoder` and `head`.

    With mean pooling the encoder has no final norm: its place is after the pooling, in the head.
    (An encoder with `norms_before_pooling` keeps its own; one with `norms_after_pooling` has the
    head's as well.) A linear probe (`norm_group`) keeps the encoder's, which is frozen, and
    normalises by batch.

    Attributes:
      unit: how an image is cut into units.
      encoder: sees all of them.
      num_classes: number of logits.
      pooling: a name in `POOLINGS`.
      norm_group: see `ClassifierHead`.
      head_dropout: its `dropout_rate`.

    Source: MAE, arXiv 2111.06377, appendix A.1 (end-to-end fine-tuning, linear probing);
    facebookresearch/mae `models_vit.py`, `main_linprobe.py`.
    """

    unit: Unit
    encoder: Encoder
    num_classes: int
    pooling: str = "mean"
    norm_group: int = 0
    head_dropout: float = 0.0

    def setup(self) -> None:
        """Make the head."""
        self.head = ClassifierHead(
            self.num_classes,
            self.pooling,
            int(self.encoder.use_cls_token),
            use_norm=not self.encoder.final_norm or self.encoder.norms_after_pooling,
            norm_group=self.norm_group,
            dropout_rate=self.head_dropout,
            dtype=self.encoder.dtype,
        )

    def __call__(
        self,
        images: jax.Array,
        *,
        drop_path_rng: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
        use_running_average: bool = True,
    ) -> jax.Array:
        """Classify images.

        Args:
          images: normalised float32 [B, H, W, C].
          drop_path_rng: key of drop path; None: none (evaluation).
          dropout_rng: key of the head's dropout, likewise.
          use_running_average: normalise with the running statistics of `batch_stats`, if there is
            a batch norm, and not with the batch's (training).

        Returns:
          Logits float32 [B, classes].
        """
        tokens = self.encoder.encode_all(self.unit.split(images), drop_path_rng=drop_path_rng)
        return self.head(tokens, dropout_rng=dropout_rng, use_running_average=use_running_average)

    @nn.nowrap
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and dtype of an image."""
        return {"image": jax.ShapeDtypeStruct(self.unit.shape, jnp.uint8)}

    def logits(self, batch: Batch) -> jax.Array:
        """Return float32 [B, classes] of `batch["image"]`, normalised float32 [B, H, W, C]."""
        return self(batch["image"])

    def features(self, batch: Batch) -> jax.Array:
        """Return float32 [B, D], what the linear layer sees."""
        tokens = self.encoder.encode_all(self.unit.split(batch["image"]))
        return self.head.pool(tokens).astype(jnp.float32)

    @nn.nowrap
    def layer_id(self, name: str) -> int:
        """Return the layer of the parameter at a path such as `encoder/block_00/norm1/scale`."""
        module, _, rest = name.partition("/")
        return self.encoder.layer_id(rest if module == "encoder" else "")

    def step_flops(self, trainable_blocks: float = -1) -> int:
        """Return FLOPs of a training step per image: products only, backward twice the forward.

        Args:
          trainable_blocks: how many of the last blocks are trained; 0: the head alone, -1: all.
            What is frozen has no backward pass; what is trained above it has, but for the
            gradient of its own input.
        """
        embed, blocks = self.encoder.flops(self.unit.count, self.unit.size)
        head = 2 * self.encoder.output_dim * self.num_classes
        forward = embed + blocks + head
        if trainable_blocks == -1:
            return 3 * forward - embed  # pixels need no gradient
        if trainable_blocks == 0:
            return forward + head
        return forward + 2 * head + int(2 * blocks * trainable_blocks / sum(self.encoder.depths))
