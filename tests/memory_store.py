"""A store of texts that threads share, in place of the coordinator of JAX."""

from __future__ import annotations

import threading


class Memory:
    """See `mae_jax.train.signals.Store`."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._changed = threading.Condition()

    def put(self, name: str, text: str) -> None:
        with self._changed:
            self.texts[name] = text
            self._changed.notify_all()

    def get(self, name: str, seconds: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: name in self.texts, seconds)
            return self.texts.get(name)

    def wait_for(self, name: str) -> None:
        assert self.get(name, 30) is not None
