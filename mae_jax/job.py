"""The processes that train together, and what they agree on before they do.

What is agreed on goes through the key-value store of JAX's coordinator and not through the devices:
it works before there are any, and a process that gives up can still tell the others why.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from etils import epath

from mae_jax.errors import ConfigError, StopError
from mae_jax.train.signals import SharedStopRequest, StopRequest, Store

FOLDER_SECONDS = 30.0  # a network file system may take that long to show a new file
WAIT_SECONDS = 10.0  # at most, in which Ctrl-C has no effect
SHOWN = 3  # differences in a message
START_SECONDS = 600.0  # to wait for processes that still build, before all end with a mistake
TRAIN_SECONDS = 5.0  # the same in training, where all meet a mistake at the same step or one alone
LAST_SECONDS = 1.0  # that the coordinator's process leaves the others to end; its end ends them
CRASH, USER_MISTAKE = 1, 2  # exit statuses


class Job:
    """A job of one process, which agrees with itself.

    Attributes:
      index: of this process.
      count: of processes.
    """

    index = 0
    count = 1

    def agree(self, facts: Mapping[str, Any], *, last: bool = False) -> None:
        """Refuse to go on unless all processes have the same facts; returns when all have come.

        Args:
          facts: by the name that a message gives them; compared as text.
          last: whether nothing is agreed on after this.

        Raises:
          ConfigError: names what differs, or what another process has raised; on all processes.
        """

    def agree_on_folder(self, folder: epath.PathLike) -> None:
        """Refuse to go on unless all processes see what the first one writes to a folder.

        Raises:
          ConfigError: as `agree`.
        """

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """End the process, and not just the context, if anything is raised in a job of several.

        On the way out it would wait: for a save that the others never finish, and at the end of
        Python for all of them, which wait for this one. A `ConfigError` ends all processes if they
        can be told or meet it too; everything else this one alone, at once.
        """
        yield

    def stop_request(self) -> StopRequest:
        """Return a stop request for all processes."""
        return StopRequest()


class SeveralProcesses(Job):
    """A job of several processes.

    They agree in rounds: the first one shows what it has, the others say whether they object, and
    it tells all of them what comes of it. So each has few questions, however many there are.

    Args:
      store: texts that all of them share.
      index: of this process.
      count: of processes.
    """

    def __init__(self, store: Store, index: int, count: int):
        self.index, self.count = index, count
        self._store = store
        self._round = 0
        self._is_over = False  # so that nobody waits for what this process says
        self._is_refused = False

    def agree(self, facts: Mapping[str, Any], *, last: bool = False) -> None:
        """See `Job.agree`."""
        texts = {name: str(value) for name, value in facts.items()}
        self._settle(texts, lambda first: self._differences(first, texts))
        self._is_over = last

    def agree_on_folder(self, folder: epath.PathLike) -> None:
        """See `Job.agree_on_folder`."""
        from mae_jax.files import needs_to_write  # and numpy: help comes without

        token = secrets.token_hex(8)
        path = epath.Path(folder)
        written = path / f"shared-{token}"
        if self.index == 0:
            with needs_to_write(folder):
                path.mkdir(parents=True, exist_ok=True)
                written.write_text("Is this folder seen by all processes?\n")

        def objection(first: Mapping[str, str]) -> str:
            deadline = time.monotonic() + FOLDER_SECONDS
            while not (path / f"shared-{first['token']}").exists():
                if time.monotonic() > deadline:
                    return (
                        f"--workdir={folder}: expected a folder that all processes share, but"
                        f" process {self.index} does not see what process 0 writes there"
                    )
                time.sleep(0.2)
            return ""

        try:
            self._settle({"token": token}, objection)
        finally:
            if self.index == 0:
                written.unlink(missing_ok=True)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """See `Job.guard`."""
        try:
            yield
        except ConfigError as error:
            self._end_with_the_others(error)
        except StopError as error:
            self._end(f"stopped: {error}", CRASH)
        except BaseException:
            self._end(f"process {self.index} of {self.count}:\n{traceback.format_exc()}", CRASH)

    def stop_request(self) -> StopRequest:
        """See `Job.stop_request`."""
        return SharedStopRequest(self._store, self.index, self.count)

    def _settle(
        self, facts: Mapping[str, str], objection: Callable[[Mapping[str, str]], str]
    ) -> None:
        """Carry out a round.

        Args:
          facts: of this process.
          objection: facts of the first process -> what this one objects to, "" for nothing.
        """
        if self.index == 0:
            self._put("facts", json.dumps(dict(facts)))
            objections = [self._get(f"objection/{i}") for i in range(1, self.count)]
            self._put("refusal", next(filter(None, objections), ""))
        elif first := self._get("facts"):
            self._put(f"objection/{self.index}", objection(json.loads(first)))
        refusal = self._get("refusal")
        self._round += 1
        if refusal:
            self._is_refused = True  # and all know
            raise ConfigError(refusal)

    def _differences(self, first: Mapping[str, str], own: Mapping[str, str]) -> str:
        """Return the names that differ with both values, "" if none does."""
        different = [
            f"{name}: expected the same on all processes, got {first.get(name, 'nothing')} on"
            f" process 0, {own.get(name, 'nothing')} on process {self.index}"
            for name in sorted(first.keys() | own.keys())
            if first.get(name) != own.get(name)
        ]
        more = len(different) - SHOWN
        return "; ".join(different[:SHOWN]) + (f"; and {more} more" if more > 0 else "")

    def _end_with_the_others(self, error: ConfigError) -> NoReturn:
        """Tell the others if they are to agree on something yet, and end when all have come."""
        if not (self._is_over or self._is_refused):
            self._tell(error)
        deadline = time.monotonic() + (TRAIN_SECONDS if self._is_over else START_SECONDS)
        self._store.put(f"mistake/{self.index}", str(error))
        for index in range(self.count):
            if self._store.get(f"mistake/{index}", max(0.1, deadline - time.monotonic())) is None:
                break
        else:
            time.sleep(LAST_SECONDS if self.index == 0 else 0.0)
        self._end(f"error: {error}", USER_MISTAKE)

    def _tell(self, error: ConfigError) -> None:
        """Let the others, who wait in the next round or will, end with this error."""
        said = f"process {self.index}: {error}"
        if self.index == 0:
            self._put("refusal", said)
            self._put("facts", "")
        else:
            self._put(f"objection/{self.index}", said)

    def _end(self, text: str, status: int) -> NoReturn:
        print(text, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _put(self, name: str, text: str) -> None:
        self._store.put(f"agreement/{self._round}/{name}", text)

    def _get(self, name: str) -> str:
        """Wait for a text: the coordinator ends this process if another one dies."""
        while (text := self._store.get(f"agreement/{self._round}/{name}", WAIT_SECONDS)) is None:
            pass
        return text
