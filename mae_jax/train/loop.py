"""The training loop: owns time and input/output, and knows no model, task or data set."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from mae_jax.errors import ConfigError
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.train.metrics import Throughput
from mae_jax.train.signals import StopRequest
from mae_jax.train.state import TrainState
from mae_jax.train.writers import Console, RunWriter
from mae_jax.types import Evaluator

StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


class Batches(Protocol):
    """Batches on the devices, for ever."""

    def __next__(self) -> Any:
        """Return the batch of the next step."""
        ...

    def scalars(self) -> dict[str, float]:
        """Return what is to be logged of the data."""
        ...


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that was not finite."""


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When what happens; all in steps.

    Attributes:
      total_steps: end of the schedule.
      last_step: where this run ends, at most `total_steps`.
      log_every: lines of metrics; the first step is logged as well.
      eval_every: evaluators; 0: only at the end of the schedule, where they always run.
      save_every: checkpoints; the last step is always saved.
      max_nonfinite_steps: skipped updates in a row that end the run.
    """

    total_steps: int
    last_step: int
    log_every: int
    eval_every: int
    save_every: int
    max_nonfinite_steps: int


def train(
    state: TrainState,
    step_fn: StepFn,
    batches: Batches,
    cadence: Cadence,
    *,
    evaluators: Sequence[Evaluator],
    checkpoints: Checkpoints,
    save_items: Callable[[int], dict[str, Any]],
    writer: RunWriter,
    console: Console,
    throughput: Throughput,
    stop: StopRequest,
    keep_best: Callable[[TrainState, dict[str, float]], None] | None = None,
) -> int:
    """Train until the last step or a signal; the state is saved when this returns.

    Metrics of a step are fetched while the next one runs; nothing else waits for the devices.

    Args:
      state: where to start; donated to the first step.
      step_fn: (state, batch) -> (state, metrics).
      batches: those from step `state.step` on. If there is an error in getting one, or a
        `ConfigError` in evaluating, the state is saved before it goes on.
      cadence: when what happens.
      evaluators: run every `eval_every` steps.
      checkpoints: where states are saved.
      save_items: step -> the JSON items `data` and `meta` of its checkpoint.
      writer: takes scalars and pictures.
      console: takes lines and progress.
      throughput: clock.
      stop: the wish to stop.
      keep_best: told of each evaluation, the state and its scalars.

    Returns:
      The last step done.

    Raises:
      NonFiniteError: after `max_nonfinite_steps` in a row; nothing is saved then.
    """
    first = step = int(state.step)
    saved = checkpoints.latest_step()
    previous: tuple[int, dict[str, jax.Array], float] | None = None
    throughput.reset()

    def settle(step: int, metrics: dict[str, jax.Array], stalled: float) -> None:
        values = {f"train/{name}": float(v) for name, v in jax.device_get(metrics).items()}
        throughput.step(stalled)  # now that it is done, not when it was started
        in_a_row = int(values.pop("train/nonfinite_in_a_row"))
        if in_a_row:
            console.say(f"step {step}: loss or gradient not finite, update skipped")
        if in_a_row >= cadence.max_nonfinite_steps:
            report_saves(wait=True)
            writer.flush()  # the rows that show how it came to that
            raise NonFiniteError(
                f"loss or gradient not finite in {in_a_row} steps in a row, the last step {step};"
                f" newest checkpoint: {checkpoints.latest_step()}"
            )
        console.advance(step)
        writer.heartbeat.beat(step)
        if step == first + 1:
            # The first step waits for caches and the first batch: show it, do not count it.
            write(step, values)
            throughput.reset()
        elif step % cadence.log_every == 0 or step == cadence.last_step:
            write(step, values)
            throughput.reset()

    def write(step: int, values: dict[str, float]) -> None:
        more = throughput.scalars() | batches.scalars()
        values |= {f"train/{name}": value for name, value in more.items()}
        writer.scalars(step, values)
        left = (cadence.last_step - step) * throughput.seconds_per_step()
        console.progress(step, values, left)

    def save() -> None:
        nonlocal saved
        with throughput.excluded("saving"):
            saved = checkpoints.save(state, **save_items(step))
            writer.flush()

    def report_saves(*, wait: bool = False) -> None:
        for done in checkpoints.committed(wait=wait):
            console.say(f"saved step {done}")

    def finish() -> None:
        if previous is not None:
            settle(*previous)
        if saved != step:
            save()
        with throughput.excluded("saving"):
            report_saves(wait=True)
        writer.flush()
        writer.heartbeat.write(step)

    @contextlib.contextmanager
    def saving_on(kind: type[Exception]) -> Iterator[None]:
        try:
            yield
        except kind:
            # Data can be mended, and the run goes on. Other processes may still have theirs.
            if jax.process_count() == 1:
                finish()
            raise

    while step < cadence.last_step and not stop.wanted():
        begun = time.perf_counter()
        with saving_on(Exception):
            batch = next(batches)
        # Devices that still work on the previous step have not waited for this batch.
        idle = previous is None or previous[1]["loss"].is_ready()  # type: ignore[attr-defined]
        stalled = time.perf_counter() - begun if idle else 0.0
        state, metrics = step_fn(state, batch)
        step += 1
        if previous is not None:
            settle(*previous)
        previous = step, metrics, stalled
        due = cadence.eval_every and step % cadence.eval_every == 0
        evaluating = due or step == cadence.total_steps
        saving = step % cadence.save_every == 0
        if evaluating or saving:
            # First, for a step that ends the run is not saved; and both wait for the step anyway.
            settle(*previous)
            previous = None
        if evaluating:
            with saving_on(ConfigError), throughput.excluded("evaluating"):
                measured = evaluate(step, state, evaluators, writer, console)
                if keep_best is not None:
                    keep_best(state, measured)
        if saving:
            save()
        report_saves()
    finish()
    return step


def evaluate(
    step: int,
    state: TrainState,
    evaluators: Sequence[Evaluator],
    writer: RunWriter,
    console: Console,
) -> dict[str, float]:
    """Run the evaluators on a state; scalars make one line, pictures and tables a file each.

    Where an average of the parameters is kept, it is measured, and the line says so.

    Returns:
      The scalars, `val/...`.
    """
    scalars: dict[str, float] = {}
    for evaluator in evaluators:
        for name, value in evaluator.run(state.best_params(), state.extra):
            if isinstance(value, float):
                scalars[f"val/{name}"] = value
            elif isinstance(value, str):
                writer.table(step, name, value)
            else:
                writer.picture(step, name, value)
    if scalars:
        writer.scalars(step, scalars)
        shown = "  ".join(f"{k.removeprefix('val/')} {v:.4g}" for k, v in scalars.items())
        of = "" if state.ema is None else ", averaged parameters"
        console.say(f"step {step} held out{of}:  {shown}")
    return scalars
