"""The decoder, against one that un-shuffles its tokens as the paper draws it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.models.decoder import Decoder, pixel_shuffle
from mae_jax.nn.blocks import TransformerBlock, block_flops
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.types import MaskPlan
from tests.weights import apply, normal, random_params

GRID, COUNT, KEEP = (3, 4), 12, 4
SIZE, WIDTH, LATENT = 6, 8, 10


def make(**fields: Any) -> Decoder:
    return Decoder(
        **{
            "grid_size": GRID,
            "unit_size": SIZE,
            "embed_dim": WIDTH,
            "depth": 2,
            "num_heads": 2,
            **fields,
        }
    )


def make_plan(masks: int, seed: int = 0) -> MaskPlan:
    ids = np.argsort(np.random.default_rng(seed).random((masks, COUNT)), axis=1)
    return MaskPlan(ids[:, :KEEP], ids[:, KEEP:])


def unshuffled(params: Any, latent: np.ndarray, plan: MaskPlan, prefix: int) -> np.ndarray:
    """Return predictions of all units in image order, step by step as in the official code."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])

    x = linear("embed", latent)
    hidden = np.tile(np.asarray(params["mask_token"]), (len(x), COUNT - KEEP, 1))
    patches = np.concatenate([x[:, prefix:], hidden], axis=1)
    restore = np.argsort(np.concatenate([plan.ids_keep, plan.ids_mask], axis=1), axis=1)
    patches = np.take_along_axis(patches, restore[..., None], axis=1)  # in image order
    x = np.concatenate([x[:, :prefix], patches], axis=1)
    table = sincos_2d(WIDTH, GRID)
    x = x + np.concatenate([np.zeros((prefix, WIDTH)), table])  # zeros for the class token
    x = x.astype(np.float32)
    for i in range(2):
        x = apply(TransformerBlock(2), params[f"block_{i:02d}"], x)
    x = np.asarray(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * np.asarray(params["norm"]["scale"]) + np.asarray(params["norm"]["bias"])
    return linear("pred", x)[:, prefix:]


@pytest.fixture
def plan() -> MaskPlan:
    return make_plan(3)


@pytest.fixture
def latent() -> np.ndarray:
    return normal((3, 1 + KEEP, LATENT))


def test_parameters_have_these_names_and_shapes(latent, plan):
    tree = jax.eval_shape(make().init, jax.random.key(0), latent, plan)["params"]
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
    assert {k: v for k, v in shapes.items() if not k.startswith("block_")} == {
        "embed/kernel": (LATENT, WIDTH),
        "embed/bias": (WIDTH,),
        "mask_token": (1, 1, WIDTH),
        "norm/scale": (WIDTH,),
        "norm/bias": (WIDTH,),
        "pred/kernel": (WIDTH, SIZE),
        "pred/bias": (SIZE,),
    }
    in_blocks = [k for k in shapes if k.startswith("block_")]
    assert len(in_blocks) == 2 * 12
    assert {k.split("/")[0] for k in in_blocks} == {"block_00", "block_01"}


@pytest.mark.parametrize("prefix", [1, 0])
def test_kept_then_hidden_order_equals_unshuffled_tokens(latent, plan, prefix):
    latent = latent[:, 1 - prefix :]
    module = make()
    params = random_params(module.init, latent, plan)
    expected = unshuffled(params, latent, plan, prefix)
    out = apply(module, params, latent, plan)
    assert out.shape == (3, COUNT - KEEP, SIZE)
    hidden = plan.ids_mask[..., None]
    np.testing.assert_allclose(out, np.take_along_axis(expected, hidden, axis=1), atol=1e-5)
    out = apply(module, params, latent, plan, skip=0)
    ids = np.concatenate([plan.ids_keep, plan.ids_mask], axis=1)[..., None]
    np.testing.assert_allclose(out, np.take_along_axis(expected, ids, axis=1), atol=1e-5)


def test_a_shared_mask_equals_the_same_mask_for_each_image(latent):
    one = make_plan(1)
    each = jax.tree.map(lambda ids: np.tile(ids, (3, 1)), one)
    module = make()
    params = random_params(module.init, latent, one)
    expected = apply(module, params, latent, each)
    np.testing.assert_allclose(apply(module, params, latent, one), expected, atol=1e-6)


def test_order_in_which_units_are_kept_or_hidden_does_not_matter(latent, plan):
    module = make()
    params = random_params(module.init, latent, plan)
    keep, hidden = [2, 0, 3, 1], [5, 1, 7, 0, 2, 6, 4, 3]
    shuffled = MaskPlan(plan.ids_keep[:, keep], plan.ids_mask[:, hidden])
    tokens = np.concatenate([latent[:, :1], latent[:, 1:][:, keep]], axis=1)
    out = apply(module, params, latent, plan)
    np.testing.assert_allclose(
        apply(module, params, tokens, shuffled), np.asarray(out)[:, hidden], atol=1e-5
    )


@pytest.mark.parametrize(
    ("latent_dim", "size", "embed_bound", "pred_bound"),
    [(1024, 768, 0.0625, 0.068465), (1280, 588, math.sqrt(6 / 1792), 0.073855)],
)
def test_initial_values_are_those_of_the_official_code(latent_dim, size, embed_bound, pred_bound):
    module = make(embed_dim=512, unit_size=size, depth=1, num_heads=16)
    plan = make_plan(1)
    latent = jnp.zeros((1, 1 + KEEP, latent_dim))
    params = jax.jit(module.init)(jax.random.key(0), latent, plan)["params"]
    for values, bound in (
        (params["embed"]["kernel"], embed_bound),
        (params["pred"]["kernel"], pred_bound),
        (params["block_00"]["attn"]["qkv"]["kernel"], 0.054127),
    ):
        assert 0.9999 * bound < np.abs(values).max() < 1.0001 * bound
        np.testing.assert_allclose(np.std(values), bound / math.sqrt(3), rtol=0.02)
    for name in ("embed", "pred"):
        assert not np.any(params[name]["bias"])
    np.testing.assert_allclose(np.std(params["mask_token"]), 0.02, rtol=0.1)


def test_predictions_of_bfloat16_products_are_float32(latent, plan):
    module = make(dtype=jnp.bfloat16)
    params = random_params(module.init, latent, plan)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = apply(module, params, latent.astype(jnp.bfloat16), plan)
    assert out.dtype == jnp.float32
    exact = apply(make(), params, latent, plan)
    np.testing.assert_allclose(out, exact, atol=0.1)


def test_flops_count_the_head_on_hidden_units_alone():
    bridge = 2 * (1 + KEEP) * LATENT * WIDTH
    head = 2 * (COUNT - KEEP) * WIDTH * SIZE
    expected = bridge + 2 * block_flops(1 + COUNT, WIDTH) + head
    assert make().flops(1 + COUNT, 1 + KEEP, LATENT, COUNT - KEEP) == expected


def test_pixel_shuffle_puts_values_where_pytorch_does():
    x = np.random.default_rng(0).normal(size=(2, 2 * 3, 5 * 4)).astype(np.float32)
    made = pixel_shuffle(jnp.asarray(x), (4, 6), 2)
    assert made.shape == (2, 24, 5)
    for unit in range(24):
        row, column = divmod(unit, 6)
        token = x[:, (row // 2) * 3 + column // 2]
        for value in range(5):
            expected = token[:, value * 4 + (row % 2) * 2 + column % 2]
            np.testing.assert_array_equal(made[:, unit, value], expected)


@pytest.mark.parametrize("grid_size", [(3, 8), (4, 4), (0, 0)])
def test_a_grid_that_cannot_be_upsampled_is_refused(grid_size):
    with pytest.raises(ConfigError, match="expected 6 squares of 2 x 2 units"):
        pixel_shuffle(jnp.zeros((1, 6, 8)), grid_size, 2)
