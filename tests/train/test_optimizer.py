"""What decays, at which rates, what is trained; AdamW and LARS against numpy in float64."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.errors import ConfigError
from mae_jax.models.transfer import make_classifier
from mae_jax.pretrain import mae
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
    tree = {"encoder": Prediction(*jnp.ones((4, 1)), places=1), "head": {"bias": jnp.ones(1)}}
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


def classifier_shapes(pretrained: nn.Module, **options: Any) -> tuple[Any, Any]:
    """Return a classifier around an encoder, and the shapes of its parameters."""
    classifier = make_classifier(pretrained.unit, pretrained.encoder, 1000, **options)
    images = jnp.zeros((1, *pretrained.unit.image_size, pretrained.unit.channels))
    return classifier, jax.eval_shape(classifier.init, jax.random.key(0), images)["params"]


def layer_factors(classifier: Any, shapes: Any, decay: float) -> Any:
    top = classifier.encoder.top_layer
    return optimizer.layer_factors(shapes, decay, classifier.layer_id, top)


# Size: blocks, decay, and factors of what is below the blocks and of the first of them.
LAYER_DECAY = {
    "vit_b": (12, 0.65, 0.00369721, 0.00568801),
    "vit_l": (24, 0.75, 0.000752543, 0.00100339),
    "vit_h": (32, 0.75, 7.53393e-5, 0.000100452),
}
BELOW = {"cls_token", "pos_embed", "patch_embed/kernel", "patch_embed/bias"}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("size", LAYER_DECAY)
def test_rate_of_every_parameter_is_the_official_one(size, pooling):
    depth, decay, below, first = LAYER_DECAY[size]
    pretrained = mae.make(size=size, image_size=(224, 224))
    classifier, shapes = classifier_shapes(pretrained, pooling=pooling)
    factors = by_name(layer_factors(classifier, shapes, decay))
    assert factors.keys() == by_name(shapes).keys()
    counted = dict.fromkeys(("below", "block", "above"), 0)
    for name, factor in factors.items():
        block = re.fullmatch(r"encoder/block_(\d\d)/.+", name)
        if block:
            counted["block"] += 1
            steps_down = depth - int(block[1])
        elif name.removeprefix("encoder/") in BELOW:
            counted["below"] += 1
            steps_down = depth + 1
        else:
            counted["above"] += 1
            steps_down = 0
        assert factor == pytest.approx(decay**steps_down, rel=1e-12), name
    # Norm and linear layer have two parameters each; a block has twelve.
    assert counted == {"below": 4, "block": 12 * depth, "above": 4}
    assert factors["encoder/pos_embed"] == pytest.approx(below, rel=1e-5)
    assert factors["encoder/block_00/norm1/scale"] == pytest.approx(first, rel=1e-5)
    assert factors[f"encoder/block_{depth - 1:02d}/mlp/fc2/bias"] == pytest.approx(decay)
    norm = "head/norm/scale" if pooling == "mean" else "encoder/norm/scale"
    assert factors[norm] == factors["head/linear/kernel"] == 1.0


def test_layer_decay_of_one_changes_no_rate(tiny_mae):
    factors = layer_factors(*classifier_shapes(tiny_mae()), 1.0)
    assert set(jax.tree.leaves(factors)) == {1.0}


def trained(pretrained: nn.Module, blocks: float, **options: Any) -> set[str]:
    """Return the names of the trainable parameters."""
    classifier, shapes = classifier_shapes(pretrained, **options)
    mask = optimizer.trainable_mask(shapes, blocks, classifier.layer_id)
    return {name for name, yes in by_name(mask).items() if yes}


def of_blocks(names: set[str], *numbers: int) -> set[str]:
    return {n for n in names if n.startswith(tuple(f"encoder/block_{i:02d}/" for i in numbers))}


def test_last_blocks_are_trained_and_half_a_block_is_its_mlp(tiny_mae):
    model = tiny_mae(depth=3)
    everything = set(by_name(classifier_shapes(model)[1]))
    head = {f"head/{name}" for name in ("norm/scale", "norm/bias", "linear/kernel", "linear/bias")}
    assert trained(model, -1) == everything
    assert trained(model, 0) == head
    assert trained(model, 1) == head | of_blocks(everything, 2)
    assert trained(model, 2) == head | of_blocks(everything, 1, 2)
    # All blocks are not everything: what is below them stays frozen.
    assert trained(model, 3) == everything - {f"encoder/{name}" for name in BELOW}

    def half(number: int) -> set[str]:
        names = ("norm2/scale", "norm2/bias", *(f"mlp/fc{i}/{x}" for i in "12" for x in WEIGHTS))
        return {f"encoder/block_{number:02d}/{name}" for name in names}

    assert trained(model, 0.5) == head | half(2)
    assert trained(model, 1.5) == head | of_blocks(everything, 2) | half(1)
    assert trained(model, 2.5) == head | of_blocks(everything, 1, 2) | half(0)


WEIGHTS = ("kernel", "bias")


def test_final_norm_is_trained_with_blocks_and_frozen_for_a_probe(tiny_mae):
    norm = {"encoder/norm/scale", "encoder/norm/bias"}
    linear = {"head/linear/kernel", "head/linear/bias"}
    assert trained(tiny_mae(), 0, pooling="cls", norm_group=2) == linear
    assert trained(tiny_mae(), 0, pooling="cls") == linear
    assert norm <= trained(tiny_mae(), 0.5, pooling="cls")
    assert norm <= trained(tiny_mae(), -1, pooling="cls")


@pytest.mark.parametrize("blocks", [0.3, 2.5, 3, 99, -0.5, -2, float("nan")])
def test_blocks_that_there_are_not_are_refused(tiny_mae, blocks):
    message = rf"^optimizer.trainable_blocks {blocks:g}: expected -1 .* 2, the blocks of the"
    with pytest.raises(ConfigError, match=message):
        trained(tiny_mae(depth=2), blocks)


MOMENTUM, TRUST = 0.9, 0.001


def slow_lars(
    params: Mapping[str, np.ndarray],
    grads: list[Mapping[str, np.ndarray]],
    rates: list[float],
    weight_decay: float,
) -> dict[str, np.ndarray]:
    """Return the parameters after one update for each of `grads`, in float64."""
    result = {}
    for name, p in params.items():
        p = p.astype(np.float64)
        mu = np.zeros_like(p)
        for gradients, rate in zip(grads, rates, strict=True):
            g = gradients[name].astype(np.float64)
            if p.ndim > 1:
                g = g + weight_decay * p
                p_norm, g_norm = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
                g = g * (TRUST * p_norm / g_norm if p_norm > 0 and g_norm > 0 else 1.0)
            mu = MOMENTUM * mu + g
            p = p - rate * mu
        result[name] = p
    return result


def follow(
    transformation: optax.GradientTransformation,
    start: Mapping[str, np.ndarray],
    grads: list[Mapping[str, np.ndarray]],
    rates: list[float],
) -> dict[str, jax.Array]:
    """Return the parameters after updates that are multiplied by -rate, as the step does."""
    params = jax.tree.map(jnp.asarray, dict(start))
    state = transformation.init(params)
    for g, rate in zip(grads, rates, strict=True):
        direction, state = transformation.update(dict(g), state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)  # noqa: B023
    return params


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_at_a_changing_rate_are_those_of_lars_in_numpy(weight_decay):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3), "token": (1, 1, 4), "bias": (3,), "zero": (2, 2), "still": (2, 2)}

    def draw() -> dict[str, np.ndarray]:
        drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        return {name: x.astype(np.float32) for name, x in drawn.items()}

    start = draw() | {"zero": np.zeros((2, 2), np.float32)}  # a norm of 0: not trusted, but taken
    grads = [draw() | {"still": np.zeros((2, 2), np.float32)} for _ in range(6)]
    rates = [0.0, 3.2, 6.4, 6.0, 1.0, 0.1]
    lars = optimizer.lars(momentum=MOMENTUM, weight_decay=weight_decay, trust_coefficient=TRUST)
    params = follow(lars, start, grads, rates)
    for name, expected in slow_lars(start, grads, rates, weight_decay).items():
        np.testing.assert_allclose(params[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)
    still = np.array_equal(params["still"], start["still"])
    assert still == (weight_decay == 0)


def test_first_direction_of_lars_by_hand():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(4, 3.0)}  # norm 6
    grads = {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.full(4, 0.5)}  # norm 1
    lars = optimizer.lars(momentum=MOMENTUM, weight_decay=0.0, trust_coefficient=TRUST)
    direction, _ = lars.update(grads, lars.init(params), params)
    np.testing.assert_allclose(direction["kernel"], 0.001 * 6.0 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(direction["bias"], 0.5, rtol=1e-6)
    decayed = optimizer.lars(momentum=MOMENTUM, weight_decay=0.5, trust_coefficient=TRUST)
    direction, _ = decayed.update(grads, decayed.init(params), params)
    # 0.5 + 0.5 x 3 = 2 in each of four places: norm 4; vectors do not decay.
    np.testing.assert_allclose(direction["kernel"], 0.001 * 6.0 / 4.0 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(direction["bias"], 0.5, rtol=1e-6)


def test_lars_is_that_of_optax_at_one_rate_and_another_one_where_the_rate_changes():
    rng = np.random.default_rng(1)
    start = {"kernel": rng.standard_normal((4, 3)).astype(np.float32)}
    grads = [{"kernel": rng.standard_normal((4, 3)).astype(np.float32)} for _ in range(4)]
    ours = optimizer.lars(momentum=MOMENTUM, weight_decay=0.0, trust_coefficient=TRUST)

    def apart(rates: list[float]) -> float:
        theirs = optax.lars(
            lambda count: jnp.asarray(rates)[count],
            momentum=MOMENTUM,
            trust_coefficient=TRUST,
            weight_decay=0.0,
        )
        a = follow(ours, start, grads, rates)["kernel"]
        # Theirs has minus and rate inside.
        b = follow(theirs, start, grads, [-1.0] * len(grads))["kernel"]
        moved = np.abs(np.asarray(a) - start["kernel"]).max()
        return float(jnp.abs(a - b).max() / moved)

    assert apart([2.0] * 4) < 1e-4
    assert apart([2.0, 1.0, 0.5, 0.25]) > 0.05
