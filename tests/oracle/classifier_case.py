"""Our side of the comparison of classifiers: data, recipes, updates by the real step, mistakes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from mae_jax.models.classifier import Classifier
from mae_jax.models.transfer import make_classifier
from mae_jax.models.vit import ViTEncoder
from mae_jax.nn.patches import PatchUnit
from mae_jax.recipes import IMAGENET_MEAN, IMAGENET_STD
from mae_jax.tasks.finetune import FinetuneTask
from mae_jax.train import optimizer, schedules
from mae_jax.train.state import TrainState
from mae_jax.train.step import train_step
from tests.oracle.agreement import Trained, Tree
from tests.oracle.mae_case import nested
from tests.weights import quick_jit, random_params

UNIT = PatchUnit((32, 24), patch_size=8)
CLASSES = 10
BATCH_SIZE = 32
TOTAL_STEPS = 20
WARMUP_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """The recipe of fine-tuning. The rates are higher than usual, so that much happens in 20 steps.

    Attributes:
      pooling: of the classifier.
      peak: rate of the head after the warm-up.
      minimum: last rate of the head.
      layer_decay: factor of the rate from a block to the one below.
      weight_decay: of AdamW.
      b2: of AdamW.
      label_smoothing: of the targets.
    """

    pooling: str = "mean"
    peak: float = 4e-3
    minimum: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    b2: float = 0.999
    label_smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class Probing:
    """The recipe of linear probing.

    Attributes:
      norm_groups: groups of the batch norm.
      peak: rate after the warm-up, that of a batch of 16,384.
      momentum: of LARS.
      weight_decay: of LARS; the official one is 0.
      trust_coefficient: of LARS.
    """

    norm_groups: int = 1
    peak: float = 6.4
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float = 0.001


class Batch(NamedTuple):
    """What both sides get at a step: images uint8 [B, H, W, 3] and labels int32 [B]."""

    image: np.ndarray
    label: np.ndarray


class Probed(NamedTuple):
    """What linear probing leaves.

    Attributes:
      trained: losses, and parameters of the head by path.
      mean: float32 [D] running mean of the features.
      var: float32 [D] running variance.
      logits: float32 [B, K] of a batch by the running statistics.
    """

    trained: Trained
    mean: np.ndarray
    var: np.ndarray
    logits: np.ndarray


def make_batches() -> list[Batch]:
    """Return coarse random images for each step, of a mean colour that tells the class."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, size=(CLASSES, 1, 1, 3))

    def one() -> Batch:
        label = rng.integers(0, CLASSES, size=BATCH_SIZE)
        noise = (
            rng.integers(-60, 60, size=(BATCH_SIZE, 8, 6, 3)).repeat(4, axis=1).repeat(4, axis=2)
        )
        image = (colours[label] + noise).clip(0, 255)
        return Batch(image.astype(np.uint8), label.astype(np.int32))

    return [one() for _ in range(TOTAL_STEPS)]


def classifier(pooling: str, norm_group: int = 0) -> Classifier:
    """Return a small classifier with learned positions."""
    encoder = ViTEncoder(UNIT.grid_size, embed_dim=32, depth=4, num_heads=4)
    return make_classifier(UNIT, encoder, CLASSES, pooling=pooling, norm_group=norm_group)


def random_weights(model: Classifier) -> dict[str, np.ndarray]:
    """Return weights by path."""
    images = jnp.zeros((1, *UNIT.image_size, UNIT.channels))
    flat = traverse_util.flatten_dict(random_params(model.init, images), sep="/")
    return {path: np.asarray(flat[path]) for path in sorted(flat)}


def warmup_cosine(recipe: Finetuning | Probing) -> Callable[[jax.Array], jax.Array]:
    """Return the schedule of a recipe."""
    return functools.partial(
        schedules.warmup_cosine,
        peak=recipe.peak,
        warmup_steps=WARMUP_STEPS,
        total_steps=TOTAL_STEPS,
        minimum=recipe.minimum if isinstance(recipe, Finetuning) else 0.0,
    )


