"""Faults of one process of several: all end, soon, with a status that says what to do."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.helpers import overrides, read_until, tiny_run, write_photographs
from tests.processes import job, outcomes, told

pytestmark = [pytest.mark.multihost, pytest.mark.drill]

CRASHES = (1, 134, -signal.SIGABRT)
"""Statuses after which a loop starts a job again."""


def flags(workdir, **fields):
    return tiny_run(workdir, eval__every="0", epochs="4.0", **fields)


def assert_nothing_lives(processes):
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_a_process_that_is_frozen_is_missed_and_all_others_end(tmp_path):
    with job([*flags(tmp_path / "run"), "--heartbeat_timeout=10"], told(2)) as processes:
        read_until(processes[0], "step 5/")
        processes[1].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        ((status, output),) = outcomes(processes[:1], timeout=400)
        print(f"the other had ended {time.monotonic() - begun:.1f} s after: status {status}")
        processes[1].kill()
        outcomes(processes[1:])
        assert_nothing_lives(processes)
    assert status in CRASHES, output


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        ("crash", 1, "ZeroDivisionError: a fault"),
        ("mistake", 2, "error: data.path: expected images, got a fault"),
    ],
)
def test_what_one_process_meets_in_training_ends_it_at_once_and_the_others(
    tmp_path, fault, status, line
):
    places = [place | {"FAULT": fault} for place in told(2)]
    more = ["--heartbeat_timeout=10"]
    with job([*flags(tmp_path / "run"), *more], places, module="tests.e2e.faulty") as processes:
        (other, said), (own, output) = outcomes(processes, timeout=400)
        assert_nothing_lives(processes)
    assert own == status, output
    assert line in output.splitlines()
    assert other in CRASHES, said


def test_other_data_in_one_process_are_named_by_all(tmp_path):
    places = told(2)
    for index, place in enumerate(places):
        place["HOME"] = str(tmp_path / f"home_{index}")
        write_photographs(tmp_path / f"home_{index}" / "pictures", 20 + 2 * index)
    data = {"data.source": "folder", "data.path": "~/pictures", "model.channels": "3"}
    data |= {"data.mean": "0.5,0.5,0.5", "data.std": "0.25,0.25,0.25", "data.augment": "none"}
    with job([*flags(tmp_path / "run"), *overrides(data)], places) as processes:
        for status, output in outcomes(processes, timeout=400):
            assert status == 2, output
            line = "error: data: expected the same on all processes, got 16 examples, "
            assert line in output
            assert " on process 0, 18 examples, " in output


def test_two_processes_of_the_same_number_train_nothing(tmp_path):
    places = told(2)
    places[1] |= {"MAE_JAX_PROCESS_ID": "0"}
    with job(flags(tmp_path / "run"), places) as processes:
        found = outcomes(processes, timeout=400)
        assert_nothing_lives(processes)
    # Whoever comes first gets the port, and waits for the other in vain.
    (waits, _), (refused, output) = sorted(found, key=lambda one: one[0] == 2)
    assert waits in CRASHES
    assert refused == 2, output
    assert "error: --coordinator_bind_address: expected an address of this machine with a" in output
    assert not (tmp_path / "run").exists()


def test_another_number_of_processes_in_one_is_named_by_the_first(tmp_path):
    places = told(2)
    places[1] |= {"MAE_JAX_NUM_PROCESSES": "3"}
    with job(flags(tmp_path / "run"), places) as processes:
        (first, output), (second, _) = outcomes(processes, timeout=400)
        assert_nothing_lives(processes)
    assert first == 2, output
    line = "error: --num_processes: expected the same on all processes, got 2 on process 0,"
    assert f"{line} 3 on process 1" in output
    assert second in CRASHES  # waits for a third one


def test_a_process_that_never_comes_is_waited_for_five_minutes(tmp_path):
    with job(flags(tmp_path / "run"), told(2)[:1]) as processes:
        begun = time.monotonic()
        ((status, output),) = outcomes(processes, timeout=500)
        print(f"ended after {time.monotonic() - begun:.0f} s: status {status}")
        assert_nothing_lives(processes)
    assert status in CRASHES, output
    assert not (tmp_path / "run").exists()
