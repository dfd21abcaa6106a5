"""`python -m mae_jax.main` itself: runs, resumes, stops, and survives a kill."""

import os
import signal
import time

import numpy as np
import pytest

from mae_jax import config as configs
from tests.e2e.cases import (
    LABELLED,
    STEPS,
    Case,
    assert_changes_are_refused,
    assert_parts_equal_the_whole,
)
from tests.helpers import (
    assert_same_state,
    finish,
    metrics,
    read_until,
    run,
    run_here,
    saved_arrays,
    start,
    tiny_run,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run: its folder and its output, with every compilation logged."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    flags = tiny_run(workdir)
    status, output = run(flags, JAX_LOG_COMPILES="1", JAX_ENABLE_COMPILATION_CACHE="false")
    assert status == 0, output
    return workdir, output


def test_a_run_leaves_what_it_promises(whole):
    workdir, output = whole
    assert "started from scratch" in output
    assert f"saved step {STEPS}" in output
    assert f"finished at step {STEPS}" in output
    assert "GFLOP per image" in output
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [20, 30, 40]
    assert (workdir / "pictures" / f"step_{STEPS}.png").stat().st_size > 1000
    assert (workdir / "config.json").exists()
    assert list(workdir.glob("events.out.tfevents.*"))


def test_metrics_have_the_promised_names(whole):
    rows = metrics(whole[0])
    train = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert train[-1].keys() >= {
        *("train/loss", "train/learning_rate", "train/grad_norm", "train/images_per_second"),
        *("train/mfu", "train/data_stall"),
    }
    assert train[0]["train/learning_rate"] == 0.0
    last = [row for row in rows if row["step"] == STEPS][-1]
    names = ("linear_top1", "linear_top1_std", "knn_top1")
    assert last.keys() >= {
        *(f"val/{name}" for name in names),
        *(f"val/random_{name}" for name in names),
        *("val/loss", "val/mean_predictor_loss"),
    }


def test_the_step_is_compiled_once(whole):
    finished = [line for line in whole[1].splitlines() if "Finished XLA compilation" in line]
    assert sum("train_step" in line for line in finished) == 1
    for name in ("jit(features)", "jit(losses)", "jit(panels)"):  # evaluated twice
        assert sum(name in line for line in finished) == 1, name


def test_a_finished_run_says_so_again_and_changes_nothing(whole):
    before = metrics(whole[0])
    status, output = run(tiny_run(whole[0]))
    assert status == 0
    assert f"resumed from step {STEPS}" in output
    assert f"finished at step {STEPS}" in output
    assert metrics(whole[0]) == before


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_saves_says_how_to_go_on_and_gives_75(whole, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = start(tiny_run(workdir))
    read_until(process, "step 5/40")
    os.kill(process.pid, number)
    status, output = finish(process)
    assert status == 75, output
    assert f"by {number.name}; everything is saved" in output
    assert "-m mae_jax.main --config=demo" in output
    status, output = run(tiny_run(workdir))
    assert status == 0, output
    assert "resumed from step" in output
    assert_same_state(whole[0], workdir, STEPS)


CASES = {
    "pretrain": Case("demo", {}, STEPS, 13, 20, ({"epochs": "0.2"}, {"model__mask_ratio": "0.5"})),
    "finetune": Case(
        "finetune:demo",
        {
            "init_from": "scratch",
            "model__drop_path_rate": "0.2",
            "data__mixup_alpha": "0.8",
            "data__cutmix_alpha": "1.0",
            "data__mixup_group": "4",
            "data__label_smoothing": "0.1",
            "data__erasing_probability": "0.5",
        },
        changes=({"data__mixup_alpha": "0.4"}, {"optimizer__layer_decay": "0.5"}),
        **LABELLED,
    ),
    "linear_probe": Case(
        "linear_probe:demo",
        {"init_from": "scratch", "run__accumulation": "2", "model__norm_group": "4"},
        changes=({"model__norm_group": "8"}, {"optimizer__momentum": "0.5"}),
        items=("extra",),
        **LABELLED,
    ),
    "partial": Case(
        "partial:demo",
        {"init_from": "scratch"},
        changes=({"optimizer__trainable_blocks": "0.5"}, {"data__per_class": "5"}),
        **LABELLED,
    ),
    "scratch": Case(
        "scratch:demo",
        {},
        changes=({"optimizer__ema_decay": "0.5"}, {"init_from": "runs/demo"}),
        items=("ema",),
        **LABELLED,
    ),
}


# What is in the fast tests; the others take the same way through the program.
FAST = ("pretrain",)


@pytest.fixture(
    scope="module",
    params=[name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def case(request, compiled_once, tmp_path_factory):
    """A task and one uninterrupted run of it."""
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    status, output = run_here(CASES[request.param].flags(workdir))
    assert status == 0, output
    assert "started from scratch" in output
    return CASES[request.param], workdir


def test_a_run_that_is_stopped_goes_on_is_killed_and_goes_on_equals_one_in_one(case, tmp_path):
    assert_parts_equal_the_whole(*case, tmp_path / "parts")


def test_another_experiment_in_the_same_folder_is_refused(case):
    assert_changes_are_refused(*case)


def test_a_checkpoint_of_each_task_has_its_items(case):
    case, whole = case
    items = {path.name for path in (whole / "checkpoints" / str(case.steps)).iterdir()}
    expected = {"params", "train", "data", "meta", "checksums", *case.items}
    assert {name for name in items if not name.startswith(("_", "commit"))} == expected


def test_best_parameters_of_a_classifier_are_kept(case):
    case, whole = case
    if configs.load_config(case.config).task == "pretrain":
        assert not (whole / "best").exists()
        return
    values = {row["step"]: row["val/top1"] for row in metrics(whole) if "val/top1" in row}
    assert list(values) == [4, 8, 12]
    best = max(values, key=values.get)
    assert [path.name for path in (whole / "best").iterdir()] == [str(best)]
    kept = saved_arrays(whole, best, "best")
    saved = saved_arrays(whole, best)
    item = "ema" if "ema" in case.items else "params"
    for name, array in kept.items():
        np.testing.assert_array_equal(array, saved[name.replace("params", item, 1)])
    assert {name[:5] for name in kept} == {name[:5] for name in ("params", *case.items)} - {"ema"}


@pytest.mark.slow
def test_a_longer_schedule_goes_on_when_allowed(whole, tmp_path):
    workdir = tmp_path / "longer"
    assert run([*tiny_run(workdir), "--stop_at_step=10"])[0] == 0
    status, output = run(tiny_run(workdir, epochs="0.2"))
    assert status == 2
    assert "epochs is 0.2" in output
    status, output = run([*tiny_run(workdir, epochs="0.2"), "--allow_change=epochs"])
    assert status == 0, output
    assert "finished at step 50" in output


@pytest.mark.drill  # parts and an average are in the runs of tasks above
def test_a_run_in_parts_with_an_average_resumes_bit_for_bit(tmp_path):
    fields = {
        "run__accumulation": "4",
        "optimizer__ema_decay": "0.9",
        "optimizer__clip_norm": "1.0",
        "epochs": "0.08",
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, output = run(tiny_run(whole, **fields))
    assert status == 0, output
    assert "20 steps of 16 images in parts of 4" in output
    assert "GiB of parameters, their average and optimiser state per device" in output
    assert "step 20 held out, averaged parameters:" in output
    assert run([*tiny_run(parts, **fields), "--stop_at_step=7"])[0] == 0
    assert run(tiny_run(parts, **fields))[0] == 0
    assert_same_state(whole, parts, 20)
    arrays = saved_arrays(whole, 20)
    for name in [name for name in arrays if name.startswith("params")]:
        average = arrays[name.replace("params", "ema", 1)]
        assert average.shape == arrays[name].shape
        assert (average != arrays[name]).any(), name


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_status_1_and_says_what_to_do(tmp_path):
    status, output = run(tiny_run(tmp_path / "run", optimizer__base_learning_rate="1e30"))
    assert status == 1, output
    assert "stopped: loss or gradient not finite in 5 steps in a row" in output
    assert "lower optimizer.base_learning_rate or set optimizer.clip_norm; go on with" in output
    assert "--allow_change=optimizer" in output
    assert "Traceback" not in output


@pytest.mark.drill
def test_ten_kills_at_any_moment_end_in_the_same_bits(tmp_path):
    """At least 3 inside a save and 8 after the first commit."""
    steps = 240
    # A state of some megabytes, saved often, so that a save takes a while.
    fields = {
        "epochs": "0.96",
        "optimizer__warmup_epochs": "0.1",
        "model__embed_dim": "192",
        "model__depth": "6",
        "eval__every": "0",
        "run__save_every": "6",
    }
    whole = tmp_path / "whole"
    status, output = run(tiny_run(whole, **fields))
    assert status == 0, output
    workdir = tmp_path / "killed"
    checkpoints = workdir / "checkpoints"
    inside = after = 0
    for kill in range(10):
        before = _committed(checkpoints)
        process = start(tiny_run(workdir, **fields))
        want_inside = kill % 2 == 1
        deadline = time.monotonic() + 120
        # Even kills: once a new step is committed. Odd ones: while a save is being written.
        while time.monotonic() < deadline and process.poll() is None:
            saving = list(checkpoints.glob("*.orbax-checkpoint-tmp"))
            if want_inside and saving and (_committed(checkpoints) > before or kill == 1):
                break
            if not want_inside and _committed(checkpoints) > before:
                time.sleep(0.05 * kill)
                break
            time.sleep(0.001)
        assert process.poll() is None, "the run ended before it could be killed"
        saving = list(checkpoints.glob("*.orbax-checkpoint-tmp"))
        kill(process)
        inside += bool(saving) and bool(list(checkpoints.glob("*.orbax-checkpoint-tmp")))
        after += bool(_committed(checkpoints))
    print(f"10 kills: {inside} inside a save, {after} after the first commit")
    assert inside >= 3
    assert after >= 8
    status, output = run(tiny_run(workdir, **fields))
    assert status == 0, output
    assert_same_state(whole, workdir, steps)


def _committed(checkpoints):
    """Return the set of committed steps' newest, 0 for none."""
    return max((int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()), default=0)
