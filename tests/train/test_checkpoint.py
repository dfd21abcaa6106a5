"""Checkpoints: bit for bit what was saved, wherever it is read."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mae_jax.errors import ConfigError
from mae_jax.train import sharding
from mae_jax.train.checkpoint import Checkpoints, SaveError, abstract_state
from mae_jax.train.optimizer import adamw
from mae_jax.train.state import Counters, TrainState

OPTIMIZER = adamw(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
META = {"config": {"seed": 3, "model": {"name": "mae"}, "mean": [0.5, 0.25]}, "jax": "1.2"}


@contextlib.contextmanager
def opened(folder: Path | str, keep: int = 3) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(folder, keep=keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def make_params(width: int = 16) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "encoder": {"block_00": {"kernel": draw(8, width), "bias": draw(width)}},
        "decoder": {"mask_token": draw(1, 1, width)},
    }


def grads_of(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.sin(7.0 * p), params)


@jax.jit
def advance(state: TrainState) -> TrainState:
    direction, opt_state = OPTIMIZER.update(grads_of(state.params), state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - 0.01 * d, state.params, direction)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def make_state(steps: int = 3, params: Any = None) -> TrainState:
    """Return a state no part of which is at its initial value."""
    params = make_params() if params is None else params
    extra = {"batch_stats": {"mean": jnp.arange(4.0)}}
    state = TrainState.create(params, extra, OPTIMIZER)
    counters = Counters(jnp.asarray(5, jnp.int32), jnp.asarray(2, jnp.int32))
    state = state.replace(counters=counters)
    for _ in range(steps):
        state = advance(state)
    return state


def save(checkpoints: Checkpoints, state: TrainState) -> int:
    """Save and wait."""
    step = checkpoints.save(state, data={"next_step": int(state.step)}, meta=META)
    assert checkpoints.committed(wait=True) == [step]
    return step


def target_of(state: TrainState, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    mesh = mesh or sharding.make_mesh(1, 1, jax.devices()[:1])
    shapes = jax.eval_shape(lambda: state)
    return abstract_state(shapes, sharding.state_sharding(shapes, mesh))


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def folders(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()}


def test_restored_state_is_the_saved_one_bit_for_bit(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored = checkpoints.restore(3, target_of(state))
    # Structures are compared too: optax's NamedTuples must not come back as dicts.
    assert_same_bits(restored, state)
    assert int(restored.counters.nonfinite_steps) == 5
    assert int(restored.counters.nonfinite_in_a_row) == 2
    assert int(restored.opt_state[0].count) == int(restored.step) == 3


def test_training_goes_on_from_a_restored_state_as_if_never_stopped(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        restored = checkpoints.restore(3, target_of(state))
    assert_same_bits(advance(advance(restored)), advance(advance(state)))


def test_state_that_has_nothing_untrained_is_restored(tmp_path):
    state = make_state().replace(extra={})
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        assert_same_bits(checkpoints.restore(3, target_of(state)), state)


def test_what_is_saved_is_the_state_at_the_call_though_it_is_donated_right_after(tmp_path):
    # Megabytes, so that writing goes on while the next steps overwrite the memory.
    big = {"kernel": jnp.linspace(-1.0, 1.0, 1_500_000).reshape(1000, 1500)}
    step_fn = jax.jit(advance, donate_argnums=0)
    state = step_fn(step_fn(TrainState.create(big, {}, OPTIMIZER)))
    expected = jax.tree.map(np.array, state)
    with opened(tmp_path) as checkpoints:
        step = checkpoints.save(state, data={}, meta={})
        for _ in range(6):
            before, state = state, step_fn(state)
        assert before.params["kernel"].is_deleted()  # memory is reused indeed
        assert checkpoints.committed(wait=True) == [step]
        restored = checkpoints.restore(step, target_of(state))
    assert_same_bits(restored, expected)
    assert not np.array_equal(state.params["kernel"], expected.params["kernel"])


def test_newest_steps_are_kept(tmp_path):
    state = make_state(steps=0)
    with opened(tmp_path, keep=2) as checkpoints:
        for _ in range(4):
            state = advance(state)
            save(checkpoints, state)
        assert checkpoints.latest_step() == 4
    assert folders(tmp_path) == {"3", "4"}
    with opened(tmp_path, keep=2) as checkpoints:
        assert_same_bits(checkpoints.restore(4, target_of(state)), state)


def test_every_step_asked_for_is_saved_and_no_other(tmp_path):
    state = make_state(steps=1)
    with opened(tmp_path, keep=10) as checkpoints:
        for steps in (0, 4, 2):
            for _ in range(steps):
                state = advance(state)
            save(checkpoints, state)
    assert folders(tmp_path) == {"1", "5", "7"}


def test_empty_folder_has_no_latest_step(tmp_path):
    with opened(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.committed() == checkpoints.committed(wait=True) == []
    assert (tmp_path / "new" / "checkpoints").is_dir()


def test_step_counts_as_saved_once_it_is_on_disk(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        later = advance(state)
        assert checkpoints.save(later, data={}, meta={}) == 4
        assert checkpoints.latest_step() == 3
        reported: list[int] = []
        while not reported:
            reported = checkpoints.committed()
            assert reported in ([], [4])
        assert (tmp_path / "4" / "params").is_dir()
        assert checkpoints.latest_step() == 4
        assert checkpoints.committed() == checkpoints.committed(wait=True) == []


def test_steps_are_reported_while_a_later_one_is_being_written(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state, data={}, meta={})
        checkpoints.save(advance(state), data={}, meta={})
        reported = checkpoints.committed()
        assert reported[0] == 3
        assert reported + checkpoints.committed(wait=True) == [3, 4]


def refuse_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the disk refuse what commits a step: that its folder gets its name."""
    rename = os.rename

    def refusing(source: str, target: str) -> None:
        if Path(target) == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO), target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads
