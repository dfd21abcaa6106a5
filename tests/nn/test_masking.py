"""Which units are hidden, and putting them back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn import masking
from mae_jax.types import MaskPlan

NOISE = [0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4]


@pytest.fixture
def plan() -> MaskPlan:
    return masking.random_plan(jax.random.key(3), 5, 12, 4)


def shared(batch_size: int = 5) -> tuple[MaskPlan, MaskPlan]:
    """Return a plan with one mask for all images, and the same repeated for each of them."""
    one = masking.random_plan(jax.random.key(4), 1, 12, 4)
    return one, jax.tree.map(lambda ids: jnp.tile(ids, (batch_size, 1)), one)


@pytest.mark.parametrize(
    ("count", "mask_ratio", "keep"),
    [
        (196, 0.75, 49),
        (196, 0.5, 98),
        (196, 0.8, 39),
        (196, 0.85, 29),
        (196, 0.9, 19),
        (196, 0.6, 78),
        (256, 0.75, 64),
        (16, 0.75, 4),
        (100, 0.9, 9),  # 100 * (1 - 0.9) is 9.999999999999998
    ],
)
def test_keep_count_is_the_floor_of_the_floating_point_product(count, mask_ratio, keep):
    assert masking.keep_count(count, mask_ratio) == keep


@pytest.mark.parametrize(
    ("count", "mask_ratio", "keep"),
    [(16, 0.0, 16), (16, 1.0, 0), (16, 0.95, 0), (1, 0.5, 0), (16, -0.5, 24), (16, 1.5, -8)],
)
def test_ratio_that_keeps_or_hides_nothing_is_refused(count, mask_ratio, keep):
    message = f"mask_ratio {mask_ratio} keeps {keep} of {count} units; at least one must be kept"
    with pytest.raises(ConfigError, match=message):
        masking.keep_count(count, mask_ratio)


def test_units_with_the_smallest_noise_are_kept_in_the_order_of_the_noise():
    plan = masking.random_plan(jax.random.key(0), 1, 8, 4, jnp.asarray([NOISE]))
    assert plan.ids_keep.tolist() == [[1, 5, 3, 7]]
    assert plan.ids_mask.tolist() == [[2, 4, 6, 0]]
    assert plan.ids_keep.dtype == plan.ids_mask.dtype == jnp.int32
    assert masking.ids_restore(plan).tolist() == [[7, 0, 4, 2, 5, 1, 6, 3]]
    assert masking.mask_of(plan).tolist() == [[1, 0, 1, 0, 1, 0, 1, 0]]


def test_a_plan_is_a_permutation_and_keeps_exactly_k(plan):
    assert plan.ids_keep.shape == (5, 4)
    assert plan.ids_mask.shape == (5, 8)
    ids = np.concatenate([plan.ids_keep, plan.ids_mask], axis=1)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(12), (5, 1)))


def test_mask_is_1_where_removed(plan):
    mask = np.asarray(masking.mask_of(plan))
    assert mask.dtype == np.float32
    for row, keep, hidden in zip(mask, plan.ids_keep, plan.ids_mask, strict=True):
        assert row[np.asarray(keep)].tolist() == [0] * 4
        assert row[np.asarray(hidden)].tolist() == [1] * 8


def test_each_image_has_its_own_mask(plan):
    assert len({tuple(row) for row in np.asarray(masking.mask_of(plan))}) > 1


def test_a_key_always_gives_the_same_plan_and_another_key_another():
    first, again, other = (masking.random_plan(jax.random.key(k), 4, 64, 16) for k in (1, 1, 2))
    np.testing.assert_array_equal(first.ids_keep, again.ids_keep)
    assert not np.array_equal(first.ids_keep, other.ids_keep)


def test_every_unit_is_kept_equally_often():
    batch_size, count, keep = 4000, 16, 4
    plan = masking.random_plan(jax.random.key(5), batch_size, count, keep)
    share = 1 - np.asarray(masking.mask_of(plan)).mean(axis=0)
    deviation = np.sqrt(0.25 * 0.75 / batch_size)
    assert np.abs(share - keep / count).max() < 4 * deviation


def test_take_gathers_each_image_by_its_own_ids(plan):
    units = np.random.default_rng(0).standard_normal((5, 12, 3)).astype(np.float32)
    taken = masking.take(jnp.asarray(units), plan.ids_keep)
    expected = np.stack([units[i, np.asarray(plan.ids_keep[i])] for i in range(5)])
    np.testing.assert_array_equal(taken, expected)


def test_restore_undoes_the_order_of_a_plan(plan):
    units = jax.random.normal(jax.random.key(0), (5, 12, 3))
    ordered = jnp.concatenate(
        [masking.take(units, plan.ids_keep), masking.take(units, plan.ids_mask)], axis=1
    )
    np.testing.assert_array_equal(masking.restore(ordered, plan), units)


def test_a_shared_mask_equals_the_same_mask_for_each_image():
    one, each = shared()
    units = jax.random.normal(jax.random.key(0), (5, 12, 3))
    np.testing.assert_array_equal(
        masking.take(units, one.ids_keep), masking.take(units, each.ids_keep)
    )
    np.testing.assert_array_equal(masking.restore(units, one), masking.restore(units, each))
    assert masking.mask_of(one).shape == (1, 12)
    np.testing.assert_array_equal(jnp.tile(masking.mask_of(one), (5, 1)), masking.mask_of(each))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected noise \[2, 16\], got \[2, 15\]"):
        masking.random_plan(jax.random.key(0), 2, 16, 4, jnp.zeros((2, 15)))
