"""Every config: built at its real size by shapes alone, and stepped once, shrunk by one helper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import build
from mae_jax import config as configs
from mae_jax.train.state import TrainState
from mae_jax.train.step import train_step
from tests.helpers import SHRINK

SIZES = {  # trainable parameters: with the fixed tables the published totals
    "vit_b": 111_907_840 - 151_296 - 100_864,
    "vit_l": 329_541_888 - 201_728 - 100_864,
    "vit_h": 657_074_508 - 328_960 - 131_584,
    "folder": 111_907_840 - 151_296 - 100_864,
}


def initial_state(config):
    task = build.build_task(config, build.build_model(config))
    optimizer = build.build_optimizer(config)
    images = jnp.zeros((1, *config.data.image_size, config.data.channels), jnp.uint8)
    return (
        task,
        optimizer,
        lambda: TrainState.create(*task.init(jax.random.key(0), {"image": images}), optimizer),
    )


@pytest.mark.parametrize("name", configs.known_configs())
def test_config_builds_at_its_real_size(name):
    config = configs.load_config(name)
    _, _, init = initial_state(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init).params))
    assert count == SIZES.get(name, count)
    assert count > 100_000


@pytest.mark.parametrize("name", configs.known_configs())
def test_config_takes_a_step_when_shrunk(name):
    config = configs.load_config(name, SHRINK)
    task, optimizer, init = initial_state(config)
    schedule, total = build.build_schedule(config, num_examples=160)
    assert total == 20
    step = functools.partial(
        train_step, task=task, optimizer=optimizer, schedule=schedule, seed=config.seed
    )
    shape = (2, *config.data.image_size, config.data.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    state = jax.jit(init)()
    before = state.params
    for _ in range(2):  # the rate of the first step is 0
        state, metrics = jax.jit(step)(state, {"image": images})
    assert np.isfinite(metrics["loss"])
    assert 0.3 < float(metrics["loss"]) < 10
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, state.params)
    assert min(jax.tree.leaves(moved["encoder"]["patch_embed"])) > 0


def test_every_config_says_how_to_run_it():
    for name in configs.known_configs():
        text = configs.find_config(name).read_text()
        assert "python -m mae_jax.main --config=" in text, name
        assert "Source" in text, name
