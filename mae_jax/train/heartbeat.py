"""The file by which others see that a run goes on, and by which it counts its restarts."""

from __future__ import annotations

import contextlib
import json
import time

from etils import epath

from mae_jax.files import errors_of, write_text


class Heartbeat:
    """`heartbeat.json` in the folder of a run: `step`, `time` and what restarts have cost.

    `time` is in seconds since 1970, as `time.time()` has it.

    Args:
      folder: of the run.
      first_step: where this process starts; 0: from scratch or from before the first checkpoint.
      active: write nothing if false (processes other than the first).

    Attributes:
      restarts: how often this run was started again, this time included.
      steps_again: that were done before and are done again, to the precision of the file.
    """

    SECONDS = 10.0  # at least between two writes

    def __init__(self, folder: epath.PathLike, first_step: int, *, active: bool = True):
        self._path = epath.Path(folder) / "heartbeat.json"
        self._active = active
        before = self._read() if active else {}
        self.restarts = before.get("restarts", -1) + 1
        lost = max(0, before.get("step", 0) - first_step)
        self.steps_again = before.get("steps_again", 0) + lost
        self._written = float("-inf")
        self.beat(first_step)

    def beat(self, step: int) -> None:
        """Say that a step is done, if it is time to."""
        if not self._active or time.monotonic() - self._written < self.SECONDS:
            return
        self.write(step)

    def write(self, step: int) -> None:
        """Say that a step is done."""
        if not self._active:
            return
        self._written = time.monotonic()
        known = {"step": step, "time": time.time()}
        counts = {"restarts": self.restarts, "steps_again": self.steps_again}
        # Of a full disk the next save has more to say.
        with contextlib.suppress(errors_of(self._path)):
            write_text(self._path, json.dumps(known | counts) + "\n")

    def _read(self) -> dict[str, int]:
        """Return what the last process wrote; nothing if there is no such file, or a broken one."""
        try:
            return json.loads(self._path.read_text())
        except (errors_of(self._path), ValueError):
            return {}
