"""The program with a fault in process 1, which the variable `FAULT` names.

`python -m tests.e2e.faulty --config=NAME ...`, with the flags of the program.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from mae_jax import build, main
from mae_jax.errors import ConfigError

STEP = 7  # whose batch meets it
FAULTS: dict[str, Exception] = {
    "crash": ZeroDivisionError("a fault"),
    "mistake": ConfigError("data.path: expected images, got a fault"),
}


class Spoilt:
    """Batches of which one cannot be had."""

    def __init__(self, batches: Any, error: Exception):
        self._batches, self._error, self._asked = batches, error, 0

    def __next__(self) -> Any:
        self._asked += 1
        if self._asked == STEP:
            raise self._error
        return next(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def spoil(make: Callable[..., Any], error: Exception) -> Callable[..., Spoilt]:
    """Return a maker of batches that does what `make` does, up to one of them."""
    return lambda *args, **kwargs: Spoilt(make(*args, **kwargs), error)


if __name__ == "__main__":
    if os.environ["MAE_JAX_PROCESS_ID"] == "1":
        build.build_batches = spoil(build.build_batches, FAULTS[os.environ["FAULT"]])
    sys.exit(main.main())
