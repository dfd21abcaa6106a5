"""Prints digests of all arrays of the newest step of a run, as one process or a job restores it.

`python -m tests.e2e.restored --config=NAME --workdir=DIR ...`, with the flags of the program.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from mae_jax import config as configs
from mae_jax import distributed, main
from mae_jax import run as program
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.train.resume import restore_newest


def digests(arrays: Iterable[np.ndarray]) -> list[str]:
    """Return a digest of dtype, shape and bits of each array, in the order of the digests."""
    return sorted(
        hashlib.sha256(f"{x.dtype} {x.shape} ".encode() + x.tobytes()).hexdigest()[:16]
        for x in arrays
    )


def run(argv: list[str]) -> None:
    flags, overrides = main.parse(argv)
    config = configs.load_config(flags.config, overrides)
    with distributed.joined(distributed.find_place(flags, os.environ)):
        checkpoints = Checkpoints(Path(flags.workdir) / "checkpoints", read_only=True)
        resumed = restore_newest(checkpoints, program._build(config).target)
        assert resumed is not None
        # Replicated, so that each process has all of it.
        leaves = (np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(resumed.state))
        print("restored", resumed.step, *digests(leaves), flush=True)
        checkpoints.close()


if __name__ == "__main__":
    run(sys.argv[1:])
