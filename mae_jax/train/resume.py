"""Which step a run goes on from: the newest that is whole, fits and is as it was saved."""

from __future__ import annotations

import dataclasses
from typing import Any

from mae_jax.errors import ConfigError
from mae_jax.train.checkpoint import Checkpoints, StepError
from mae_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A step that was restored.

    Attributes:
      step: its number.
      state: as it was saved.
      data: its position in the data.
      notes: lines on what was skipped, and why.
    """

    step: int
    state: TrainState
    data: dict[str, Any]
    notes: list[str]


def restore_newest(checkpoints: Checkpoints, target: TrainState) -> Resumed | None:
    """Restore the newest step that can be trusted; None: there is no step at all.

    Newer ones that were refused are renamed to `N.refused`, so that the run can save these steps
    again; nothing is deleted. All processes have to call this, and restore the same step.

    Args:
      checkpoints: of the run.
      target: `jax.ShapeDtypeStruct` leaves with shardings, which decide the layout.

    Raises:
      ConfigError: if there are steps, and none of them can be restored; they are left as they are.
    """
    refused: dict[int, str] = {}
    for step in reversed(checkpoints.steps()):
        try:
            state = checkpoints.restore(step, target)
        except StepError as error:
            # The reason alone: the error itself would keep the arrays in memory.
            refused[step] = error.reason
            continue
        notes = [
            f"skipped step {bad}: {reason}; kept as {checkpoints.set_aside(bad)}"
            for bad, reason in refused.items()
        ]
        if not checkpoints.has_checksums(step):
            notes.append(f"note: step {step} has no checksums; it is taken as it is")
        return Resumed(step, state, checkpoints.read_json(step, "data"), notes)
    if not refused:
        return None
    if len(set(refused.values())) == 1:  # another model, most likely
        older = "; nor any older step" if len(refused) > 1 else ""
        raise StepError(checkpoints.path(max(refused)), refused[max(refused)] + older)
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in refused.items())
    raise ConfigError(f"cannot restore any step of {checkpoints.directory}: {reasons}")


def newest_meta(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Return the item `meta` of the newest step in which it is as it was saved, if there is any."""
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.read_json(step, "meta")
        except StepError:
            continue
    return None
