"""Learning-rate arithmetic, against the published recipe and a float64 formula."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.train import schedules

IMAGENET = 1_281_167
STEPS_PER_EPOCH = 312
TOTAL = 800 * STEPS_PER_EPOCH
WARMUP = 40 * STEPS_PER_EPOCH
PEAK = 2.4e-3

# float32 has no better cosine next to -1, where 1 + cos cancels.
FLOAT32 = 2e-7 * PEAK

recipe = functools.partial(
    schedules.warmup_cosine, peak=PEAK, warmup_steps=WARMUP, total_steps=TOTAL
)


def slow_rate(step: int, minimum: float = 0.0) -> float:
    if step < WARMUP:
        return PEAK * step / WARMUP
    angle = math.pi * (step - WARMUP) / (TOTAL - WARMUP)
    return minimum + (PEAK - minimum) * 0.5 * (1.0 + math.cos(angle))


@pytest.fixture(scope="module")
def rates() -> np.ndarray:
    """Return the rates of all steps of the recipe and of a few after its end."""
    return np.asarray(jax.jit(recipe)(jnp.arange(TOTAL + 1000)))


# The last figure of a value is rounded: 5e-5 relative for the one that is given with five.
@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.0),
        (1, 6e-5),
        (20, 1.2e-3),
        (40, 2.4e-3),
        (100, 2.36328e-3),
        (400, 1.2991e-3),
        (420, 1.2e-3),
        (600, 3.87262e-4),
        (799, 1.02523e-8),
    ],
)
def test_rate_has_the_published_value_at_the_start_of_an_epoch(epoch, rate):
    assert float(recipe(epoch * STEPS_PER_EPOCH)) == pytest.approx(rate, rel=5e-5, abs=FLOAT32)


def test_rate_follows_the_formula_at_every_step(rates):
    expected = [slow_rate(step) for step in range(TOTAL)]
    np.testing.assert_allclose(rates[:TOTAL], expected, rtol=5e-7, atol=FLOAT32)


def test_first_step_has_a_rate_of_exactly_zero(rates):
    assert rates[0] == 0.0
    assert rates[1] > 0.0


def test_rate_is_never_negative_and_stays_at_its_minimum_after_the_end(rates):
    assert rates.min() == 0.0
    assert (rates[TOTAL:] == 0.0).all()


def test_rate_rises_through_the_warm_up_and_falls_from_there(rates):
    assert (np.diff(rates[: WARMUP + 1]) > 0).all()
    assert rates.argmax() == WARMUP
    # A hundred steps apart, so that rounding does not count.
    assert (np.diff(rates[WARMUP:TOTAL:100]) < 0).all()


def test_warm_up_and_cosine_meet_at_the_peak(rates):
    assert rates[WARMUP] == np.float32(PEAK)
    assert rates[WARMUP - 1] == pytest.approx(PEAK * (1 - 1 / WARMUP), rel=1e-6)


def test_rate_ends_at_the_minimum_and_still_starts_at_zero():
    with_minimum = functools.partial(recipe, minimum=1e-5)
    assert float(with_minimum(0)) == 0.0
    assert float(with_minimum(WARMUP)) == pytest.approx(PEAK)
    assert float(with_minimum(420 * STEPS_PER_EPOCH)) == pytest.approx((PEAK + 1e-5) / 2)
    for step in (TOTAL, TOTAL + 7):
        assert float(with_minimum(step)) == pytest.approx(1e-5, rel=1e-6)
    assert float(jnp.min(with_minimum(jnp.arange(WARMUP, TOTAL, 100)))) >= 1e-5 - FLOAT32


def test_warm_up_may_be_a_fraction_of_a_step():
    rate = functools.partial(schedules.warmup_cosine, peak=3.0, warmup_steps=1.5, total_steps=4)
    halves = [0.0, 2.0, *(1.5 * (1 + math.cos(math.pi * x / 2.5)) for x in (0.5, 1.5, 2.5))]
    np.testing.assert_allclose([float(rate(step)) for step in range(5)], halves, atol=1e-6)


def test_without_a_warm_up_the_first_step_has_the_peak():
    rate = functools.partial(schedules.warmup_cosine, peak=1.0, warmup_steps=0, total_steps=4)
    np.testing.assert_allclose(
        [float(rate(step)) for step in range(5)],
        [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)],
        atol=1e-6,
    )


def test_rate_is_a_float32_scalar_of_a_traced_integer_step():
    rate = jax.jit(recipe)(jnp.asarray(12, jnp.int32))
    assert rate.dtype == jnp.float32
    assert rate.shape == ()


def test_peak_grows_with_the_batch_from_256():
    assert schedules.scaled_learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert schedules.scaled_learning_rate(1.5e-4, 256) == 1.5e-4
    assert schedules.scaled_learning_rate(1.5e-4, 64) == pytest.approx(3.75e-5)


def test_imagenet_has_312_full_batches_of_4096():
    assert schedules.steps_per_epoch(IMAGENET, 4096) == 312
    assert schedules.total_steps(IMAGENET, 4096, 800) == 249_600
    assert schedules.total_steps(IMAGENET, 4096, 1600) == 499_200


def test_set_smaller_than_a_batch_has_one_step_an_epoch():
    assert schedules.steps_per_epoch(100, 256) == 1
    assert schedules.total_steps(100, 256, 7) == 7


def test_epochs_may_be_a_fraction():
    assert schedules.total_steps(IMAGENET, 4096, 0.5) == 156
    assert schedules.total_steps(IMAGENET, 4096, 1 / 312) == 1


@pytest.mark.parametrize("epochs", [0.0, 0.1])
def test_run_without_a_step_is_refused(epochs):
    with pytest.raises(ConfigError, match=f"epochs {epochs} is less than one step of batch_size 8"):
        schedules.total_steps(16, 8, epochs)
