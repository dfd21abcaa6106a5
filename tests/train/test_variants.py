"""One real training step of each thing that a configuration of MAE can ask for."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train.optimizer import adamw
from mae_jax.train.state import TrainState
from mae_jax.train.step import train_step
from tests.weights import quick_jit, random_params

OPTIMIZER = adamw(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
# Fields and the number of patches that they hide. Several at once: each costs a compilation.
VARIANTS: list[tuple[dict[str, Any], int]] = [
    ({"image_size": (64, 96), "channels": 4, "mask_ratio": 0.95, "mask_sampling": "grid"}, 92),
    ({"channels": 1, "norm_pix_loss": False, "mask_ratio": 0.1}, 2),
    ({"mask_sampling": "block", "dtype": jnp.bfloat16}, 12),
    ({"mask_sampling": "block", "mask_ratio": 0.5, "loss_on": "all"}, 8),
    ({"loss_on": "all", "norm_pix_loss": False, "mask_tokens_in_encoder": True}, 12),
    ({"positions": "learned", "use_cls_token": False, "mask_tokens_in_encoder": True}, 12),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "hidden"), VARIANTS, ids=str)
def test_step_of_a_variant_moves_every_parameter_and_stays_finite(tiny_mae, fields, hidden):
    model = tiny_mae(depth=1, **fields)
    size = (*model.unit.image_size, model.unit.channels)
    grey = (0.5,) * model.unit.channels
    task = PretrainTask(model, grey, (0.3,) * model.unit.channels)
    images = np.random.default_rng(0).integers(0, 256, (4, *size), dtype=np.uint8)

    blank = {"image": jnp.zeros((1, *size))}
    plan = model.plan(jax.random.key(0), 1)
    params = random_params(model.init, blank, plan, method="predict")
    before = TrainState.create(params, {}, OPTIMIZER)
    step = functools.partial(
        train_step, task=task, optimizer=OPTIMIZER, schedule=lambda s: 1e-3 + 0.0 * s, seed=0
    )
    after, metrics = quick_jit(step)(before, {"image": jnp.asarray(images)})
    assert plan.ids_mask.shape == (1, hidden)
    # Targets have a variance near 1 (uniform pixels, 1/12 over 0.3^2); random biases add to it.
    assert 0.8 < float(metrics["loss"]) < 4
    assert int(after.counters.nonfinite_steps) == 0
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before.params),
        jax.tree.leaves(after.params),
        strict=True,
    ):
        assert new.dtype == jnp.float32
        assert np.isfinite(new).all()
        assert (np.asarray(new) != np.asarray(old)).any(), jax.tree_util.keystr(path)
