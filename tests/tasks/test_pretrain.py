"""Pre-training as a task: normalisation, masks and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.nn import masking
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.types import Batch, MaskPlan, Rng, Stream

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def draw_batch(count: int = 4, seed: int = 0) -> Batch:
    """Return images with structure larger than a patch, and labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (count, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    fine = rng.integers(0, 56, (count, 32, 32, 3))
    return {
        "image": jnp.asarray(coarse + fine, jnp.uint8),
        "label": jnp.arange(count, dtype=jnp.int32),
    }


def rng_at(step: int, seed: int = 5) -> Rng:
    return Rng(jax.random.key(seed), jnp.asarray(step, jnp.int32))


@pytest.fixture(scope="module")
def task(tiny_mae) -> PretrainTask:
    return PretrainTask(tiny_mae(depth=1), MEAN, STD)


@pytest.fixture(scope="module")
def params(task) -> Any:
    return jax.jit(lambda: task.init(jax.random.key(0), draw_batch())[0])()


@pytest.fixture(scope="module")
def loss_fn(task) -> Any:
    return jax.jit(lambda params, batch, rng: task.loss(params, {}, batch, rng)[0])


class Recorder:
    """A method that remembers its last plan and predictions."""

    def __init__(self, method: Any):
        self._method = method

    def plan(self, *args: Any) -> MaskPlan:
        self.last_plan = self._method.plan(*args)
        return self.last_plan

    def prepare(self, batch: Batch) -> Batch:
        return self._method.prepare(batch)

    def apply(self, *args: Any, **fields: Any) -> Any:
        self.last_predictions = self._method.apply(*args, **fields)
        return self.last_predictions


def watched_loss(method: Any) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Return (params, batch, rng) -> loss, the places it hid and what it predicted there."""

    def watch(params: Any, batch: Batch, rng: Rng) -> tuple[jax.Array, jax.Array, jax.Array]:
        recorder = Recorder(method)
        loss, _ = PretrainTask(recorder, MEAN, STD).loss(params, {}, batch, rng)
        return loss, recorder.last_plan.ids_mask, recorder.last_predictions["image"].output

    return jax.jit(watch)


def test_fresh_parameters_are_float32_without_extra_state(task):
    params, extra = jax.eval_shape(lambda: task.init(jax.random.key(0), draw_batch(1)))
    assert params.keys() == {"encoder", "decoder"}
    assert extra == {}
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_mean_squared_error_of_hidden_patches(tiny_mae, norm_pix_loss, params):
    batch = draw_batch()
    watch = watched_loss(tiny_mae(depth=1, norm_pix_loss=norm_pix_loss))
    loss, ids, output = map(np.asarray, watch(params, batch, rng_at(3)))
    pixels = (np.asarray(batch["image"], np.float64) / 255 - MEAN) / STD
    errors = []
    for b in range(4):
        for m, place in enumerate(ids[b].tolist()):
            row, column = divmod(place, 4)
            patch = pixels[b, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].reshape(-1)
            if norm_pix_loss:
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            errors.append(np.mean((output[b, m] - patch) ** 2))
    assert len(errors) == 4 * 12
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-5)


def test_masks_are_drawn_from_seed_and_step_and_nothing_else(task, params):
    watch = watched_loss(task.method)

    def masks(rng: Rng, batch: Batch, params: Any = params) -> list[list[int]]:
        return watch(params, batch, rng)[1].tolist()

    first = masks(rng_at(3), draw_batch())
    assert masks(rng_at(3), draw_batch(seed=9), jax.tree.map(lambda x: x + 0.1, params)) == first
    assert masks(rng_at(4), draw_batch()) != first
    assert masks(rng_at(3, seed=6), draw_batch()) != first
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), Stream.MASK), 3)
    assert task.method.plan(key, 4).ids_mask.tolist() == first


def test_task_has_no_metrics_and_leaves_extra_state_alone(task, params):
    extra = {"mean": jnp.ones(3)}
    _, (metrics, new) = jax.eval_shape(lambda: task.loss(params, extra, draw_batch(), rng_at(0)))
    assert metrics == {}
    assert new.keys() == {"mean"}
    assert new["mean"].shape == (3,)


def test_loss_repeats_bit_for_bit_and_differs_between_steps(loss_fn, params):
    losses = [float(loss_fn(params, draw_batch(), rng_at(step))) for step in (3, 3, 4)]
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-4


def test_loss_of_a_fresh_model_is_near_that_of_predicting_nothing(loss_fn, params):
    # 1 and the variance of a fresh head's output, 16 inputs of variance 1 under Xavier's weights.
    expected = 1.0 + 16 * 2 / (16 + 192)
    assert float(loss_fn(params, draw_batch(), rng_at(0))) == pytest.approx(expected, abs=0.15)


def test_loss_of_predicting_zeros_is_the_biased_variance_of_a_normalised_patch(loss_fn, params):
    silent = dict(params) | {"decoder": dict(params["decoder"])}
    silent["decoder"]["pred"] = jax.tree.map(jnp.zeros_like, params["decoder"]["pred"])
    loss = float(loss_fn(silent, draw_batch(), rng_at(0)))
    assert loss == pytest.approx(191 / 192, rel=1e-3)


def test_a_caller_decides_the_masks_by_noise_or_by_a_plan(task, params, loss_fn):
    mask = np.zeros((4, 16), int)
    for row in range(4):
        mask[row, row : row + 12] = 1  # 12 hidden in each, elsewhere in each
    of_plan = {**draw_batch(), "plan": masking.plan_of_mask(mask)}
    noise = mask + np.linspace(0.0, 0.5, 16)[None]  # kept and hidden ones in raster order
    of_noise = {**draw_batch(), "noise": jnp.asarray(noise, jnp.float32)}
    for batch in (of_plan, of_noise):
        plan = task.prepare(batch, rng_at(3))["plan"]
        np.testing.assert_array_equal(masking.mask_of(plan), mask)
    losses = [float(loss_fn(params, batch, rng_at(3))) for batch in (of_plan, of_noise)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - float(loss_fn(params, draw_batch(), rng_at(3)))) > 1e-4


def test_a_plan_of_another_grid_or_batch_is_refused(task, params):
    for rows, count in ((4, 12), (3, 16), (4, 25)):
        mask = np.arange(count)[None].repeat(rows, axis=0) % 4 != 0
        batch = {**draw_batch(), "plan": masking.plan_of_mask(mask)}
        with pytest.raises(ValueError, match=r"expected a plan of 16 units in 1 or 4 rows, got"):
            task.loss(params, {}, batch, rng_at(0))
