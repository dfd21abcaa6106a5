"""Several processes on loopback: one run, one stop, one answer to a mistake."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.e2e.restored import digests
from tests.e2e.rows import STEPS as STEPS_OF_ROWS
from tests.helpers import (
    assert_same_state,
    metrics,
    overrides,
    read_until,
    saved_arrays,
    tiny_run,
)
from tests.processes import by_slurm, job, outcomes, run_job, told

pytestmark = pytest.mark.multihost

STEPS = 40
FIELDS = {"eval__every": "0"}  # at the end alone
CLOSE = 1e-5  # sums over processes are made in another order


def flags(workdir, **fields):
    return tiny_run(workdir, **(FIELDS | fields))


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in metrics(workdir) if "train/loss" in row}


def measured(workdir):
    """Return what is measured on held-out images at the end."""
    return [row for row in metrics(workdir) if "val/loss" in row][-1]


def run_whole(workdir, count, *more, **options):
    """Run the digits to the end with `count` processes; return the output of process 0."""
    return run_whole_of([*flags(workdir), *more], count, **options)


def run_whole_of(argv, count, **options):
    found = run_job(argv, count, **options)
    for status, output in found:
        assert status == 0, output
    for _, output in found[1:]:
        assert "step " not in output, "only process 0 prints"
    return found[0][1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run_whole(workdir, 1, "--profile_steps=3:4")
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    output = run_whole(workdir, 2)
    assert "2 processes meet at 127.0.0.1:" in output
    assert "listens on 127.0.0.1:" in output
    assert f"finished at step {STEPS}" in output
    assert "goodput " in output
    return workdir


def assert_alike(one, other, at=(1, *range(5, STEPS + 1, 5))):
    for step in at:
        assert losses(other)[step] == pytest.approx(losses(one)[step], rel=CLOSE), step
    assert measured(other)["val/loss"] == pytest.approx(measured(one)["val/loss"], rel=CLOSE)
    for name in ("val/linear_top1", "val/knn_top1"):  # of 32 images
        assert measured(other)[name] == pytest.approx(measured(one)[name], abs=7), name


@pytest.mark.slow
def test_two_processes_train_as_one_does(alone, two):
    assert_alike(alone, two)
    assert (two / "pictures" / f"step_{STEPS}.png").exists()
    assert json.loads((two / "heartbeat.json").read_text())["step"] == STEPS
    assert list((alone / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_nothing_is_lost(two, tmp_path):
    workdir = tmp_path / "run"
    with job(flags(workdir), told(2)) as processes:
        read_until(processes[0], "step 5/")
        processes[1].send_signal(signal.SIGTERM)
        (status, output), (other_status, other_output) = outcomes(processes)
    assert (status, other_status) == (75, 75), output + other_output
    assert "by SIGTERM to process 1; everything is saved" in output
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"stopped at step {newest} of {STEPS}" in output
    output = run_whole(workdir, 2, "--stop_at_step=30")
    assert f"resumed from step {newest}" in output
    assert_same_state(two, workdir, 30)


@pytest.mark.slow
def test_another_configuration_in_one_process_is_named_by_all(tmp_path):
    only = {1: ["--config.seed=7"]}
    for status, output in run_job(flags(tmp_path / "run"), 2, only=only):
        assert status == 2, output
        line = "error: seed: expected the same on all processes, got 0 on process 0, 7 on process 1"
        assert line in output
        assert "Traceback" not in output


def rows_of(count, **options):
    """Return the lines of `tests.e2e.rows`."""
    fields = overrides({"batch_size": "16", "eval.batch_size": "16"})
    found = run_job(["--config=demo", *fields], count, module="tests.e2e.rows", **options)
    for status, output in found:
        assert status == 0, output
    lines = [line for line in found[0][1].splitlines() if line.startswith("step ")]
    assert len(lines) == len(STEPS_OF_ROWS)
    return lines


@pytest.mark.drill
def test_images_and_masks_are_the_same_row_by_row_for_any_number_of_processes():
    one = rows_of(1)
    assert rows_of(2) == one
    assert rows_of(4) == one
    assert rows_of(2, devices=4) == one


@pytest.mark.drill
@pytest.mark.parametrize(("count", "devices"), [(4, 1), (2, 4)])
def test_any_number_of_processes_and_devices_trains_as_one_does(alone, tmp_path, count, devices):
    run_whole(tmp_path / "run", count, devices=devices)
    assert_alike(alone, tmp_path / "run")


@pytest.mark.drill
def test_parameters_may_be_spread_over_the_processes(alone, tmp_path):
    run_whole(tmp_path / "run", 2, "--config.run.mesh.fsdp=4", devices=2)
    assert_alike(alone, tmp_path / "run")


@pytest.mark.drill
def test_four_processes_go_on_as_one_and_as_four_again(alone, tmp_path):
    workdir = tmp_path / "run"
    for count, end, workers in ((4, 13, 0), (1, 24, 1), (4, STEPS, 0)):
        more = f"--stop_at_step={end}", f"--config.run.workers={workers}"
        run_whole(workdir, count, *more)
        saved = digests(saved_arrays(workdir, end).values())
        for other in {1, 4} - {count}:
            # Restored bit for bit by as many as go on, in each of them.
            found = run_job(flags(workdir), other, module="tests.e2e.restored")
            for status, output in found:
                assert status == 0, output
                assert output.splitlines()[-1].split() == ["restored", str(end), *saved]
    # The next batch was the right one each time.
    assert_alike(alone, workdir, at=range(5, STEPS + 1, 5))


@pytest.mark.drill
def test_a_classifier_is_trained_and_measured_by_two_processes_as_by_one(alone, tmp_path):
    top1, neighbours = {}, {}
    for count in (1, 2):
        workdir = tmp_path / f"finetune_{count}"
        run_whole_of(tiny_run(workdir, config="finetune:demo", init_from=str(alone)), count)
        top1[count] = [row["val/top1"] for row in metrics(workdir) if "val/top1" in row]
        assert len(list((workdir / "best").iterdir())) == 1
        workdir = tmp_path / f"knn_{count}"
        fields = overrides({"init_from": str(alone), "eval.batch_size": "500"})
        run_whole_of(["--config=knn", f"--workdir={workdir}", *fields], count)
        neighbours[count] = json.loads((workdir / "results.json").read_text())["figures"]["knn"]
    assert top1[2] == pytest.approx(top1[1], abs=1)  # of 1,000 images
    assert neighbours[2]["top1"] == pytest.approx(neighbours[1]["top1"], abs=0.5)


@pytest.mark.drill
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_takes_the_others_with_it(tmp_path, victim):
    workdir = tmp_path / "run"
    with job([*flags(workdir, epochs="4.0"), "--heartbeat_timeout=10"], told(2)) as processes:
        read_until(processes[0], "step 5/")
        os.killpg(processes[victim].pid, signal.SIGKILL)
        begun = time.monotonic()
        statuses = [status for status, _ in outcomes(processes, timeout=60)]
        print(f"all had ended {time.monotonic() - begun:.1f} s after")
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] not in (0, 2, 75)


@pytest.mark.drill
def test_folders_that_are_not_shared_are_named(tmp_path):
    only = {1: [f"--workdir={tmp_path / 'elsewhere'}"]}
    for status, output in run_job(flags(tmp_path / "run"), 2, only=only):
        assert status == 2, output
        assert "expected a folder that all processes share, but process 1 does not see" in output


@pytest.mark.drill
def test_a_job_that_slurm_started_is_found(tmp_path):
    with job(flags(tmp_path / "run"), by_slurm(2)) as processes:
        found = outcomes(processes)
    assert [status for status, _ in found] == [0, 0], found
    assert "2 processes meet at localhost:" in found[0][1]
