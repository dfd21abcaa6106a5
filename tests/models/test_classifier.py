"""A classifier around an encoder: pooling, norms, and what its parameters are called."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.models.transfer import make_classifier
from tests.weights import apply, normal, random_params


@pytest.mark.parametrize(
    ("pooling", "here", "not_here"),
    [("mean", "head/norm/scale", "encoder/norm/scale"), ("cls", "encoder/norm/scale", "head/norm")],
)
def test_the_norm_stands_before_or_after_the_pooling(tiny_mae, pooling, here, not_here):
    model = tiny_mae(depth=1)
    classifier = make_classifier(model.unit, model.encoder, 5, pooling=pooling)
    images = normal((3, 32, 32, 3))
    params = random_params(classifier.init, images)
    names = traverse_util.flatten_dict(params, sep="/")
    assert here in names
    assert not any(name.startswith(not_here) for name in names)
    assert {"head/linear/kernel", "head/linear/bias", "encoder/pos_embed"} <= names.keys()
    assert params.keys() == {"encoder", "head"}

    logits = apply(classifier, params, images)
    assert logits.shape == (3, 5)
    assert logits.dtype == jnp.float32
    units = classifier.unit.split(jnp.asarray(images))
    ids = jnp.arange(16)[None]
    tokens = np.asarray(apply(classifier.encoder, params["encoder"], units, ids), np.float64)
    if pooling == "mean":
        pooled = tokens[:, 1:].mean(axis=1)
        centred = pooled - pooled.mean(axis=1, keepdims=True)
        pooled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
        pooled = pooled * np.asarray(names["head/norm/scale"]) + np.asarray(names["head/norm/bias"])
    else:
        pooled = tokens[:, 0]
    kernel, bias = (np.asarray(names[f"head/linear/{name}"]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(logits, pooled @ kernel + bias, atol=1e-5)
    batch = {"image": images}
    np.testing.assert_allclose(
        apply(classifier, params, batch, method="features"), pooled, atol=1e-5
    )
    np.testing.assert_array_equal(apply(classifier, params, batch, method="logits"), logits)


def test_a_fresh_head_is_close_to_undecided(tiny_mae):
    model = tiny_mae(depth=1)
    classifier = make_classifier(model.unit, model.encoder, 5)
    params = jax.jit(classifier.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    kernel = np.asarray(params["head"]["linear"]["kernel"])
    assert 0 < np.abs(kernel).max() < 1e-4
    assert not params["head"]["linear"]["bias"].any()


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"pooling": "max"}, "model.pooling 'max' is not one of mean, cls"),
        ({"use_cls_token": False}, {"pooling": "cls"}, "model.pooling 'cls' needs a class token"),
        ({}, {"num_classes": 0}, "model.num_classes 0: expected at least 1"),
        ({}, {"image_size": (33, 32)}, "image_size 33x32 is not a multiple of patch_size 8"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_mae, fields, options, message):
    model = tiny_mae(depth=1, **fields)
    with pytest.raises(ConfigError, match=message):
        make_classifier(model.unit, model.encoder, **{"num_classes": 5} | options)
