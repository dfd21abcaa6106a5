"""Random erasing: which boxes, what is in them, and what stays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.tasks.erasing import Erasure, RandomErasing, erase, inside_box

MANY = 4000


def boxes(erasing, image_size):
    """Return boxes of many images; without jit, so that the generator is compiled once for all."""
    return np.asarray(erasing.draw(jax.random.key(0), MANY, image_size).box)


def sides(box):
    return box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]


def test_inside_a_box_is_what_its_edges_say():
    box = jnp.array([[1, 3, 0, 2], [0, 3, 2, 2], [0, 3, 0, 4]], jnp.int32)
    inside = np.asarray(inside_box(box, (2, 3, 4, 1)))[..., 0].astype(int)
    assert inside[0].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert inside[1].sum() == 0
    assert inside[2].all()


def test_a_box_becomes_noise_and_the_rest_stays_bit_for_bit():
    images = jax.random.uniform(jax.random.key(1), (3, 40, 50, 3)) + 100
    box = jnp.array([[0, 40, 0, 50], [5, 15, 10, 40], [7, 7, 0, 50]], jnp.int32)
    out = np.asarray(erase(images, Erasure(box=box, rng=jax.random.split(jax.random.key(2), 3))))
    assert out.dtype == np.float32
    erased = out < 50
    assert (erased == np.asarray(inside_box(box, erased.shape))).all()
    np.testing.assert_array_equal(out[~erased], np.asarray(images)[~erased])
    noise = out[0]
    assert noise.mean() == pytest.approx(0, abs=0.05)  # 6,000 values
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.1
    assert not np.isin(out[1][erased[1]], noise).any()  # each image has its own


def test_a_quarter_of_the_images_is_erased():
    height, _ = sides(boxes(RandomErasing(), (64, 64)))
    assert (height > 0).mean() == pytest.approx(0.25, abs=0.03)
    assert (sides(boxes(RandomErasing(probability=0.0), (64, 64)))[0] == 0).all()
    assert (sides(boxes(RandomErasing(probability=1.0), (64, 64)))[0] > 0).all()


@pytest.mark.parametrize("image_size", [(96, 96), (60, 120)])
def test_boxes_lie_within_the_image_and_have_the_areas_and_ratios_asked_for(image_size):
    box = boxes(RandomErasing(probability=1.0), image_size)
    height, width = sides(box)
    assert box.min() == 0
    assert box[:, 1].max() == image_size[0]
    assert box[:, 3].max() == image_size[1]
    assert (height < image_size[0]).all()
    assert (width < image_size[1]).all()
    # Sides are rounded by up to half a pixel.
    share = height * width / (image_size[0] * image_size[1])
    assert ((height + 0.5) * (width + 0.5) / (image_size[0] * image_size[1]) >= 0.02).all()
    assert ((height - 0.5) * (width - 0.5) / (image_size[0] * image_size[1]) <= 1 / 3).all()
    assert share.max() > 0.32
    assert ((height + 0.5) / (width - 0.5) >= 0.3).all()
    assert ((height - 0.5) / (width + 0.5) <= 1 / 0.3).all()
    if image_size == (96, 96):  # hardly any box has to be drawn again
        assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
        assert np.log(height / width).mean() == pytest.approx(0, abs=0.05)
        # Places: the free room is split evenly on average.
        assert (box[:, 0] / (96 - height)).mean() == pytest.approx(0.5, abs=0.03)
        assert (box[:, 2] / (96 - width)).mean() == pytest.approx(0.5, abs=0.03)


def test_a_box_that_never_fits_is_not_erased():
    assert (sides(boxes(RandomErasing(probability=1.0), (1, 8)))[0] == 0).all()
    # A box with two thirds of the area and a ratio of 1 is as high as an image of 10 x 20.
    always = RandomErasing(probability=1.0, area=(2 / 3, 2 / 3), ratio=1.0)
    assert (sides(boxes(always, (10, 20)))[0] == 0).all()
    assert (sides(boxes(always, (20, 20)))[0] == 16).all()  # sqrt(2 / 3 * 400) = 16.3


def test_an_image_depends_on_its_own_key_alone():
    images = jax.random.normal(jax.random.key(5), (8, 16, 16, 3))
    erasing = RandomErasing(probability=0.5)
    plan, other = (erasing.draw(jax.random.key(k), 8, (16, 16)) for k in (6, 7))
    whole = erase(images, plan)
    np.testing.assert_array_equal(whole, jax.jit(erase)(images, plan))
    part = erase(images[2:5], jax.tree.map(lambda rows: rows[2:5], plan))
    np.testing.assert_array_equal(part, whole[2:5])
    assert (np.asarray(erase(images, other)) != np.asarray(whole)).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probability": 1.1}, "data.erasing_probability 1.1: expected 0 ... 1"),
        ({"area": (0.5, 0.2)}, "erasing area: expected 0 < least <= most <= 1, got (0.5, 0.2)"),
        ({"area": (0.0, 0.2)}, "erasing area: expected 0 < least <= most <= 1, got (0.0, 0.2)"),
        ({"ratio": 0.0}, "erasing ratio: expected in (0, 1], got 0.0"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        RandomErasing(**fields)
    assert str(caught.value) == message
