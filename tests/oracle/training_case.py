"""Our side of the comparison of training: updates of a small ViT by the real step, and mistakes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from mae_jax.nn import masking
from mae_jax.pretrain import mae
from mae_jax.recipes import IMAGENET_MEAN, IMAGENET_STD
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train import optimizer, schedules
from mae_jax.train.state import TrainState
from mae_jax.train.step import train_step
from mae_jax.types import Rng
from tests.oracle.agreement import Trained, Tree
from tests.oracle.mae_case import nested

MODEL: dict[str, Any] = {
    "size": "vit_s",
    "image_size": (32, 32),
    "patch_size": 8,
    "depth": 2,
    "decoder_depth": 2,
}
"""Fields of `mae.make`: 384 wide with 2 + 2 blocks, 16 patches."""

SEED = 0
BATCH_SIZE = 16
TOTAL_STEPS = 50
WARMUP_STEPS = 10
# Of the order of the recipe's 2.4e-3, so that decay, which goes with it, shows in few steps.
PEAK = 1.5e-3
B1, B2, EPS, DECAY = 0.9, 0.95, 1e-8, 0.05


class Batch(NamedTuple):
    """What both sides get at a step.

    Attributes:
      image: uint8 [B, H, W, C].
      noise: float32 [B, N], of which the smallest are kept, with the masks that our run draws.
    """

    image: np.ndarray
    noise: np.ndarray


def make_task() -> PretrainTask:
    """Return what is trained."""
    return PretrainTask(mae.make(**MODEL), IMAGENET_MEAN, IMAGENET_STD)


def make_batches(task: PretrainTask) -> list[Batch]:
    """Return smooth random images for each step, another set each, and the masks of the run."""

    @jax.jit
    def ranks(image: jax.Array, step: int) -> jax.Array:
        plan = task.prepare({"image": image}, Rng(jax.random.key(SEED), step))["plan"]
        return masking.ids_restore(plan)

    def one(step: int) -> Batch:
        rng = np.random.default_rng((SEED, step))
        coarse = rng.integers(0, 256, size=(BATCH_SIZE, 3, 3, 3), dtype=np.uint8)
        image = np.stack([_enlarged(x) for x in coarse])
        # The rank of each patch: sorting the ranks gives the plan back, and no two are equal.
        return Batch(image, np.asarray(ranks(image, step), np.float32))

    return [one(step) for step in range(TOTAL_STEPS)]


def _enlarged(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(MODEL["image_size"], Image.Resampling.BICUBIC))


class Recipe(NamedTuple):
    """What of the recipe a mistake may change.

    Attributes:
      b2: of AdamW.
      eps: of AdamW.
      no_decay: names of parameters that do not decay.
      warmup_steps: of the schedule.
      first_step: number that the schedule gives to the first step.
    """

    b2: float = B2
    eps: float = EPS
    no_decay: tuple[str, ...] = ()
    warmup_steps: int = WARMUP_STEPS
    first_step: int = 0


RECIPE = Recipe()


def train(
    task: PretrainTask,
    params: Tree,
    batches: list[Batch],
    recipe: Recipe = RECIPE,
) -> Trained:
    """Train our model from `params` with our step, a step a batch.

    Args:
      task: its method's parameters are `params`.
      params: arrays by path.
      batches: the first of `make_batches`; their noise is not used, for the step draws the masks.
      recipe: with or without a mistake.
    """
    adamw = optimizer.adamw(
        b1=B1, b2=recipe.b2, eps=recipe.eps, weight_decay=DECAY, no_decay=recipe.no_decay
    )

    def schedule(step: jax.Array) -> jax.Array:
        return schedules.warmup_cosine(
            step + recipe.first_step,
            peak=PEAK,
            warmup_steps=recipe.warmup_steps,
            total_steps=TOTAL_STEPS,
        )

    step_fn = jax.jit(
        functools.partial(train_step, task=task, optimizer=adamw, schedule=schedule, seed=SEED)
    )
    state = TrainState.create(nested(params), {}, adamw)
    losses = []
    for batch in batches:
        state, metrics = step_fn(state, {"image": batch.image})
        losses.append(float(metrics["loss"]))
    flat = traverse_util.flatten_dict(state.params, sep="/")
    return Trained(np.asarray(losses), {path: np.asarray(flat[path]) for path in params})


def _all_decay(patch: pytest.MonkeyPatch) -> Recipe:
    def decay_mask(params: Any, no_decay: tuple[str, ...] = ()) -> Any:
        return jax.tree.map(lambda _: True, params)

    patch.setattr(optimizer, "decay_mask", decay_mask)
    return RECIPE


def _with(**fields: Any) -> Callable[[pytest.MonkeyPatch], Recipe]:
    return lambda patch: Recipe(**fields)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], Recipe]] = {
    "decay of biases and norms": _all_decay,
    "no decay of the tokens": _with(no_decay=("cls_token", "mask_token")),
    "schedule one step ahead": _with(first_step=1),
    "no warm-up": _with(warmup_steps=0),
    "b2 of 0.999": _with(b2=0.999),
    "epsilon of 1e-6": _with(eps=1e-6),
}
"""Each is put into our code where that is needed, and returns the recipe to train by."""
