"""What happens to a run whose numbers go wrong: the real step, loop and checkpoints together."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.pretrain import mae
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train import loop, sharding
from mae_jax.train.checkpoint import Checkpoints, abstract_state
from mae_jax.train.loop import Cadence, NonFiniteError
from mae_jax.train.metrics import Throughput
from mae_jax.train.optimizer import adamw
from mae_jax.train.signals import StopRequest
from mae_jax.train.state import TrainState
from mae_jax.train.step import train_step
from mae_jax.train.writers import Console
from tests.train.test_loop import FakeWriter
from tests.weights import quick_jit

OPTIMIZER = adamw(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
STEPS = 12


class Batches:
    """Images of step n (from 1); float32, so that one pixel of some steps can be infinite."""

    def __init__(self, first: int, bad_steps: set[int]):
        self.step = first
        self.bad_steps = bad_steps

    def __next__(self) -> dict[str, jax.Array]:
        self.step += 1
        pixels = np.random.default_rng(self.step).uniform(0, 255, (4, 32, 32, 3))
        if self.step in self.bad_steps:
            pixels[1, 5, 6, 2] = np.inf
        return {"image": jnp.asarray(pixels, jnp.float32)}

    def scalars(self) -> dict[str, float]:
        return {}


class Program:
    """A tiny model, its compiled step, and a way to train with it into a folder."""

    def __init__(self, model: mae.MaskedAutoencoder):
        self.task = PretrainTask(model, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        self.step_fn = quick_jit(
            functools.partial(
                train_step,
                task=self.task,
                optimizer=OPTIMIZER,
                schedule=lambda step: 1e-3 + 0.0 * step,
                seed=0,
                ema_decay=0.9,
            )
        )
        self.fresh = quick_jit(self.init)()

    def init(self) -> TrainState:
        batch = {"image": jnp.zeros((1, 32, 32, 3))}
        init = self.task.init(jax.random.key(0), batch)
        return TrainState.create(*init, OPTIMIZER, averaged=True)

    def train(
        self, folder: Path, bad_steps: set[int], last_step: int = STEPS
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """Train from the newest checkpoint to a step; returns the state saved and the rows."""
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            first = checkpoints.latest_step() or 0
            writer = FakeWriter()
            loop.train(
                checkpoints.restore(first, self.target()) if first else self.fresh,
                self.step_fn,
                Batches(first, bad_steps),
                Cadence(
                    STEPS, last_step, log_every=1, eval_every=0, save_every=4, max_nonfinite_steps=5
                ),
                evaluators=[],
                checkpoints=checkpoints,
                save_items=lambda step: {"data": {}, "meta": {}},
                writer=writer,
                console=Console(STEPS, first),
                throughput=Throughput(4, 1, 1.0),
                stop=StopRequest(),
            )
        return self.newest(folder), writer.rows

    def newest(self, folder: Path) -> TrainState:
        with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
            return checkpoints.restore(checkpoints.latest_step(), self.target())

    def target(self) -> TrainState:
        return abstract_state(self.fresh, sharding.shardings_of(self.fresh))


@pytest.fixture(scope="module")
def program(tiny_mae) -> Program:
    return Program(tiny_mae(depth=1))


def assert_finite(state: TrainState) -> None:
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()


def counts(state: TrainState) -> tuple[int, int]:
    return int(state.counters.nonfinite_steps), int(state.counters.nonfinite_in_a_row)


@pytest.mark.parametrize("bad_steps", [{7}, {7, 8, 9}])
def test_run_goes_on_after_some_infinite_steps(program, tmp_path, bad_steps, capsys):
    state, rows = program.train(tmp_path, bad_steps)
    assert_finite(state)
    assert counts(state) == (len(bad_steps), 0)
    by_step = {row["step"]: row for row in rows}
    for step in range(1, STEPS + 1):
        assert np.isfinite(by_step[step]["train/loss"]) == (step not in bad_steps)
        so_far = sum(bad <= step for bad in bad_steps)
        assert by_step[step]["train/nonfinite_steps"] == so_far
    said = capsys.readouterr().out
    assert said.count("loss or gradient not finite, update skipped") == len(bad_steps)
    assert "step 7: loss" in said


def test_infinite_pixel_on_one_device_skips_the_update_on_all(program):
    """As of one process: each holds a row, and one of them is bad."""
    mesh = sharding.make_mesh(8, 1)
    state = jax.device_put(program.fresh, sharding.replicated(mesh))
    pixels = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype(np.float32)
    pixels[5, 5, 6, 2] = np.inf
    batch = sharding.put_batch({"image": pixels}, sharding.batch_sharding(mesh))
    after, _ = program.step_fn(state, batch)
    assert int(after.step) == 1
    for before, leaf in zip(
        jax.tree.leaves((state.params, state.opt_state, state.ema)),
        jax.tree.leaves((after.params, after.opt_state, after.ema)),
        strict=True,
    ):
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(before).tobytes()
    for shard in after.counters.nonfinite_steps.addressable_shards:
        assert int(shard.data) == 1


@pytest.mark.slow
def test_counters_are_those_of_the_whole_run_after_a_resume(program, tmp_path):
    whole, _ = program.train(tmp_path / "whole", {7, 8, 9})
    first, _ = program.train(tmp_path / "parts", {7, 8, 9}, last_step=8)
    assert counts(first) == (2, 2)
    second, rows = program.train(tmp_path / "parts", {7, 8, 9})
    assert rows[0]["step"] == 9
    assert rows[0]["train/nonfinite_steps"] == 3.0
    assert counts(second) == counts(whole) == (3, 0)
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_run_that_stays_infinite_ends_and_what_was_saved_is_sound(program, tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        program.train(tmp_path, set(range(7, 100)))
    assert str(caught.value) == (
        "loss or gradient not finite in 5 steps in a row, the last step 11; newest checkpoint: 8"
    )
    state = program.newest(tmp_path)
    assert_finite(state)
    assert counts(state) == (2, 2)
    # The third to fifth come before a resumed run may end: the row of them is not begun anew.
    with pytest.raises(NonFiniteError, match=r"in 5 steps in a row, the last step 11;"):
        program.train(tmp_path, set(range(7, 100)))


@pytest.mark.slow
def test_guard_needs_next_to_no_memory():
    """At most 5 % of the state, once activations are larger than the gradients.

    With smaller batches it needs up to the size of the gradients (a third of the state), for no
    update may begin before the last gradient is known to be finite.
    """
    model = mae.make(
        size="vit_s", image_size=(32, 32), patch_size=8, embed_dim=192, depth=3, num_heads=3,
        decoder_embed_dim=128, decoder_depth=1, decoder_num_heads=4,
    )  # fmt: skip
    task = PretrainTask(model, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))

    def init() -> TrainState:
        batch = {"image": jnp.zeros((1, 32, 32, 3), jnp.uint8)}
        return TrainState.create(*task.init(jax.random.key(0), batch), OPTIMIZER)

    shapes = jax.eval_shape(init)
    batch = {"image": jax.ShapeDtypeStruct((32, 32, 32, 3), np.uint8)}

    def needed(choose: Any) -> int:
        step = functools.partial(  # a new one each time, for what is traced is remembered by it
            train_step, task=task, optimizer=OPTIMIZER, schedule=lambda s: 1e-3 + 0.0 * s, seed=0
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, "cond", choose)
            compiled = jax.jit(step, donate_argnums=0).lower(shapes, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    unguarded = needed(lambda finite, update, skip: update())
    by_cond = (needed(jax.lax.cond) - unguarded) / state
    by_where = (
        needed(lambda ok, a, b: jax.tree.map(lambda x, y: jnp.where(ok, x, y), a(), b()))
        - unguarded
    ) / state
    print(f"the guard needs {by_cond:.1%} of the state; a where over its leaves {by_where:.1%}")
    assert by_cond <= 0.05 < by_where
