"""Cutting clips into cubes, and the target normalised by channel."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn.cubes import (
    CubeUnit,
    channel_statistics,
    denormalize_channels,
    normalize_channels,
)
from tests.weights import normal

CASES = [  # clip_size, tubelet_size, patch_size, channels
    ((4, 4, 6), 2, 2, 3),
    ((6, 4, 4), 3, 4, 1),
    ((3, 6, 3), 1, 3, 2),
]


def slow_split(clips: np.ndarray, d: int, p: int) -> np.ndarray:
    _, frames, height, width, channels = clips.shape
    units = []
    for first, top, left in itertools.product(
        range(0, frames, d), range(0, height, p), range(0, width, p)
    ):
        unit = [
            clips[:, first + f, top + i, left + j, c]
            for f, i, j, c in itertools.product(range(d), range(p), range(p), range(channels))
        ]
        units.append(np.stack(unit, axis=1))
    return np.stack(units, axis=1)


@pytest.mark.parametrize(("clip_size", "tubelet_size", "patch_size", "channels"), CASES)
def test_split_equals_a_loop_over_pixels_and_join_undoes_it(
    clip_size, tubelet_size, patch_size, channels
):
    unit = CubeUnit(clip_size, tubelet_size, patch_size, channels)
    clips = normal((2, *clip_size, channels))
    units = unit.split(jnp.asarray(clips))
    assert units.shape == (2, unit.count, unit.size)
    np.testing.assert_array_equal(units, slow_split(clips, tubelet_size, patch_size))
    np.testing.assert_array_equal(unit.join(units), clips)


def test_a_unit_runs_over_frames_then_rows_then_columns_then_channels():
    units = CubeUnit((2, 2, 4), 2, 2, 1).split(jnp.arange(16.0).reshape(1, 2, 2, 4, 1))
    assert units[0].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


def test_sizes_are_counted_in_time_then_down_then_across():
    unit = CubeUnit((16, 224, 224))
    assert (unit.grid_size, unit.count, unit.size) == ((8, 14, 14), 1568, 1536)
    unit = CubeUnit((4, 32, 48), 1, 8, 4)
    assert unit.shape == (4, 32, 48, 4)
    assert (unit.grid_size, unit.image_size, unit.frames) == ((4, 4, 6), (32, 48), 4)


def test_split_keeps_the_dtype():
    unit = CubeUnit((2, 4, 4), 2, 2)
    units = unit.split(jnp.ones((1, 2, 4, 4, 3), jnp.uint8))
    assert units.dtype == unit.join(units).dtype == jnp.uint8


def test_resized_clips_have_the_same_cubes():
    unit = CubeUnit((4, 16, 16), 2, 8, 1)
    assert unit.resized((24, 32)) == CubeUnit((4, 24, 32), 2, 8, 1)
    assert unit.resized((16, 16), frames=10) == CubeUnit((10, 16, 16), 2, 8, 1)
    with pytest.raises(ConfigError, match="frames 5 is not a multiple of tubelet_size 2"):
        unit.resized((16, 16), frames=5)


def test_each_channel_is_normalised_by_itself_with_the_epsilon_outside_the_root():
    # Two frames of one pixel; channels 1, 3 and 10, 30: mean 2 and 20, unbiased variance 2 and 200.
    units = jnp.asarray([[[1.0, 10.0, 3.0, 30.0]]]) * 1e-6
    mean, scale = channel_statistics(units, 2)
    np.testing.assert_allclose(mean, [[[[2e-6, 20e-6]]]], rtol=1e-6)
    expected = np.sqrt([2.0, 200.0]) * 1e-6 + 1e-6
    np.testing.assert_allclose(scale, expected.reshape(1, 1, 1, 2), rtol=1e-5)
    np.testing.assert_allclose(
        normalize_channels(units, 2)[0, 0],
        [-1e-6 / expected[0], -10e-6 / expected[1], 1e-6 / expected[0], 10e-6 / expected[1]],
        rtol=1e-5,
    )


def test_normalising_is_exact_to_rounding_and_undone():
    units = np.random.default_rng(1).normal(3.0, 5.0, (2, 5, 48)).astype(np.float32)
    wide = units.astype(np.float64).reshape(2, 5, 16, 3)
    expected = (wide - wide.mean(2, keepdims=True)) / (wide.std(2, ddof=1, keepdims=True) + 1e-6)
    values = normalize_channels(jnp.asarray(units), 3)
    np.testing.assert_allclose(values, expected.reshape(units.shape), atol=2e-6)
    np.testing.assert_allclose(denormalize_channels(values, units, 3), units, atol=1e-5)


def test_statistics_are_float32_and_a_flat_cube_gives_no_nan():
    units = jnp.full((1, 1, 12), 0.5, jnp.bfloat16)
    mean, scale = channel_statistics(units, 3)
    assert mean.dtype == scale.dtype == normalize_channels(units, 3).dtype == jnp.float32
    np.testing.assert_array_equal(normalize_channels(units, 3), np.zeros((1, 1, 12)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((5, 8, 8), 2, 4), "frames 5 is not a multiple of tubelet_size 2"),
        (((4, 8, 10), 2, 4), "image_size 8x10 is not a multiple of patch_size 4"),
        (
            ((0, 8, 8), 2, 4),
            "frames 0, image_size 8x8, tubelet_size 2, patch_size 4 and channels 3",
        ),
        (((4, 8, 8), 0, 4), "tubelet_size 0, patch_size 4 and channels 3 must all be at least 1"),
        (((4, 8, 8), 2, 0), "patch_size 0"),
        (((4, 8, 8), 2, 4, 0), "channels 0 must all be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        CubeUnit(*fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_clips_of_another_shape_are_refused():
    unit = CubeUnit((2, 4, 4), 2, 2)
    with pytest.raises(ValueError, match=r"expected clips \[B, 2, 4, 4, 3\], got \[1, 4, 4, 3\]"):
        unit.split(jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"expected units \[B, 4, 24\], got \[1, 4, 12\]"):
        unit.join(jnp.zeros((1, 4, 12)))