class Parts(NamedTuple):
    """What a mistake may change.

    Attributes:
      optimizer: gives the direction.
      schedule: gives the rate.
      rate_factors: factors of the rate, or None.
    """

    optimizer: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]
    rate_factors: Any = None


def unchanged(parts: Parts, *_: Any) -> Parts:
    """Put no mistake in."""
    return parts


def finetuning_parts(model: Classifier, params: Any, recipe: Finetuning) -> Parts:
    """Return what fine-tuning is made of."""
    adamw = optimizer.adamw(
        b1=0.9,
        b2=recipe.b2,
        eps=1e-8,
        weight_decay=recipe.weight_decay,
        no_decay=("cls_token", "pos_embed"),
    )
    top = model.encoder.top_layer
    factors = optimizer.layer_factors(params, recipe.layer_decay, model.layer_id, top)
    return Parts(adamw, warmup_cosine(recipe), factors)


def probing_parts(recipe: Probing) -> Parts:
    """Return what linear probing is made of."""
    lars = optimizer.lars(
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        trust_coefficient=recipe.trust_coefficient,
    )
    return Parts(lars, warmup_cosine(recipe))


def finetune(
    params: Tree,
    batches: list[Batch],
    recipe: Finetuning,
    change: Callable[[Parts, Any, Finetuning], Parts] = unchanged,
) -> Trained:
    """Fine-tune our classifier from `params` with our step, a step a batch.

    Args:
      params: arrays by path.
      batches: the first of the run.
      recipe: of the run.
      change: puts a mistake in.
    """
    model = classifier(recipe.pooling)
    task = FinetuneTask(
        model,
        IMAGENET_MEAN,
        IMAGENET_STD,
        label_smoothing=recipe.label_smoothing,
    )
    tree = nested(params)
    parts = change(finetuning_parts(model, tree, recipe), tree, recipe)
    state, losses = _run(task, tree, {}, batches, parts)
    return Trained(losses, _flat(state.params, params))


