"""A classifier around an encoder: pooling, norms, and what its parameters are called."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.models.classifier import Classifier, ClassifierHead
from mae_jax.models.transfer import make_classifier
from mae_jax.nn.layers import dropout
from tests.weights import apply, normal, quick_jit, random_params


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


def test_the_dropout_of_the_head_is_of_what_its_linear_layer_sees():
    head = ClassifierHead(5, "cls", prefix=1, use_norm=False, dropout_rate=0.5)
    tokens = normal((3, 2, 4))
    params = random_params(head.init, tokens)
    linear = {name: np.asarray(leaf) for name, leaf in params["linear"].items()}
    key = jax.random.key(0)
    logits = apply(head, params, tokens, dropout_rng=key)
    kept = np.asarray(dropout(jnp.ones((3, 4)), 0.5, key))
    assert set(kept.ravel()) == {0, 2}
    expected = tokens[:, 0] * kept @ linear["kernel"] + linear["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_probe_keeps_the_norm_of_the_encoder_and_normalises_by_batch(tiny_mae, pooling):
    model = tiny_mae(depth=1)
    classifier = make_classifier(
        model.unit, model.encoder, 5, pooling=pooling, norm_group=3, positions="fixed"
    )
    images = normal((3, 32, 32, 3))
    params = random_params(classifier.init, images)
    assert params["head"].keys() == {"linear"}
    assert "norm" in params["encoder"]
    assert "pos_embed" not in params["encoder"]
    stats = {"mean": normal((16,), seed=1), "var": 1 + normal((16,), seed=2) ** 2}
    variables = {"params": params, "batch_stats": {"head": {"batch_norm": stats}}}

    tokens = quick_jit(lambda p: model.encoder.apply({"params": p}, units(classifier, images), IDS))
    tokens = np.asarray(tokens(params["encoder"]), np.float64)
    pooled = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(axis=1)
    measured = (pooled - stats["mean"]) / np.sqrt(stats["var"] + 1e-6)
    trained = (pooled - pooled.mean(axis=0)) / np.sqrt(pooled.var(axis=0) + 1e-6)
    kernel, bias = (np.asarray(params["head"]["linear"][name]) for name in ("kernel", "bias"))

    @quick_jit
    def applied(variables: Any) -> Any:
        batch = {"image": images}
        training = {"use_running_average": False, "mutable": ["batch_stats"]}
        return (
            classifier.apply(variables, batch, method="features"),
            classifier.apply(variables, batch, method="logits"),
            classifier.apply(variables, images, **training)[0],
        )

    features, logits, in_training = applied(variables)
    np.testing.assert_allclose(features, measured, atol=1e-4)
    np.testing.assert_allclose(logits, measured @ kernel + bias, atol=1e-4)
    np.testing.assert_allclose(in_training, trained @ kernel + bias, atol=1e-3)


IDS = jnp.arange(16)[None]


def units(classifier: Classifier, images: np.ndarray) -> jax.Array:
    return classifier.unit.split(jnp.asarray(images))


@pytest.mark.parametrize(
    ("options", "deviation"), [({}, 2e-5), ({"pooling": "cls", "norm_group": 2}, 0.01)]
)
def test_a_fresh_head_is_close_to_undecided(tiny_mae, options, deviation):
    model = tiny_mae(depth=1, embed_dim=64)
    classifier = make_classifier(model.unit, model.encoder, 40, **options)
    params = quick_jit(classifier.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    kernel = np.asarray(params["head"]["linear"]["kernel"])
    # PyTorch's truncated normal has its ends at -2 and 2, whatever the deviation: so it has none.
    np.testing.assert_allclose(kernel.std(), deviation, rtol=0.05)
    assert 3 * deviation < np.abs(kernel).max() < 6 * deviation
    assert not params["head"]["linear"]["bias"].any()


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"pooling": "max"}, "model.pooling 'max' is not one of mean, cls"),
        ({"use_cls_token": False}, {"pooling": "cls"}, "model.pooling 'cls' needs a class token"),
        ({}, {"num_classes": 0}, "model.num_classes 0: expected at least 1"),
        ({}, {"drop_path_rate": 1.0}, "model.drop_path_rate 1.0: expected at least 0, below 1"),
        ({}, {"drop_path_rate": -0.1}, "model.drop_path_rate -0.1: expected at least 0"),
        ({}, {"head_dropout": 1.0}, "model.head_dropout 1.0: expected at least 0, below 1"),
        ({}, {"norm_group": 1}, r"model.norm_group 1: expected 0 \(none\) or at least 2"),
        ({}, {"norm_group": -4}, "model.norm_group -4: expected 0"),
        ({}, {"image_size": (33, 32)}, "image_size 33x32 is not a multiple of patch_size 8"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_mae, fields, options, message):
    model = tiny_mae(depth=1, **fields)
    with pytest.raises(ConfigError, match=message):
        make_classifier(model.unit, model.encoder, **{"num_classes": 5} | options)
