"""A process of two that save, and restore what only one of them finds damaged: port, index, folder.

Started by `test_resume.py`; prints the step that was restored, and what is said of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mae_jax.train import sharding
from mae_jax.train.checkpoint import abstract_state
from mae_jax.train.resume import restore_newest
from mae_jax.train.state import TrainState
from tests.train.test_resume import cut_in_half, opened, state_at


def main(port: str, index: int, folder: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, initialization_timeout=60)
    shapes = jax.eval_shape(lambda: state_at(0))
    shardings = sharding.state_sharding(shapes, sharding.make_mesh(1, 4))

    def spread(state: TrainState) -> TrainState:
        return jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i]),
            state,
            shardings,
        )

    with opened(folder) as checkpoints:
        for step in (20, 30):
            checkpoints.save(spread(state_at(step)), data={"next_step": step}, meta={})
            checkpoints.committed(wait=True)
        if index == 0:
            for path in (folder / "30" / "params").glob("ocdbt.process_1/d/*"):
                cut_in_half(path)
        multihost_utils.sync_global_devices("damaged")
        for _ in range(2):
            resumed = restore_newest(checkpoints, abstract_state(shapes, shardings))
            assert resumed is not None
            print("restored", resumed.step, *resumed.notes, flush=True)
            if resumed.step == 20:
                checkpoints.save(spread(state_at(30)), data={"next_step": 30}, meta={})
                checkpoints.committed(wait=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
