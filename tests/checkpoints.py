"""A checkpoint as a run leaves it, without the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mae_jax import build
from mae_jax import config as configs
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.train.state import TrainState
from tests.helpers import shrunk
from tests.weights import random_params


def tiny_config(config: str = "demo", **fields: str) -> ConfigDict:
    """Return a configuration with a tiny model; "__" in a name stands for the dot."""
    more = {name.replace("__", "."): value for name, value in fields.items()}
    return configs.load_config(config, shrunk(config) | more)


def write_checkpoint(
    workdir: Path,
    config: ConfigDict,
    *,
    steps: Sequence[int] = (3,),
    averaged: bool = False,
    stored: dict[str, Any] | None = None,
) -> Path:
    """Save random parameters of each step, and twice these as their average, as a run would.

    Args:
      workdir: of the run.
      config: of the run.
      steps: of the checkpoints.
      averaged: keep an average.
      stored: in place of the configuration.
    """
    task = build.build_task(config, build.build_model(config))
    images = jnp.zeros((1, *config.data.image_size, config.data.channels), jnp.uint8)

    def init(key: jax.Array, images: jax.Array) -> dict[str, Any]:
        return {"params": task.init(key, {"image": images})[0]}

    checkpoints = Checkpoints(workdir / "checkpoints")
    meta = {"config": stored or config.to_dict(), "mae_jax": "0.0.7"}
    for step in steps:
        params = random_params(init, images, seed=step)
        state = TrainState.create(params, {}, optax.identity(), averaged=averaged)
        if averaged:
            state = state.replace(ema=jax.tree.map(lambda p: 2 * p, params))
        checkpoints.save(state.replace(step=jnp.int32(step)), data={}, meta=meta)
    checkpoints.close()
    return workdir


def write_params(
    folder: Path, config: ConfigDict, params: dict[str, Any], *, extra: Any | None = None
) -> Path:
    """Save parameters alone, some parts of a model, as converted weights are kept."""
    checkpoints = Checkpoints(folder / "checkpoints")
    meta = {"config": config.to_dict(), "mae_jax": "0.0.7", "parts": sorted(params)}
    checkpoints.save_params(params, meta=meta, extra=extra)
    checkpoints.close()
    return folder
