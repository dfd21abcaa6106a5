"""HiViT's encoder: what stays within a unit, relative places, taking it elsewhere."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.models.hivit import HiViTEncoder
from mae_jax.models.transfer import make_classifier, transfer_encoder
from mae_jax.nn import blocks
from mae_jax.nn.patches import PatchUnit
from mae_jax.nn.pos_embed import resize_relative_table, resize_table, sincos_2d
from tests.weights import apply, normal, quick_jit, random_params

GRID, COUNT = (3, 4), 12
CHANNELS, SIZE, DIM = 2, 8 * 8 * 2, 4  # stem patches of 2 pixels; the last stage is 16 wide
IDS = np.asarray([[7, 0, 11, 4, 2], [1, 10, 3, 8, 5]])


def make(**fields: Any) -> HiViTEncoder:
    usual = {"grid_size": GRID, "channels": CHANNELS, "stem_dim": DIM, "num_heads": 2}
    return HiViTEncoder(**usual | {"stage_depths": (1, 1, 2)} | fields)


def shapes_of(module: HiViTEncoder) -> dict[str, tuple[int, ...]]:
    units = jax.ShapeDtypeStruct((1, 5, SIZE), jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), units, IDS[:1])["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def units() -> np.ndarray:
    return normal((2, 5, SIZE))


@pytest.fixture(scope="module")
def params(units: np.ndarray) -> Any:
    return random_params(make(relative_positions=True).init, units, IDS)


def without_tables(params: Any) -> Any:
    flat = traverse_util.flatten_dict(params, sep="/")
    kept = {path: leaf for path, leaf in flat.items() if not path.endswith("/table")}
    return traverse_util.unflatten_dict(kept, sep="/")


# Parameters


def test_parameters_have_these_names_and_shapes():
    shapes = shapes_of(make(relative_positions=True))
    mlp = {"norm2/scale", "norm2/bias", "mlp/fc1/kernel", "mlp/fc1/bias"}
    mlp |= {"mlp/fc2/kernel", "mlp/fc2/bias"}
    attention = {f"norm1/{name}" for name in ("scale", "bias")} | {"attn/bias/table"}
    attention |= {
        f"attn/{layer}/{name}" for layer in ("qkv", "proj") for name in ("kernel", "bias")
    }
    in_blocks = {k for k in shapes if k.startswith("block_")}
    # A depth of 1 is two blocks of the stem, and one of the last stage.
    expected = {f"block_{i:02d}/{name}" for i in range(6) for name in mlp}
    assert in_blocks == expected | {f"block_{i:02d}/{name}" for i in (4, 5) for name in attention}
    assert {k: v for k, v in shapes.items() if k not in in_blocks} == {
        "patch_embed/kernel": (2 * 2 * CHANNELS, DIM),
        "patch_embed/bias": (DIM,),
        "patch_norm/scale": (DIM,),
        "patch_norm/bias": (DIM,),
        "downsample_1/norm/scale": (4 * DIM,),
        "downsample_1/norm/bias": (4 * DIM,),
        "downsample_1/reduction/kernel": (4 * DIM, 2 * DIM),
        "downsample_2/norm/scale": (8 * DIM,),
        "downsample_2/norm/bias": (8 * DIM,),
        "downsample_2/reduction/kernel": (8 * DIM, 4 * DIM),
        "pos_embed": (1, COUNT, 4 * DIM),
        "norm/scale": (28 * DIM,),
        "norm/bias": (28 * DIM,),
    }
    assert shapes["block_01/mlp/fc1/kernel"] == (DIM, 3 * DIM)
    assert shapes["block_02/mlp/fc1/kernel"] == (2 * DIM, 6 * DIM)
    assert shapes["block_04/mlp/fc1/kernel"] == (4 * DIM, 16 * DIM)
    assert shapes["block_04/attn/qkv/kernel"] == (4 * DIM, 12 * DIM)
    assert shapes["block_05/attn/bias/table"] == (5, 7, 2)


def test_a_published_depth_is_two_blocks_in_the_stem():
    assert make(stage_depths=(2, 2, 20)).depths == (4, 4, 20)


def test_scales_norm_and_positions_are_there_only_where_asked_for():
    one = shapes_of(make(multi_scale=False))
    assert one["norm/scale"] == (4 * DIM,)  # not of all scales
    assert make(multi_scale=False).output_dim == 4 * DIM
    assert make().output_dim == 28 * DIM
    bare = shapes_of(make(final_norm=False, positions="fixed"))
    assert not {"norm/scale", "pos_embed"} & bare.keys()
    assert not any(name.endswith("/table") for name in bare)


def test_initial_values(units):
    module = make(stem_dim=32, relative_positions=True, stage_depths=(1, 1, 1))
    params = quick_jit(module.init)(jax.random.key(0), units, IDS)["params"]
    flat = traverse_util.flatten_dict(params, sep="/")
    bound = 1 / math.sqrt(2 * 2 * CHANNELS)  # PyTorch's, of a convolution
    for path, values in flat.items():
        values = np.asarray(values)
        if path.startswith("patch_embed/"):
            assert 0.9 * bound < np.abs(values).max() <= bound
            np.testing.assert_allclose(values.std(), bound / math.sqrt(3), rtol=0.2)
        elif path.endswith("kernel"):
            np.testing.assert_allclose(values.std(), 0.02, rtol=0.05, err_msg=path)
            assert np.abs(values).max() > 3 * 0.02  # not cut at two deviations
        elif path == "pos_embed":
            np.testing.assert_array_equal(values[0], sincos_2d(128, GRID))
        else:
            assert np.all(values == float(path.endswith("scale"))), path


# What reaches what


def test_units_can_be_left_out_before_the_stem(units, params):
    """The first two scales of a unit are the same whether the others are there or not."""
    module = make(relative_positions=True, final_norm=False)
    params = {name: leaf for name, leaf in params.items() if name != "norm"}
    every = normal((2, COUNT, SIZE), seed=1)
    kept = np.take_along_axis(every, IDS[..., None], axis=1)
    after = np.take_along_axis(
        np.asarray(apply(module, params, every, method="encode_all")), IDS[..., None], axis=1
    )
    before = np.asarray(apply(module, params, kept, IDS))
    assert before.shape == (2, 5, 28 * DIM)
    np.testing.assert_allclose(before[..., : 24 * DIM], after[..., : 24 * DIM], atol=1e-5)
    # The last stage does look around.
    assert np.abs(before - after)[..., 24 * DIM :].min(axis=-1).max() > 1e-3


def test_order_of_the_units_is_only_the_order_of_the_output(units, params):
    module = make(relative_positions=True)
    order = [3, 0, 4, 1, 2]
    out = np.asarray(apply(module, params, units, IDS))
    shuffled = apply(module, params, units[:, order], IDS[:, order])
    np.testing.assert_allclose(shuffled, out[:, order], atol=1e-5)
    moved = np.asarray(apply(module, params, units, IDS[:, order]))
    assert np.abs(moved - out).max() > 1e-2


def test_shared_ids_equal_the_same_ids_for_each_image(units, params):
    module = make(relative_positions=True)
    one = apply(module, params, units, IDS[:1])
    each = apply(module, params, units, np.tile(IDS[:1], (2, 1)))
    np.testing.assert_allclose(one, each, atol=1e-5)


def test_relative_positions_bias_by_difference_of_places(units, params):
    """A table that forbids all but the unit to the right lets a token see that unit alone."""
    module = make(relative_positions=True, positions="fixed", final_norm=False, multi_scale=False)
    table = np.full((5, 7, 2), -1e4, np.float32)
    table[2, 3 - 1] = 0  # query - key is (0, -1): the key is one to the right
    table[2, 3] = -5e3  # itself, where there is none
    changed = {k: v for k, v in params.items() if k not in ("norm", "pos_embed")}
    for name in ("block_04", "block_05"):
        attn = {**params[name]["attn"], "bias": {"table": table}}
        changed[name] = {**params[name], "attn": attn}
    ids = np.asarray([[5, 6, 0]])  # (1, 1), (1, 2), (0, 0)

    def out(units: jax.Array) -> jax.Array:
        return module.apply({"params": changed}, units, ids)

    by_unit = np.asarray(quick_jit(jax.jacrev(out))(units[:1, :3]))[0, :, :, 0]
    reaches = np.abs(by_unit).max(axis=(1, 3)) > 0
    np.testing.assert_array_equal(
        reaches, [[True, True, False], [False, True, False], [False, False, True]]
    )


def test_tables_of_zeros_change_nothing(units, params):
    zero = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key == "table" else leaf, params
    )
    plain = apply(make(), without_tables(params), units, IDS)
    np.testing.assert_allclose(
        apply(make(relative_positions=True), zero, units, IDS), plain, atol=1e-6
    )
    other = apply(make(relative_positions=True), params, units, IDS)
    assert np.abs(np.asarray(other) - plain).max() > 1e-2


def test_learned_positions_start_as_the_fixed_ones_and_are_trained(units, params):
    rest = {k: v for k, v in without_tables(params).items() if k != "pos_embed"}
    started = {**rest, "pos_embed": make().fixed_table()}
    np.testing.assert_allclose(
        apply(make(), started, units, IDS),
        apply(make(positions="fixed"), rest, units, IDS),
        atol=1e-6,
    )

    def loss(params: Any) -> jax.Array:
        return jnp.square(make().apply({"params": params}, units, IDS) - 1.0).sum()

    gradient = np.asarray(quick_jit(jax.grad(loss))(started)["pos_embed"][0])
    assert set(np.flatnonzero(np.abs(gradient).max(axis=1))) == set(IDS.ravel())


def test_bfloat16_is_for_products_alone(units, params):
    module = make(relative_positions=True, dtype=jnp.bfloat16)
    out = apply(module, params, units, IDS)
    assert out.dtype == jnp.bfloat16
    exact = apply(make(relative_positions=True), params, units, IDS)
    assert 0 < np.abs(out.astype(jnp.float32) - exact).max() < 0.15


def test_drop_path_grows_over_all_blocks(units, monkeypatch):
    rates = []

    def record(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
        assert rng is not None
        rates.append((rate, x.ndim))
        return x

    monkeypatch.setattr(blocks, "drop_path", record)
    module = make(drop_path_rate=0.25)
    jax.eval_shape(
        lambda: module.init(jax.random.key(0), units, IDS, drop_path_rng=jax.random.key(1))
    )
    # Six blocks, one branch each in the stem and two after it.
    expected = [0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.25, 0.25]
    np.testing.assert_allclose([rate for rate, _ in rates], expected)
    assert [ndim for _, ndim in rates] == [5] * 4 + [3] * 4


# Elsewhere


def test_layers_are_those_of_the_released_code():
    """28 blocks are 1 ... 28; merging counts with the block before it."""
    encoder = make(stage_depths=(2, 2, 20))
    assert encoder.top_layer == 29
    expected = {
        "patch_embed/kernel": 0,
        "patch_norm/scale": 0,
        "pos_embed": 0,
        "block_00/norm2/scale": 1,
        "block_03/mlp/fc1/kernel": 4,
        "downsample_1/norm/scale": 4,
        "block_04/mlp/fc1/kernel": 5,
        "block_07/mlp/fc1/kernel": 8,
        "downsample_2/reduction/kernel": 8,
        "block_08/attn/bias/table": 9,
        "block_27/attn/qkv/kernel": 28,
        "norm/scale": 29,
        "": 29,
    }
    assert {name: encoder.layer_id(name) for name in expected} == expected


UNIT = PatchUnit((24, 32), patch_size=8, channels=CHANNELS)


@pytest.mark.parametrize("options", [{}, {"norm_group": 2, "positions": "fixed"}])
def test_a_classifier_sees_the_last_stage_without_a_norm(options):
    classifier = make_classifier(UNIT, make(relative_positions=True), 3, **options)
    encoder = classifier.encoder
    assert not encoder.multi_scale
    assert not encoder.final_norm
    assert encoder.relative_positions
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((2, 24, 32, CHANNELS)))
    shapes = traverse_util.flatten_dict(shapes["params"], sep="/")
    assert "encoder/norm/scale" not in shapes
    assert shapes["head/linear/kernel"].shape == (4 * DIM, 3)
    if not options:
        assert shapes["head/norm/scale"].shape == (4 * DIM,)
        assert shapes["encoder/pos_embed"].shape == (1, COUNT, 4 * DIM)


def test_there_is_no_class_token_to_pool():
    with pytest.raises(ConfigError, match=r"model\.pooling 'cls' needs a class token"):
        make_classifier(UNIT, make(), 3, pooling="cls")


def test_a_pretrained_encoder_is_taken_with_fresh_tables_to_another_grid(params):
    source, given = make(), without_tables(params)
    classifier = make_classifier(UNIT, make(relative_positions=True), 3, image_size=(40, 32))
    target = classifier.encoder
    assert target.grid_size == (5, 4)
    fresh = jax.eval_shape(
        target.init, jax.random.key(0), jnp.zeros((1, 20, SIZE)), jnp.arange(20)[None]
    )["params"]
    moved = transfer_encoder(given, source, target, fresh)
    assert "norm" not in moved
    # What is not there stays the caller's: tables, at zero.
    assert not any("/table" in path for path in traverse_util.flatten_dict(moved, sep="/"))
    expected = resize_table(np.asarray(given["pos_embed"]), (3, 4), (5, 4), prefix=0)
    np.testing.assert_array_equal(moved["pos_embed"], expected)
    # From a fine-tuned one the tables come along, resized as well.
    moved = transfer_encoder(params, make(relative_positions=True), target, fresh)
    table = moved["block_05"]["attn"]["bias"]["table"]
    assert table.shape == (9, 7, 2)
    before = np.asarray(params["block_05"]["attn"]["bias"]["table"])
    np.testing.assert_array_equal(table, resize_relative_table(before, (9, 7)))


def test_flops_are_worked_by_hand():
    embed, rest = make().flops(units=5, unit_size=SIZE)
    assert embed == 2 * 5 * 16 * (8 * 4)  # 16 patches of 8 values each to 4
    stem = 2 * (16 * 6 * 4**2) + 2 * (4 * 6 * 8**2)  # two MLPs, ratio 3, in each stage
    merges = 4 * 16 * 8 + 1 * 32 * 16
    attention = 2 * (12 * 16**2 + 2 * 5 * 16)  # a token: 4 + 8 products, two with 5 tokens
    assert rest == 2 * 5 * (stem + merges + attention)


# Refusals


def test_what_cannot_be_is_refused(units):
    def init(module: HiViTEncoder, units: np.ndarray, **options: Any) -> None:
        jax.eval_shape(lambda: module.init(jax.random.key(0), units, IDS, **options))

    with pytest.raises(ConfigError, match="positions 'none' is not one of fixed, learned"):
        init(make(positions="none"), units)
    with pytest.raises(ConfigError, match=r"units of 98 values .* cannot be cut into 4 x 4"):
        init(make(), units[..., : 7 * 7 * 2])
    with pytest.raises(ConfigError, match="replaced: expected None"):
        init(make(), units, replaced=np.zeros((1, 5), bool))
