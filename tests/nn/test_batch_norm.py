"""Batch normalisation by groups: against numpy in float64, and that parts change nothing."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn.batch_norm import FeatureNorm
from mae_jax.train.step import split_batch
from tests.weights import quick_jit

EPS = 1e-6


def features(count: int, size: int = 5, seed: int = 0) -> np.ndarray:
    """Return features whose means and deviations differ, in float32."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(0, 2, count)[:, None]  # so that groups of neighbours would differ
    return (rng.normal(3.0, np.arange(1, size + 1), (count, size)) + drift).astype(np.float32)


def stats(mean: np.ndarray, var: np.ndarray) -> dict[str, Any]:
    return {"batch_stats": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}}


def train(
    norm: FeatureNorm, x: np.ndarray, variables: dict[str, Any] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return what the norm makes of a batch in training, and the new running statistics."""
    size = x.shape[-1]
    variables = variables or stats(np.zeros(size, np.float32), np.ones(size, np.float32))
    apply = quick_jit(
        lambda v, x: norm.apply(v, x, use_running_average=False, mutable=["batch_stats"])
    )
    y, new = apply(variables, x)
    return np.asarray(y), {k: np.asarray(v) for k, v in new["batch_stats"].items()}


@pytest.mark.parametrize("groups", [1, 3])
def test_training_is_that_of_numpy_with_every_nth_row_in_a_group(groups):
    x = features(12).astype(np.float64)
    y, running = train(FeatureNorm(12 // groups), x.astype(np.float32))
    means, variances = [], []
    for group in range(groups):
        rows = x[group::groups]
        expected = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + EPS)
        np.testing.assert_allclose(y[group::groups], expected, atol=2e-5)
        means.append(rows.mean(axis=0))
        variances.append(rows.var(axis=0, ddof=1))  # the unbiased one is averaged
    np.testing.assert_allclose(running["mean"], 0.1 * np.mean(means, axis=0), rtol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * np.mean(variances, axis=0), rtol=1e-5)
    assert y.dtype == running["mean"].dtype == running["var"].dtype == np.float32


def test_two_values_of_one_feature_by_hand():
    # Mean 2, biased variance 1, unbiased 2.
    y, running = train(FeatureNorm(2), np.array([[1.0], [3.0]], np.float32))
    np.testing.assert_allclose(y, [[-1.0], [1.0]], rtol=1e-6)
    np.testing.assert_allclose(running["mean"], [0.2], rtol=1e-6)
    np.testing.assert_allclose(running["var"], [0.9 * 1 + 0.1 * 2], rtol=1e-6)


def test_running_statistics_forget_by_a_tenth_a_step_and_serve_evaluation():
    x = features(8)
    before = stats(np.full(5, 4.0, np.float32), np.full(5, 9.0, np.float32))
    norm = FeatureNorm(8)
    _, running = train(norm, x, before)
    np.testing.assert_allclose(running["mean"], 3.6 + 0.1 * x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(running["var"], 8.1 + 0.1 * x.var(axis=0, ddof=1), rtol=1e-5)
    # Three rows: groups do not matter then.
    evaluated = norm.apply(before, x[:3], use_running_average=True)
    np.testing.assert_allclose(evaluated, (x[:3] - 4.0) / np.sqrt(9.0 + EPS), rtol=1e-5)


def test_epsilon_is_the_official_one_and_a_constant_feature_becomes_zero():
    y, running = train(FeatureNorm(4), np.full((4, 2), 7.0, np.float32))
    assert not y.any()
    np.testing.assert_allclose(running["var"], 0.9, rtol=1e-6)
    norm = FeatureNorm(4)
    small = norm.apply(
        stats(np.zeros(2, np.float32), np.zeros(2, np.float32)),
        np.ones((1, 2), np.float32),
        use_running_average=True,
    )
    np.testing.assert_allclose(small, 1000.0, rtol=1e-5)  # 1 / sqrt(1e-6)


def test_half_precision_features_are_normalised_in_float32():
    x = features(6).astype(jnp.bfloat16)
    y, _ = train(FeatureNorm(6), x)
    rows = x.astype(np.float64)
    expected = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + EPS)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_batch_have_the_groups_of_the_whole(parts):
    x = features(24)
    norm = FeatureNorm(4)  # six groups
    whole, running = train(norm, x)
    cut = split_batch({"x": jnp.asarray(x), "y": jnp.asarray(whole)}, parts)
    seen = []
    for part in range(parts):
        y, after = train(norm, np.asarray(cut["x"][part]))
        np.testing.assert_allclose(y, cut["y"][part], atol=1e-5)
        seen.append(after)
    for name in ("mean", "var"):
        of_parts = np.mean([after[name] for after in seen], axis=0)
        np.testing.assert_allclose(of_parts, running[name], rtol=1e-5)


@pytest.mark.parametrize("group_size", [5, 16, 1, 0])
def test_groups_that_do_not_fill_the_batch_are_refused(group_size):
    norm = FeatureNorm(group_size)
    message = rf"^model.norm_group {group_size}: expected at least 2, and a number that divides"
    with pytest.raises(ConfigError, match=message):
        train(norm, features(8))
