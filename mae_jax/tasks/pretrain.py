"""Pre-training: predict what is hidden."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.losses import reconstruction
from mae_jax.types import Batch, Params, Rng, Stream


def normalize_images(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Return uint8 images [B, H, W, C] as float32, (x / 255 - mean) / std for each channel."""
    shape = (1, 1, 1, -1)
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.reshape(jnp.asarray(mean, jnp.float32), shape)) / jnp.reshape(
        jnp.asarray(std, jnp.float32), shape
    )


@dataclasses.dataclass(frozen=True)
class PretrainTask:
    """A masked method with the normalisation of its input.

    Attributes:
      method: a linen module that is a `mae_jax.types.Method`.
      mean: of each channel, in [0, 1].
      std: of each channel, in (0, 1].
    """

    method: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
        """Return fresh parameters; `batch` holds uint8 images of the right shape."""
        inputs = self.inputs(batch)
        plan = self.method.plan(rng, len(inputs["image"]))
        return self.method.init(rng, inputs, plan, method="predict")["params"], {}

    def inputs(self, batch: Batch) -> Batch:
        """Return the batch with its images normalised."""
        return {**batch, "image": normalize_images(batch["image"], self.mean, self.std)}

    def call(self, name: str, params: Params, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """Return what the method's function `name` makes of a batch of uint8 images."""
        return self.method.apply(
            {"params": params}, self.inputs(batch), *args, method=name, **kwargs
        )

    def prepare(self, batch: Batch, rng: Rng) -> Batch:
        """Return the batch with `plan`, its masks: drawn from (seed, step), or the caller's.

        A caller who wants masks of their own puts `plan` into the batch, a `MaskPlan` (as
        `mae_jax.nn.masking.plan_of_mask` makes it of 0/1 masks), or `noise`, float [B, N]: the
        units with the smallest noise are kept.
        """
        if "plan" in batch:
            return batch
        noise = batch.get("noise")
        plan = self.method.plan(rng.key(Stream.MASK), len(batch["image"]), noise)
        return {**batch, "plan": plan}

    def loss(
        self, params: Params, extra: Any, batch: Batch, rng: Rng
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """Return the loss under the masks of `prepare`, no metrics, and `extra` as it was."""
        batch = self.prepare(batch, rng)  # nothing to do in the step, which has done it
        plan, drop_path_rng = batch["plan"], rng.key(Stream.DROP_PATH)
        predictions = self.call("predict", params, batch, plan, drop_path_rng=drop_path_rng)
        return reconstruction.example_losses(predictions).sum(), ({}, extra)
