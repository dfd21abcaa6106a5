"""The encoder: positions, class token, parameters, initialisation, drop path."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.models.vit import ViTEncoder
from mae_jax.nn import blocks
from mae_jax.nn.blocks import TransformerBlock
from mae_jax.nn.pos_embed import sincos_2d
from tests.weights import apply, normal, quick_jit, random_params

GRID = (3, 4)
COUNT, SIZE, WIDTH = 12, 10, 16
IDS = np.asarray([[7, 0, 11, 4, 2], [1, 10, 3, 8, 5]])


def make(**fields: Any) -> ViTEncoder:
    return ViTEncoder(
        **{"grid_size": GRID, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, **fields}
    )


def shapes_of(module: ViTEncoder) -> dict[str, tuple[int, ...]]:
    units = jax.ShapeDtypeStruct((1, 5, SIZE), jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), units, IDS[:1])["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


@pytest.fixture
def units() -> np.ndarray:
    return normal((2, 5, SIZE))


def test_parameters_have_these_names_and_shapes():
    shapes = shapes_of(make())
    assert {k: v for k, v in shapes.items() if not k.startswith("block_")} == {
        "patch_embed/kernel": (SIZE, WIDTH),
        "patch_embed/bias": (WIDTH,),
        "cls_token": (1, 1, WIDTH),
        "norm/scale": (WIDTH,),
        "norm/bias": (WIDTH,),
    }
    in_blocks = [k for k in shapes if k.startswith("block_")]
    assert len(in_blocks) == 2 * 12
    assert {k.split("/")[0] for k in in_blocks} == {"block_00", "block_01"}
    assert shapes["block_01/attn/qkv/kernel"] == (WIDTH, 3 * WIDTH)


def test_more_than_ten_blocks_sort_by_name():
    names = [k for k in shapes_of(make(depth=12)) if k.endswith("qkv/bias")]
    assert sorted(names) == [f"block_{i:02d}/attn/qkv/bias" for i in range(12)]


def test_positions_and_class_token_are_parameters_only_where_asked_for():
    assert shapes_of(make(positions="learned"))["pos_embed"] == (1, 1 + COUNT, WIDTH)
    without = shapes_of(make(positions="learned", use_cls_token=False))
    assert without["pos_embed"] == (1, COUNT, WIDTH)
    assert "cls_token" not in without


def test_encoder_embeds_adds_positions_and_runs_the_blocks(units):
    module = make()
    params = random_params(module.init, units, IDS)
    values = jax.tree.map(np.asarray, params)
    x = units @ values["patch_embed"]["kernel"] + values["patch_embed"]["bias"]
    x = x + sincos_2d(WIDTH, GRID)[IDS]
    x = np.concatenate([np.tile(values["cls_token"], (2, 1, 1)), x], axis=1)  # has no position
    for i in range(2):
        x = apply(TransformerBlock(2), params[f"block_{i:02d}"], x)
    x = np.asarray(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = x * values["norm"]["scale"] + values["norm"]["bias"]
    out = apply(module, params, units, IDS)
    assert out.shape == (2, 6, WIDTH)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_order_of_the_units_is_only_the_order_of_the_output(units):
    module = make()
    params = random_params(module.init, units, IDS)
    order = [3, 0, 4, 1, 2]
    out = apply(module, params, units, IDS)
    shuffled = apply(module, params, units[:, order], IDS[:, order])
    expected = np.asarray(out)[:, [0] + [1 + i for i in order]]
    np.testing.assert_allclose(shuffled, expected, atol=1e-5)
    moved = apply(module, params, units[:, order], IDS)
    assert np.abs(np.asarray(moved) - out)[:, 0].max() > 1e-3  # positions do matter


def test_shared_ids_equal_the_same_ids_for_each_image(units):
    module = make()
    params = random_params(module.init, units, IDS)
    one = apply(module, params, units, IDS[:1])
    each = apply(module, params, units, np.tile(IDS[:1], (2, 1)))
    np.testing.assert_allclose(one, each, atol=1e-6)


def test_encode_all_sees_every_unit_in_image_order():
    units = normal((2, COUNT, SIZE))
    module = make()
    params = random_params(module.init, units[:, :5], IDS)
    every = apply(module, params, units, method="encode_all")
    assert every.shape == (2, 1 + COUNT, WIDTH)
    ids = np.tile(np.arange(COUNT), (2, 1))
    np.testing.assert_allclose(every, apply(module, params, units, ids), atol=1e-6)
    np.testing.assert_array_equal(module.patch_tokens(every), every[:, 1:])


def test_without_a_class_token_there_are_only_patches(units):
    module = make(use_cls_token=False)
    out = apply(module, random_params(module.init, units, IDS), units, IDS)
    assert out.shape == (2, 5, WIDTH)
    np.testing.assert_array_equal(module.patch_tokens(out), out)


@pytest.mark.parametrize("use_cls_token", [True, False])
def test_learned_positions_start_as_the_fixed_ones(units, use_cls_token):
    learned = make(positions="learned", use_cls_token=use_cls_token, depth=1)
    fixed = make(use_cls_token=use_cls_token, depth=1)
    params = jax.jit(learned.init)(jax.random.key(0), units, IDS)["params"]
    table = np.asarray(params["pos_embed"][0])
    np.testing.assert_array_equal(table[int(use_cls_token) :], sincos_2d(WIDTH, GRID))
    assert not table[: int(use_cls_token)].any()
    rest = {k: v for k, v in params.items() if k != "pos_embed"}
    expected = apply(fixed, rest, units, IDS)
    np.testing.assert_allclose(apply(learned, params, units, IDS), expected, atol=1e-6)


def test_learned_positions_of_seen_units_and_of_the_class_token_get_a_gradient(units):
    module = make(positions="learned")
    params = random_params(module.init, units, IDS)

    def loss(params: Any) -> jax.Array:
        return jnp.square(module.apply({"params": params}, units, IDS) - 1.0).sum()

    gradient = np.asarray(quick_jit(jax.grad(loss))(params)["pos_embed"][0])
    seen = {0, *(IDS.ravel() + 1)}
    assert set(np.flatnonzero(np.abs(gradient).max(axis=1))) == seen


@pytest.mark.parametrize(
    ("width", "heads", "patch", "kernel_bound", "bias_bound", "qkv_bound"),
    [
        (768, 12, 16, 0.0625, 0.03608, 0.044194),
        (1024, 16, 16, 0.057864, 0.03608, 0.038273),
        (1280, 16, 14, 0.056674, 0.04124, 0.034233),
    ],
)
def test_initial_values_are_those_of_the_official_code(
    width, heads, patch, kernel_bound, bias_bound, qkv_bound
):
    module = make(embed_dim=width, num_heads=heads, depth=1)
    units = jnp.zeros((1, 1, 3 * patch**2))
    params = jax.jit(module.init)(jax.random.key(0), units, jnp.zeros((1, 1), jnp.int32))["params"]
    for values, bound, slack in (
        (params["patch_embed"]["kernel"], kernel_bound, 1e-4),
        (params["patch_embed"]["bias"], bias_bound, 2e-2),  # few values: the largest is not at it
        (params["block_00"]["attn"]["qkv"]["kernel"], qkv_bound, 1e-4),
    ):
        largest = np.abs(values).max()
        assert bound * (1 - slack) < largest < bound * (1 + 2e-4)
        np.testing.assert_allclose(np.std(values), bound / math.sqrt(3), rtol=0.06)
    np.testing.assert_allclose(np.std(params["cls_token"]), 0.02, rtol=0.1)
    assert np.all(params["norm"]["scale"] == 1)
    assert not np.any(params["norm"]["bias"])


def test_bfloat16_is_for_products_alone(units):
    module = make(dtype=jnp.bfloat16)
    params = random_params(module.init, units, IDS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = apply(module, params, units, IDS)
    assert out.dtype == jnp.bfloat16
    exact = apply(make(), params, units, IDS)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.1)


def test_drop_path_rate_grows_from_zero_and_each_branch_has_its_own_key(units, monkeypatch):
    rates, keys = [], []

    def record(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
        rates.append(rate)
        keys.append(jax.random.key_data(rng))
        return x

    module = make(depth=4, drop_path_rate=0.3)
    params = random_params(module.init, units, IDS)
    monkeypatch.setattr(blocks, "drop_path", record)

    def run(params: Any) -> jax.Array:
        module.apply({"params": params}, units, IDS, drop_path_rng=jax.random.key(1))
        return jnp.stack(keys)

    drawn = np.asarray(quick_jit(run)(params))
    np.testing.assert_allclose(rates, [0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert len(np.unique(drawn, axis=0)) == 8


def test_drop_path_without_a_key_or_rate_is_none_and_with_both_is_random(units):
    module, plain = make(drop_path_rate=0.9), make()
    params = random_params(module.init, units, IDS)
    images, ids = np.tile(units[:1], (16, 1, 1)), IDS[:1]
    key = jax.random.key(0)
    expected = apply(plain, params, images, ids)
    np.testing.assert_array_equal(apply(module, params, images, ids), expected)
    np.testing.assert_array_equal(apply(plain, params, images, ids, drop_path_rng=key), expected)
    once = apply(module, params, images, ids, drop_path_rng=key)
    np.testing.assert_array_equal(once, apply(module, params, images, ids, drop_path_rng=key))
    assert len({row.tobytes() for row in np.asarray(once)}) > 1  # one draw for each sample
    other = apply(module, params, images, ids, drop_path_rng=jax.random.key(1))
    assert not np.array_equal(once, other)


def test_unknown_positions_are_refused(units):
    with pytest.raises(ConfigError, match="positions 'rotary' is not one of fixed, learned"):
        make(positions="rotary").init(jax.random.key(0), units, IDS)


def test_flops_count_the_embedding_and_the_blocks_with_the_class_token():
    embed, in_blocks = make().flops(units=5, unit_size=SIZE)
    assert embed == 2 * 5 * SIZE * WIDTH
    assert in_blocks == 2 * blocks.block_flops(6, WIDTH)
    assert make(use_cls_token=False).flops(5, SIZE)[1] == 2 * blocks.block_flops(5, WIDTH)
