"""The parameters that did best on held-out examples, in a folder of their own."""

from __future__ import annotations

from typing import Any

from etils import epath

from mae_jax.train.checkpoint import Checkpoints
from mae_jax.train.state import TrainState


class BestCheckpoint:
    """Keeps one checkpoint: that of the evaluation with the highest `metric`, the first if equal.

    It is a checkpoint of parameters (averaged, where an average is kept) and of batch statistics,
    from which no run resumes. What was best before a run was stopped is read from its folder.

    Args:
      directory: made if missing.
      metric: a scalar of the evaluation.
      meta: configuration and versions, for JSON; `best` is added.

    Attributes:
      step: of the best checkpoint; None: there is none yet.
      value: of its metric.
    """

    def __init__(self, directory: epath.PathLike, metric: str, meta: dict[str, Any]):
        self._checkpoints = Checkpoints(directory, keep=1)
        self._metric = metric
        self._meta = meta
        self.step = self._checkpoints.latest_step()
        self.value = float("-inf")
        if self.step is not None:
            self.value = self._checkpoints.read_json(self.step, "meta")["best"][metric]

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

    def forget(self) -> None:
        """Delete what was best: of a run that starts anew, it is another's."""
        if self.step is not None:
            self._checkpoints.delete(self.step)
        self.step, self.value = None, float("-inf")

    def path(self) -> epath.Path | None:
        """Return the folder of the best checkpoint."""
        return None if self.step is None else self._checkpoints.path(self.step)

    def close(self) -> None:
        """Let go of the folder."""
        self._checkpoints.close()
