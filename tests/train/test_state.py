"""The state of a run before its first step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mae_jax.train.state import TrainState


def test_new_state_is_at_step_zero_with_counters_at_zero_and_a_fresh_optimiser():
    params, extra = {"w": jnp.ones((2, 3))}, {"mean": jnp.ones(3)}
    adam = optax.scale_by_adam()
    state = TrainState.create(params, extra, adam)
    assert (int(state.step), state.step.dtype, state.step.shape) == (0, jnp.int32, ())
    for count in (state.counters.nonfinite_steps, state.counters.nonfinite_in_a_row):
        assert (int(count), count.dtype, count.shape) == (0, jnp.int32, ())
    assert state.params is params
    assert state.extra is extra
    fresh = adam.init(params)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(fresh)
    assert all(map(jnp.array_equal, jax.tree.leaves(state.opt_state), jax.tree.leaves(fresh)))


def test_state_can_be_made_and_described_inside_a_jitted_function():
    def init() -> TrainState:
        return TrainState.create({"w": jnp.ones((2, 3))}, {}, optax.scale_by_adam())

    shapes = jax.eval_shape(init)
    assert shapes.params["w"].shape == (2, 3)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.jit(init)()) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


def test_average_starts_as_the_parameters_in_arrays_of_its_own():
    state = TrainState.create({"w": jnp.ones((2, 3))}, {}, optax.identity(), averaged=True)
    assert jnp.array_equal(state.ema["w"], state.params["w"])
    assert state.ema["w"] is not state.params["w"]
    assert state.best_params() is state.ema
    plain = TrainState.create(state.params, {}, optax.identity())
    assert plain.ema is None
    assert plain.best_params() is plain.params
    # Donated twice, a buffer would be an error.
    jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)(state)


def test_optimiser_knows_what_is_trained_alone_and_the_average_all():
    params = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "c": {"w": jnp.ones((4, 4))}}
    trainable = {"a": {"w": False, "b": True}, "c": {"w": False}}
    adam = optax.scale_by_adam()
    state = TrainState.create(params, {}, adam, averaged=True, trainable=trainable)
    assert state.opt_state.mu.keys() == state.opt_state.nu.keys() == {"a"}
    assert state.opt_state.mu["a"].keys() == {"b"}
    assert jax.tree.structure(state.params) == jax.tree.structure(state.ema)
    assert state.params is params


def test_state_made_outside_of_a_jitted_function_can_be_donated():
    state = TrainState.create({"w": jnp.ones((2, 3))}, {}, optax.scale_by_adam())
    new = jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)(state)
    assert int(new.step) == 1
