"""Where a run's output goes: terminal, `metrics.jsonl`, TensorBoard, `pictures/`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping

import numpy as np
import tqdm
from etils import epath

from mae_jax.files import encode_picture, is_local, write_text, writing
from mae_jax.train.events import EventFile
from mae_jax.train.heartbeat import Heartbeat
from mae_jax.train.metrics import format_seconds


class Console:
    """Lines for people, and a progress bar where there is a terminal.

    Args:
      total_steps: of the whole run.
      first_step: where this process starts.
      quiet: print nothing (processes other than the first).
    """

    def __init__(self, total_steps: int, first_step: int = 0, *, quiet: bool = False):
        self._quiet = quiet
        self._total = total_steps
        self._first = first_step
        self._has_bar = not quiet and sys.stderr.isatty()
        self._bar: tqdm.tqdm | None = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def advance(self, step: int) -> None:
        """Move the bar, which appears with the first step."""
        if self._has_bar and self._bar is None:
            self._bar = tqdm.tqdm(
                total=self._total,
                initial=self._first,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
                dynamic_ncols=True,
                leave=False,
            )
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def progress(self, step: int, scalars: Mapping[str, float], seconds_left: float) -> None:
        """Show a step's loss, rate, images/s and the time left."""
        shown = (
            f"loss {scalars['train/loss']:.4f}  lr {scalars['train/learning_rate']:.2e}"
            f"  {scalars['train/images_per_second']:.0f} images/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"{shown}  {format_seconds(seconds_left)} left")
        else:
            self.say(f"step {step}/{self._total}  {shown}  {format_seconds(seconds_left)} left")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


class RunWriter:
    """Writes scalars and pictures of a run into its folder.

    Every method but `close` may raise `StopError`.

    `metrics.jsonl` has one object a line, `step` and scalars; lines after `first_step`, which a
    killed run may have left, are dropped, so that a resumed run reads as one.

    Args:
      workdir: the run's folder; on a bucket the file is rewritten at each `flush`.
      first_step: the step from which the run goes on.
      active: False makes every method do nothing (processes other than the first).

    Attributes:
      heartbeat: by which others see that the run goes on.
    """

    def __init__(self, workdir: epath.PathLike, *, first_step: int = 0, active: bool = True):
        self._active = active
        self._workdir = epath.Path(workdir)
        if active:
            with writing(self._workdir):
                self._workdir.mkdir(parents=True, exist_ok=True)
        self.heartbeat = Heartbeat(self._workdir, first_step, active=active)
        if not active:
            return
        self._is_local = is_local(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._lines = _lines_up_to(self._path, first_step)
        with writing(self._path):
            write_text(self._path, "".join(self._lines))
        self._events = None
        if self._is_local:
            with writing(self._workdir):
                self._events = EventFile(self._workdir, first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of `metrics.jsonl`."""
        if not self._active:
            return
        line = json.dumps({"step": step} | {k: _json_number(v) for k, v in values.items()}) + "\n"
        self._lines.append(line)
        if self._is_local:
            with writing(self._path), self._path.open("a") as file:
                file.write(line)
        if self._events is not None:
            with writing(self._workdir):
                for name, value in values.items():
                    self._events.scalar(step, name, value)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3], as `pictures/step_N.png` (`NAME_step_N` if named).

        A film, uint8 [F, H, W, 3], as `step_N.gif`.
        """
        if not self._active:
            return
        encoded, suffix = encode_picture(image)
        prefix = "" if name == "pictures" else f"{name}_"
        folder = self._workdir / "pictures"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{prefix}step_{step}{suffix}").write_bytes(encoded)
        if self._events is not None and image.ndim == 3:
            with writing(self._workdir):
                self._events.image(step, name, image)

    def table(self, step: int, name: str, text: str) -> None:
        """Write a table as `tables/NAME_step_N.csv`."""
        if not self._active:
            return
        folder = self._workdir / "tables"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}_step_{step}.csv").write_text(text)

    def flush(self) -> None:
        """Bring everything to disk."""
        if not self._active:
            return
        with writing(self._workdir):
            if not self._is_local:
                write_text(self._path, "".join(self._lines))
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Close what is open, without a word: whoever wants to know has called `flush`."""
        if self._active and self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
    """Return the whole lines of a metrics file that belong to steps up to `step`."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line cut by a kill
            continue
        if row["step"] <= step and step > 0:
            kept.append(line + "\n")
    return kept


def _json_number(value: float) -> float | None:
    """Return a float that strict JSON readers take: null for NaN and infinities."""
    return float(value) if np.isfinite(value) else None
