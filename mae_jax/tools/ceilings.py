"""What a device can do at best, measured: the rate of a large matrix product, and of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Sides of square matrices: large enough for the rate to have stopped growing.
SIDES = {"cpu": (512, 1024, 2048), "other": (4096, 8192)}
COPIED = {"cpu": 2**26, "other": 2**29}  # bytes, more than a cache holds
REPEATS = {"cpu": 1, "other": 10}  # before the clock is read, so that waiting does not show


class Ceilings:
    """The best rates seen so far.

    Attributes:
      flops: of a matrix product, FLOP/s; 0 before the first `measure`.
      bytes_per_second: of a copy, read and written bytes both counted; 0 if it is not measured.
    """

    def __init__(self, dtype: Any, *, copy: bool = False):
        """Compile products of several sizes.

        Args:
          dtype: of the products.
          copy: measure copies as well.
        """
        kind = "cpu" if jax.default_backend() == "cpu" else "other"
        self.flops, self.bytes_per_second = 0.0, 0.0
        self._repeats = REPEATS[kind]
        self._product = jax.jit(jnp.matmul)
        # Not zeros: some devices are quicker with them.
        self._matrices = [
            jax.random.normal(jax.random.key(0), (side, side), dtype) for side in SIDES[kind]
        ]
        self._negate = jax.jit(jnp.negative)  # a copy itself may be compiled to nothing
        self._copied = jnp.ones(COPIED[kind] // 4, jnp.float32) if copy else None
        self.measure()  # compiles
        self.flops, self.bytes_per_second = 0.0, 0.0

    def measure(self) -> None:
        """Measure once more."""
        for x in self._matrices:
            seconds = self._seconds(self._product, x, x)
            self.flops = max(self.flops, 2 * len(x) ** 3 / seconds)
        if self._copied is not None:
            seconds = self._seconds(self._negate, self._copied)
            self.bytes_per_second = max(self.bytes_per_second, 2 * self._copied.nbytes / seconds)

    def _seconds(self, program: Callable[..., jax.Array], *args: jax.Array) -> float:
        begun = time.perf_counter()
        for _ in range(self._repeats):
            result = program(*args)
        jax.block_until_ready(result)
        return (time.perf_counter() - begun) / self._repeats
