"""Checkpoints: the only module that knows Orbax.

A step is a folder with the items `params`, `ema` (their average, where one is kept), `extra`
(batch statistics, where there are such) and `train` (the rest of the state), and `data` and `meta`
in JSON. It is committed by one rename, so that a step is there in full or not at all.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from mae_jax.errors import ConfigError
from mae_jax.train.state import TrainState
from mae_jax.types import Params

ITEMS = ("params", "ema", "extra", "train", "data", "meta")


class Checkpoints:
    """The steps saved under one folder.

    Args:
      directory: made if missing; a bucket works.
      keep: how many of the newest steps stay.
      read_only: neither make the folder nor clear what a killed save has left in it.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 3, read_only: bool = False):
        # Orbax takes absolute paths alone; a bucket's name is one.
        is_remote = "://" in str(directory)
        self.directory = epath.Path(directory if is_remote else os.path.abspath(directory))
        self._pending: list[int] = []
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                # The loop decides when; without a policy Orbax would add steps of its own.
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                preservation_policy=checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                enable_async_checkpointing=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Return the newest committed step, None if there is none."""
        steps = set(self._manager.all_steps()) - set(self._pending)
        return max(steps, default=None)

    def path(self, step: int) -> epath.Path:
        """Return the folder of a step."""
        return self.directory / str(step)

    def save(self, state: TrainState, *, data: dict[str, Any], meta: dict[str, Any]) -> int:
        """Start saving `state` under its step; the arrays are copied before this returns.

        Args:
          state: the state after its step.
          data: the position in the data, for JSON.
          meta: configuration and versions, for JSON.

        Returns:
          The step. It counts as saved once `committed` has returned it.
        """
        step = int(state.step)
        started = self._manager.save(
            step,
            args=ocp.args.Composite(
                **{k: ocp.args.StandardSave(v) for k, v in _array_items(state).items()},
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        if not started:
            raise RuntimeError(f"checkpoint of step {step} was not saved; is it there already?")
        self._pending.append(step)
        return step

    def save_params(
        self, params: Params, *, meta: dict[str, Any], step: int = 0, extra: Any | None = None
    ) -> None:
        """Save parameters alone, as a step from which no run resumes; returns when it is there.

        Args:
          params: arrays.
          meta: configuration and versions, for JSON.
          step: its number.
          extra: batch statistics, if there are such.
        """
        arrays = {"params": params, **({"extra": extra} if extra else {})}
        started = self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
                meta=ocp.args.JsonSave(meta),
            ),
        )
        if not started:
            raise RuntimeError(f"checkpoint of step {step} was not saved; is there a later one?")
        self._manager.wait_until_finished()

    def delete(self, step: int) -> None:
        """Delete a committed step."""
        self._manager.delete(step)

    def committed(self, *, wait: bool = False) -> list[int]:
        """Return the steps committed since the last call; with `wait`, when all are."""
        # A save waits for the one before it, so all but the last are there.
        still = self._pending[-1:] if not wait and self._manager.is_saving_in_progress() else []
        if self._pending and not still:
            # Raises if the save failed; `check_for_errors` does not see what its thread met.
            self._manager.wait_until_finished()
        done, self._pending = self._pending[: len(self._pending) - len(still)], still
        return done

    def read_json(self, step: int, item: str) -> dict[str, Any]:
        """Return the item `data` or `meta` of a step.

        Raises:
          ConfigError: if it cannot be read.
        """
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()})
            )
        except Exception as error:
            raise ConfigError(
                f"{self.path(step)} is no checkpoint of this program: {error}"
            ) from error
        return restored[item]

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Return the state of a step.

        Args:
          step: a committed one.
          target: `jax.ShapeDtypeStruct` leaves with shardings, which decide the layout.

        Raises:
          ConfigError: if the step's arrays are not those of `target`.
        """
        restored = self._restore_arrays(step, _array_items(target))
        return target.replace(
            params=restored["params"],
            ema=restored.get("ema"),
            extra=restored.get("extra", {}),
            **restored["train"],
        )

    def has_average(self, step: int) -> bool:
        """Return whether the averaged parameters of a step were saved."""
        return (self.path(step) / "ema").exists()

    def restore_params(self, step: int, target: Params, *, averaged: bool = False) -> Params:
        """Return the parameters of a step alone.

        Args:
          step: a committed one.
          target: `jax.ShapeDtypeStruct` leaves with shardings, which decide the layout.
          averaged: those that `has_average` speaks of.

        Raises:
          ConfigError: if the step's arrays are not those of `target`.
        """
        item = "ema" if averaged else "params"
        return self._restore_arrays(step, {item: target})[item]

    def restore_extra(self, step: int, target: Any) -> Any:
        """Return the extra state of a step alone; arguments and errors as `restore_params`."""
        return self._restore_arrays(step, {"extra": target})["extra"] if target else {}

    def _restore_arrays(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Restore items by name; each target is a tree of shapes."""
        for item in targets:
            if not (self.path(step) / item).exists():
                raise ConfigError(f"cannot restore {self.path(step)}: it has no item {item!r}")
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ConfigError(f"cannot restore {self.path(step)}: {reason}") from error
        return dict(restored.items())

    def close(self) -> None:
        """Wait for what is being saved, and let go of the folder."""
        self._manager.close()


def _array_items(state: TrainState) -> dict[str, Any]:
    """Return the items of arrays: each can be restored by itself, by Orbax alone."""
    items = {"params": state.params, "train": _train_item(state)}
    if state.ema is not None:
        items["ema"] = state.ema
    if state.extra:
        items["extra"] = state.extra
    return items


def _train_item(state: TrainState) -> dict[str, Any]:
    """Return the state without its parameters, their average and the extra state."""
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "counters": state.counters,
    }


def abstract_state(shapes: TrainState, shardings: TrainState) -> TrainState:
    """Return a restore target from shapes and shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
