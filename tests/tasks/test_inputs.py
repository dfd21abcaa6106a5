"""What a module gets to see of a batch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mae_jax.tasks.inputs import IMAGES, ImageModel, normalize_images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def test_images_are_normalised_channel_by_channel():
    images = jnp.asarray([[[[0, 255, 51]]]], jnp.uint8)
    out = normalize_images(images, MEAN, STD)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(
        out[0, 0, 0], [(0 - 0.5) / 0.2, (1 - 0.4) / 0.25, (0.2 - 0.3) / 0.5], rtol=1e-6
    )


def test_grey_images_have_one_channel_to_normalise():
    out = normalize_images(jnp.full((2, 3, 4, 1), 255, jnp.uint8), (0.25,), (0.5,))
    assert out.shape == (2, 3, 4, 1)
    np.testing.assert_allclose(out, 1.5, rtol=1e-6)


def test_inputs_keep_what_is_no_image():
    batch = {"image": jnp.full((2, 4, 4, 3), 7, jnp.uint8), "label": jnp.arange(2)}
    inputs = ImageModel(None, MEAN, STD).inputs(batch)
    assert inputs["label"] is batch["label"]
    np.testing.assert_array_equal(inputs["image"], normalize_images(batch["image"], MEAN, STD))
    assert batch["image"].dtype == jnp.uint8


def test_the_image_that_one_is_mixed_with_is_normalised_as_well():
    batch = {name: jnp.full((1, 4, 4, 3), i, jnp.uint8) for i, name in enumerate(IMAGES)}
    inputs = ImageModel(None, MEAN, STD).inputs(batch)
    for name, image in batch.items():
        np.testing.assert_array_equal(inputs[name], normalize_images(image, MEAN, STD))
