"""What the compiled step must not have in it: costs that no test of numbers would see."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp

from mae_jax import build
from mae_jax import config as configs
from mae_jax.train import sharding
from mae_jax.train.checkpoint import abstract_state
from tests.helpers import SHRINK


def lowered(name: str, rows: int, data: int = 1, **fields: str) -> jax.stages.Lowered:
    """Return the step of a config, traced, on the first `data` devices."""
    config = configs.load_config(name, {"batch_size": str(rows), **fields})
    task = build.build_task(config, build.build_model(config))
    training = build.build_training(config, task, build.build_optimizer(config))
    mesh = sharding.make_mesh(data, 1, jax.devices()[:data])
    shapes = jax.eval_shape(functools.partial(training.init, 0))
    placed = sharding.state_sharding(shapes, mesh)
    by_row = sharding.batch_sharding(mesh)
    step = jax.jit(
        functools.partial(training.step, schedule=lambda step: jnp.float32(1e-3)),
        in_shardings=(placed, by_row),
        out_shardings=(placed, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return step.lower(abstract_state(shapes, placed), build.batch_of(task.module, rows, by_row))


def test_devices_exchange_gradients_and_no_activations():
    """Under data parallelism sums are all that is exchanged."""
    shrink = {k: v for k, v in SHRINK.items() if k.startswith("model.")}
    text = lowered("demo", 16, data=8, **shrink).compile().as_text()
    assert len(re.findall(r" all-reduce\(| all-reduce-start\(", text)) > 0  # the test can tell
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {collective}(" not in text, collective


def test_masking_costs_no_scatter_in_the_backward_pass():
    text = lowered("vit_b", 2).as_text()
    assert "stablehlo.gather" in text
    assert "stablehlo.scatter" not in text
