"""Steps of which a part of the parameters is trained: what stays as it is, and what it costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.models.transfer import make_classifier
from mae_jax.tasks.finetune import FinetuneTask
from mae_jax.train import optimizer as optimizers
from mae_jax.train.state import TrainState
from mae_jax.train.step import train_step
from mae_jax.types import Batch
from tests.flops import count
from tests.weights import quick_jit, random_params

ADAMW = optimizers.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05)
LARS = optimizers.lars(momentum=0.9, weight_decay=0.1, trust_coefficient=0.001)
RATE, DECAY, EMA = 1e-2, 0.5, 0.9
CLASSES = 5

# Name: the last blocks that are trained, the optimiser, and what the classifier is.
KINDS: dict[str, tuple[float, optax.GradientTransformation, dict[str, Any]]] = {
    "probe": (0.0, LARS, {"pooling": "cls", "positions": "fixed", "norm_group": 4}),
    "half a block": (0.5, ADAMW, {}),
    "one block": (1.0, ADAMW, {}),
    "full": (-1.0, ADAMW, {}),
}


def by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {optimizers.path_name(path): leaf for path, leaf in leaves}


def draw_batch(count: int) -> Batch:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, count).astype(np.int32),
    }


def make(
    tiny_mae: Any, kind: str, **fields: Any
) -> tuple[TrainState, Callable[..., Any], Any, FinetuneTask]:
    """Return a state with an average, the step, which parameters it trains, and the task."""
    blocks, optimizer, options = KINDS[kind]
    model = tiny_mae(**fields)
    classifier = make_classifier(model.unit, model.encoder, CLASSES, **options)
    task = FinetuneTask(classifier, (0.5,) * 3, (0.25,) * 3, trainable_blocks=blocks)
    images = jnp.zeros((1, 32, 32, 3))
    params = random_params(classifier.init, images)
    extra = jax.eval_shape(classifier.init, jax.random.key(0), images)
    extra = jax.tree.map(lambda x: jnp.ones(x.shape), {k: extra[k] for k in extra if k != "params"})
    trainable = optimizers.trainable_mask(params, blocks, classifier.layer_id)
    state = TrainState.create(params, extra, optimizer, averaged=True, trainable=trainable)
    step_fn = functools.partial(
        train_step,
        task=task,
        optimizer=optimizer,
        schedule=lambda step: RATE + 0.0 * step,
        seed=0,
        ema_decay=EMA,
        trainable=trainable,
        rate_factors=optimizers.layer_factors(
            params, DECAY, classifier.layer_id, classifier.encoder.top_layer
        ),
    )
    return state, step_fn, trainable, task


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_changes_and_is_known_to_the_optimiser(tiny_mae, kind):
    start, step_fn, trainable, _ = make(tiny_mae, kind)
    trained = by_name(trainable)
    jitted, state, batch = quick_jit(step_fn), start, draw_batch(8)
    for _ in range(2):
        state, metrics = jitted(state, batch)
    assert np.isfinite(metrics["loss"])
    assert int(metrics["nonfinite_steps"]) == 0
    for name, before, after, average in zip(
        trained, *map(jax.tree.leaves, (start.params, state.params, state.ema)), strict=True
    ):
        if trained[name]:
            assert (np.asarray(before) != np.asarray(after)).any(), name
            assert (np.asarray(average) != np.asarray(before)).any(), name
            assert (np.asarray(average) != np.asarray(after)).any(), name
        else:  # neither moved, nor decayed, nor rounded
            assert np.asarray(before).tobytes() == np.asarray(after).tobytes(), name
            assert np.asarray(before).tobytes() == np.asarray(average).tobytes(), name
    assert jax.tree.structure(state) == jax.tree.structure(start)

    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    shapes = [x.shape for name, x in by_name(start.params).items() if trained[name]]
    per_parameter = 1 if kind == "probe" else 2
    assert [x.shape for x in moments] == per_parameter * shapes
    if kind == "probe":
        assert len(shapes) == 2
        assert (np.asarray(jax.tree.leaves(state.extra)[0]) != 1).any()


def test_rate_and_decay_of_each_parameter_are_multiplied_by_its_factor(tiny_mae):
    start, step_fn, _, _ = make(tiny_mae, "full")
    batch, after = draw_batch(8), []
    for decay in (0.0, 0.5):
        adam = optimizers.adamw(b1=0.9, b2=0.999, eps=1e-12, weight_decay=decay)
        state = start.replace(opt_state=adam.init(start.params))
        state, _ = quick_jit(functools.partial(step_fn, optimizer=adam))(state, batch)
        after.append(by_name(state.params))
    before, (plain, decayed) = by_name(start.params), after
    for name, factor in {
        "encoder/patch_embed/kernel": DECAY**3,
        "encoder/pos_embed": DECAY**3,
        "encoder/block_00/attn/proj/kernel": DECAY**2,
        "encoder/block_01/mlp/fc2/bias": DECAY,
        "head/norm/scale": 1.0,
        "head/linear/kernel": 1.0,
    }.items():
        # AdamW's first step without decay is the sign of the gradient: the rate can be read.
        moved = np.abs(np.asarray(plain[name] - before[name]))
        np.testing.assert_allclose(np.median(moved), RATE * factor, rtol=1e-3, err_msg=name)
        shrunk = RATE * factor * 0.5 * before[name] * (before[name].ndim > 1)
        np.testing.assert_allclose(plain[name] - decayed[name], shrunk, atol=2e-7, err_msg=name)


COUNT = 64


@pytest.fixture(scope="module")
def costs(tiny_mae) -> dict[str, tuple[int, int, FinetuneTask]]:
    """Return (bytes that the compiled step needs beside the state, FLOPs, the task) by kind."""
    made = {}
    for kind in ("probe", "one block", "full"):
        state, step_fn, _, task = make(tiny_mae, kind, embed_dim=64, depth=4, num_heads=4)
        traced = quick_jit(step_fn).trace(state, draw_batch(COUNT))
        memory = traced.lower().compile().memory_analysis().temp_size_in_bytes
        made[kind] = (memory, count(traced.jaxpr.jaxpr), task)
        print(f"{kind}: {memory / 2**20:.2f} MiB, {made[kind][1] / 1e9:.3f} GFLOP a step")
    return made


@pytest.mark.slow
def test_memory_of_a_step_grows_with_what_is_trained(costs):
    probe, block, full = (costs[kind][0] for kind in ("probe", "one block", "full"))
    assert probe < block < full
    assert block < 0.7 * full


def test_products_of_a_step_are_those_that_are_counted_for_it(costs):
    flops = {}
    for kind, (_, counted, task) in costs.items():
        flops[kind] = counted
        assert counted == COUNT * task.step_flops(), kind
    assert flops["probe"] < flops["one block"] < flops["full"]
