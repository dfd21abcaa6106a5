"""Measuring in turns: who goes first changes from round to round, and ratios are taken within one.

What else a machine does then hits all alike, and what a round slows down it slows down for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

BATCHES = 3  # of synthetic images, in rotation
WARM_UP = 3  # steps that do not count
DOES_NOT_FIT = "does not fit in memory"


def no_memory(error: BaseException) -> bool:
    """Return whether an error, of jax or of PyTorch, says that memory was short."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "can't allocate memory"))
    )


def turn(items: Sequence[Item], number: int) -> list[Item]:
    """Return the order of a round: A B C, then B C A, then C A B, and so on."""
    first = number % len(items) if items else 0
    return [*items[first:], *items[:first]]


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median over the rounds of time over the reference's time in the same round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def spread(times: Sequence[float]) -> float:
    """Return the distance of the slowest round to the fastest, as a share of the median."""
    return (max(times) - min(times)) / statistics.median(times)
