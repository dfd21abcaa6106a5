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


@pytest.mark.parametrize("mask_ratio", [0.1, 0.25, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("grid_size", [(14, 14), (6, 16)])
@pytest.mark.parametrize("sample", [masking.block_plan, masking.grid_plan])
def test_block_and_grid_plans_hide_exactly_the_number(sample, grid_size, mask_ratio):
    count = grid_size[0] * grid_size[1]
    keep = masking.keep_count(count, mask_ratio)
    plan = sample(jax.random.key(1), 64, grid_size, keep)
    assert plan.ids_keep.shape == (64, keep)
    ids = np.sort(np.concatenate([plan.ids_keep, plan.ids_mask], axis=1), axis=1)
    np.testing.assert_array_equal(ids, np.tile(np.arange(count), (64, 1)))
    assert len(np.unique(np.asarray(masking.mask_of(plan)), axis=0)) > 1  # not one mask for all


def neighbours_alike(plan: MaskPlan, grid_size: tuple[int, int]) -> float:
    """Return the share of neighbouring pairs of units that are both hidden or both kept."""
    mask = np.asarray(masking.mask_of(plan)).reshape(-1, *grid_size)
    across, down = mask[:, :, 1:] == mask[:, :, :-1], mask[:, 1:] == mask[:, :-1]
    return float((across.mean() + down.mean()) / 2)


def test_block_plans_hide_rectangles():
    # 20 of 196: one rectangle of at least 16 units, and what is left of a second one.
    plan = masking.block_plan(jax.random.key(2), 30, (14, 14), 176)
    for mask in np.asarray(masking.mask_of(plan)).reshape(-1, 14, 14):
        rows, columns = np.nonzero(mask)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        densest = max(
            mask[r : r + h, c : c + w].sum() * (mask[r : r + h, c : c + w].all())
            for r in range(14)
            for c in range(14)
            for h in range(1, 15 - r)
            for w in range(1, 15 - c)
            if h * w <= 20
        )
        assert densest >= 10 or height * width == 20
    half = masking.block_plan(jax.random.key(3), 200, (14, 14), 98)
    by_chance = masking.random_plan(jax.random.key(3), 200, 196, 98)
    assert neighbours_alike(half, (14, 14)) > 0.85
    assert neighbours_alike(by_chance, (14, 14)) == pytest.approx(0.5, abs=0.02)


def test_grid_plans_keep_one_of_each_2_by_2_at_three_quarters():
    plan = masking.grid_plan(jax.random.key(4), 50, (14, 14), 49)
    mask = np.asarray(masking.mask_of(plan)).reshape(50, 7, 2, 7, 2)
    np.testing.assert_array_equal((1 - mask).sum(axis=(2, 4)), np.ones((50, 7, 7)))
    places = {tuple(np.argwhere(m[0, :, 0] == 0)[0]) for m in mask}
    assert places == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for m in mask:  # the same place in each
        assert (m == m[:1, :, :1]).all()


def test_grid_plans_are_checkerboards_at_a_half():
    plan = masking.grid_plan(jax.random.key(5), 50, (14, 14), 98)
    assert neighbours_alike(plan, (14, 14)) == 0.0


def test_a_plan_can_be_made_of_a_mask():
    mask = np.array([[1, 0, 1, 0, 0], [0, 0, 1, 1, 0]])
    plan = masking.plan_of_mask(mask)
    assert plan.ids_keep.tolist() == [[1, 3, 4], [0, 1, 4]]
    assert plan.ids_mask.tolist() == [[0, 2], [2, 3]]
    np.testing.assert_array_equal(masking.mask_of(plan), mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 0], [1, 1, 0]], r"equally many removed units in each row, got shape \[2, 3\]"),
        ([[0, 0, 0]], "mask: keeps 3 of 3 units"),
        ([[1, 1, 1]], "mask: keeps 0 of 3 units"),
        ([[255, 0, 0]], r"mask: expected \[R, N\] of 0 and 1, got shape \[1, 3\] with 255"),
        ([[0.5, 0, 1]], r"of 0 and 1, got shape \[1, 3\] with 0.5"),
        ([1, 0, 0], r"mask: expected \[R, N\] of 0 and 1, got shape \[3\]$"),
    ],
)
def test_a_mask_that_fits_no_plan_is_refused(mask, message):
    with pytest.raises(ConfigError, match=message):
        masking.plan_of_mask(np.array(mask))


