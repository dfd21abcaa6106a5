"""The weighted reconstruction loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.losses.reconstruction import absolute_error, example_losses, squared_error
from mae_jax.types import Prediction


def make(seed: int, shape: tuple[int, int, int] = (3, 5, 7)) -> Prediction:
    rng = np.random.default_rng(seed)
    output, target = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    weight = jnp.asarray(rng.random(shape[:2]), jnp.float32)
    ids = jnp.arange(shape[1])[None]
    return Prediction(output=output, target=target, ids=ids, weight=weight, places=shape[1])


def test_squared_error_is_a_mean_over_the_values_of_a_unit():
    p = make(0)
    error = squared_error(p.output, p.target)
    assert error.shape == (3, 5)
    difference = np.asarray(p.output, np.float64) - np.asarray(p.target, np.float64)
    np.testing.assert_allclose(error, (difference**2).sum(axis=2) / 7, rtol=1e-6)


def test_absolute_error_is_a_mean_over_the_values_of_a_unit():
    p = make(0)
    difference = np.asarray(p.output, np.float64) - np.asarray(p.target, np.float64)
    expected = np.abs(difference).sum(axis=2) / 7
    np.testing.assert_allclose(absolute_error(p.output, p.target), expected, rtol=1e-6)
    shares = example_losses({"image": p.replace(kind="l1")})
    np.testing.assert_allclose(shares, (expected * p.weight).sum(axis=1), rtol=1e-6)


def test_each_example_has_the_weighted_sum_of_its_units():
    p = make(1)
    expected = np.zeros(3)
    for b in range(3):
        for m in range(5):
            difference = np.asarray(p.output[b, m], np.float64) - np.asarray(p.target[b, m])
            expected[b] += float(p.weight[b, m]) * (difference**2).mean()
    losses = example_losses({"image": p})
    assert losses.shape == (3,)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_equal_weights_give_the_official_mean_over_removed_patches():
    rng = np.random.default_rng(2)
    prediction, target = rng.standard_normal((2, 3, 8, 7)).astype(np.float32)
    mask = np.asarray(
        [[1, 0, 1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    )
    per_patch = ((prediction - target) ** 2).mean(-1)
    official = (per_patch * mask).sum() / mask.sum()
    rows = np.arange(3)[:, None]
    hidden = np.stack([np.flatnonzero(row) for row in mask])
    p = Prediction(
        output=jnp.asarray(prediction[rows, hidden]),
        target=jnp.asarray(target[rows, hidden]),
        ids=jnp.asarray(hidden),
        weight=jnp.full((3, 5), 1 / 15),
        places=8,
    )
    np.testing.assert_allclose(example_losses({"image": p}).sum(), official, rtol=1e-6)


def test_several_predictions_add_up():
    first, second = make(3), make(4, (3, 2, 4))
    both = example_losses({"image": first, "text": second})
    apart = example_losses({"image": first}) + example_losses({"text": second})
    np.testing.assert_allclose(both, apart, rtol=1e-6)


def test_a_unit_of_weight_zero_gets_no_gradient():
    p = make(5)
    p = p.replace(weight=p.weight.at[:, 2].set(0.0))

    def loss(output: jax.Array) -> jax.Array:
        return example_losses({"image": p.replace(output=output)}).sum()

    gradient = jax.grad(loss)(p.output)
    assert not np.any(gradient[:, 2])
    expected = 2 / 7 * p.weight[..., None] * (p.output - p.target)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_a_perfect_prediction_costs_nothing():
    p = make(6)
    np.testing.assert_array_equal(example_losses({"image": p.replace(output=p.target)}), [0, 0, 0])


def test_loss_is_float32_whatever_comes_in():
    p = make(7)
    low = p.replace(output=p.output.astype(jnp.bfloat16), target=p.target.astype(jnp.bfloat16))
    wide = low.replace(output=low.output.astype(jnp.float32), target=low.target.astype(jnp.float32))
    losses = example_losses({"image": low})
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, example_losses({"image": wide}))


def test_an_unknown_kind_of_error_is_refused():
    with pytest.raises(KeyError, match="huber"):
        example_losses({"image": make(8).replace(kind="huber")})
