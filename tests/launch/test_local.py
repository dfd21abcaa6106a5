from __future__ import annotations

import signal
import time

import pytest

from tests.launch.conftest import LAUNCH, check_golden

LOCAL = LAUNCH / "local.sh"
FLAGS = ("--config=demo", "--workdir=run")


def test_each_process_is_told_its_place(stage):
    for process in range(3):
        stage.plan("exit 0", process=process)
    assert stage.run(LOCAL, "--processes=3", *FLAGS).returncode == 0
    told = [stage.variables(process) for process in range(3)]
    addresses = {v["MAE_JAX_COORDINATOR_ADDRESS"] for v in told}
    assert len(addresses) == 1
    host, port = addresses.pop().split(":")
    assert host == "127.0.0.1"
    assert 1024 < int(port) < 65536
    for process, variables in enumerate(told):
        assert variables["MAE_JAX_COORDINATOR_BIND_ADDRESS"] == f"127.0.0.1:{port}"
        assert variables["MAE_JAX_NUM_PROCESSES"] == "3"
        assert variables["MAE_JAX_PROCESS_ID"] == str(process)
        assert variables["JAX_PLATFORMS"] == "cpu"
        assert stage.arguments(process) == ["-m", "mae_jax.main", *FLAGS]


def test_one_process_is_left_to_itself(stage):
    assert stage.run(LOCAL, *FLAGS).returncode == 0
    assert not [name for name in stage.variables() if name.startswith(("MAE_JAX_", "JAX_"))]


def test_output_says_whose_it_is_and_is_complete(stage):
    stage.plan('seq 1000; echo error >&2; printf "no end"; exit 0', process=0)
    stage.plan("printf '%s\\n' a '  b\\n' ''; exit 0", process=1)
    ended = stage.run(LOCAL, "--processes=2", *FLAGS)
    lines = ended.stdout.splitlines()
    numbers = [f"[0] {number}" for number in range(1, 1001)]
    assert [x for x in lines if x.startswith("[0]")] == [*numbers, "[0] error", "[0] no end"]
    assert [x for x in lines if x.startswith("[1]")] == ["[1] a", "[1]   b\\n", "[1] "]


def test_a_process_that_ends_wrongly_ends_all_and_gives_its_status(stage):
    for process in range(3):
        stage.plan("stop_at 9", process=process)
    stage.plan("sleep 0.2; exit 7", process=1)
    ended = stage.run(LOCAL, "--once", "--processes=3", *FLAGS)
    assert ended.returncode == 7
    assert "process 1 ended with status 7" in ended.stderr
    assert stage.survivors() == []


def test_data_workers_of_a_killed_process_end_with_it(stage):
    stage.plan('sleep 100 & echo $! >>"$STUB/pids"; wait', process=0)
    stage.plan("sleep 0.2; kill -KILL $$", process=1)
    assert stage.run(LOCAL, "--once", "--processes=2", *FLAGS).returncode == 128 + 9
    assert stage.survivors() == []


@pytest.mark.parametrize(
    ("statuses", "together"), [((0, 0), 0), ((0, 75), 75), ((75, 75), 75), ((2, 2), 2)]
)
def test_the_status_is_that_of_all(stage, statuses, together):
    for process, status in enumerate(statuses):
        stage.plan(f"exit {status}", process=process)
    assert stage.run(LOCAL, "--once", "--processes=2", *FLAGS).returncode == together


def test_all_are_started_again_after_a_crash_of_one(stage):
    stage.plan("stop_at 9", "commit 20; exit 0", process=0)
    stage.plan("sleep 0.2; exit 1", "exit 0", process=1)
    assert stage.run(LOCAL, "--processes=2", *FLAGS).returncode == 0
    assert [stage.runs(process) for process in range(2)] == [2, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes_and_they_save(stage, number):
    for process in range(2):
        stage.plan("stop_at 30", process=process)
    running = stage.begin(LOCAL, "--processes=2", *FLAGS)
    assert running.stdout is not None
    assert {running.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    running.send_signal(number)
    ended = stage.end(running)
    assert ended.returncode == 75
    assert sorted(ended.stdout.splitlines()) == [
        "[0] stopped at step 30",
        "[1] stopped at step 30",
    ]


def test_a_second_interrupt_ends_processes_that_do_not_stop(stage):
    deaf = "trap '' TERM; trap 'exit 130' INT; echo ready; while :; do sleep 0.05; done"
    for process in range(2):
        stage.plan(deaf, process=process)
    running = stage.begin(LOCAL, "--processes=2", *FLAGS)
    assert running.stdout is not None
    assert {running.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        assert running.poll() is None
        running.send_signal(number)
        time.sleep(0.3)
    assert stage.end(running).returncode == 128 + signal.SIGINT
    assert stage.survivors() == []


def test_nothing_is_left_in_the_folder_of_temporary_files(stage):
    stage.plan("exit 2", process=1)
    assert stage.run(LOCAL, "--processes=2", *FLAGS, TMPDIR=str(stage.folder)).returncode == 2
    assert not list(stage.folder.glob("tmp.*"))


def test_nothing_is_left_when_it_fails_itself(stage):
    ended = stage.run(LOCAL, "--once", *FLAGS, TMPDIR=str(stage.folder), STUB_PYTHON="false")
    assert ended.returncode == 1  # no port was found
    assert stage.runs() == 0
    assert not list(stage.folder.glob("tmp.*"))


def test_dry_run_shows_what_a_shell_would_run(stage):
    odd = (
        "--config=demo",
        "--workdir=a 'run'",
        '--config.data.path=$HOME/"x"',
        "--config.init_from=",
    )
    ended = stage.run(LOCAL, "--dry-run", "--processes=2", *odd)
    assert ended.returncode == 0
    assert stage.runs() == 0
    check_golden("local.txt", ended.stdout)
    # And it means the same.
    command = ended.stdout.splitlines()[0]
    stage.run("bash", "-c", command)
    assert stage.arguments() == ["-m", "mae_jax.main", *odd]


@pytest.mark.parametrize("number", ["0", "-1", "two", "", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(stage, number):
    ended = stage.run(LOCAL, f"--processes={number}", *FLAGS)
    assert ended.returncode == 2
    assert ended.stderr == f"error: --processes: expected a positive number, got '{number}'\n"


def test_a_work_folder_is_needed(stage):
    ended = stage.run(LOCAL, "--config=demo")
    assert ended.returncode == 2
    assert ended.stderr == "error: --workdir: expected --workdir=DIR among the flags, got none\n"
