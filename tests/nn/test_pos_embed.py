"""The fixed sine-cosine table, against published values and a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn.pos_embed import bicubic_matrix, resize_table, sincos_2d

VALUES = [  # width, side of the grid, index of the patch, dimension -> value
    (768, 14, 1, {0: 0.841471, 1: 0.815251, 191: 0.000105, 192: 0.540302, 384: 0.0, 576: 1.0}),
    (768, 14, 14, {0: 0.0, 192: 1.0, 384: 0.841471, 385: 0.815251, 576: 0.540302}),
    (768, 14, 195, {0: 0.420167, 1: -0.174370, 192: 0.907447, 767: 0.999999}),
    (512, 14, 195, {1: -0.451936, 128: 0.907447}),
    (1024, 14, 195, {1: -0.025767}),
    (1280, 16, 255, {1: 0.905919}),
]
SUMS = [  # width, side of the grid, sum of the table
    (768, 14, 69594.4939),
    (512, 14, 46340.3331),
    (1024, 14, 92849.1979),
    (1280, 16, 149578.4058),
]


@pytest.mark.parametrize(("width", "side", "index", "values"), VALUES)
def test_table_has_the_values_of_the_official_code(width, side, index, values):
    row = sincos_2d(width, (side, side))[index]
    np.testing.assert_allclose(row[list(values)], list(values.values()), atol=6e-7)


@pytest.mark.parametrize(("width", "side", "total"), SUMS)
def test_table_has_the_sum_of_the_official_code(width, side, total):
    table = sincos_2d(width, (side, side))
    np.testing.assert_allclose(table.sum(dtype=np.float64), total, atol=2e-4)


@pytest.mark.parametrize(("width", "grid_size"), [(768, (14, 14)), (1280, (16, 16)), (8, (3, 7))])
def test_squared_norm_of_each_row_is_half_the_width(width, grid_size):
    table = sincos_2d(width, grid_size)
    norms = np.square(table, dtype=np.float64).sum(axis=1)
    np.testing.assert_allclose(norms, np.full(len(table), width / 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("width", "grid_size"), [(16, (2, 5)), (16, (5, 2)), (4, (1, 3)), (20, (3, 3))]
)
def test_table_equals_a_loop_on_any_grid(width, grid_size):
    rows, columns = grid_size
    expected = []
    for row in range(rows):
        for column in range(columns):
            quarter = [10000 ** (-k / (width / 4)) for k in range(width // 4)]
            expected.append(
                [math.sin(column * w) for w in quarter]
                + [math.cos(column * w) for w in quarter]
                + [math.sin(row * w) for w in quarter]
                + [math.cos(row * w) for w in quarter]
            )
    table = sincos_2d(width, grid_size)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, atol=1e-7)


def test_width_that_is_no_multiple_of_4_is_refused():
    with pytest.raises(ConfigError, match="embed_dim 18 is not a multiple of 4"):
        sincos_2d(18, (2, 2))


def test_bicubic_weights_half_way_are_those_of_keys_with_a_of_three_quarters():
    near, far = 0.59375, -0.09375  # at distances 1/2 and 3/2
    expected = [[near + far, near, far, 0], [0, far, near, near + far]]  # the border counts twice
    np.testing.assert_allclose(bicubic_matrix(4, 2), expected, atol=1e-12)
    # Twice as fine: place 3 1/4 has the samples 2 ... 5 at 5/4, 1/4, 3/4 and 7/4.
    inner = bicubic_matrix(8, 16)[7]
    np.testing.assert_allclose(inner[2:6], [-0.10546875, 0.87890625, 0.26171875, -0.03515625])


@pytest.mark.parametrize(("old", "new"), [(14, 24), (16, 14), (3, 7), (1, 4)])
def test_bicubic_weights_sum_to_one(old, new):
    matrix = bicubic_matrix(old, new)
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)


def test_a_table_is_resized_down_and_across_by_themselves():
    rows, columns = np.arange(4.0), 10.0 * np.arange(6.0)
    table = (rows[:, None] + columns[None]).reshape(1, 24, 1).astype(np.float32)
    table = np.concatenate([np.full((1, 1, 1), 7.0, np.float32), table], axis=1)
    out = resize_table(table, (4, 6), (8, 3), prefix=1)
    assert out.shape == (1, 25, 1)
    assert out.dtype == np.float32
    assert out[0, 0, 0] == 7.0
    down, across = bicubic_matrix(4, 8) @ rows, bicubic_matrix(6, 3) @ columns
    expected = down[:, None] + across[None]
    np.testing.assert_allclose(out[0, 1:, 0].reshape(8, 3), expected, rtol=1e-6, atol=1e-5)


def test_the_same_grid_keeps_every_bit():
    table = np.random.default_rng(0).normal(size=(1, 17, 8)).astype(np.float32)
    assert resize_table(table, (4, 4), (4, 4), prefix=1) is table


@pytest.mark.parametrize("shape", [(1, 16, 8), (17, 8), (2, 17, 8)])
def test_a_table_of_another_grid_is_refused(shape):
    with pytest.raises(ConfigError, match=r"expected \[1, 1 \+ 16, D\] for the grid 4 x 4, got"):
        resize_table(np.zeros(shape), (4, 4), (2, 2), prefix=1)
