"""What decays, and AdamW against numpy in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.train import optimizer
from mae_jax.types import Prediction

B1, B2, EPS, DECAY = 0.9, 0.95, 1e-8, 0.05

BLOCK_KERNELS = ("attn/qkv/kernel", "attn/proj/kernel", "mlp/fc1/kernel", "mlp/fc2/kernel")

DECAYED = {
    "encoder/patch_embed/kernel",
    "encoder/cls_token",
    *(f"encoder/block_00/{name}" for name in BLOCK_KERNELS),
    *(f"encoder/block_01/{name}" for name in BLOCK_KERNELS),
    "decoder/embed/kernel",
    "decoder/mask_token",
    *(f"decoder/block_00/{name}" for name in BLOCK_KERNELS),
    "decoder/pred/kernel",
}


def shapes_of(model: nn.Module) -> Any:
    """Return the shapes of a model's parameters."""

    def init() -> Any:
        plan = model.plan(jax.random.key(0), 1)
        batch = {"image": jnp.zeros((1, 32, 32, 3))}
        return model.init(jax.random.key(0), batch, plan, method="predict")["params"]

    return jax.eval_shape(init)


def by_name(tree: Any) -> dict[str, Any]:
    return {optimizer.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_matrices_and_tokens_decay_and_nothing_else(tiny_mae):
    decays = by_name(optimizer.decay_mask(shapes_of(tiny_mae())))
    assert {name for name, yes in decays.items() if yes} == DECAYED
    assert {name.rsplit("/", 1)[1] for name in decays.keys() - DECAYED} == {"bias", "scale"}


@pytest.mark.parametrize("excluded", ["pos_embed", "cls_token"])
def test_named_parameter_is_left_out_of_the_decay(tiny_mae, excluded):
    shapes = shapes_of(tiny_mae(positions="learned"))
    everything = by_name(optimizer.decay_mask(shapes))
    assert {name for name, yes in everything.items() if yes} == DECAYED | {"encoder/pos_embed"}
    without = by_name(optimizer.decay_mask(shapes, no_decay=(excluded,)))
    changed = {name for name in everything if everything[name] != without[name]}
    assert changed == {f"encoder/{excluded}"}


def test_name_to_leave_out_is_the_whole_last_part_of_a_path():
    tree = {"head": {"kernel": jnp.ones((2, 2)), "head_kernel": jnp.ones((2, 2))}}
    assert optimizer.decay_mask(tree, no_decay=("head",)) == {
        "head": {"kernel": True, "head_kernel": True}
    }
    assert optimizer.decay_mask(tree, no_decay=("kernel",)) == {
        "head": {"kernel": False, "head_kernel": True}
    }


def test_path_is_the_names_of_keys_and_fields_joined_by_slashes():
    tree = {"encoder": Prediction(*jnp.ones((4, 1))), "head": {"bias": jnp.ones(1)}}
    fields = [f"encoder/{name}" for name in ("output", "target", "ids", "weight")]
    assert list(by_name(tree)) == [*fields, "head/bias"]


def slow_adamw(
    params: Mapping[str, np.ndarray], grads: list[Mapping[str, np.ndarray]], rate: float
) -> dict[str, np.ndarray]:
    """Return the parameters after one update for each of `grads`, in float64."""
    result = {}
    for name, p in params.items():
        p = p.astype(np.float64)
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t, g in enumerate((g[name].astype(np.float64) for g in grads), start=1):
            m = B1 * m + (1 - B1) * g
            v = B2 * v + (1 - B2) * g * g
            adam = (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
            p = p - rate * (adam + (DECAY * p if p.ndim > 1 else 0.0))
        result[name] = p
    return result


def test_five_updates_are_those_of_adamw_in_numpy():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3), "token": (1, 1, 4), "bias": (3,), "small": (2, 2)}
    # Gradients of `small` are as small as eps, which then counts.
    scales = {"kernel": 1.0, "token": 1e-3, "bias": 10.0, "small": 2e-8}

    def draw(scale_of: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {
            name: (scale_of[name] * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    start = draw(dict.fromkeys(shapes, 1.0))
    grads = [draw(scales) for _ in range(5)]

    adamw = optimizer.adamw(b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    params = jax.tree.map(jnp.asarray, start)
    state = adamw.init(params)
    for g in grads:
        direction, state = adamw.update(g, state, params)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, params, direction)

    for name, expected in slow_adamw(start, grads, rate=0.1).items():
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_parameters_named_in_no_decay_follow_the_gradient_alone():
    params = {"kernel": jnp.full((2, 2), 3.0), "pos_embed": jnp.full((2, 2), 3.0)}
    adamw = optimizer.adamw(b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, no_decay=("pos_embed",))
    zeros = jax.tree.map(jnp.zeros_like, params)
    direction, _ = adamw.update(zeros, adamw.init(params), params)
    np.testing.assert_allclose(direction["kernel"], DECAY * 3.0, rtol=1e-6)
    assert not direction["pos_embed"].any()


def test_optimiser_state_is_float32_and_shaped_like_the_parameters(tiny_mae):
    shapes = shapes_of(tiny_mae())
    adamw = optimizer.adamw(b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    state = jax.eval_shape(adamw.init, shapes)
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert [x.shape for x in arrays] == [x.shape for x in jax.tree.leaves(shapes)] * 2
    assert {x.dtype for x in arrays} == {jnp.dtype(jnp.float32)}


def test_clipping_scales_all_gradients_by_their_common_norm():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(1)}
    grads = {"kernel": jnp.full((2, 2), 6.0), "bias": jnp.full(1, 5.0)}  # norm 13
    options = {"b1": B1, "b2": B2, "eps": EPS, "weight_decay": 0.0}

    def moments(clip_norm: float) -> list[float]:
        adamw = optimizer.adamw(clip_norm=clip_norm, **options)
        _, state = adamw.update(grads, adamw.init(params), params)
        (adam,) = (s for s in state if isinstance(s, optax.ScaleByAdamState))
        return [float(adam.mu["kernel"][0, 0]), float(adam.mu["bias"][0])]

    scale = 1 - B1
    np.testing.assert_allclose(moments(0.0), [6.0 * scale, 5.0 * scale], rtol=1e-6)
    np.testing.assert_allclose(moments(20.0), [6.0 * scale, 5.0 * scale], rtol=1e-6)
    np.testing.assert_allclose(moments(1.3), [0.6 * scale, 0.5 * scale], rtol=1e-6)
