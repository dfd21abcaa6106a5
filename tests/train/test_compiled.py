"""What the compiled step must not have in it: costs that no test of numbers would see."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mae_jax import build
from mae_jax import config as configs
from mae_jax.tools import communication
from mae_jax.train import sharding
from mae_jax.train.checkpoint import abstract_state
from tests.helpers import SHRINK

SMALL = {name: value for name, value in SHRINK.items() if name.startswith("model.")}


def lowered(
    name: str, rows: int, data: int = 1, fsdp: int = 1, **fields: str
) -> jax.stages.Lowered:
    """Return the step of a config, traced, on the first `data` times `fsdp` devices."""
    config = configs.load_config(name, {"batch_size": str(rows), **fields})
    task = build.build_task(config, build.build_model(config))
    training = build.build_training(config, task, build.build_optimizer(config))
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
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


def collectives(text: str) -> Counter[str]:
    """Return the bytes of the arrays that each kind of collective gives, scalars left out."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    sizes: Counter[str] = Counter()
    for shapes, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        for dtype, dimensions in re.findall(r"(\w+)\[([\d,]+)\]", shapes):
            assert dtype == "f32", f"{kind} of {dtype}"
            sizes[kind] += 4 * math.prod(map(int, dimensions.split(",")))
    return sizes


def small_params() -> Any:
    """Return the shapes of the parameters of the step that is compiled here."""
    config = configs.load_config("demo", SMALL)
    task = build.build_task(config, build.build_model(config))
    return jax.eval_shape(lambda: build.initial_variables(config, task, 0))[0]


def test_devices_exchange_gradients_and_no_activations():
    """Under data parallelism sums are all that is exchanged, each gradient once."""
    found = collectives(lowered("demo", 16, data=8, **SMALL).compile().as_text())
    assert found == {"all-reduce": communication.exchanged(small_params(), 1)["all-reduce"]}


@pytest.mark.slow
def test_devices_that_share_parameters_exchange_parameters_and_gradients():
    """On the CPU parameters are gathered once and kept, and a reduce-scatter is an all-reduce."""
    found = collectives(lowered("demo", 16, fsdp=8, **SMALL).compile().as_text())
    expected = communication.exchanged(small_params(), 8)
    assert 0 < expected["all-reduce"] < expected["reduce-scatter"]
    assert found == {
        "all-gather": expected["all-gather"] / communication.GATHERS,
        "all-reduce": expected["all-reduce"] + expected["reduce-scatter"],
    }


def test_masking_costs_no_scatter_in_the_backward_pass():
    text = lowered("vit_b", 2).as_text()
    assert "stablehlo.gather" in text
    assert "stablehlo.scatter" not in text
