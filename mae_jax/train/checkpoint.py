"""Checkpoints: the only module that knows Orbax.

A step is a folder with the items `params`, `ema` (their average, where one is kept), `extra`
(batch statistics, where there are such) and `train` (the rest of the state), and `data`, `meta` and
`checksums` in JSON. It is committed by one rename, so that a step is there in full or not at all;
what is read is compared with its checksums.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mae_jax.errors import ConfigError, StopError
from mae_jax.files import is_local
from mae_jax.train import checksums, quiet
from mae_jax.train.state import TrainState
from mae_jax.types import Params

ARRAYS = ("params", "ema", "extra", "train")
TEXTS = ("data", "meta")
CHECKSUMS = "checksums"
ITEMS = (*ARRAYS, *TEXTS, CHECKSUMS)


_T = TypeVar("_T")


class StepError(ConfigError):
    """A step that is not there, does not fit, or is not as it was saved.

    Attributes:
      reason: the message without the folder.
    """

    def __init__(self, path: epath.Path, reason: str):
        super().__init__(f"cannot restore {path}: {reason}")
        self.reason = reason


class SaveError(StopError):
    """A step could not be written."""


class Checkpoints:
    """The steps saved under one folder.

    Args:
      directory: made if missing; a bucket works.
      keep: how many of the newest steps stay.
      read_only: neither make the folder nor clear what a killed save has left in it.
      before_save: called before each save and deletion; raises if the folder has become another's.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int = 3,
        read_only: bool = False,
        before_save: Callable[[], None] = lambda: None,
    ):
        # Orbax takes absolute paths alone; a bucket's name is one.
        self._is_local = is_local(directory)
        self.directory = epath.Path(os.path.abspath(directory) if self._is_local else directory)
        self._before_save = before_save
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
                # Else it looks into each step, and complains of folders that hold none.
                lightweight_initialize=True,
            ),
        )

    def steps(self) -> list[int]:
        """Return the numbers of the committed steps, and of folders that look like one, upwards."""
        return sorted(set(self._manager.all_steps()) - set(self._pending))

    def latest_step(self) -> int | None:
        """Return the newest of `steps`, None if there is none."""
        return max(self.steps(), default=None)

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

        Raises:
          ConfigError: if there is no room for it.
          SaveError: if it cannot be written, or the one before it could not be.
        """
        step = int(state.step)
        self._save(step, _array_items(state), {"data": data, "meta": meta})
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

        Raises:
          ConfigError: if there is no room for it.
          SaveError: if it cannot be written.
        """
        arrays = {"params": params, **({"extra": extra} if extra else {})}
        self._save(step, arrays, {"meta": meta})
        with _one_line(step):
            self._manager.wait_until_finished()

    def _save(self, step: int, arrays: dict[str, Any], texts: dict[str, Any]) -> None:
        """Start saving items under a step."""
        self._finish()
        self._before_save()
        self.require_space(arrays)
        texts = {**texts, CHECKSUMS: checksums.record_of(arrays, texts)}
        with _one_line(step):
            started = self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
                    **{name: ocp.args.JsonSave(text) for name, text in texts.items()},
                ),
            )
            if not started:
                raise FileExistsError("it, or a later step, is there already")

    def require_space(self, tree: Any) -> None:
        """Raise `ConfigError` if a local folder has no room for the arrays of `tree`, or shapes."""
        if not self._is_local:
            return
        leaves = jax.tree.leaves(tree)
        needed = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise ConfigError(
                f"{self.directory}: expected {needed:,} bytes free for a checkpoint, got {free:,}"
            )

    def delete(self, step: int) -> None:
        """Delete a committed step; raises as `before_save` does."""
        self._before_save()
        self._manager.delete(step)

    def set_aside(self, step: int) -> str:
        """Rename a step, so that it is no step any more; returns its new name.

        All processes have to call this; the first does it.
        """
        name = f"{step}.refused"
        number = 1
        while (self.directory / name).exists():
            number += 1
            name = f"{step}.refused_{number}"
        if jax.process_index() == 0:
            self.path(step).rename(self.directory / name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return name

    def committed(self, *, wait: bool = False) -> list[int]:
        """Return the steps committed since the last call; with `wait`, when all are.

        Raises:
          SaveError: if one of them could not be written.
        """
        # A save waits for the one before it, so all but the last are there.
        still = self._pending[-1:] if not wait and self._manager.is_saving_in_progress() else []
        if not still:
            self._finish()
        done, self._pending = self._pending[: len(self._pending) - len(still)], still
        return done

    def _finish(self) -> None:
        """Wait for the save under way."""
        if not self._pending:
            return
        try:
            # Raises if the save failed; `check_for_errors` does not see what its thread met.
            with _one_line(self._pending[-1]):
                self._manager.wait_until_finished()
        except SaveError:
            self._pending.pop()
            raise

    def read_json(self, step: int, item: str) -> dict[str, Any]:
        """Return the item `data` or `meta` of a step.

        Raises:
          StepError: if it cannot be read, or is not as it was saved.
        """
        value = self._read_json(step, item)
        record = self._record(step)
        if record is not None and record.texts.get(item) != checksums.of_json(value):
            raise StepError(self.path(step), f"{item} is damaged (checksum)")
        return value

    def read_json_together(self, step: int, item: str) -> dict[str, Any]:
        """As `read_json`; all processes have to call this, and raise if one of them does."""
        error: StepError | None = None
        value: dict[str, Any] = {}
        try:
            value = self.read_json(step, item)
        except StepError as met:
            error = met
        _raise_together(error, self.path(step))
        return value

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        try:
            return json.loads((self.path(step) / item / "metadata").read_text())
        except FileNotFoundError as error:
            raise StepError(self.path(step), f"it has no item {item!r}") from error
        except (OSError, ValueError) as error:
            raise StepError(self.path(step), f"{item} is damaged: {_first_line(error)}") from error

    def has_checksums(self, step: int) -> bool:
        """Return whether a step has checksums: early versions of this program saved none."""
        return (self.path(step) / CHECKSUMS).exists()

    def items(self, step: int) -> list[str]:
        """Return the items that a step had when it was saved; without checksums, those it has.

        Raises:
          StepError: if the checksums cannot be read.
        """
        record = self._record(step)
        if record is not None:
            return record.items()
        return [item for item in (*ARRAYS, *TEXTS) if (self.path(step) / item).exists()]

    def _record(self, step: int) -> checksums.Record | None:
        """Return what the step was when it was saved; None: it never had checksums."""
        if not self.has_checksums(step):
            if self._had_checksums(step):
                raise StepError(self.path(step), f"it has no item {CHECKSUMS!r}")
            return None
        stored = self._read_json(step, CHECKSUMS)
        try:
            return checksums.Record.of(stored)
        except ValueError as error:
            raise StepError(self.path(step), f"{CHECKSUMS} is damaged (checksum)") from error

    def _had_checksums(self, step: int) -> bool:
        """Return whether Orbax's list of items has them: no such step may pass for an old one."""
        try:
            return f'"{CHECKSUMS}"' in (self.path(step) / "_CHECKPOINT_METADATA").read_text()
        except (OSError, ValueError):
            return False

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Return the state of a step. All processes have to call this.

        Args:
          step: a committed one.
          target: `jax.ShapeDtypeStruct` leaves with shardings, which decide the layout.

        Raises:
          StepError: if the step's arrays are not those of `target`, or it is not as it was saved;
            for all processes, if one met it.
        """
        error: StepError | None = None
        restored: dict[str, Any] = {}
        try:
            restored = self._read_arrays(step, _array_items(target))
            for item in TEXTS:
                self.read_json(step, item)
        except StepError as met:
            error = met
        _raise_together(error, self.path(step))
        self._compare(step, restored)
        return target.replace(
            params=restored["params"],
            ema=restored.get("ema"),
            extra=restored.get("extra", {}),
            **restored["train"],
        )

    def has_average(self, step: int) -> bool:
        """Return whether the averaged parameters of a step were saved, there still or not."""
        return "ema" in self.items(step)

    def restore_params(self, step: int, target: Params, *, averaged: bool = False) -> Params:
        """Return the parameters of a step alone.

        Args:
          step: a committed one.
          target: `jax.ShapeDtypeStruct` leaves with shardings, which decide the layout.
          averaged: those that `has_average` speaks of.

        Raises:
          StepError: if the step's arrays are not those of `target`, or not as they were saved.
        """
        item = "ema" if averaged else "params"
        return self._restore_item(step, item, target)

    def restore_extra(self, step: int, target: Any) -> Any:
        """Return the extra state of a step alone; arguments and errors as `restore_params`."""
        return self._restore_item(step, "extra", target) if target else {}

    def _restore_item(self, step: int, item: str, target: Any) -> Any:
        restored = self._read_arrays(step, {item: target})
        self._compare(step, restored)
        return restored[item]

    def verify(self, step: int) -> int:
        """Read every item of a step and compare it with its checksum; needs no model.

        Arrays come into the memory of this process, an item at a time.

        Returns:
          The number of arrays.

        Raises:
          StepError: if one is missing, cannot be read, or is not as it was saved.
        """
        items = self.items(step)
        if not any(item in ARRAYS for item in items):
            raise StepError(self.path(step), "it holds no arrays")
        count = 0
        for item in items:
            if item in TEXTS:
                self.read_json(step, item)
                continue
            target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), self._noted(step, item))
            restored = self._read_arrays(step, {item: target})
            self._compare(step, restored)
            count += len(jax.tree.leaves(restored))
        return count

    def _item_path(self, step: int, item: str) -> epath.Path:
        path = self.path(step) / item
        if not path.exists():
            raise StepError(self.path(step), f"it has no item {item!r}")
        return path

    def _noted(self, step: int, item: str) -> Any:
        """Return shapes and dtypes of an item as Orbax has noted them, without a look at a file."""
        path = self._item_path(step, item)
        return self._by_orbax(
            step, item, lambda: ocp.StandardCheckpointHandler().metadata(path).tree
        )

    def _read_arrays(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Restore items by name, each like its target, without a look at their checksums.

        By Orbax's handler and not by its manager, which waits for the other processes at its end:
        for minutes, if one of them has failed.
        """
        record = self._record(step)
        restored = {}
        for item, target in targets.items():
            path = self._item_path(step, item)
            # Compared here, for Orbax casts to another dtype without a word.
            saved = (
                record.kinds(item) if record else checksums.kinds({item: self._noted(step, item)})
            )
            self._refuse_others(step, saved, checksums.kinds({item: target}))
            read = functools.partial(
                ocp.StandardCheckpointHandler().restore,
                path,
                args=ocp.args.StandardRestore(target),
            )
            restored[item] = self._by_orbax(step, item, read)
        return restored

    def _refuse_others(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
        """Raise if arrays were saved that are not wanted, or the other way round."""
        for name in sorted(saved.keys() | wanted.keys()):
            expected, got = wanted.get(name, "nothing"), saved.get(name, "nothing")
            if expected != got:
                raise StepError(self.path(step), f"{name}: expected {expected}, got {got}")

    def _by_orbax(self, step: int, item: str, read: Callable[[], _T]) -> _T:
        """Return `read()`; whatever it raises becomes one line, and all else goes to the logger."""
        try:
            return read()
        except Exception as error:
            quiet.after_a_failed_read()
            quiet.LOG.exception("%s of %s cannot be read", item, self.path(step))
            reason = f"{item} cannot be read: {_first_line(error)}"
        # Not from the error: it would keep in memory what was read so far.
        raise StepError(self.path(step), reason)

    def _compare(self, step: int, restored: dict[str, Any]) -> None:
        """Raise if arrays are not as they were saved; of shared arrays all processes call this."""
        record = self._record(step)
        if record is None:
            return
        sums = checksums.of_arrays(restored)
        wrong = [name for name in sums if sums[name] != record.sums[name]]
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise StepError(self.path(step), f"{wrong[0]} is damaged (checksum){more}")

    def close(self) -> None:
        """Wait for what is being saved, and let go of the folder.

        Raises:
          SaveError: if it could not be saved.
        """
        try:
            self._finish()
        finally:
            self._manager.close()


def _raise_together(error: StepError | None, path: epath.Path) -> None:
    """Raise `error`, and in a process that has none if another has one."""
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
    if error is not None:
        raise error
    if failed:
        raise StepError(path, "another process could not read it")


@contextlib.contextmanager
def _one_line(step: int) -> Iterator[None]:
    """Turn whatever is raised in saving a step into one line."""
    try:
        yield
    except Exception as error:
        raise SaveError(f"checkpoint of step {step} was not saved: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Return the start of what an error says: storage may say hundreds of lines."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else repr(error)


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