def probe(
    params: Tree,
    batches: list[Batch],
    recipe: Probing,
    change: Callable[[Parts, Probing], Parts] = unchanged,
) -> Probed:
    """Train the head of our classifier on the frozen encoder; arguments as of `finetune`.

    The logits are those of the first batch.
    """
    model = classifier("cls", norm_group=BATCH_SIZE // recipe.norm_groups)
    task = FinetuneTask(model, IMAGENET_MEAN, IMAGENET_STD)
    first = {"image": batches[0].image, "label": batches[0].label}
    _, extra = quick_jit(task.init)(jax.random.key(0), first)
    tree = nested(params)
    parts = change(probing_parts(recipe), recipe)
    trainable = optimizer.trainable_mask(tree, 0, model.layer_id)
    state, losses = _run(task, tree, extra, batches, parts, trainable)
    trained = _flat(state.params, params)
    for path, array in params.items():
        if path.startswith("encoder/"):
            np.testing.assert_array_equal(trained[path], array, err_msg=path)
    statistics = state.extra["batch_stats"]["head"]["batch_norm"]
    logits = quick_jit(functools.partial(task.call, "logits"))(
        state.params, first, extra=state.extra
    )
    head = {path: array for path, array in trained.items() if path.startswith("head/")}
    mean, var = np.asarray(statistics["mean"]), np.asarray(statistics["var"])
    return Probed(Trained(losses, head), mean, var, np.asarray(logits))


def _run(
    task: FinetuneTask,
    params: Any,
    extra: Any,
    batches: list[Batch],
    parts: Parts,
    trainable: Any = None,
) -> tuple[TrainState, np.ndarray]:
    step = functools.partial(
        train_step,
        task=task,
        optimizer=parts.optimizer,
        schedule=parts.schedule,
        seed=0,
        trainable=trainable,
        rate_factors=parts.rate_factors,
    )
    step_fn = quick_jit(step)
    state = TrainState.create(params, extra, parts.optimizer, trainable=trainable)
    losses = []
    for batch in batches:
        state, metrics = step_fn(state, {"image": batch.image, "label": batch.label})
        losses.append(float(metrics["loss"]))
    return state, np.asarray(losses)


def _flat(tree: Any, paths: Tree) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(tree, sep="/")
    assert flat.keys() == paths.keys()
    return {path: np.asarray(flat[path]) for path in paths}


def _one_layer_lower(parts: Parts, params: Any, recipe: Finetuning) -> Parts:
    def lower(factor: float) -> float:
        return factor if factor == 1 else factor * recipe.layer_decay

    return parts._replace(rate_factors=jax.tree.map(lower, parts.rate_factors))


def _head_with_the_last_block(parts: Parts, params: Any, recipe: Finetuning) -> Parts:
    def higher(factor: float) -> float:
        return min(1.0, factor / recipe.layer_decay)

    return parts._replace(rate_factors=jax.tree.map(higher, parts.rate_factors))


def _decaying_positions(parts: Parts, params: Any, recipe: Finetuning) -> Parts:
    decay = recipe.weight_decay
    adamw = optimizer.adamw(
        b1=0.9, b2=recipe.b2, eps=1e-8, weight_decay=decay, no_decay=("cls_token",)
    )
    return parts._replace(optimizer=adamw)


def _decay_at_the_rate_of_the_head(parts: Parts, params: Any, recipe: Finetuning) -> Parts:
    mask = optimizer.decay_mask(params, ("cls_token", "pos_embed"))

    def add(direction: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def one(d: jax.Array, p: jax.Array, decays: bool, factor: float) -> jax.Array:
            return d + recipe.weight_decay * p / factor if decays else d

        return jax.tree.map(one, direction, params, mask, parts.rate_factors), state

    decay = optax.GradientTransformation(lambda _: optax.EmptyState(), add)
    adam = optax.scale_by_adam(b1=0.9, b2=recipe.b2, eps=1e-8)
    return parts._replace(optimizer=optax.chain(adam, decay))


FINETUNING_MISTAKES: dict[str, tuple[dict[str, Any], Callable[..., Parts]]] = {
    "blocks a layer too low": ({}, _one_layer_lower),
    "blocks a layer too high": ({}, _head_with_the_last_block),
    "no layer-wise decay": ({"layer_decay": 1.0}, unchanged),
    "decay of positions": ({}, _decaying_positions),
    "weight decay at the rate of the head": ({}, _decay_at_the_rate_of_the_head),
    "no label smoothing": ({"label_smoothing": 0.0}, unchanged),
    "cosine to zero": ({"minimum": 0.0}, unchanged),
    "b2 of 0.95": ({"b2": 0.95}, unchanged),
}
"""Fields of the recipe that are changed, and what is changed in its parts."""


def _rate_before_momentum(parts: Parts, recipe: Probing) -> Parts:
    lars = optax.chain(
        optax.masked(
            optax.scale_by_trust_ratio(trust_coefficient=recipe.trust_coefficient),
            optimizer.decay_mask,
        ),
        optax.scale_by_schedule(parts.schedule),
        optax.trace(decay=recipe.momentum),
    )
    return Parts(lars, lambda step: jnp.ones(()))


def _trusted_bias(parts: Parts, recipe: Probing) -> Parts:
    trust = optax.scale_by_trust_ratio(trust_coefficient=recipe.trust_coefficient)
    return parts._replace(optimizer=optax.chain(trust, optax.trace(decay=recipe.momentum)))


PROBING_MISTAKES: dict[str, tuple[dict[str, Any], Callable[..., Parts]]] = {
    "rate before the momentum": ({}, _rate_before_momentum),
    "the bias is scaled too": ({}, _trusted_bias),
    "two groups for one": ({"norm_groups": 2}, unchanged),
    "weight decay": ({"weight_decay": 1e-2}, unchanged),
}
"""The same of linear probing."""
