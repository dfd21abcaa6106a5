"""Ctrl-C and SIGTERM as a wish that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Protocol


class StopRequest:
    """A context in which SIGINT and SIGTERM set a flag; a second SIGINT ends the process at once.

    Attributes:
      name: the signal that came, None while there was none.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wanted(self) -> bool:
        """Return whether to stop now; all processes of a job ask equally often."""
        return self.name is not None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Store(Protocol):
    """Texts by name, which all processes of a job share."""

    def put(self, name: str, text: str) -> None:
        """Set a text; one that is there is replaced."""
        ...

    def get(self, name: str, seconds: float) -> str | None:
        """Return a text as soon as it is there, None if it does not come in time."""
        ...


class SharedStopRequest(StopRequest):
    """A stop request to any process of a job, which all of them meet at the same question.

    A thread of each process waits for the request. When it comes, no process gets an answer from
    `wanted` until it is known how often each has asked; the first question that none has asked yet
    is the one that all answer with yes. No device takes part. JAX has such a thing, for SIGTERM
    alone; Orbax moves its counter from a thread of its own, so that a process may miss the step.

    Args:
      store: of the job.
      index: of this process.
      count: of processes.

    Attributes:
      name: the signal and who got it, None as long as all go on.
    """

    SECONDS = 1.0  # after which a thread that waits looks whether it is to end

    def __init__(self, store: Store, index: int, count: int):
        super().__init__()
        self._store, self._index, self._count = store, index, count
        self._lock = threading.Lock()
        self._asked = 0
        self._last: int | None = None  # the question that is answered with yes
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop request", daemon=True)

    def __enter__(self) -> SharedStopRequest:
        super().__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._leaving.set()
        self._thread.join()

    def wanted(self) -> bool:
        """Return whether to stop now: the same on all processes, which ask equally often."""
        with self._lock:
            self._asked += 1
            return self._last is not None and self._asked >= self._last

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._store.put("stop/request", f"{signal.Signals(number).name} to process {self._index}")

    def _watch(self) -> None:
        name = self._wait("stop/request")
        if name is None:
            return
        with self._lock:
            self._store.put(f"stop/asked/{self._index}", str(self._asked))
            if self._index == 0:
                asked = [self._wait(f"stop/asked/{index}") for index in range(self._count)]
                self._store.put("stop/last", str(max(int(times or 0) for times in asked) + 1))
            last = self._wait("stop/last")
            if last is not None:
                self.name, self._last = name, int(last)

    def _wait(self, name: str) -> str | None:
        """Return a text of the store; None if this process leaves."""
        while not self._leaving.is_set():
            text = self._store.get(name, self.SECONDS)
            if text is not None:
                return text
        return None
