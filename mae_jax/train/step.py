"""The training step of every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mae_jax.train.state import Counters, TrainState
from mae_jax.types import Batch, Params, Rng, Task

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
    accumulation: int = 1,
    ema_decay: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make one update.

    A loss or gradient that is not finite leaves parameters, average and optimiser as they were and
    is counted; the step number, and with it data and schedule, goes on. The branch is a `cond`, for
    a `where` over all leaves would hold both versions in memory.

    Args:
      state: donated by those who compile this.
      batch: arrays [B, ...] of the global batch.
      task: gives the loss.
      optimizer: gives the direction, which is multiplied by -rate.
      schedule: gives the rate.
      seed: of the run.
      accumulation: parts that the batch is cut into, one after the other, to save memory; divides
        B. The update is that of the whole batch, to rounding.
      ema_decay: of the average of the parameters, where the state has one.

    Returns:
      The new state and float32 scalars: the task's metrics, `loss`, `learning_rate`, `grad_norm`,
      `nonfinite_steps` and `nonfinite_in_a_row`.
    """
    rng = Rng(jax.random.key(seed), state.step)
    batch = task.prepare(batch, rng)
    loss, metrics, extra, grads = _gradients(task, state, batch, rng, accumulation)
    grad_norm = optax.tree.norm(grads)
    learning_rate = schedule(state.step)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def update() -> tuple:
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, direction)
        return params, extra, opt_state, _averaged(state.ema, params, ema_decay)

    def skip() -> tuple:
        return state.params, state.extra, state.opt_state, state.ema

    params, extra, opt_state, ema = jax.lax.cond(finite, update, skip)
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
    new_state = TrainState(state.step + 1, params, extra, opt_state, counters, ema)
    return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def _averaged(ema: Params | None, params: Params, decay: float) -> Params | None:
    if ema is None:
        return None
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, ema, params)


def _gradients(
    task: Task, state: TrainState, batch: Batch, rng: Rng, accumulation: int
) -> tuple[jax.Array, dict[str, jax.Array], Any, Params]:
    """Return loss, metrics, extra state and gradients: means over the parts of the batch."""
    loss_and_grad = jax.value_and_grad(task.loss, has_aux=True)
    if accumulation == 1:
        (loss, (metrics, extra)), grads = loss_and_grad(state.params, state.extra, batch, rng)
        return loss, metrics, extra, grads

    def one(extra: Any, number: jax.Array, part: Batch) -> tuple[tuple, Any]:
        # What is drawn for each example is in the batch already; the rest differs between parts.
        part_rng = rng.replace(seed=jax.random.fold_in(rng.seed, number))
        (loss, (metrics, extra)), grads = loss_and_grad(state.params, extra, part, part_rng)
        return (loss, metrics, grads), extra

    def add(carry: tuple, numbered_part: tuple) -> tuple[tuple, None]:
        sums, extra = carry
        values, extra = one(extra, *numbered_part)
        return (jax.tree.map(jnp.add, sums, values), extra), None

    numbered = jnp.arange(accumulation), split_batch(batch, accumulation)
    first = jax.tree.map(lambda x: x[0], numbered)
    shapes, _ = jax.eval_shape(one, state.extra, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (sums, extra), _ = jax.lax.scan(add, (zeros, state.extra), numbered)
    loss, metrics, grads = jax.tree.map(lambda x: x / accumulation, sums)
    return loss, metrics, extra, grads


def split_batch(batch: Batch, parts: int) -> Batch:
    """Cut arrays [B, ...] into [parts, B / parts, ...]; those with one row are given to each part.

    Row r goes to part r % parts: so the rows of each part are spread over the devices as those of
    the batch are, and none has to move.
    """
    size = max(len(x) for x in jax.tree.leaves(batch))

    def cut(x: jax.Array) -> jax.Array:
        if len(x) == 1 < size:
            return jnp.broadcast_to(x[None], (parts, *x.shape))
        return jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)
