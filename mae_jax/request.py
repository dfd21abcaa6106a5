"""What the command line asks for beside the configuration, and what it is told at the end."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence

FINISHED, STOPPED = 0, 75  # exit statuses


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for beside the configuration.

    Attributes:
      workdir: folder of the run.
      stop_at_step: end there, in the middle of the schedule; None: at its end.
      allow_change: fields that may differ from those the folder was made with.
      argv: the flags as they were given, to be repeated in messages.
      profile_steps: first and last step of a profile; None: none is written.
    """

    workdir: str
    stop_at_step: int | None = None
    allow_change: Sequence[str] = ()
    argv: Sequence[str] = ()
    profile_steps: tuple[int, int] | None = None

    def command(self, *more: str) -> str:
        """Return the command that was given, with flags added or, if given before, replaced."""
        names = tuple(f"{flag.partition('=')[0]}=" for flag in more)
        kept = [flag for flag in self.argv if not flag.startswith(names)]
        return shlex.join([_interpreter(), "-m", "mae_jax.main", *kept, *more])


def _interpreter() -> str:
    """Return how this Python is called from here: by name if on the path, else by its file."""
    # Not by resolving links: every environment's python is a link to the same file.
    if os.path.dirname(shutil.which("python") or "") == os.path.dirname(sys.executable):
        return "python"
    below = os.path.relpath(sys.executable)
    return sys.executable if below.startswith("..") else below
