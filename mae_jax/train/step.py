"""The training step of every task."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mae_jax.train.state import Counters, TrainState
from mae_jax.types import Batch, Rng, Task

Schedule = Callable[[jax.Array], jax.Array]
"""Steps done before this one -> learning rate."""


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    seed: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make one update.

    A loss or gradient that is not finite leaves parameters and optimiser as they were and is
    counted; the step number, and with it data and schedule, goes on. The branch is a `cond`, for a
    `where` over all leaves would hold both versions in memory.

    Returns:
      The new state and float32 scalars: the task's metrics, `loss`, `learning_rate`, `grad_norm`,
      `nonfinite_steps` and `nonfinite_in_a_row`.
    """
    rng = Rng(jax.random.key(seed), state.step)
    loss_and_grad = jax.value_and_grad(task.loss, has_aux=True)
    (loss, (metrics, extra)), grads = loss_and_grad(state.params, state.extra, batch, rng)
    grad_norm = optax.tree.norm(grads)
    learning_rate = schedule(state.step)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def update() -> tuple:
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, direction)
        return params, extra, opt_state

    def skip() -> tuple:
        return state.params, state.extra, state.opt_state

    params, extra, opt_state = jax.lax.cond(finite, update, skip)
    bad = 1 - finite.astype(jnp.int32)
    counters = Counters(
        nonfinite_steps=state.counters.nonfinite_steps + bad,
        nonfinite_in_a_row=bad * (state.counters.nonfinite_in_a_row + 1),
    )
    metrics = metrics | {
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "nonfinite_steps": counters.nonfinite_steps,
        "nonfinite_in_a_row": counters.nonfinite_in_a_row,
    }
    new_state = TrainState(state.step + 1, params, extra, opt_state, counters)
    return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}
