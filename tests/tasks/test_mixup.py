"""Mixup and CutMix: pixels, targets and shares by hand, and what is drawn."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.tasks.mixup import Mixture, Mixup, smooth_targets

MANY = 3000


def make(**fields):
    return Mixup(**{"num_classes": 5, "group_size": 4, **fields})


def mix(mixup, images, labels, plan):
    """Mix a batch of whole groups."""
    return mixup.mix(images, labels, mixup.partners(images), mixup.partners(labels), plan)


def draw_and_mix(mixup, rng, images, labels):
    return mix(mixup, images, labels, mixup.draw(rng, len(images), images.shape[1:3]))


def constant_images(values, size=(4, 6)):
    """Images each of one value, so that a pixel tells where it comes from."""
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32)[:, None, None, None], (8, *size, 3))


def mixture(share, box):
    return Mixture(share=jnp.asarray(share, jnp.float32), box=jnp.asarray(box, jnp.int32))


def draws(mixup, image_size):
    """Return share and box of many groups; without jit, so that Beta is compiled once for all."""
    drawn = mixup.draw(jax.random.key(0), MANY * mixup.group_size, image_size)
    return (np.asarray(rows)[:: mixup.group_size] for rows in (drawn.share, drawn.box))


def area(box):
    return (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])


def test_smooth_targets_by_hand():
    out = smooth_targets(jnp.array([1, 0], jnp.int32), 4, 0.1)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, [[0.025, 0.925, 0.025, 0.025], [0.925, *[0.025] * 3]])


def test_mixup_by_hand():
    """Groups (0, 1, 2, 3) and (4, 5, 6, 7); partners 3, 2, 1, 0 and 7, 6, 5, 4."""
    images = constant_images([0, 1, 2, 3, 10, 20, 30, 40])
    labels = jnp.array([0, 1, 2, 3, 4, 4, 0, 1], jnp.int32)
    plan = mixture([0.75] * 4 + [0.5] * 4, [[0, 0, 0, 0]] * 8)
    out, targets = mix(make(label_smoothing=0.0), images, labels, plan)
    expected = [0.75, 1.25, 1.75, 2.25, 25, 25, 25, 25]
    np.testing.assert_array_equal(out, constant_images(expected))
    assert targets.dtype == out.dtype == jnp.float32
    np.testing.assert_array_equal(
        targets,
        [
            [0.75, 0, 0, 0.25, 0],
            [0, 0.75, 0.25, 0, 0],
            [0, 0.25, 0.75, 0, 0],
            [0.25, 0, 0, 0.75, 0],
            [0, 0.5, 0, 0, 0.5],
            [0.5, 0, 0, 0, 0.5],
            [0.5, 0, 0, 0, 0.5],
            [0, 0.5, 0, 0, 0.5],
        ],
    )


def test_cutmix_by_hand():
    images = constant_images([0, 1, 2, 3, 10, 20, 30, 40])
    labels = jnp.array([0, 1, 2, 3, 4, 4, 0, 1], jnp.int32)
    # 2 x 3 of 4 x 6 pixels: a quarter from the partner; nothing in the second group.
    plan = mixture([0.75] * 4 + [1.0] * 4, [[1, 3, 0, 3]] * 4 + [[2, 2, 0, 6]] * 4)
    out, targets = mix(make(), images, labels, plan)
    expected = np.array(images)
    expected[:4, 1:3, 0:3] = np.array(images)[3::-1, 1:3, 0:3]
    np.testing.assert_array_equal(out, expected)
    # on = 0.92, off = 0.02
    np.testing.assert_allclose(
        targets[1], [0.02, 0.92 * 0.75 + 0.005, 0.92 * 0.25 + 0.015, 0.02, 0.02], rtol=1e-6
    )
    np.testing.assert_allclose(targets[4], [0.02, 0.02, 0.02, 0.02, 0.92], rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_targets_sum_to_one_and_say_what_share_of_the_pixels_is_whose(seed):
    """Each image is a one-hot vector of its label, so that its mean is a target itself."""
    labels = jax.random.permutation(jax.random.key(seed), 12).astype(jnp.int32)
    hot = jax.nn.one_hot(labels, 12)
    images = jnp.broadcast_to(hot[:, None, None, :], (12, 10, 14, 12))
    mixup = make(num_classes=12, group_size=4, label_smoothing=0.1)
    out, targets = draw_and_mix(mixup, jax.random.key(seed + 100), images, labels)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    seen = np.asarray(out, np.float64).mean(axis=(1, 2))
    np.testing.assert_allclose(targets, 0.9 * seen + 0.1 / 12, atol=1e-6)


def test_a_cut_box_has_exactly_the_area_that_the_share_leaves():
    size = (17, 23)
    share, box = draws(make(mixup_alpha=0.0), size)
    np.testing.assert_allclose(share, 1 - area(box) / (17 * 23), rtol=2e-7)
    assert (np.rint(share * 17 * 23) == 17 * 23 - area(box)).all()
    assert box.min() >= 0
    assert (box[:, 1].max(), box[:, 3].max()) == size
    height, width = box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]
    assert height.min() == width.min() == 0
    assert height.max() <= 16  # half of a side, rounded down, to both sides of the middle
    assert width.max() <= 22


def test_a_cut_box_about_the_middle_has_sides_of_the_square_root_of_its_share():
    """A Beta distribution that is all at 1/2 leaves the place alone to chance."""
    _, box = draws(make(mixup_alpha=0.0, cutmix_alpha=1e8), (64, 100))
    height, width = box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]
    # int(64 * 0.7071) = 45, int(100 * 0.7071) = 70; halves 22 and 35.
    assert (height.max(), width.max()) == (44, 70)
    assert (height.min(), width.min()) == (22, 35)  # the middle is the first row, or column
    inner = (box[:, 0] > 0) & (box[:, 1] < 64)
    assert (height[inner] == 44).all()
    middles = box[inner, 0] + 22  # uniform on 23 ... 41
    assert set(middles) == set(range(23, 42))
    assert inner.mean() == pytest.approx(19 / 64, abs=0.04)


def test_half_of_the_groups_are_cut():
    _, box = draws(make(), (32, 32))
    cut = area(box) > 0
    assert cut.mean() == pytest.approx(0.5, abs=0.04)
    _, box = draws(make(mixup_switch_probability=0.2), (32, 32))
    assert (area(box) > 0).mean() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("alpha", [0.8, 3.0])
def test_the_share_of_mixup_has_the_beta_distribution(alpha):
    share, box = draws(make(mixup_alpha=alpha, cutmix_alpha=0.0), (8, 8))
    assert (box == 0).all()
    assert share.min() >= 0
    assert share.max() <= 1
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.07)


def test_groups_that_are_not_mixed_stay_as_they_are():
    images = jax.random.normal(jax.random.key(0), (12, 6, 6, 3))
    labels = jnp.arange(12, dtype=jnp.int32) % 5
    out, targets = draw_and_mix(make(mixup_probability=0.0), jax.random.key(1), images, labels)
    np.testing.assert_array_equal(out, images)
    np.testing.assert_allclose(targets, smooth_targets(labels, 5, 0.1), rtol=1e-6)
    share, box = draws(make(mixup_probability=0.7), (32, 32))
    untouched = (share == 1) & (area(box) == 0)
    assert untouched.mean() == pytest.approx(0.3, abs=0.03)


def test_all_of_a_group_are_mixed_in_one_way_and_groups_differ():
    plan = make().draw(jax.random.key(3), 12, (32, 32))
    for rows in jax.tree.leaves(plan):
        groups = np.asarray(rows).reshape(3, 4, -1)
        assert (groups == groups[:, :1]).all()
    assert len(np.unique(plan.share)) == 3


def test_a_group_does_not_know_the_batch_around_it():
    images = jax.random.normal(jax.random.key(0), (12, 6, 6, 3))
    labels = jnp.arange(12, dtype=jnp.int32) % 5
    mixup = make()
    whole = draw_and_mix(mixup, jax.random.key(4), images, labels)
    others = jax.random.normal(jax.random.key(9), images.shape).at[4:8].set(images[4:8])
    other_labels = labels.at[:4].set(4).at[4:8].set(labels[4:8])
    changed = draw_and_mix(mixup, jax.random.key(4), others, other_labels)
    plan = mixup.draw(jax.random.key(4), 12, (6, 6))
    part = mix(mixup, images[4:8], labels[4:8], jax.tree.map(lambda rows: rows[4:8], plan))
    for ours, theirs, alone in zip(whole, changed, part, strict=True):
        np.testing.assert_array_equal(ours[4:8], theirs[4:8])
        np.testing.assert_array_equal(ours[4:8], alone)
    assert (np.asarray(whole[0][:4]) != np.asarray(changed[0][:4])).any()


def test_the_key_decides_alone():
    images = jax.random.normal(jax.random.key(0), (12, 6, 6, 3))
    labels = jnp.arange(12, dtype=jnp.int32) % 5
    first, again, other = (
        draw_and_mix(make(), jax.random.key(k), images, labels)[0] for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    compiled, _ = jax.jit(functools.partial(draw_and_mix, make()))(
        jax.random.key(1), images, labels
    )
    np.testing.assert_allclose(compiled, first, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 3}, "data.mixup_group 3: expected an even number"),
        ({"group_size": 0}, "data.mixup_group 0: expected an even number"),
        ({"mixup_alpha": -1.0}, "data.mixup_alpha -1.0, data.cutmix_alpha 1.0: expected"),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, "data.mixup_alpha 0.0, data.cutmix_alpha 0.0"),
        ({"label_smoothing": 1.5}, "data.label_smoothing 1.5: expected 0 ... 1"),
        ({"mixup_switch_probability": -0.5}, "data.mixup_switch_probability -0.5: expected 0"),
        ({"mixup_probability": 2.0}, "data.mixup_probability 2.0: expected 0 ... 1"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        make(**fields)
    assert str(caught.value).startswith(message)


def test_groups_that_do_not_fill_the_batch_are_refused():
    message = "data.mixup_group 4: expected a number that divides batch_size, which is 6"
    with pytest.raises(ConfigError, match=message):
        make().draw(jax.random.key(0), 6, (4, 4))
    with pytest.raises(ConfigError, match=message):
        make().partners(jnp.zeros(6))
