"""One run a folder: a lock with host, process and heartbeat.

Two runs on one folder would both save, and neither would notice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from etils import epath

from mae_jax.errors import ConfigError, StopError
from mae_jax.files import create_text, errors_of, needs_to_write, words_of, write_text

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
WATCH_SECONDS = 1.0  # between two looks at the lock of another host
SETTLE_SECONDS = 0.5  # for the others that take over the same lock at the same time


class FolderLock:
    """A context in which the file `lock` says that this process works in a folder.

    A thread renews its heartbeat. What a killed run has left is taken over: at once on the host
    where the process is gone, when it has been silent for `STALE_SECONDS` elsewhere, which is
    waited for.

    Args:
      folder: made if missing; a bucket works.
      active: False makes everything do nothing (processes other than the first).

    Attributes:
      note: a line on whose lock was taken over; None: nobody's.
    """

    def __init__(self, folder: epath.PathLike, *, active: bool = True):
        self._folder = epath.Path(folder)
        self._path = self._folder / "lock"
        self._active = active
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self.note: str | None = None

    def __enter__(self) -> FolderLock:
        """Take the lock.

        Raises:
          ConfigError: if a run that is alive has it, or the folder cannot be written to.
        """
        if self._active:
            with needs_to_write(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                if not create_text(self._path, self._content()):
                    self._take_over()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lock, if it is still ours."""
        if self._active:
            self._released.set()
            self._thread.join()
            # Where it stays, it is taken over once its heartbeat is old.
            with contextlib.suppress(errors_of(self._path)):
                if self._is_ours(self._read()):
                    self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Refuse if another run has taken the lock, as of a process that was frozen.

        To be called before something is saved.

        Raises:
          ConfigError: if it has.
          StopError: if the lock cannot be read.
        """
        if not self._active:
            return
        try:
            found = self._read()
        except errors_of(self._path) as error:
            raise StopError(f"{self._path} cannot be read: {words_of(error)}") from error
        if not self._is_ours(found):
            whose = f"now that of {_owner(found)}" if found else "gone"
            raise ConfigError(
                f"{self._folder}: expected to be the only run there, but {self._path} is {whose};"
                " nothing more is saved"
            )

    def _take_over(self) -> None:
        found = self._read()
        if found is not None:
            self._wait_for_silence(found)
            self.note = f"took over the lock of {_owner(found)}, which is gone"
        self._write()
        time.sleep(SETTLE_SECONDS)
        self.check()

    def _wait_for_silence(self, found: dict[str, Any]) -> None:
        """Return when the run of a lock is gone; raise if it is alive.

        Of a run on another host that was killed a moment ago, to be started again here, the last
        heartbeat is still young: it is alive if another one comes.
        """
        is_elsewhere = found.get("host") != socket.gethostname()
        if is_elsewhere and _is_alive(found):
            logging.warning("%s: waiting for a sign of %s", self._path, _owner(found))
        while _is_alive(found):
            now = self._read()
            if now is None:
                return  # it has just been released
            if not is_elsewhere or now.get("heartbeat") != found.get("heartbeat"):
                raise ConfigError(
                    f"{self._folder}: expected a folder that no run works in, got one of"
                    f" {_owner(now)}; if that run is gone, remove {self._path}"
                )
            time.sleep(WATCH_SECONDS)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A full disk, say: the next may succeed; what is saved says so by itself.
            with contextlib.suppress(errors_of(self._path)):
                if self._is_ours(self._read()):
                    self._write()

    def _content(self) -> str:
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": _started(os.getpid()),
                "heartbeat": time.time(),
                "token": self._token,
            }
        )

    def _write(self) -> None:
        write_text(self._path, self._content(), beside=self._token)

    def _read(self) -> dict[str, Any] | None:
        """Return what the file says; None: there is none, or none that can be read."""
        for _ in range(2):
            try:
                content = json.loads(self._path.read_text())
                return content if isinstance(content, dict) else None
            except FileNotFoundError:
                return None
            except ValueError:
                time.sleep(0.1)  # made, and about to be written
        return None

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("token") == self._token


def _owner(found: dict[str, Any]) -> str:
    """Return in words whose lock it is."""
    age = time.time() - found.get("heartbeat", 0.0)
    return f"process {found.get('pid')} on {found.get('host')} (heartbeat {age:.0f} s ago)"


def _is_alive(found: dict[str, Any]) -> bool:
    """Return whether the run of a lock can still be alive."""
    # Clocks may differ, and jump: a heartbeat from far in the future is none either.
    if abs(time.time() - found.get("heartbeat", 0.0)) >= STALE_SECONDS:
        return False
    if found.get("host") != socket.gethostname():
        return True
    return _runs(found.get("pid", 0), found.get("started"))


def _runs(pid: int, started: str | None) -> bool:
    """Return whether a process of this host is alive, and not another one with its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return started is None or _started(pid) == started


def _started(pid: int) -> str | None:
    """Return when a process was started, in ticks since the start of the machine.

    None: it is gone (or ended, and its parent has not noticed), or this is not Linux.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
