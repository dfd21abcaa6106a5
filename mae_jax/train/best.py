"""The parameters that did best on held-out examples, in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etils import epath

from mae_jax.train.checkpoint import Checkpoints, StepError
from mae_jax.train.state import TrainState


class BestCheckpoint:
    """Keeps one checkpoint: that of the evaluation with the highest `metric`, the first if equal.

    It is a checkpoint of parameters (averaged, where an average is kept) and of batch statistics,
    from which no run resumes.

    Args:
      directory: made if missing.
      metric: a scalar of the evaluation.
      meta: configuration and versions, for JSON; `best` is added.
      before_save: raises if nothing may be changed there any more.

    Attributes:
      step: of the best checkpoint; None: there is none yet.
      value: of its metric.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        metric: str,
        meta: dict[str, Any],
        *,
        before_save: Callable[[], None] = lambda: None,
    ):
        self._checkpoints = Checkpoints(directory, keep=1, before_save=before_save)
        self._metric = metric
        self._meta = meta
        self.step: int | None = None
        self.value = float("-inf")

    def open(self, *, anew: bool = False) -> list[str]:
        """Read what was best before the run was stopped. All processes have to call this.

        Args:
          anew: delete it instead: of a run that starts anew, it is another's.

        Returns:
          Lines on what is damaged. It is renamed to `N.refused`, and the next evaluation is the
          best again.
        """
        notes = []
        for step in reversed(self._checkpoints.steps()):
            if anew:
                self._checkpoints.delete(step)
                continue
            try:
                meta = self._checkpoints.read_json_together(step, "meta")
            except StepError as error:
                kept = self._checkpoints.set_aside(step)
                notes.append(f"skipped best step {step}: {error.reason}; kept as {kept}")
                continue
            self.step, self.value = step, meta["best"][self._metric]
            break
        return notes

    def keep(self, state: TrainState, scalars: dict[str, float]) -> None:
        """Save the state's parameters if `scalars` has a better value; returns when they are."""
        value = scalars[self._metric]
        if not value > self.value:
            return
        step = int(state.step)
        if self.step is not None and step <= self.step:
            # A run that goes on from before its best, in another way; steps are saved upwards.
            self._checkpoints.delete(self.step)
        meta = {"best": {self._metric: value}, "averaged": state.ema is not None, **self._meta}
        self._checkpoints.save_params(state.best_params(), meta=meta, step=step, extra=state.extra)
        self.step, self.value = step, value

    def path(self) -> epath.Path | None:
        """Return the folder of the best checkpoint."""
        return None if self.step is None else self._checkpoints.path(self.step)

    def close(self) -> None:
        """Let go of the folder."""
        self._checkpoints.close()
