"""Real steps of ViT-H/14 at 224 pixels, full size, as a program; prints what they gave as JSON."""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from typing import Any

# One image, at the rate of 4096. The first step has the rate 0, the second that of the peak.
PEAK = 2.4e-3
OVERRIDES = {
    "batch_size": "1",
    "epochs": "4.0",
    "optimizer.warmup_epochs": "1.0",
    "optimizer.base_learning_rate": str(PEAK * 256),
}


def take_steps() -> dict[str, Any]:
    """Return what two steps from fresh parameters give, by name."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mae_jax import build
    from mae_jax.config import load_config
    from mae_jax.train.optimizer import path_name
    from mae_jax.train.state import TrainState
    from mae_jax.train.step import train_step
    from mae_jax.types import Params, Rng, Stream

    config = load_config("vit_h", OVERRIDES)
    task = build.build_task(config, build.build_model(config))
    optimizer = build.build_optimizer(config)
    schedule, _ = build.build_schedule(config, num_examples=1)
    shape = (1, *config.data.image_size, config.data.channels)
    batch = {"image": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}

    def init() -> TrainState:
        key = Rng(jax.random.key(config.seed), 0).key(Stream.INIT)
        return TrainState.create(*task.init(key, batch), optimizer)

    step_fn = jax.jit(
        functools.partial(
            train_step, task=task, optimizer=optimizer, schedule=schedule, seed=config.seed
        ),
        donate_argnums=0,
    )
    state = jax.jit(init)()
    rows, seconds = [], []
    for _ in range(2):
        start = time.perf_counter()
        state, metrics = step_fn(state, batch)
        rows.append({name: float(value) for name, value in metrics.items()})
        seconds.append(time.perf_counter() - start)
    params, step = state.params, int(state.step)
    del state  # the moments give way to the parameters of the start, which are made once more

    @jax.jit
    def largest_moves(params: Params) -> Params:
        return jax.tree.map(lambda p, q: jnp.abs(p - q).max(), params, init().params)

    moves = jax.tree_util.tree_leaves_with_path(largest_moves(params))
    return {
        "step": step,
        "steps": rows,
        "seconds": seconds,
        "count": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "moves": {path_name(path): float(move) for path, move in moves},
        # Kilobytes; on macOS bytes.
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


if __name__ == "__main__":
    print(json.dumps(take_steps()))