def test_uniform_plan_by_hand():
    noise = jnp.asarray(
        [[0.9, 0.2, 0.8, 0.7, 0.5, 0.6, 0.1, 0.3, 0.4, 0.4, 0.9, 0.8, 0.3, 0.9, 0.7, 0.6]]
    )
    plan = masking.uniform_plan(jax.random.key(0), 1, (4, 4), 0.25, noise)
    # Blocks (0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15); int(4 * 0.75) stay.
    assert plan.ids_keep.tolist() == [[1, 6, 12, 15]]
    assert plan.ids_mask.tolist() == [[0, 2, 3, 4, 5, 7, 8, 9, 10, 11, 13, 14]]
    assert plan.replaced is not None
    assert plan.replaced.tolist() == [[False, False, False, True]]
    assert np.flatnonzero(masking.replaced_of(plan)[0]).tolist() == [15]
    assert plan.ids_keep.dtype == plan.ids_mask.dtype == jnp.int32


def test_uniform_plan_keeps_each_unit_of_a_block_equally_often():
    rows, columns, draws = 4, 6, 4000
    plan = masking.uniform_plan(jax.random.key(1), draws, (rows, columns), 0.25)
    kept = 1 - np.asarray(masking.mask_of(plan)).reshape(draws, rows // 2, 2, columns // 2, 2)
    assert (kept.sum(axis=(2, 4)) == 1).all()
    # A share of 1/4 has a deviation of 0.007 here, and the largest of 24 is within 5 of them.
    np.testing.assert_allclose(kept.mean(axis=0), 0.25, atol=0.035)
    replaced = np.asarray(masking.replaced_of(plan))
    assert (replaced.sum(axis=1) == 6 - int(6 * 0.75)).all()
    assert (replaced <= 1 - np.asarray(masking.mask_of(plan))).all()
    np.testing.assert_allclose(replaced.mean(axis=0), 2 / 24, atol=0.025)
    order = np.sort(np.concatenate([plan.ids_keep, plan.ids_mask], axis=1), axis=1)
    assert (order == np.arange(24)).all()


def test_uniform_plan_of_a_callers_mask_has_the_order_of_blocks():
    mask = np.ones((1, 16), int)
    mask[0, [4, 3, 8, 15]] = 0
    plan = masking.uniform_plan_of_mask(mask, (4, 4))
    assert plan.ids_keep.tolist() == [[4, 3, 8, 15]]  # raster order would be 3, 4
    assert plan.replaced is None
    np.testing.assert_array_equal(masking.mask_of(plan), mask)


@pytest.mark.parametrize(
    ("kept", "grid_size", "message"),
    [
        ([0, 1, 8, 15], (4, 4), r"got 2 in block \(0, 0\) of row 0"),
        ([0, 3, 8, 12], (4, 4), r"got 2 in block \(1, 0\) of row 0"),
        ([0, 3, 8, 15], (3, 4), "even number of units down and across, to .*, got 3 x 4"),
        ([0, 3, 8, 15], (4, 6), r"mask: expected \[R, 24\], got shape \[1, 16\]"),
    ],
)
def test_mask_that_is_not_one_of_each_block_is_refused(kept, grid_size, message):
    mask = np.ones((1, 16), int)
    mask[0, kept] = 0
    with pytest.raises(ConfigError, match=message):
        masking.uniform_plan_of_mask(mask, grid_size)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.9])
def test_secondary_ratio_that_leaves_nothing_is_refused(ratio):
    with pytest.raises(ConfigError, match=f"secondary_ratio {ratio} leaves"):
        masking.uniform_counts((4, 4), ratio)
