"""The training step of every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mae_jax.train.partition import merge, select
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
    seed: int | jax.Array,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    trainable: Any | None = None,
    rate_factors: Any | None = None,
    whole: Callable[[Params], Params] = lambda params: params,
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
      trainable: tree of bools like the parameters; only leaves that are true are differentiated,
        known to the optimiser, updated and averaged. None: all.
      rate_factors: tree of floats like the parameters, by which the rate of each is multiplied
        (layer-wise decay). None: 1 for all.
      whole: makes of spread parameters what the task computes with; see `sharding.whole`.

    Returns:
      The new state and float32 scalars: the task's metrics, `loss`, `learning_rate`, `grad_norm`,
      `nonfinite_steps` and `nonfinite_in_a_row`.
    """
    rng = Rng(jax.random.key(seed), state.step)
    batch = task.prepare(batch, rng)
    before = select(state.params, trainable)

    def loss_of(trained: Params, batch: Batch, rng: Rng) -> tuple:
        return task.loss(whole(merge(state.params, trained)), state.extra, batch, rng)

    loss, metrics, extra, grads = _gradients(loss_of, before, batch, rng, accumulation)
    grad_norm = optax.tree.norm(grads)
    learning_rate = schedule(state.step)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if rate_factors is None:
        factors = jax.tree.map(lambda _: 1.0, before)
    else:
        factors = select(rate_factors, trainable)
    average = None if state.ema is None else select(state.ema, trainable)

    def update() -> tuple:
        direction, opt_state = optimizer.update(grads, state.opt_state, before)
        after = jax.tree.map(
            lambda p, d, factor: p - learning_rate * factor * d, before, direction, factors
        )
        return after, extra, opt_state, _averaged(average, after, ema_decay)

    def skip() -> tuple:
        return before, state.extra, state.opt_state, average

    after, extra, opt_state, average = jax.lax.cond(finite, update, skip)
    params = merge(state.params, after)
    ema = None if state.ema is None else merge(state.ema, average)
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
    loss_of: Callable[..., tuple], trained: Params, batch: Batch, rng: Rng, accumulation: int
) -> tuple[jax.Array, dict[str, jax.Array], Any, Params]:
    """Return loss, metrics, extra state, gradients of `trained`: means over the parts."""
    loss_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if accumulation == 1:
        (loss, (metrics, extra)), grads = loss_and_grad(trained, batch, rng)
        return loss, metrics, extra, grads

    def one(number: jax.Array, part: Batch) -> tuple:
        # What is drawn for each example is in the batch already; the rest differs between parts.
        part_rng = rng.replace(seed=jax.random.fold_in(rng.seed, number))
        (loss, (metrics, extra)), grads = loss_and_grad(trained, part, part_rng)
        return loss, metrics, extra, grads

    def add(sums: tuple, numbered_part: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, one(*numbered_part)), None

    numbered = jnp.arange(accumulation), split_batch(batch, accumulation)
    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], numbered))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(add, zeros, numbered)
    # Back to the dtype of each: a mean of integers is no integer.
    return jax.tree.map(lambda x, shape: (x / accumulation).astype(shape.dtype), sums, shapes)


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
