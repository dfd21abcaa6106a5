"""Pre-training: predict what is hidden."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from mae_jax.losses import reconstruction
from mae_jax.tasks.inputs import ImageModel
from mae_jax.types import Batch, Params, Rng, Stream


@dataclasses.dataclass(frozen=True)
class PretrainTask(ImageModel):
    """A masked method, a linen module that is a `mae_jax.types.Method`, as a task."""

    @property
    def method(self) -> Any:
        """The module."""
        return self.module

    def step_flops(self) -> int:
        """Return the FLOPs of one training step per image."""
        return self.method.step_flops()

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
        """Return fresh parameters; `batch` holds uint8 images of the right shape."""
        inputs = self.inputs(batch)
        plan = self.method.plan(rng, len(inputs["image"]))
        return self.method.init(rng, inputs, plan, method="predict")["params"], {}

    def prepare(self, batch: Batch, rng: Rng) -> Batch:
        """Return the batch with `plan`, its masks: drawn from (seed, step), or the caller's.

        And with what the method's `prepare` adds.

        A caller who wants masks of their own puts `plan` into the batch, a `MaskPlan` (as
        `mae_jax.nn.masking.plan_of_mask` makes it of 0/1 masks), or `noise`, float [B, N]: the
        units with the smallest noise are kept.
        """
        if "plan" in batch:
            return self.method.prepare(batch)
        noise = batch.get("noise")
        plan = self.method.plan(rng.key(Stream.MASK), len(batch["image"]), noise)
        return self.method.prepare({**batch, "plan": plan})

    def loss(
        self, params: Params, extra: Any, batch: Batch, rng: Rng
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """Return the loss under the masks of `prepare`, no metrics, and `extra` as it was."""
        if "plan" not in batch:  # the step has prepared it
            batch = self.prepare(batch, rng)
        plan, drop_path_rng = batch["plan"], rng.key(Stream.DROP_PATH)
        predictions = self.call("predict", params, batch, plan, drop_path_rng=drop_path_rng)
        return reconstruction.example_losses(predictions).sum(), ({}, extra)
