"""What the training loop itself costs: steps that do nothing, with the state of a large model."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from mae_jax.tools import records
from mae_jax.train.loop import Cadence, train
from mae_jax.train.metrics import Throughput
from mae_jax.train.signals import StopRequest
from mae_jax.train.state import Counters, TrainState
from mae_jax.train.writers import Console, RunWriter

LOG_EVERY = 20  # steps, as in all recipes

COLUMNS = {
    "leaves": ("arrays of the state", ""),
    "steps_per_second": ("steps/s", ".0f"),
    "least": ("least", ".0f"),
}


class Nothing:
    """The same batch for ever, and checkpoints that are not kept."""

    def __init__(self) -> None:
        self._batch = jnp.zeros(())

    def __next__(self) -> jax.Array:
        return self._batch

    def scalars(self) -> dict[str, float]:
        """Return nothing to log."""
        return {}

    def latest_step(self) -> int | None:
        """Return that nothing was saved."""
        return None

    def save(self, state: TrainState, **items: Any) -> int:
        """Save nothing; return the step."""
        return int(state.step)

    def committed(self, *, wait: bool = False) -> list[int]:
        """Return that nothing was saved."""
        return []


def make_state(leaves: int, first: int) -> TrainState:
    """Return a state with so many arrays, at a step."""
    counters = Counters(*(jnp.zeros((), jnp.int32) for _ in range(2)))
    params = {f"leaf_{i}": jnp.zeros(8) for i in range(leaves)}
    return TrainState(jnp.asarray(first, jnp.int32), params, {}, (), counters)


def do_nothing(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """Count the step."""
    zeros = ("learning_rate", "grad_norm", "nonfinite_steps", "nonfinite_in_a_row")
    return state.replace(step=state.step + 1), {
        "loss": batch,
        **{name: jnp.zeros(()) for name in zeros},
    }


def run(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Time `flags.rounds` times `flags.steps` steps, print and return a row."""
    step_fn = jax.jit(do_nothing, donate_argnums=0)
    rates = []
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        for number in range(flags.rounds + 1):
            first = number * flags.steps
            state = step_fn(make_state(flags.leaves, first - 1), jnp.zeros(()))[0]
            last, nothing = first + flags.steps, Nothing()
            writer = RunWriter(epath.Path(folder), first_step=first)
            begun = time.perf_counter()
            train(
                state,
                step_fn,
                nothing,
                Cadence(
                    total_steps=last + 1,  # the end of a schedule would be evaluated
                    last_step=last,
                    log_every=LOG_EVERY,
                    eval_every=0,
                    save_every=last + 1,
                    max_nonfinite_steps=1,
                ),
                evaluators=[],
                checkpoints=nothing,  # type: ignore[arg-type]
                save_items=lambda step: {},
                writer=writer,
                console=Console(last, first, quiet=True),
                throughput=Throughput(1, 1, 1.0),
                stop=stop,
            )
            seconds = time.perf_counter() - begun
            writer.close()
            if number:  # the first warms up
                rates.append(flags.steps / seconds)
    row = {
        "leaves": flags.leaves,
        "steps_per_second": statistics.median(rates),
        "least": min(rates),
        "rounds": len(rates),
    }
    print(records.table([row], COLUMNS))
    if flags.json:
        records.append(flags.json, [row])
    return [row]
