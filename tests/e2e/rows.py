"""Prints digests of what steps of a config see, for one process or each of a job: images, masks.

`python -m tests.e2e.rows --config=NAME --config.FIELD=VALUE ...`, with the flags of the program.
"""

from __future__ import annotations

import hashlib
import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from mae_jax import build, distributed, main
from mae_jax import config as configs
from mae_jax.types import Rng

STEPS = (0, 1, 7)


def digest(array: jax.Array) -> str:
    """Return a digest of a global array, whose rows are in several processes."""
    whole = (
        array
        if array.is_fully_addressable
        else multihost_utils.process_allgather(array, tiled=True)
    )
    return hashlib.sha256(np.ascontiguousarray(whole).tobytes()).hexdigest()[:16]


def run(argv: list[str]) -> None:
    flags, overrides = main.parse(argv)
    config = configs.load_config(flags.config, overrides)
    with distributed.joined(distributed.find_place(flags, os.environ)) as job:
        source, read = build.build_sources(config)[0], build.build_readers(config)[0]
        mesh = build.build_mesh(config)
        task = build.build_task(config, build.build_model(config))

        def hidden(batch: dict[str, jax.Array], step: int) -> jax.Array:
            rng = Rng(jax.random.key(config.seed), step)
            return task.prepare(batch, rng)["plan"].ids_keep

        for step in STEPS:
            batches = build.build_batches(config, source, read, start_step=step, mesh=mesh)
            batch = next(batches)
            batches.close()
            found = digest(batch["image"]), digest(jax.jit(hidden)(batch, step))
            if job.index == 0:
                print("step", step, "images", found[0], "masks", found[1], flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
