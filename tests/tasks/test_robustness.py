"""The mean corruption error: hand-worked values and what is refused."""

from __future__ import annotations

import pytest

from mae_jax.errors import ConfigError
from mae_jax.tasks.robustness import ALEXNET_ERRORS, mean_corruption_error

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


def constant(error: float) -> dict[str, list[float]]:
    return {name: [error] * 5 for name in ALEXNET_ERRORS}


def test_a_constant_error_of_one_half():
    mce, mean_error = mean_corruption_error(constant(0.5))
    assert round(mce, 2) == 64.67
    assert mean_error == pytest.approx(50.0)


def test_errors_of_alexnet_are_one_hundred_percent():
    errors = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(errors)[0] == pytest.approx(100.0, rel=1e-12)


def test_two_corruptions_by_hand():
    errors = constant(0.0)
    errors["fog"] = [0.1, 0.2, 0.3, 0.4, 0.5]  # 0.3 on average
    errors["pixelate"] = [0.0, 0.0, 0.0, 0.0, 1.0]  # 0.2
    mce, mean_error = mean_corruption_error(errors)
    assert mce == pytest.approx(100 * (0.3 / 0.819324 + 0.2 / 0.717840) / 15)
    assert mean_error == pytest.approx(100 * (0.3 + 0.2) / 15)


def test_corruptions_are_found_by_name_and_not_by_place():
    errors = {name: [0.05 * place] * 5 for place, name in enumerate(ALEXNET_ERRORS)}
    turned = dict(reversed(errors.items()))
    assert list(turned) != list(errors)
    assert mean_corruption_error(turned) == mean_corruption_error(errors)


def test_there_are_fifteen_and_the_four_further_ones_are_not_among_them():
    assert len(ALEXNET_ERRORS) == 15
    assert not ALEXNET_ERRORS.keys() & set(EXTRA)
    # All are 50,000 answers at 5 severities: multiples of 1 in 250,000.
    answers = [250_000 * error for error in ALEXNET_ERRORS.values()]
    assert answers == pytest.approx([round(number) for number in answers], abs=1e-6)


def without(name: str) -> dict[str, list[float]]:
    return {key: values for key, values in constant(0.5).items() if key != name}


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (without("snow"), "15 of ImageNet-C, missing: snow$"),
        *((constant(0.5) | {name: [0.5] * 5}, f"unknown: {name}$") for name in EXTRA),
        (constant(0.5) | {"fog": [0.5] * 4}, "corruption fog: expected errors at 5 .*, got 4$"),
        (constant(0.5) | {"fog": [0.5] * 6}, "corruption fog: expected errors at 5 .*, got 6$"),
        (constant(0.5) | {"frost": [50.0] * 5}, r"corruption frost: expected errors in \[0, 1\]"),
        (constant(0.5) | {"frost": [float("nan")] * 5}, "corruption frost"),
    ],
)
def test_errors_that_are_not_those_of_the_set_are_refused(errors, message):
    with pytest.raises(ConfigError, match=message):
        mean_corruption_error(errors)
