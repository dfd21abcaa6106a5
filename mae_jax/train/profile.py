"""A profile of some steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath

from mae_jax.train.loop import StepFn
from mae_jax.train.state import TrainState


class ProfiledStep:
    """A step that writes a profile of some of its calls.

    Args:
      step_fn: to be called.
      folder: of the profile.
      steps: first and last one that are profiled, counted from 1.
      done: steps before the first call.
    """

    def __init__(
        self, step_fn: StepFn, folder: epath.PathLike, steps: tuple[int, int], *, done: int
    ):
        self._step_fn, self._folder = step_fn, folder
        self._first, self._last = steps
        self._done = done
        self._is_on = False

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take a step."""
        step = self._done = self._done + 1
        if not self._is_on and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True
        results = self._step_fn(state, batch)
        if step == self._last:
            jax.block_until_ready(results)
            self.close()
        return results

    def close(self) -> None:
        """End a profile whose last step does not come."""
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
