"""SimMIM beside UM-MAE: what the network may see, and the head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn import masking
from mae_jax.pretrain import simmim, um_mae
from tests.weights import normal, quick_jit, random_params

TINY = {
    "size": "pvt_s",
    "image_size": (16, 32),
    "channels": 1,
    "stem_patch_size": 2,
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": 1,
}


@pytest.fixture(scope="module")
def model() -> simmim.SimMIM:
    return simmim.make(**TINY | {"image_size": (64, 64)})


def test_hidden_pixels_have_no_gradient(model):
    plan = model.plan(jax.random.key(2), 2)
    images = jnp.asarray(normal((2, 64, 64, 1)))
    params = random_params(model.init, {"image": images}, plan, method="predict")

    @quick_jit
    def gradients(images):
        def output(images):
            predictions = model.apply({"params": params}, {"image": images}, plan, method="predict")
            return jnp.square(predictions["image"].output).sum(), predictions["image"]

        return jax.grad(output, has_aux=True)(images)

    gradient, prediction = gradients(images)
    per_unit = np.abs(model.unit.split(gradient)).sum(axis=2)
    hidden = np.asarray(masking.mask_of(plan)) == 1
    assert (per_unit[hidden] == 0).all()
    assert (per_unit[~hidden] > 0).all()
    assert prediction.kind == "l1"
    assert prediction.output.shape == (2, 48, 64)
    np.testing.assert_array_equal(prediction.ids, plan.ids_mask)
    target = masking.take(model.unit.split(images), plan.ids_mask)
    np.testing.assert_array_equal(prediction.target, target)  # raw pixels


def test_head_gives_each_token_a_square_of_units():
    head = simmim.ShuffleHead((2, 4), 3)
    latent = jnp.asarray(normal((1, 2, 5)))
    params = random_params(head.init, latent)
    values = np.asarray(latent[0] @ params["pred"]["kernel"]) + np.asarray(params["pred"]["bias"])
    out = np.asarray(head.apply({"params": params}, latent)).reshape(2, 4, 3)
    for token in (0, 1):
        for y in (0, 1):
            for x in (0, 1):
                expected = values[token, [4 * u + 2 * y + x for u in range(3)]]
                np.testing.assert_allclose(out[y, 2 * token + x], expected, atol=1e-6)


def test_masks_are_random_or_one_of_four(model):
    plan = model.clone(mask_ratio=0.5).plan(jax.random.key(0), 3)
    assert plan.ids_keep.shape == (3, 32)
    uniform = model.clone(mask_sampling="uniform")
    noise = jnp.asarray(np.random.default_rng(0).random((3, 64), np.float32))
    plan = uniform.plan(jax.random.key(0), 3, noise)
    same = masking.uniform_plan(jax.random.key(1), 3, (8, 8), noise=noise)
    np.testing.assert_array_equal(plan.ids_keep, same.ids_keep)
    assert plan.replaced is None
    assert uniform.panel_captions()["masked"] == "masked 75%"


def test_the_encoder_is_that_of_um_mae():
    for size in ("swin_t", "pvt_s"):
        ours = simmim.make(size=size, image_size=(256, 256))
        assert ours.encoder == um_mae.make(size=size, image_size=(256, 256)).encoder
    # 40.5 / 20.2 GFLOP: what a step of UM-MAE saves.
    swin = simmim.make(size="swin_t", image_size=(256, 256)).step_flops()
    assert 1.9 < swin / um_mae.make(size="swin_t", image_size=(256, 256)).step_flops() < 2.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "vit_b", "image_size": (32, 32)}, "size 'vit_b': expected a pyramid"),
        (TINY | {"mask_sampling": "block"}, "'block' is not one of random, uniform"),
        (TINY | {"mask_ratio": 1.0}, "mask_ratio 1.0 keeps 0 of"),
        (TINY | {"image_size": (24, 32)}, "cannot be halved 3 times"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        simmim.make(**fields)
