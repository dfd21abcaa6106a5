"""Swin over units: the grid, windows and regions, and where the biases take places from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.models.swin import PositionMlp, SwinEncoder, region_mask
from mae_jax.nn import masking
from tests.weights import apply, normal, random_params


def make(grid_size=(4, 8), **fields) -> SwinEncoder:
    fields = {"stage_depths": (2, 1, 1, 1), "window_size": 8} | fields
    return SwinEncoder(grid_size=grid_size, channels=1, embed_dim=8, num_heads=2, **fields)


@pytest.fixture(scope="module")
def plan():
    return masking.uniform_plan(jax.random.key(0), 2, (4, 8), 0.25)


def test_grids_windows_and_shifts_of_the_published_sizes():
    encoder = make((16, 16), window_size=16)
    grids = [encoder.window(grid, full=False) for grid in encoder.stage_grids(64)]
    assert grids == [((8, 8), (4, 4)), ((8, 8), (4, 4)), ((8, 8), (0, 0)), ((4, 4), (0, 0))]
    assert encoder.stage_grids(64) == [(32, 32), (16, 16), (8, 8), (4, 4)]
    grids = [encoder.window(grid, full=True) for grid in encoder.stage_grids(256)]
    assert grids == [((16, 16), (8, 8)), ((16, 16), (8, 8)), ((16, 16), (0, 0)), ((8, 8), (0, 0))]


def test_compaction_brings_each_unit_its_own_coordinates(plan):
    encoder = make()
    ids = plan.ids_keep
    places = np.asarray(encoder._places(ids, (2, 4)))  # [2, 8, 16, 2]
    row, column = np.divmod(np.arange(16 * 32), 32)  # of all tokens
    image = np.stack([row, column], axis=-1).reshape(4, 4, 8, 4, 2)  # unit and place within
    for n in range(2):
        for block, unit in enumerate(np.asarray(ids[n])):
            i, j = divmod(block, 4)
            of_unit = image[unit // 8, :, unit % 8]
            np.testing.assert_array_equal(places[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4], of_unit)
    full = np.asarray(encoder._places(jnp.arange(32)[None], (4, 8)))
    np.testing.assert_array_equal(full[0], np.stack([row, column], -1).reshape(16, 32, 2))


def test_regions_of_a_small_shifted_grid():
    mask = region_mask((4, 4), (2, 2), (1, 1))
    assert mask.shape == (4, 4, 4)
    assert mask[0].all()  # nothing came in from the other end
    # Top right: the right column came in from the left.
    np.testing.assert_array_equal(mask[1], np.tile([[1, 0], [0, 1]], (2, 2)))
    np.testing.assert_array_equal(mask[2], np.kron(np.eye(2), np.ones((2, 2))))
    np.testing.assert_array_equal(mask[3], np.eye(4))


def test_bias_is_of_the_log_spaced_difference_key_minus_query():
    places = jnp.asarray([[0.0, 0.0], [3.0, 0.0], [1.0, 7.0]])
    module = PositionMlp(2, 3)
    params = jax.tree.map(np.asarray, random_params(module.init, places))
    out = apply(module, params, places)
    assert out.shape == (2, 3, 3)
    x = np.array([np.log(1 + 1), np.log(1 + 7)])  # query 0, key 2
    hidden = np.maximum(x @ params["fc1"]["kernel"] + params["fc1"]["bias"], 0)
    expected = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(out[:, 0, 2], expected, rtol=1e-5)
    hidden = np.maximum(-x @ params["fc1"]["kernel"] + params["fc1"]["bias"], 0)
    expected = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(out[:, 2, 0], expected, rtol=1e-5)


def test_parameters_have_their_names_and_no_table():
    encoder = make()
    shapes = jax.eval_shape(
        lambda: encoder.init(
            jax.random.key(0),
            jnp.zeros((1, 8, 64)),
            jnp.zeros((1, 8), int),
            replaced=jnp.zeros((1, 8), bool),
        )
    )["params"]
    assert set(shapes) == {
        *("patch_embed", "patch_norm", "mask_token", "norm"),
        *(f"block_{i:02d}" for i in range(5)),
        *(f"downsample_{i}" for i in (1, 2, 3)),
    }
    assert shapes["patch_embed"]["kernel"].shape == (4, 8)
    assert shapes["downsample_1"]["proj"]["kernel"].shape == (32, 16)
    assert set(shapes["block_00"]["attn"]) == {"qkv", "proj", "bias"}
    layers = [encoder.layer_id(n) for n in ("patch_norm/scale", "downsample_1/norm/scale", "norm")]
    assert layers == [0, 3, 6]


def test_tokens_that_are_replaced_do_not_show(plan):
    encoder = make(drop_path_rate=0.0)
    units = normal((2, 8, 64))
    params = random_params(encoder.init, units, plan.ids_keep, replaced=plan.replaced)
    out = apply(encoder, params, units, plan.ids_keep, replaced=plan.replaced)
    assert out.shape == (2, 1 * 2, 64)
    other = np.where(plan.replaced[..., None], units + 1, units)
    same = apply(encoder, params, other, plan.ids_keep, replaced=plan.replaced)
    np.testing.assert_array_equal(out, same)
    moved = apply(encoder, params, units, plan.ids_keep.at[0, 0].add(1), replaced=plan.replaced)
    assert np.abs(out[0] - moved[0]).max() > 1e-4  # places count
    np.testing.assert_array_equal(out[1], moved[1])


@pytest.mark.parametrize(
    ("grid_size", "units", "fields", "message"),
    [
        ((14, 14), 49, {}, r"28 x 28 stem patches cannot be halved 3 times.*multiple of 4 units"),
        ((7, 7), 49, {}, r"28 x 28 stem patches cannot be halved 3 times.*multiple of 2 units"),
        ((12, 12), 36, {"window_size": 16}, r"window_size 16: .* 12 x 12 tokens .* 8 x 8"),
        ((4, 8), 16, {}, "expected all of 4 x 8 units, or one of each 2 x 2, got 16"),
        ((4, 8), 32, {"positions": "learned"}, "positions 'learned': Swin has none"),
    ],
)
def test_what_cannot_be_run_is_refused(grid_size, units, fields, message):
    with pytest.raises(ConfigError, match=message):
        make(grid_size, **fields).check(units)
