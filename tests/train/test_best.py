"""The best checkpoint: which evaluation it is of, and that a run that goes on remembers it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from mae_jax.errors import ConfigError
from mae_jax.train.best import BestCheckpoint
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.train.state import TrainState

META = {"config": {"seed": 3}, "jax": "1.2"}


@contextlib.contextmanager
def opened(folder: Path, meta: dict[str, Any] = META) -> Iterator[BestCheckpoint]:
    best = BestCheckpoint(folder, "val/top1", meta)
    assert best.open() == []
    try:
        yield best
    finally:
        best.close()


def state_at(step: int, *, averaged: bool = False, extra: Any = None) -> TrainState:
    """Return a state whose parameters are the step, and twice that their average."""
    params = {"head": {"bias": jnp.full(3, float(step))}}
    state = TrainState.create(params, extra or {}, optax.identity(), averaged=averaged)
    if averaged:
        state = state.replace(ema={"head": {"bias": jnp.full(3, 2.0 * step)}})
    return state.replace(step=jnp.asarray(step, jnp.int32))


def kept(folder: Path) -> dict[str, float]:
    """Return the first parameter of each step there is, read by Orbax alone."""
    steps = [path for path in folder.iterdir() if path.name.isdigit()]
    restore = ocp.StandardCheckpointer().restore
    return {p.name: float(restore(p / "params")["head"]["bias"][0]) for p in steps}


def follow(best: BestCheckpoint, values: dict[int, float], **options: Any) -> None:
    for step, value in values.items():
        best.keep(state_at(step, **options), {"val/loss": -value, "val/top1": value})


def test_highest_value_is_kept_and_the_first_of_equals(tmp_path):
    with opened(tmp_path) as best:
        assert (best.step, best.path()) == (None, None)
        follow(best, {10: 40.0, 20: 60.0, 30: 50.0, 40: 60.0})
        assert (best.step, best.value) == (20, 60.0)
        assert best.path() == tmp_path / "20"
    assert kept(tmp_path) == {"20": 20.0}


def test_a_value_of_zero_is_better_than_none(tmp_path):
    with opened(tmp_path) as best:
        follow(best, {10: 0.0, 20: 0.0})
    assert kept(tmp_path) == {"10": 10.0}


def test_a_value_that_is_no_number_is_not_the_best(tmp_path):
    with opened(tmp_path) as best:
        follow(best, {10: float("nan")})
        assert best.step is None
        follow(best, {20: 5.0, 30: float("nan")})
        assert best.step == 20
    assert kept(tmp_path) == {"20": 20.0}


def test_a_run_that_goes_on_knows_what_was_best(tmp_path):
    with opened(tmp_path) as best:
        follow(best, {10: 40.0, 20: 60.0})
    with opened(tmp_path) as best:
        assert (best.step, best.value) == (20, 60.0)
        follow(best, {20: 60.0, 30: 55.0})  # the step after which it was killed, once more
        assert kept(tmp_path) == {"20": 20.0}
        follow(best, {40: 61.0})
    assert kept(tmp_path) == {"40": 40.0}


def test_a_run_that_goes_on_from_before_its_best_may_find_a_better_one_there(tmp_path):
    # Killed after the evaluation of step 20, before its save, and changed in what may be changed.
    with opened(tmp_path) as best:
        follow(best, {10: 40.0, 20: 60.0})
    with opened(tmp_path) as best:
        follow(best, {15: 70.0})
        assert (best.step, best.value) == (15, 70.0)
    assert kept(tmp_path) == {"15": 15.0}
    with opened(tmp_path) as best:
        assert (best.step, best.value) == (15, 70.0)
        follow(best, {15: 71.0})
        assert (best.step, best.value) == (15, 71.0)
    with opened(tmp_path) as best:
        assert (best.step, best.value) == (15, 71.0)


def test_a_run_that_starts_anew_has_no_best_yet(tmp_path):
    with opened(tmp_path) as best:
        follow(best, {10: 40.0})
    anew = BestCheckpoint(tmp_path, "val/top1", META)
    assert anew.open(anew=True) == []
    assert (anew.step, kept(tmp_path)) == (None, {})
    follow(anew, {5: 30.0})
    anew.close()
    assert kept(tmp_path) == {"5": 5.0}


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_what_was_best_and_is_damaged_is_named_and_kept_aside(tmp_path, damage):
    with opened(tmp_path) as best:
        follow(best, {10: 40.0})
    meta = tmp_path / "10" / "meta" / "metadata"
    if damage == "changed":
        meta.write_text(meta.read_text().replace("40.0", "90.0"))
    else:
        meta.unlink()
    best = BestCheckpoint(tmp_path, "val/top1", META)
    (note,) = best.open()
    assert note.startswith("skipped best step 10: ")
    assert note.endswith("; kept as 10.refused")
    assert best.step is None
    follow(best, {10: 30.0})
    best.close()
    assert kept(tmp_path) == {"10": 10.0}
    assert (tmp_path / "10.refused" / "params").exists()


def test_a_run_that_has_lost_its_folder_changes_nothing_there(tmp_path):
    with opened(tmp_path) as best:
        follow(best, {10: 40.0})

    def lost() -> None:
        raise ConfigError("another run's")

    best = BestCheckpoint(tmp_path, "val/top1", META, before_save=lost)
    best.open()
    for step in (5, 20):  # the one before what is best would delete it
        with pytest.raises(ConfigError, match="another run's"):
            follow(best, {step: 50.0})
    best.close()
    assert kept(tmp_path) == {"10": 10.0}


def test_averaged_parameters_are_those_that_were_measured_and_meta_says_so(tmp_path):
    with opened(tmp_path / "plain") as best:
        follow(best, {10: 40.0})
    with opened(tmp_path / "averaged") as best:
        follow(best, {10: 40.0}, averaged=True)
    assert kept(tmp_path / "plain") == {"10": 10.0}
    assert kept(tmp_path / "averaged") == {"10": 20.0}
    for name in ("plain", "averaged"):
        checkpoints = Checkpoints(tmp_path / name, read_only=True)
        meta = checkpoints.read_json(10, "meta")
        checkpoints.close()
        assert meta == META | {"averaged": name == "averaged", "best": {"val/top1": 40.0}}


def test_batch_statistics_are_kept_with_the_parameters(tmp_path):
    extra = {"batch_stats": {"mean": jnp.arange(3.0)}}
    with opened(tmp_path) as best:
        follow(best, {10: 40.0}, extra=extra)
    restored = ocp.StandardCheckpointer().restore(tmp_path / "10" / "extra")
    np.testing.assert_array_equal(restored["batch_stats"]["mean"], [0.0, 1.0, 2.0])
    assert not (tmp_path / "10" / "train").exists()
