"""Cutting images into patches, and the normalised target."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn.patches import (
    PatchUnit,
    denormalize_units,
    from_grid,
    normalize_units,
    subdivide,
    to_grid,
    unit_statistics,
)

CASES = [  # image_size, patch_size, channels
    ((4, 4), 2, 3),
    ((8, 12), 4, 3),
    ((12, 6), 3, 1),
    ((6, 4), 2, 4),
    ((5, 5), 5, 3),
    ((2, 3), 1, 2),
]


def slow_split(images: np.ndarray, p: int) -> np.ndarray:
    _, height, width, channels = images.shape
    units = []
    for top in range(0, height, p):
        for left in range(0, width, p):
            unit = [
                images[:, top + i, left + j, c]
                for i in range(p)
                for j in range(p)
                for c in range(channels)
            ]
            units.append(np.stack(unit, axis=1))
    return np.stack(units, axis=1)


def random_images(unit: PatchUnit, batch_size: int = 2) -> np.ndarray:
    shape = (batch_size, *unit.image_size, unit.channels)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_unit_runs_over_rows_then_columns_then_channels():
    units = PatchUnit((4, 4), 2).split(jnp.arange(48.0).reshape(1, 4, 4, 3))
    assert units.shape == (1, 4, 12)
    assert units[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert units[0, 1].tolist() == [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]
    assert units[0, 2].tolist() == [24, 25, 26, 27, 28, 29, 36, 37, 38, 39, 40, 41]


@pytest.mark.parametrize(("image_size", "patch_size", "channels"), CASES)
def test_split_equals_a_loop_over_pixels(image_size, patch_size, channels):
    unit = PatchUnit(image_size, patch_size, channels)
    images = random_images(unit)
    units = unit.split(jnp.asarray(images))
    assert units.shape == (2, unit.count, unit.size)
    np.testing.assert_array_equal(units, slow_split(images, patch_size))


@pytest.mark.parametrize(("image_size", "patch_size", "channels"), CASES)
def test_join_undoes_split(image_size, patch_size, channels):
    unit = PatchUnit(image_size, patch_size, channels)
    images = random_images(unit)
    np.testing.assert_array_equal(unit.join(unit.split(jnp.asarray(images))), images)


def test_sizes_are_counted_down_then_across():
    unit = PatchUnit((32, 48), 8, 4)
    assert unit.grid_size == (4, 6)
    assert unit.count == 24
    assert unit.size == 256


def test_split_and_join_keep_the_dtype():
    unit = PatchUnit((4, 4), 2)
    for dtype in (jnp.bfloat16, jnp.uint8):
        units = unit.split(jnp.ones((1, 4, 4, 3), dtype))
        assert units.dtype == dtype
        assert unit.join(units).dtype == dtype


def test_normalised_values_have_the_unbiased_variance():
    unit = jnp.asarray([6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23], jnp.float32)
    normalized = normalize_units(unit)
    np.testing.assert_allclose(normalized[0], -1.304538, atol=1e-6)  # biased: -1.362546


def test_all_values_of_a_unit_are_normalised_together():
    units = np.random.default_rng(1).normal(3.0, 5.0, (2, 5, 48)).astype(np.float32)
    wide = units.astype(np.float64)
    mean = wide.sum(-1, keepdims=True) / 48
    variance = ((wide - mean) ** 2).sum(-1, keepdims=True) / 47
    expected = (wide - mean) / np.sqrt(variance + 1e-6)
    np.testing.assert_allclose(normalize_units(jnp.asarray(units)), expected, atol=2e-6)


def test_predicting_zeros_costs_one_less_one_nth():
    units = jax.random.normal(jax.random.key(0), (3, 4, 768))
    error = jnp.square(normalize_units(units)).mean(-1)
    np.testing.assert_allclose(error, np.full((3, 4), 767 / 768), rtol=1e-5)


def test_a_flat_unit_becomes_zeros_and_not_nan():
    mean, std = unit_statistics(jnp.full((1, 1, 12), 0.5))
    np.testing.assert_allclose(mean, 0.5)
    np.testing.assert_allclose(std, 1e-3, rtol=1e-6)  # the root of the 1e-6 that is added
    np.testing.assert_array_equal(normalize_units(jnp.full((1, 1, 12), 0.5)), np.zeros((1, 1, 12)))


def test_statistics_are_float32_whatever_the_pixels_are():
    units = jnp.asarray(np.random.default_rng(2).normal(100.0, 1.0, (2, 3, 48)), jnp.bfloat16)
    mean, std = unit_statistics(units)
    assert mean.dtype == std.dtype == jnp.float32
    wide = np.asarray(units, np.float64)
    np.testing.assert_allclose(mean[..., 0], wide.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(std[..., 0], wide.std(-1, ddof=1), rtol=1e-4)
    assert normalize_units(units).dtype == jnp.float32


def test_denormalize_undoes_normalize():
    units = jnp.asarray(np.random.default_rng(3).normal(2.0, 3.0, (2, 3, 48)), jnp.float32)
    np.testing.assert_allclose(denormalize_units(normalize_units(units), units), units, atol=1e-5)


def test_denormalize_gives_predictions_the_brightness_and_contrast_of_the_true_unit():
    rng = np.random.default_rng(4)
    units = jnp.asarray(rng.normal(2.0, 3.0, (1, 2, 48)), jnp.float32)
    values = jnp.asarray(rng.standard_normal((1, 2, 48)), jnp.float32)
    mean, std = unit_statistics(denormalize_units(normalize_units(values), units))
    true_mean, true_std = unit_statistics(units)
    np.testing.assert_allclose(mean, true_mean, rtol=1e-5)
    np.testing.assert_allclose(std, true_std, rtol=1e-5)


@pytest.mark.parametrize("image_size", [(30, 32), (32, 30), (4, 4)])
def test_a_patch_that_does_not_divide_the_image_is_refused(image_size):
    height, width = image_size
    message = f"image_size {height}x{width} is not a multiple of patch_size 8"
    with pytest.raises(ConfigError, match=message):
        PatchUnit(image_size, 8)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "channels"),
    [((0, 8), 8, 3), ((8, -8), 8, 3), ((8, 8), 0, 3), ((8, 8), 8, 0)],
)
def test_sizes_below_one_are_refused(image_size, patch_size, channels):
    with pytest.raises(ConfigError, match="must all be at least 1"):
        PatchUnit(image_size, patch_size, channels)


@pytest.mark.parametrize("shape", [(2, 32, 24, 3), (2, 24, 32, 1), (24, 32, 3)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected images \[B, 24, 32, 3\], got \[") as error:
        PatchUnit((24, 32), 8).split(jnp.zeros(shape))
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 11, 192), (2, 12, 64)])
def test_units_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected units \[B, 12, 192\], got \["):
        PatchUnit((24, 32), 8).join(jnp.zeros(shape))


def test_a_unit_in_patches_is_what_the_image_in_patches_has_there():
    coarse, fine = PatchUnit((16, 24), 8), PatchUnit((16, 24), 2)
    images = random_images(fine)
    inner = subdivide(coarse.split(images), 4, 3)
    assert inner.shape == (2, 6, 4, 4, 12)
    grid = to_grid(inner, coarse.grid_size)
    np.testing.assert_array_equal(grid, fine.split(images).reshape(2, 8, 12, 12))
    np.testing.assert_array_equal(from_grid(grid, 4), inner)


def test_units_that_cannot_be_cut_are_refused():
    with pytest.raises(ConfigError, match="units of 48 values and 3 channels cannot be cut into 3"):
        subdivide(jnp.zeros((1, 2, 48)), 3, 3)
