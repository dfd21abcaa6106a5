"""The work of `mae_jax.tools.checkpoints`."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from mae_jax.errors import ConfigError
from mae_jax.train.checkpoint import Checkpoints, StepError

DAMAGED = 1


def list_steps(directory: str) -> int:
    """Print a line for each step, and for what was set aside or never completed."""
    with _opened(directory) as checkpoints:
        steps = checkpoints.steps()
        for step in steps:
            print(_described(checkpoints, step))
        others = [path for path in checkpoints.directory.iterdir() if path.is_dir()]
        for path in sorted(others):
            if path.name not in map(str, steps):
                kind = "set aside" if ".refused" in path.name else "not a step"
                print(f"{path.name}  {_size_and_time(path)[0]:,} bytes  {kind}")
    return 0


def verify(directory: str, step: int | None = None) -> int:
    """Read all steps, or one, compare them with their checksums, and print a line for each."""
    damaged = False
    with _opened(directory) as checkpoints:
        steps = checkpoints.steps()
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps))
            raise ConfigError(f"--step={step}: expected a step of {directory}, one of {known}")
        for number in steps if step is None else [step]:
            try:
                count = checkpoints.verify(number)
            except StepError as error:
                damaged = True
                print(f"step {number}: {error.reason}", flush=True)
                continue
            has_checksums = checkpoints.has_checksums(number)
            found = "intact" if has_checksums else "can be read, but has no checksums"
            print(f"step {number}: {found}, {count} arrays", flush=True)
    return DAMAGED if damaged else 0


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[Checkpoints]:
    """Open the checkpoints that a folder has or is; raises ConfigError if there are none."""
    path = epath.Path(os.path.expanduser(directory))
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir():
        raise ConfigError(f"DIR: expected a folder of checkpoints, got {directory}, which is none")
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        if not checkpoints.steps():
            raise ConfigError(f"DIR: expected a folder of checkpoints, got none in {directory}")
        yield checkpoints
    finally:
        checkpoints.close()


def _described(checkpoints: Checkpoints, step: int) -> str:
    """Return the line of a step: bytes, when, whether it is whole, of what, and its items."""
    path = checkpoints.path(step)
    size, time = _size_and_time(path)
    when = datetime.datetime.fromtimestamp(time).isoformat(" ", "seconds")
    there = sorted(item.name for item in path.iterdir() if item.is_dir())
    try:
        missing = [item for item in checkpoints.items(step) if item not in there]
        whole = f"without {', '.join(missing)}" if missing else "complete"
        what = f"{whole}  {_written_by(checkpoints.read_json(step, 'meta'))}"
    except StepError as error:
        what = error.reason
    return f"step {step}  {size:,} bytes  {when}  {what}  [{' '.join(there)}]"


def _written_by(meta: dict[str, Any]) -> str:
    """Return model and version out of an item `meta`."""
    config = meta.get("config", {})
    model = config.get("model", {})
    name = " ".join(str(model[key]) for key in ("name", "size") if key in model)
    return f"{config.get('task', 'pretrain')} {name}, mae_jax {meta.get('mae_jax')}"


def _size_and_time(path: epath.Path) -> tuple[int, int]:
    """Return the bytes of all files below a folder, and when the newest was written.

    Not the time of the folder: on a bucket it has none.
    """
    folders, total, newest = [path], 0, 0
    while folders:
        for child in folders.pop().iterdir():
            if child.is_dir():
                folders.append(child)
                continue
            facts = child.stat()
            total, newest = total + facts.length, max(newest, facts.mtime)
    return total, newest
