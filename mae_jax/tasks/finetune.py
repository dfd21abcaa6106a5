"""Training a classifier: fine-tuning, whole or in part, linear probing, and from scratch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from mae_jax.tasks.erasing import RandomErasing, erase
from mae_jax.tasks.inputs import ImageModel
from mae_jax.tasks.mixup import Mixup, smooth_targets
from mae_jax.types import Batch, Params, Rng, Stream


@dataclasses.dataclass(frozen=True)
class FinetuneTask(ImageModel):
    """A `Classifier` as a task: cross entropy on labels that may be smoothed and mixed.

    Images are normalised, then erased, then mixed, in the order of timm. What is trained, at which
    rates and by which optimiser, is not known here.

    Attributes:
      mixup: mixup and CutMix, with their own label smoothing; None: neither.
      erasing: of boxes; None: none.
      label_smoothing: of the targets where there is no `mixup`.
      trainable_blocks: for the count of FLOPs alone; see `Classifier.step_flops`.

    Source: MAE, arXiv 2111.06377, appendix A.1; facebookresearch/mae `engine_finetune.py`.
    """

    mixup: Mixup | None = None
    erasing: RandomErasing | None = None
    label_smoothing: float = 0.0
    trainable_blocks: float = -1

    @property
    def classifier(self) -> Any:
        """The module, a `Classifier`."""
        return self.module

    def step_flops(self) -> int:
        """Return the FLOPs of one training step per image."""
        return self.classifier.step_flops(self.trainable_blocks)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
        """Return fresh parameters and batch statistics; `batch` holds uint8 images."""
        variables = dict(self.module.init(rng, self.inputs(batch)["image"]))
        params = variables.pop("params")
        return params, variables

    def prepare(self, batch: Batch, rng: Rng) -> Batch:
        """Return the batch with the boxes to erase, the partners to mix with, and how to mix.

        Each example gets its partner's image (as uint8), label and box, so that the batch can be
        cut into any parts.
        """
        shape = batch["image"].shape
        count, size = shape[0], (shape[-3], shape[-2])
        batch = dict(batch)
        if self.erasing is not None:
            batch["erasure"] = self.erasing.draw(rng.key(Stream.ERASING), count, size)
        if self.mixup is not None:
            names = ("image", "label", "erasure")
            own = {name: batch[name] for name in names if name in batch}
            batch["partner"] = jax.tree.map(self.mixup.partners, own)
            batch["mixture"] = self.mixup.draw(rng.key(Stream.MIXUP), count, size)
        return batch

    def examples(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return what the network is trained on, of a prepared batch.

        Returns:
          Images float32, normalised, erased and mixed, and targets float32 [B, K].
        """
        images = self._images(batch)
        if self.mixup is None:
            classes = self.classifier.num_classes
            return images, smooth_targets(batch["label"], classes, self.label_smoothing)
        partner = batch["partner"]
        partner_images = self._images(partner)
        return self.mixup.mix(
            images, batch["label"], partner_images, partner["label"], batch["mixture"]
        )

    def _images(self, batch: Batch) -> jax.Array:
        images = self.inputs(batch)["image"]
        return erase(images, batch["erasure"]) if "erasure" in batch else images

    def loss(
        self, params: Params, extra: Any, batch: Batch, rng: Rng
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """Return the mean cross entropy of a prepared batch, no metrics, and new statistics."""
        images, targets = self.examples(batch)
        logits, extra = self.module.apply(
            {"params": params, **extra},
            images,
            drop_path_rng=rng.key(Stream.DROP_PATH),
            dropout_rng=rng.key(Stream.DROPOUT),
            use_running_average=False,
            mutable=list(extra),
        )
        return optax.softmax_cross_entropy(logits, targets).mean(), ({}, extra)
