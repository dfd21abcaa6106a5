"""The measure of agreement itself: that it can fail, and what it leaves out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle.agreement import (
    SMALL,
    Result,
    Trained,
    agrees,
    shares,
    split_qkv,
    training_shares,
)
from tests.oracle.frozen import Frozen, load, save


@pytest.fixture
def result() -> Result:
    rng = np.random.default_rng(0)
    gradients = {
        "block_00/attn/qkv/kernel": rng.standard_normal((4, 12)),
        "block_00/attn/qkv/bias": rng.standard_normal(12),
        "norm/scale": 1e-9 * rng.standard_normal(4),
    }
    return Result(2.0, rng.standard_normal((2, 3, 4)), gradients)


def changed(result: Result, path: str, by: np.ndarray) -> Result:
    return result._replace(
        gradients={**result.gradients, path: result.gradients[path] * (1 + by)},
    )


def test_a_result_agrees_with_itself(result):
    assert set(shares(result, result, SMALL).values()) == {0.0}
    assert agrees(result, result, SMALL)


def test_differences_are_measured_against_their_tolerances(result):
    ours = result._replace(loss=2.0 + 1e-6, predictions=result.predictions * (1 + 1.5e-6))
    by_name = shares(ours, result, SMALL)
    assert by_name["loss"] == pytest.approx(0.5, rel=1e-3)
    assert by_name["predictions"] == pytest.approx(0.5, rel=1e-3)
    assert agrees(ours, result, SMALL)
    assert not agrees(ours._replace(loss=2.0 + 3e-6), result, SMALL)
    assert not agrees(ours._replace(predictions=result.predictions * (1 + 4e-6)), result, SMALL)


def test_query_key_and_value_are_compared_apart_and_the_key_bias_not_at_all(result):
    assert set(split_qkv(result.gradients)) == {
        "block_00/attn/q/kernel",
        "block_00/attn/k/kernel",
        "block_00/attn/v/kernel",
        "block_00/attn/q/bias",
        "block_00/attn/v/bias",
        "norm/scale",
    }
    for part, differs in ((0, True), (1, False), (2, True)):
        by = np.zeros(12)
        by[4 * part : 4 * part + 4] = 1e-3
        ours = changed(result, "block_00/attn/qkv/bias", by)
        assert agrees(ours, result, SMALL) != differs


def test_a_gradient_that_is_nearly_zero_is_measured_against_the_floor(result):
    assert agrees(changed(result, "norm/scale", np.full(4, 1e-2)), result, SMALL)
    assert not agrees(changed(result, "norm/scale", np.full(4, 1e4)), result, SMALL)


def test_nan_does_not_agree(result):
    assert not agrees(result._replace(loss=float("nan")), result, SMALL)
    assert not agrees(changed(result, "norm/scale", np.full(4, np.nan)), result, SMALL)


def test_a_missing_gradient_does_not_agree(result):
    less = {k: v for k, v in result.gradients.items() if k != "norm/scale"}
    with pytest.raises(AssertionError):
        agrees(result._replace(gradients=less), result, SMALL)


def test_training_is_measured_against_what_it_changed():
    start = {"norm/scale": np.full(4, 100.0), "attn/qkv/bias": np.zeros(6)}
    theirs = Trained(
        np.array([4.0, 2.0]),
        {"norm/scale": np.full(4, 101.0), "attn/qkv/bias": np.array([1.0, 1, 2, 2, 3, 3])},
    )
    assert set(training_shares(theirs, theirs, start).values()) == {0.0}
    ours = Trained(
        np.array([4.0, 2.0 + 1e-4]),
        {
            "norm/scale": np.full(4, 101.0 + 2e-3),
            "attn/qkv/bias": np.array([1.0, 1, 9, 9, 3 * 1.0005, 3 * 1.0005]),
        },
    )
    by_name = training_shares(ours, theirs, start)
    expected = {"losses": 0.5, "norm/scale": 2.0, "attn/q/bias": 0.0, "attn/v/bias": 0.5}
    assert by_name == pytest.approx(expected)


def test_training_that_is_not_a_number_does_not_agree():
    start, end = {"norm/scale": np.zeros(2)}, {"norm/scale": np.ones(2)}
    theirs = Trained(np.ones(2), end)
    for ours in (
        Trained(np.array([1.0, np.nan]), end),
        Trained(np.ones(2), {"norm/scale": np.array([1.0, np.nan])}),
    ):
        assert not all(share <= 1 for share in training_shares(ours, theirs, start).values())


def test_a_stored_result_comes_back(result, tmp_path):
    params = {path: array.astype(np.float32) for path, array in result.gradients.items()}
    image = np.ones((2, 3), np.float32)
    save(tmp_path / "file.npz", Frozen({"image": image}, params, {"raw": result}))
    inputs, weights, results = load(tmp_path / "file.npz")
    np.testing.assert_array_equal(inputs["image"], image)
    assert weights.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(weights[path], array)
    assert agrees(results["raw"], result, SMALL)
    assert results["raw"].loss == result.loss
