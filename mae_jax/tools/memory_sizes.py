"""How much memory a step needs, as compiled: nothing runs, so that any size can be asked for."""

from __future__ import annotations

import argparse
from typing import Any

from mae_jax.errors import ConfigError
from mae_jax.tools import records, step_times

COLUMNS = {
    "config": ("config", ""),
    "least_mib": ("temporary MiB, least batch", ".0f"),
    "most_mib": ("largest batch", ".0f"),
    "image_mib": ("MiB an image", ".1f"),
    "image_over_first": ("/ first", ".3f"),
    "compile_seconds": ("compiled in s", ".0f"),
}


def run(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile the steps of configs at two batch sizes; print a table and return its rows.

    What a larger batch needs more, by image, are activations; the rest, gradients above all, is
    there once.

    Raises:
      ConfigError: if a config is none, or there are not two batch sizes.
    """
    least, most = min(flags.batch_size), max(flags.batch_size)
    if least == most or len(flags.batch_size) != 2:
        raise ConfigError(
            "--batch_size: expected two, whose difference tells what an image needs, got"
            f" {','.join(map(str, flags.batch_size))}"
        )
    cases = [[step_times.Case(name, size) for size in (least, most)] for name in flags.configs]
    for pair in cases:
        pair[1].config()  # mistakes come before any work
    rows: list[dict[str, Any]] = []
    for pair in cases:
        row = _row(*pair)
        row["image_over_first"] = row["image_mib"] / (rows[0] if rows else row)["image_mib"]
        rows.append(row)
        if flags.json:
            records.append(flags.json, [row])
    print(f"\nbatch {least} and {most}; the state is not counted\n\n{records.table(rows, COLUMNS)}")
    return rows


def _row(least: step_times.Case, most: step_times.Case) -> dict[str, Any]:
    sizes, seconds = [], 0.0
    for case in (least, most):
        compiled, taken = step_times.program(case).compile()
        memory = compiled.memory_analysis()
        if memory is None:
            raise ConfigError("bench memory: this device does not tell what a program needs")
        sizes.append(memory.temp_size_in_bytes / 2**20)
        seconds += taken
    return {
        **records.environment(),
        "what": "memory",
        "config": least.name,
        "batch_sizes": [least.batch_size, most.batch_size],
        "least_mib": sizes[0],
        "most_mib": sizes[1],
        "image_mib": (sizes[1] - sizes[0]) / (most.batch_size - least.batch_size),
        "compile_seconds": seconds,
    }
