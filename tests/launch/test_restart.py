from __future__ import annotations

import signal

import pytest

from tests.launch.conftest import LAUNCH

COMMAND = (LAUNCH / "restart.sh", "python", "-m", "mae_jax.main", "--config=demo")


def test_finished_is_not_started_again(stage):
    stage.plan("commit 10; exit 0", "exit 0")
    assert stage.run(*COMMAND, "--workdir=run").returncode == 0
    assert stage.runs() == 1


def test_a_mistake_of_the_user_is_not_started_again(stage):
    stage.plan("exit 2", "exit 0")
    assert stage.run(*COMMAND, "--workdir=run").returncode == 2
    assert stage.runs() == 1


def test_stopped_and_saved_is_started_again_at_once(stage):
    stage.plan(*["exit 75"] * 6, "exit 0")  # more often than a crash would be
    ended = stage.run(*COMMAND, "--workdir=run", RESTART_WAIT="1000")
    assert ended.returncode == 0
    assert stage.runs() == 7


def test_arguments_arrive_as_they_were_given(stage):
    odd = ["--workdir=a 'run'", '--config.data.path=/it\'s "here"', "--config.x=$HOME *", "--a="]
    assert stage.run(*COMMAND, *odd).returncode == 0
    assert stage.arguments() == ["-m", "mae_jax.main", "--config=demo", *odd]


def test_a_crash_without_a_new_step_is_given_up_after_three_restarts(stage):
    stage.plan(*["exit 7"] * 10)
    ended = stage.run(*COMMAND, "--workdir=run")
    assert ended.returncode == 7
    assert stage.runs() == 1 + 3
    assert "no new step in 3 restarts (newest: none)" in ended.stderr


def test_a_new_step_starts_the_count_anew(stage):
    stage.plan(*["exit 7"] * 3, "commit 5; exit 7", *["exit 7"] * 2, "commit 9; exit 0")
    assert stage.run(*COMMAND, "--workdir=run").returncode == 0
    assert stage.runs() == 7


def test_a_step_that_was_there_or_is_not_committed_is_no_new_one(stage):
    (stage.folder / "run/checkpoints/40").mkdir(parents=True)
    stage.plan(*["commit 40; commit 50.orbax-checkpoint-tmp; exit 7"] * 10)
    ended = stage.run(*COMMAND, "--workdir=run")
    assert ended.returncode == 7
    assert stage.runs() == 4
    assert "(newest: 40)" in ended.stderr


def test_a_later_step_counts_though_a_smaller_number_is_sorted_after_it(stage):
    (stage.folder / "run/checkpoints/9").mkdir(parents=True)
    stage.plan(*[f"commit {step}; exit 7" for step in range(10, 16)], "exit 0")
    assert stage.run(*COMMAND, "--workdir=run").returncode == 0
    assert stage.runs() == 7


def test_waits_double_up_to_the_longest(stage):
    stage.plan(*["exit 1"] * 10)
    # `sleep` that only says how long it would.
    (stage.folder / "sleep").write_text('#!/bin/sh\necho "$1" >>"$STUB/slept"\n')
    (stage.folder / "sleep").chmod(0o755)
    stage.run(
        *COMMAND,
        "--workdir=run",
        PATH=f"{stage.folder}:{stage.environment['PATH']}",
        RESTART_WAIT="4",
        RESTART_MAX_WAIT="10",
        RESTART_LIMIT="4",
    )
    assert (stage.folder / "slept").read_text().split() == ["4", "8", "10", "10"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_the_loop(stage, number):
    stage.plan("stop_at 30", "exit 0")
    running = stage.begin(*COMMAND, "--workdir=run")
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(number)
    ended = stage.end(running)
    assert (ended.returncode, ended.stdout) == (75, "stopped at step 30\n")
    assert stage.runs() == 1


def test_a_run_that_a_signal_ends_before_it_heeds_signals_is_stopped(stage):
    """As a Python that is still importing: it has nothing to save."""
    stage.plan("echo ready; while :; do sleep 0.05; done", "exit 0")
    running = stage.begin(*COMMAND, "--workdir=run")
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGTERM)
    assert stage.end(running).returncode == 75
    assert stage.runs() == 1


def test_a_run_that_another_ends_by_sigterm_has_crashed(stage):
    stage.plan("kill -TERM $$", "commit 10; exit 0")
    ended = stage.run(*COMMAND, "--workdir=run")
    assert ended.returncode == 0
    assert "status 143" in ended.stderr
    assert stage.runs() == 2


def test_a_signal_between_two_runs_ends_the_loop(stage):
    stage.plan("exit 1", "exit 0")
    running = stage.begin(*COMMAND, "--workdir=run", RESTART_WAIT="1000")
    assert running.stderr is not None
    assert "restart 1 in 1000 s" in running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    assert stage.end(running).returncode == 75
    assert stage.runs() == 1


def test_what_a_killed_run_leaves_behind_is_ended(stage):
    stage.plan('sleep 100 & echo $! >>"$STUB/pids"; kill -KILL $$', "exit 0")
    assert stage.run(*COMMAND, "--workdir=run").returncode == 0
    assert stage.survivors() == []


def test_steps_in_a_bucket_are_counted(stage):
    crashes = ["exit 7"] * 3
    stage.plan(*crashes, "commit 5; exit 7", *["exit 7"] * 10)
    assert stage.run(*COMMAND, "--workdir=gs://bucket/run").returncode == 7
    assert stage.runs() == 3 + 1 + 3


def test_a_step_in_a_bucket_counts_once_it_is_committed(stage):
    """There it has its number from the first object on; `commit_success.txt` is the last."""
    half = 'mkdir -p "$workdir/checkpoints/{}"; exit 7'
    stage.plan("commit 5; exit 7", *[half.format(step) for step in range(6, 16)])
    ended = stage.run(*COMMAND, "--workdir=gs://bucket/run")
    assert ended.returncode == 7
    assert stage.runs() == 1 + 3
    assert "(newest: 5)" in ended.stderr


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "s3://bucket/run"])
def test_a_bucket_that_cannot_be_listed_is_judged_by_time(stage, workdir):
    (stage.folder / "no_access").touch()
    stage.plan(*[f"commit {step}; exit 7" for step in range(10)])
    assert stage.run(*COMMAND, f"--workdir={workdir}").returncode == 7
    assert stage.runs() == 4  # each too short to have committed anything
    stage.plan(*["exit 7"] * 10, "exit 0")
    ended = stage.run(*COMMAND, f"--workdir={workdir}", RESTART_PROGRESS_SECONDS="0")
    assert ended.returncode == 0
    assert stage.runs() == 11


def test_without_a_work_folder_or_a_command_it_is_refused(stage):
    ended = stage.run(*COMMAND)
    assert ended.returncode == 2
    assert ended.stderr == "error: --workdir: expected --workdir=DIR among the flags, got none\n"
    ended = stage.run(LAUNCH / "restart.sh")
    assert ended.returncode == 2
    assert ended.stderr == "error: restart.sh: expected a command, got nothing\n"
    assert stage.runs() == 0
