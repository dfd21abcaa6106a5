"""What it saves that the encoder sees visible units alone: MAE, arXiv 2111.06377, table 2."""

from __future__ import annotations

import argparse
from typing import Any

from mae_jax.errors import ConfigError
from mae_jax.tools import records, step_times

ALL = " model.mask_tokens_in_encoder=True"


def run(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Time configs against the same with all units in the encoder; print a table, return its rows.

    Raises:
      ConfigError: if a config is none, or sees all units already.
    """
    rows = []
    for name in flags.configs:
        for case in (name, name + ALL):
            config = step_times.Case(case, flags.batch_size[0]).config()
            if config.model.get("mask_tokens_in_encoder") is not case.endswith(ALL):
                raise ConfigError(f"{name!r}: expected a config whose encoder sees no mask tokens")
        rows += step_times.measure([name, name + ALL], flags)
    print(f"\n{step_times.heading(rows)}\n\n{records.table(rows, step_times.COLUMNS)}\n")
    for row in rows:
        if row["config"].endswith(ALL) and "time_over_first" in row:
            print(
                f"{row['config'].removesuffix(ALL)}, batch {row['batch_size']}: with all units in"
                f" the encoder a step takes {row['time_over_first']:.2f} times as long, with"
                f" {row['gflop_over_first']:.2f} times the FLOPs"
            )
    return rows
