"""The step: one update by hand, updates that are skipped, and where randomness comes from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.train.optimizer import adamw
from mae_jax.train.state import TrainState
from mae_jax.train.step import split_batch, train_step
from mae_jax.types import Batch, Params, Rng, Stream

GOOD = {"x": np.array([[1.0, -2.0], [3.0, 4.0]], np.float32), "root": np.ones(1, np.float32)}
BAD_LOSS = GOOD | {"x": np.array([[1.0, np.nan], [3.0, 4.0]], np.float32)}
INFINITE_LOSS = GOOD | {"x": np.array([[1.0, np.inf], [3.0, 4.0]], np.float32)}
# The square root is 0 and its slope infinite: the gradient alone is not finite.
BAD_GRADIENT = GOOD | {"root": np.zeros(1, np.float32)}

StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """Half the squared distance to the batch, and a square root that can be made to break."""

    noisy: bool = False  # whether what `prepare` has drawn counts

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
        del rng, batch
        params = {"w": jnp.asarray([3.0, 5.0]), "b": jnp.zeros(())}
        return params, {"batches": jnp.zeros((), jnp.int32)}

    def prepare(self, batch: Batch, rng: Rng) -> Batch:
        # A number for each example, and one for all.
        drawn = jax.random.normal(rng.key(Stream.MASK), batch["x"].shape)
        return {**batch, "drawn": drawn, "shared": jnp.asarray([[0.25, 0.5]])}

    def loss(
        self, params: Params, extra: Any, batch: Batch, rng: Rng
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        distance = params["w"][None] - batch["x"]
        root = batch["root"][0] + params["b"] - jax.lax.stop_gradient(params["b"])
        loss = 0.5 * jnp.mean(jnp.sum(distance**2, axis=1)) + jnp.sqrt(root)
        if self.noisy:
            loss += jnp.mean(batch["drawn"] @ params["w"] + (batch["shared"] @ params["w"]) ** 2)
        draws = {stream.name: jax.random.uniform(rng.key(stream)) for stream in Stream}
        metrics = draws | {"rows": jnp.asarray(len(batch["x"]), jnp.int32)}
        return loss, (metrics, {"batches": extra["batches"] + 1})


@functools.cache  # so that equal steps are compiled once
def make(
    optimizer: optax.GradientTransformation | None = None,
    schedule: Callable[[jax.Array], jax.Array] = lambda step: 0.1 * (step + 1.0),
    seed: int = 0,
    noisy: bool = False,
    averaged: bool = False,
    **options: Any,
) -> tuple[TrainState, StepFn]:
    """Return the state before the first step, and the jitted step."""
    optimizer = optimizer or adamw(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    task = Quadratic(noisy)
    init = task.init(jax.random.key(0), GOOD)
    state = TrainState.create(*init, optimizer, averaged=averaged)
    step_fn = functools.partial(
        train_step, task=task, optimizer=optimizer, schedule=schedule, seed=seed, **options
    )
    return state, jax.jit(step_fn)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def unchanged_part(state: TrainState) -> list[bytes]:
    """Return the bits of all that a skipped update must leave alone."""
    return bits((state.params, state.extra, state.opt_state))


def test_one_step_is_a_move_against_the_gradient_by_the_rate():
    state, step_fn = make(optax.identity())
    new, metrics = step_fn(state, GOOD)
    # The mean of the batch is (2, 1), so the gradient is (1, 4); that of the root is 1/2.
    np.testing.assert_allclose(new.params["w"], [3.0 - 0.1 * 1.0, 5.0 - 0.1 * 4.0], rtol=1e-6)
    np.testing.assert_allclose(new.params["b"], -0.1 * 0.5, rtol=1e-6)
    # Squared distances 4 + 49 and 0 + 1: their mean is 27.
    assert float(metrics["loss"]) == pytest.approx(27.0 / 2 + 1.0)
    assert float(metrics["grad_norm"]) == pytest.approx((1.0 + 16.0 + 0.25) ** 0.5)
    assert float(metrics["learning_rate"]) == pytest.approx(0.1)
    assert int(new.step) == 1


def test_first_step_of_adamw_is_the_sign_of_the_gradient():
    # Without rank 2 nothing decays, and the bias corrections cancel in the first step.
    state, step_fn = make()
    new, _ = step_fn(state, GOOD)
    np.testing.assert_allclose(new.params["w"], [2.9, 4.9], rtol=1e-6)
    np.testing.assert_allclose(new.params["b"], -0.1, rtol=1e-6)


def test_rate_multiplies_the_direction_after_the_optimiser():
    state, step_fn = make(optax.trace(decay=0.5), schedule=lambda step: 1.0 / (step + 1.0))
    start = np.array([3.0, 5.0])
    first, _ = step_fn(state, GOOD)
    second, _ = step_fn(first, GOOD)
    gradient = start - [2.0, 1.0]
    after_one = start - gradient
    trace = after_one - [2.0, 1.0] + 0.5 * gradient  # momentum of gradients, not of updates
    np.testing.assert_allclose(second.params["w"], after_one - 0.5 * trace, rtol=1e-6)


def test_rate_of_zero_changes_no_parameter_but_the_optimiser_moves():
    state, step_fn = make(schedule=lambda step: 0.0 * step)
    new, _ = step_fn(state, GOOD)
    assert bits(new.params) == bits(state.params)
    assert bits(new.opt_state) != bits(state.opt_state)


def test_state_that_is_not_trained_is_taken_from_the_task():
    state, step_fn = make()
    for expected in (1, 2):
        state, _ = step_fn(state, GOOD)
        assert int(state.extra["batches"]) == expected


@pytest.mark.parametrize(
    ("batch", "finite_loss"), [(BAD_LOSS, False), (INFINITE_LOSS, False), (BAD_GRADIENT, True)]
)
def test_update_that_is_not_finite_changes_no_bit_and_is_counted(batch, finite_loss):
    state, step_fn = make()
    state, _ = step_fn(state, GOOD)
    new, metrics = step_fn(state, batch)
    assert unchanged_part(new) == unchanged_part(state)
    assert int(new.step) == 2
    assert int(new.counters.nonfinite_steps) == int(new.counters.nonfinite_in_a_row) == 1
    assert float(metrics["nonfinite_steps"]) == float(metrics["nonfinite_in_a_row"]) == 1.0
    assert np.isfinite(metrics["loss"]) == finite_loss
    assert not np.isfinite(metrics["grad_norm"])


def test_skipped_updates_are_counted_in_all_and_in_a_row():
    state, step_fn = make()
    counts = []
    for batch in (GOOD, BAD_LOSS, BAD_GRADIENT, GOOD, BAD_LOSS, GOOD, GOOD):
        state, _ = step_fn(state, batch)
        counts.append((int(state.counters.nonfinite_steps), int(state.counters.nonfinite_in_a_row)))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0), (3, 0)]
    assert int(state.step) == 7


def test_rate_follows_the_step_and_not_the_number_of_updates_made():
    state, step_fn = make(optax.identity())
    state, skipped = step_fn(state, BAD_LOSS)
    state, made = step_fn(state, GOOD)
    assert float(skipped["learning_rate"]) == pytest.approx(0.1)
    assert float(made["learning_rate"]) == pytest.approx(0.2)
    np.testing.assert_allclose(state.params["w"], [3.0 - 0.2, 5.0 - 0.8], rtol=1e-6)


def test_training_goes_on_after_a_skipped_update_as_if_it_had_not_been():
    constant = {"schedule": lambda step: 0.1 + 0.0 * step}
    (state, step_fn), (other, _) = make(**constant), make(**constant)
    for batch in (GOOD, BAD_LOSS, GOOD):
        state, _ = step_fn(state, batch)
    for batch in (GOOD, GOOD):
        other, _ = step_fn(other, batch)
    assert unchanged_part(state) == unchanged_part(other)


def draws(metrics: dict[str, jax.Array]) -> list[float]:
    return [float(metrics[stream.name]) for stream in Stream]


def test_keys_differ_between_steps_and_streams_and_seeds():
    seen = []
    for seed in (0, 1):
        state, step_fn = make(seed=seed)
        for _ in range(3):
            state, metrics = step_fn(state, GOOD)
            seen += draws(metrics)
    assert len(seen) == 2 * 3 * len(Stream)
    assert len(set(seen)) == len(seen)


def test_keys_are_a_function_of_seed_and_step_alone():
    state, step_fn = make(seed=7)
    _, at_zero = step_fn(state, GOOD)
    later = state.replace(step=jnp.asarray(5, jnp.int32), params={"w": jnp.ones(2), "b": 1.0})
    _, at_five = step_fn(later, BAD_LOSS)
    for step, metrics in ((0, at_zero), (5, at_five)):
        keys = [
            jax.random.fold_in(jax.random.fold_in(jax.random.key(7), stream), step)
            for stream in range(len(Stream))
        ]
        assert draws(metrics) == [float(jax.random.uniform(key)) for key in keys]


def test_same_state_and_batches_give_the_same_bits():
    runs = []
    for _ in range(2):
        state, step_fn = make()
        for batch in (GOOD, BAD_GRADIENT, GOOD):
            state, metrics = step_fn(state, batch)
        runs.append(bits((state, metrics)))
    assert runs[0] == runs[1]


def test_metrics_are_float32_scalars_with_those_of_the_task_among_them():
    state, step_fn = make()
    _, metrics = step_fn(state, GOOD)
    assert {(x.dtype, x.shape) for x in metrics.values()} == {(jnp.dtype(jnp.float32), ())}
    assert float(metrics["rows"]) == 2.0
    ours = {"loss", "learning_rate", "grad_norm", "nonfinite_steps", "nonfinite_in_a_row"}
    assert metrics.keys() == ours | {"rows"} | {stream.name for stream in Stream}


def test_state_keeps_its_structure_shapes_and_types():
    state, step_fn = make()
    new, _ = step_fn(state, GOOD)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def many_rows(count: int = 12) -> Batch:
    x = np.random.default_rng(3).normal(size=(count, 2)).astype(np.float32)
    return {"x": x, "root": np.ones(1, np.float32)}


def test_rows_of_a_part_are_spread_over_the_batch_and_a_single_row_is_shared():
    batch = {"rows": jnp.arange(12).reshape(6, 2), "one": jnp.asarray([7])}
    parts = split_batch(batch, 3)
    assert parts["rows"][:, :, 0].tolist() == [[0, 6], [2, 8], [4, 10]]
    assert parts["one"].tolist() == [[7], [7], [7]]
    assert split_batch({"one": jnp.asarray([7])}, 1)["one"].tolist() == [[7]]


@pytest.mark.parametrize("accumulation", [2, 3, 12])
def test_accumulated_update_is_that_of_the_whole_batch(accumulation):
    (state, whole), (_, in_parts) = (
        make(noisy=True, accumulation=parts) for parts in (1, accumulation)
    )
    one, of_one = whole(state, many_rows())
    many, of_many = in_parts(state, many_rows())
    for name in ("loss", "grad_norm", "learning_rate"):
        assert float(of_many[name]) == pytest.approx(float(of_one[name]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(many.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert int(many.step) == 1
    # State that is not trained passes through each part; metrics are their means.
    assert (int(one.extra["batches"]), int(many.extra["batches"])) == (1, 1)
    assert float(of_many["rows"]) == 12 / accumulation


def test_draws_of_the_parts_differ_where_they_are_not_of_an_example():
    state, step_fn = make(accumulation=2)
    _, metrics = step_fn(state, many_rows())
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in (0, 1)]
    expected = [float(jax.random.uniform(Rng(key, 0).key(Stream.DROP_PATH))) for key in keys]
    assert expected[0] != expected[1]
    assert float(metrics["DROP_PATH"]) == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("row", [0, 5])
def test_one_bad_part_skips_the_whole_update(row):
    state, step_fn = make(accumulation=3)
    batch = many_rows()
    batch["x"][row] = np.inf
    new, metrics = step_fn(state, batch)
    assert unchanged_part(new) == unchanged_part(state)
    assert float(metrics["nonfinite_steps"]) == 1.0


def test_average_follows_the_parameters_and_a_skipped_update_leaves_it():
    state, step_fn = make(optax.identity(), averaged=True, ema_decay=0.75)
    assert bits(state.ema) == bits(state.params)
    first, _ = step_fn(state, GOOD)
    second, _ = step_fn(first, GOOD)
    by_hand = 0.75 * (0.75 * np.array([3.0, 5.0]) + 0.25 * np.asarray(first.params["w"]))
    by_hand += 0.25 * np.asarray(second.params["w"])
    np.testing.assert_allclose(second.ema["w"], by_hand, rtol=1e-6)
    skipped, _ = step_fn(second, BAD_LOSS)
    assert bits(skipped.ema) == bits(second.ema)
    assert second.best_params() is second.ema
    assert make()[0].best_params() is not None


def test_average_does_not_change_what_is_trained():
    (plain, plain_step), (averaged, averaged_step) = make(), make(averaged=True, ema_decay=0.9)
    for _ in range(3):
        plain, _ = plain_step(plain, GOOD)
        averaged, _ = averaged_step(averaged, GOOD)
    assert unchanged_part(plain) == unchanged_part(averaged)
