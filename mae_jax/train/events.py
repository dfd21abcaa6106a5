"""TensorBoard's file of events, written by the thread that calls."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np


class EventFile:
    """The events of a run, in a local folder that TensorBoard is pointed at.

    tensorboardX's own `SummaryWriter` hands events to a thread. Of an error there nobody hears,
    and once the queue of a thread that has ended is full, a run would wait for ever. Here every
    method raises `OSError` if the file cannot be written.

    Args:
      folder: is there.
      first_step: the step from which the run goes on; TensorBoard drops what it has of later ones.
    """

    def __init__(self, folder: str | os.PathLike[str], first_step: int = 0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._file = EventsWriter(os.path.join(folder, "events"))
        self._write(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, step: int, name: str, value: float) -> None:
        """Add a number."""
        from tensorboardX.summary import scalar

        self._write(step, summary=scalar(name, value))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Add a picture, uint8 [H, W, 3]."""
        from tensorboardX.summary import image

        self._write(step, summary=image(name, picture, dataformats="HWC"))

    def flush(self) -> None:
        """Bring everything to disk."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **content))
