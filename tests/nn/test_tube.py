"""Masks of clips: tubes and whole time slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn import masking
from mae_jax.types import MaskPlan
from tests.weights import quick_jit

GRID = (4, 3, 5)  # time slots, down, across


TUBES, FRAMES = (
    quick_jit(draw, static_argnums=(1, 2, 3)) for draw in (masking.tube_plan, masking.frame_plan)
)


def masks_of(plan: MaskPlan) -> np.ndarray:
    """Return the 0/1 mask [B, t, h w]."""
    return np.asarray(masking.mask_of(plan)).reshape(-1, GRID[0], GRID[1] * GRID[2])


@pytest.mark.parametrize(
    ("count", "ratio", "hidden"),
    [(196, 0.9, 176), (196, 0.95, 186), (196, 0.75, 147), (8, 0.875, 7), (1568, 0.9, 1411)],
)
def test_hidden_units_are_the_floor_of_the_product(count, ratio, hidden):
    assert masking.hidden_count(count, ratio) == hidden


@pytest.mark.parametrize(
    ("ratio", "hidden"), [(0.0, 0), (0.05, 0), (1.0, 16), (1.2, 19), (-1, -16)]
)
def test_a_ratio_that_keeps_or_hides_nothing_is_refused(ratio, hidden):
    message = f"mask_ratio {ratio} hides {hidden} of 16 places; at least one must be kept"
    with pytest.raises(ConfigError, match=message):
        masking.hidden_count(16, ratio, "places")


@pytest.mark.parametrize(
    ("draw", "keep", "kept"), [(TUBES, 4, 16), (FRAMES, 1, 15)], ids=["tube", "frame"]
)
def test_a_plan_is_a_permutation_in_raster_order(draw, keep, kept):
    plan = draw(jax.random.key(0), 6, GRID, keep)
    assert plan.ids_keep.shape == (6, kept)
    assert plan.ids_mask.shape == (6, 60 - kept)
    assert plan.ids_keep.dtype == plan.ids_mask.dtype == jnp.int32
    for ids in plan.ids_keep, plan.ids_mask:
        assert np.all(np.diff(ids, axis=1) > 0)
    both = np.concatenate([plan.ids_keep, plan.ids_mask], axis=1)
    np.testing.assert_array_equal(np.sort(both, axis=1), np.tile(np.arange(60), (6, 1)))


def test_a_tube_is_the_same_in_all_slots_and_another_for_each_clip():
    masks = masks_of(TUBES(jax.random.key(0), 6, GRID, 4))
    assert np.all(masks == masks[:, :1])
    np.testing.assert_array_equal(masks[:, 0].sum(axis=1), [11] * 6)
    assert len({mask.tobytes() for mask in masks}) == 6


def test_frames_are_whole_slots_and_others_for_each_clip():
    masks = masks_of(FRAMES(jax.random.key(0), 6, GRID, 1))
    assert np.all(masks == masks[..., :1])
    np.testing.assert_array_equal(masks[..., 0].sum(axis=1), [3] * 6)
    assert len({mask.tobytes() for mask in masks}) > 1


def test_noise_says_what_is_kept():
    noise = np.full((1, 15), 0.5)
    noise[0, [14, 2, 7]] = 0.1, 0.2, 0.3
    plan = TUBES(jax.random.key(0), 1, GRID, 3, jnp.asarray(noise))
    assert plan.ids_keep[0].tolist() == [s * 15 + i for s in range(4) for i in (2, 7, 14)]
    noise = jnp.asarray([[0.9, 0.1, 0.8, 0.2]])
    plan = FRAMES(jax.random.key(0), 1, GRID, 2, noise)
    assert plan.ids_keep[0].tolist() == [*range(15, 30), *range(45, 60)]


def test_every_place_is_kept_equally_often():
    masks = masks_of(TUBES(jax.random.key(5), 3000, GRID, 6))
    share = 1 - masks[:, 0].mean(axis=0)
    assert np.abs(share - 6 / 15).max() < 4 * np.sqrt(0.4 * 0.6 / 3000)
