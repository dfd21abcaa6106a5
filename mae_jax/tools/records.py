"""Figures of benchmarks: what they were measured on, as lines of JSON and as tables.

Imports no jax: a program that measures without it says so by what it does not name.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_jax.data.processes import available_cores

Row = Mapping[str, Any]

# Whose versions are named where they are imported.
LIBRARIES = ("jax", "jaxlib", "flax", "torch", "transformers")


def host() -> dict[str, Any]:
    """Return `processor`, `cores` (those this process may use) and `python` (its version)."""
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "python": platform.python_version(),
    }


def environment() -> dict[str, Any]:
    """Return what figures depend on beside the code: device, cores of the host, versions.

    Keys: those of `host`, and of `LIBRARIES` those that are imported; with jax also `device` (its
    kind) and `devices` (how many).
    """
    found = host()
    for name in LIBRARIES:
        if name in sys.modules:
            found[name] = importlib.metadata.version(name)
    if "jax" in sys.modules:
        devices = sys.modules["jax"].devices()
        found |= {"device": devices[0].device_kind, "devices": len(devices)}
    return found


def installed() -> dict[str, str]:
    """Return the versions of those of `LIBRARIES` that are installed, imported or not."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    """Return the name of the host's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    """Return rows as a table in Markdown.

    Args:
      rows: figures by name. One that is None, or not there, is a dash.
      columns: name of a figure -> (title, format), as `{"seconds": ("s a step", ".2f")}`; a column
        of dashes alone is left out. Words are written as they are, whatever the format.
    """

    def cell(row: Row, name: str) -> str:
        value, form = row.get(name), columns[name][1]
        if value is None:
            return "-"
        text = value if isinstance(value, str) else format(value, form)
        return text.replace("|", "\\|")

    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = [[columns[name][0] for name in shown], ["---"] * len(shown)]
    lines += [[cell(row, name) for name in shown] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def append(path: str | Path, rows: Sequence[Row], shared: Row | None = None) -> None:
    """Append rows to a file, a line of JSON each.

    Args:
      path: of the file.
      rows: figures by name.
      shared: what is true of all, unless a row says otherwise; None: the `environment`. Those who
        measure other processes give the `host`: asking jax would take hold of the device.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = environment() if shared is None else shared
    # A program that was killed may have left half a line, which is not to spoil the next one.
    torn = path.exists() and path.read_text()[-1:] not in ("", "\n")
    with path.open("a") as file:
        file.write("\n" if torn else "")
        file.writelines(json.dumps({**shared, **row}) + "\n" for row in rows)


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none if there is no such file; half lines are passed over."""
    path = Path(path).expanduser()
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """Return the last of `rows` that has all these values; None: there is none."""
    for row in reversed(rows):
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None
