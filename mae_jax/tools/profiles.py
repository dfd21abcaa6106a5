"""What a step spends its time on, from a trace of the profiler."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from mae_jax.tools import records

STEPS = 3
SHOWN = 10
# These hold operations that are listed themselves.
OUTER = ("conditional", "cond", "while", "call")


def profile(take: Callable[[int], None], folder: str) -> list[dict[str, Any]]:
    """Trace some steps into a folder; return the operations that took most of the time.

    Args:
      take: takes a number of steps, and waits for them.
      folder: for the trace, which TensorBoard and Perfetto read.

    Returns:
      `operation` (its name without a number), `milliseconds` a step, `share` of the sum over all
      operations, and `count` a step, the longest first.
    """
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(str(path)):
        take(STEPS)
    newest = max(path.rglob("*.xplane.pb"), key=lambda found: found.stat().st_mtime)
    return summed(events(jax.profiler.ProfileData.from_file(str(newest))), STEPS)[:SHOWN]


def table(rows: Sequence[records.Row]) -> str:
    """Return the operations of `profile` as a table in Markdown."""
    columns = {
        "operation": ("operation", ""),
        "milliseconds": ("ms a step", ".2f"),
        "share": ("share", ".1%"),
        "count": ("times a step", ".0f"),
    }
    return records.table(rows, columns)


def events(data: Any) -> Iterator[tuple[str, float]]:
    """Yield (operation, nanoseconds) of all that ran: on the devices, or on the CPU if it is one.

    Args:
      data: a `jax.profiler.ProfileData`.
    """
    on_devices = [
        event
        for plane in data.planes
        if plane.name.startswith("/device:")
        for line in _working_lines(list(plane.lines))
        for event in line.events
    ]
    if on_devices:
        yield from ((event.name, event.duration_ns) for event in on_devices)
        return
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if "hlo_op" in dict(event.stats):
                    yield event.name, event.duration_ns


def _working_lines(lines: list[Any]) -> list[Any]:
    """Return the lines of a device whose events do not overlap with those of others."""
    operations = [line for line in lines if line.name == "XLA Ops"]  # of a TPU
    return operations or [line for line in lines if line.name.startswith("Stream")]  # of a GPU


def summed(found: Iterable[tuple[str, float]], steps: int) -> list[dict[str, Any]]:
    """Return operations of one name together, the longest first; see `profile`."""
    total: dict[str, float] = collections.defaultdict(float)
    count: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in found:
        kind = re.sub(r"([._]\d+)+$", "", name.removeprefix("%").split(" = ")[0])
        if kind not in OUTER:
            total[kind] += nanoseconds
            count[kind] += 1
    everything = max(1, sum(total.values()))
    return [
        {
            "operation": kind,
            "milliseconds": nanoseconds / 1e6 / steps,
            "share": nanoseconds / everything,
            "count": count[kind] / steps,
        }
        for kind, nanoseconds in sorted(total.items(), key=lambda item: -item[1])
    ]
