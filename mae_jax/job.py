"""The processes that train together, and what they agree on before they do.

What is agreed on goes through the key-value store of JAX's coordinator and not through the devices:
it works before there are any, and a process that gives up can still tell the others why.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mae_jax.errors import ConfigError
from mae_jax.train.signals import SharedStopRequest, StopRequest, Store

FOLDER_SECONDS = 30.0  # a network file system may take that long to show a new file
WAIT_SECONDS = 10.0  # at most, in which Ctrl-C has no effect
SHOWN = 3  # differences in a message


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

    Attributes:
      is_over: whether all rounds are, so that nobody waits for what this process says.
      is_refused: whether the processes have been told to end.
    """

    def __init__(self, store: Store, index: int, count: int):
        self.index, self.count = index, count
        self.is_over = self.is_refused = False
        self._store = store
        self._round = 0

    def agree(self, facts: Mapping[str, Any], *, last: bool = False) -> None:
        """See `Job.agree`."""
        texts = {name: str(value) for name, value in facts.items()}
        self._settle(texts, lambda first: self._differences(first, texts))
        self.is_over = last

    def agree_on_folder(self, folder: epath.PathLike) -> None:
        """See `Job.agree_on_folder`."""
        token = secrets.token_hex(8)
        path = epath.Path(folder)
        written = path / f"shared-{token}"
        if self.index == 0:
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

    def tell(self, error: ConfigError) -> None:
        """Let the others, who wait in the next round or will, end with this error."""
        said = f"process {self.index}: {error}"
        if self.index == 0:
            self._put("refusal", said)
            self._put("facts", "")
        else:
            self._put(f"objection/{self.index}", said)
        self.is_refused = True

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
            self.is_refused = True
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

    def _put(self, name: str, text: str) -> None:
        self._store.put(f"agreement/{self._round}/{name}", text)

    def _get(self, name: str) -> str:
        """Wait for a text: the coordinator ends this process if another one dies."""
        while (text := self._store.get(f"agreement/{self._round}/{name}", WAIT_SECONDS)) is None:
            pass
        return text
