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
from mae_jax.train import compiler, sharding
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
    step = functools.partial(training.step, schedule=lambda step: jnp.float32(1e-3))
    batch = build.batch_of(task.module, rows, sharding.batch_sharding(mesh))
    return compiler.lower_step(step, abstract_state(shapes, placed), batch)


def collectives(text: str) -> Counter[str]:
    """Return the bytes of the arrays that each kind of collective gives, scalars left out."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    sizes: Counter[str] = Counter()
    for shapes, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        for dtype, dimensions in re.findall(r"(\w+)\[([\d,]+)\]", shapes):
            assert dtype == "f32", f"{kind} of {dtype}"
            sizes[kind] += 4 * math.prod(map(int, dimensions.split(",")))
    return sizes


def params_of(name: str, **fields: str) -> Any:
    """Return the shapes of the parameters of a config."""
    config = configs.load_config(name, fields)
    task = build.build_task(config, build.build_model(config))
    return jax.eval_shape(lambda: build.initial_variables(config, task, 0))[0]


def test_devices_exchange_gradients_and_no_activations():
    """Under data parallelism sums are all that is exchanged, each gradient once."""
    found = collectives(lowered("demo", 16, data=8, **SMALL).compile().as_text())
    params = params_of("demo", **SMALL)
    assert found == {"all-reduce": communication.exchanged(params, 1)["all-reduce"]}


def of_spread_parameters(params: Any, fsdp: int) -> dict[str, float]:
    """Return the collectives of a step that is compiled for a CPU, in bytes.

    There parameters are gathered once and kept, and a reduce-scatter is an all-reduce.
    """
    expected = communication.exchanged(params, fsdp)
    assert 0 < expected["all-reduce"] < expected["reduce-scatter"]
    return {
        "all-gather": expected["all-gather"] / communication.GATHERS,
        "all-reduce": expected["all-reduce"] + expected["reduce-scatter"],
    }


ONE_BLOCK = {"model.depth": "1", "model.decoder_depth": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows", "fields"), [("demo", 16, SMALL), ("vit_b", 8, ONE_BLOCK)])
def test_devices_that_share_parameters_exchange_parameters_and_gradients(name, rows, fields):
    """And no activations, though ViT-B's matrices invite XLA to cut the width of the tokens."""
    found = collectives(lowered(name, rows, fsdp=8, **fields).compile().as_text())
    assert found == of_spread_parameters(params_of(name, **fields), 8)


def test_masking_costs_no_scatter_in_the_backward_pass():
    text = lowered("vit_b", 2).as_text()
    assert "stablehlo.gather" in text
    assert "stablehlo.scatter" not in text