def test_save_that_fails_is_an_error_and_not_reported_as_saved(tmp_path, monkeypatch):
    state = make_state()
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    save(checkpoints, state)
    refuse_folder(monkeypatch, folder / "4")
    checkpoints.save(advance(state), data={}, meta={})
    # At the next look, and not at the next save.
    with pytest.raises(SaveError, match=r"^checkpoint of step 4 was not saved: .+$") as caught:
        all(checkpoints.committed() == [] for _ in itertools.count())
    assert "\n" not in str(caught.value)
    assert checkpoints.latest_step() == 3
    assert checkpoints.committed() == []
    checkpoints.close()
    with opened(folder) as checkpoints:
        assert checkpoints.latest_step() == 3
        assert_same_bits(checkpoints.restore(3, target_of(state)), state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("moment", ["save", "close"])
def test_save_that_failed_is_said_by_whatever_comes_next(tmp_path, moment, monkeypatch):
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    refuse_folder(monkeypatch, tmp_path / "3")
    checkpoints.save(state, data={}, meta={})
    next_call = {
        "save": lambda: checkpoints.save(advance(state), data={}, meta={}),
        "close": checkpoints.close,
    }[moment]
    with pytest.raises(SaveError, match=r"^checkpoint of step 3 was not saved: "):
        next_call()
    checkpoints.close()


def room_for(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr("mae_jax.train.checkpoint.shutil.disk_usage", lambda path: usage)


def test_step_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch):
    state = make_state()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with opened(tmp_path) as checkpoints:
        room_for(monkeypatch, size)
        checkpoints.require_space(target_of(state))
        save(checkpoints, state)
        room_for(monkeypatch, size - 1)
        message = f"^{tmp_path}: expected {size:,} bytes free for a checkpoint, got {size - 1:,}$"
        for attempt in (
            lambda: checkpoints.require_space(target_of(state)),
            lambda: checkpoints.save(advance(state), data={}, meta={}),
        ):
            with pytest.raises(ConfigError, match=message):
                attempt()
        assert folders(tmp_path) == {"3"}
        assert checkpoints.committed(wait=True) == []


def test_folder_that_has_become_anothers_is_not_written_to(tmp_path):
    def lost() -> None:
        raise ConfigError("another's")

    checkpoints = Checkpoints(tmp_path, before_save=lost)
    with contextlib.closing(checkpoints), pytest.raises(ConfigError, match="another's"):
        checkpoints.save(make_state(), data={}, meta={})
    assert folders(tmp_path) == set()


def test_saving_a_step_twice_is_an_error(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        with pytest.raises(SaveError, match="step 3 was not saved: it, or a later step, is there"):
            checkpoints.save(state, data={}, meta={})


def test_parameters_are_read_by_one_plain_line_of_orbax(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        path = checkpoints.path(3)
    assert path == tmp_path / "3"
    params = ocp.StandardCheckpointer().restore(path / "params")
    assert_same_bits(params, state.params)


def averaged_state() -> TrainState:
    state = make_state()
    return state.replace(ema=jax.tree.map(lambda p: p + 1.0, state.params))


def test_average_is_saved_and_restored_and_read_alone(tmp_path):
    state = averaged_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        path = checkpoints.path(3)
    assert_same_bits(ocp.StandardCheckpointer().restore(path / "ema"), state.ema)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.has_average(3)
        assert_same_bits(checkpoints.restore(3, target_of(state)), state)
        target = target_of(state).params
        assert_same_bits(checkpoints.restore_params(3, target), state.params)
        assert_same_bits(checkpoints.restore_params(3, target, averaged=True), state.ema)


def test_average_that_was_not_saved_is_refused_in_one_line(tmp_path):
    with opened(tmp_path) as checkpoints:
        save(checkpoints, make_state())
        assert not checkpoints.has_average(3)
        for restore in (
            lambda: checkpoints.restore(3, target_of(averaged_state())),
            lambda: checkpoints.restore_params(3, target_of(make_state()).params, averaged=True),
        ):
            with pytest.raises(ConfigError, match=r"3: it has no item 'ema'$"):
                restore()


def test_extra_state_is_an_item_of_its_own_and_read_alone(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        path = checkpoints.path(3)
    assert_same_bits(ocp.StandardCheckpointer().restore(path / "extra"), state.extra)
    assert "extra" not in ocp.StandardCheckpointer().restore(path / "train")
    with opened(tmp_path) as checkpoints:
        target = target_of(state).extra
        assert_same_bits(checkpoints.restore_extra(3, target), state.extra)
        # A model without such state asks for none, whatever there is.
        assert checkpoints.restore_extra(3, {}) == {}


def test_extra_state_that_was_not_saved_is_refused_in_one_line(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state.replace(extra={}))
        for restore in (
            lambda: checkpoints.restore(3, target_of(state)),
            lambda: checkpoints.restore_extra(3, target_of(state).extra),
        ):
            with pytest.raises(ConfigError, match=r"3: it has no item 'extra'$"):
                restore()
        assert not (tmp_path / "3" / "extra").exists()


def test_parameters_saved_alone_come_with_their_statistics_and_step(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        checkpoints.save_params(state.params, meta=META, step=7, extra=state.extra)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 7
        target = target_of(state)
        assert_same_bits(checkpoints.restore_params(7, target.params), state.params)
        assert_same_bits(checkpoints.restore_extra(7, target.extra), state.extra)
        assert checkpoints.read_json(7, "meta") == META
        with pytest.raises(ConfigError, match="it has no item 'train'"):
            checkpoints.restore(7, target)


def test_state_of_a_part_that_is_trained_is_restored_with_its_structure(tmp_path):
    params = make_params()
    trainable = {
        "encoder": {"block_00": {"kernel": False, "bias": True}},
        "decoder": {"mask_token": True},
    }
    state = TrainState.create(params, {}, OPTIMIZER, averaged=True, trainable=trainable)
    assert [x.shape for x in jax.tree.leaves(state.opt_state[0].mu)] == [(1, 1, 16), (16,)]
    state = state.replace(step=jnp.asarray(3, jnp.int32))
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        assert_same_bits(checkpoints.restore(3, target_of(state)), state)
        everything = TrainState.create(params, {}, OPTIMIZER, averaged=True)
        with pytest.raises(ConfigError, match=r"^cannot restore .*3: "):
            checkpoints.restore(3, target_of(everything))


def test_json_items_come_back_as_they_were(tmp_path):
    with opened(tmp_path) as checkpoints:
        save(checkpoints, make_state())
    with opened(tmp_path) as checkpoints:
        assert checkpoints.read_json(3, "meta") == META
        assert checkpoints.read_json(3, "data") == {"next_step": 3}


def test_folder_of_a_step_has_an_item_for_each_part_and_json_that_people_can_read(tmp_path):
    with opened(tmp_path) as checkpoints:
        save(checkpoints, make_state())
    items = {path.name for path in (tmp_path / "3").iterdir() if path.is_dir()}
    assert items == {"params", "extra", "train", "data", "meta", "checksums"}
    assert json.loads((tmp_path / "3" / "meta" / "metadata").read_text()) == META


@pytest.mark.parametrize("damage", ["missing item", "missing step", "empty step", "not JSON"])
def test_json_that_cannot_be_read_is_refused_in_one_line(tmp_path, damage):
    with opened(tmp_path) as checkpoints:
        save(checkpoints, make_state())
    step = 9 if damage in ("missing step", "empty step") else 3
    if damage == "missing item":
        shutil.rmtree(tmp_path / "3" / "meta")
    elif damage == "empty step":
        (tmp_path / "9").mkdir()
    elif damage == "not JSON":
        (tmp_path / "3" / "meta" / "metadata").write_text('{"config": ')
    with opened(tmp_path) as checkpoints, pytest.raises(ConfigError) as caught:
        checkpoints.read_json(step, "meta")
    assert str(tmp_path / str(step)) in str(caught.value)
    assert "\n" not in str(caught.value)


def wrong_shape(state: TrainState) -> TrainState:
    return make_state(params=make_params(width=24))


def parameter_more(state: TrainState) -> TrainState:
    return make_state(params=make_params() | {"head": {"kernel": jnp.ones((4, 4))}})


def parameter_less(state: TrainState) -> TrainState:
    return make_state(params={"encoder": make_params()["encoder"]})


def other_optimizer(state: TrainState) -> TrainState:
    return state.replace(opt_state={"momentum": state.params})


@pytest.mark.parametrize("change", [wrong_shape, parameter_more, parameter_less, other_optimizer])
def test_state_of_another_model_is_refused_in_one_line(tmp_path, change):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        with pytest.raises(ConfigError) as caught:
            checkpoints.restore(3, target_of(change(state)))
    assert str(caught.value).startswith(f"cannot restore {tmp_path / '3'}: ")
    assert ": expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_dtype_is_refused_and_not_cast(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params)
        refused = (
            r"3: params/decoder/mask_token: expected bfloat16\[1,1,16\], got float32\[1,1,16\]$"
        )
        for restore in (
            lambda: checkpoints.restore(3, target_of(state.replace(params=params))),
            lambda: checkpoints.restore_params(3, target_of(state.replace(params=params)).params),
        ):
            with pytest.raises(ConfigError, match=refused):
                restore()
        shutil.rmtree(tmp_path / "3" / "checksums")
        (tmp_path / "3" / "_CHECKPOINT_METADATA").unlink()  # as one without checksums
        with pytest.raises(ConfigError, match=refused):
            checkpoints.restore(3, target_of(state.replace(params=params)))


def test_step_that_is_not_there_is_refused_in_one_line(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
        with pytest.raises(ConfigError) as caught:
            checkpoints.restore(8, target_of(state))
    assert str(caught.value).startswith(f"cannot restore {tmp_path / '8'}: ")
    assert "\n" not in str(caught.value)


def test_save_that_was_killed_is_ignored_and_does_not_leak_into_the_next(tmp_path):
    state = make_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, state)
    leftover = tmp_path / "4.orbax-checkpoint-tmp" / "params"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("half an array")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        state = advance(state)
        save(checkpoints, state)
        assert_same_bits(checkpoints.restore(4, target_of(state)), state)
    assert folders(tmp_path) == {"3", "4"}
    assert not list((tmp_path / "4").rglob("junk"))


def test_what_killed_saves_left_is_cleared_away_by_the_next_save(tmp_path):
    (tmp_path / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        save(checkpoints, make_state())
    assert folders(tmp_path) == {"3"}


def test_relative_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state()
    with opened("runs/one") as checkpoints:
        save(checkpoints, state)
        assert checkpoints.path(3) == tmp_path / "runs" / "one" / "3"
    assert folders(tmp_path / "runs" / "one") == {"3"}
    with opened("./runs/../runs/one") as checkpoints:
        assert_same_bits(checkpoints.restore(3, target_of(state)), state)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 8), (1, 1)),
        ((1, 8), (1, 2)),
        ((1, 8), (1, 4)),
        ((8, 1), (2, 2)),
        ((1, 1), (1, 8)),
        ((4, 2), (2, 4)),
    ],
)
def test_state_moves_between_layouts_bit_for_bit(tmp_path, before, after):
    def mesh_of(data: int, fsdp: int) -> jax.sharding.Mesh:
        return sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])

    state = make_state()
    laid_out = jax.device_put(state, sharding.state_sharding(state, mesh_of(*before)))
    with opened(tmp_path) as checkpoints:
        save(checkpoints, laid_out)
    target = target_of(state, mesh_of(*after))
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore(3, target)
    assert_same_bits(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_reading_alone_leaves_a_killed_save_where_it_is(tmp_path):
    left = tmp_path / "7.orbax-checkpoint-tmp"
    left.mkdir()
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.latest_step() is None
    checkpoints.close()
    assert left.exists()
