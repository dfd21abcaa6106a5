from __future__ import annotations

import os
import re
import signal
import socket

import pytest

from tests.launch.conftest import HERE, LAUNCH, ROOT, check_golden

SLURM = LAUNCH / "slurm.sh"
FLAGS = ("--config=vit_l", "--workdir=run")


@pytest.fixture
def clone(stage):
    """Return a stage that looks like the folder of a clone."""
    (stage.folder / "launch").symlink_to(LAUNCH)
    return stage


def plans(stage, *runs: str) -> None:
    for process in range(2):
        stage.plan(*runs, process=process)


def test_a_job_that_is_stopped_goes_back_into_the_queue_until_it_has_finished(clone):
    plans(clone, "commit 10; exit 75", "commit 20; exit 75", "commit 30; exit 0")
    ended = clone.run("sbatch", SLURM, *FLAGS)
    assert ended.returncode == 0, ended.stderr
    assert clone.log("scontrol") == ["requeue 4711"] * 2
    assert [clone.runs(process) for process in range(2)] == [3, 3]
    assert [clone.variables(process)["SLURM_PROCID"] for process in range(2)] == ["0", "1"]


def test_a_task_that_stops_a_little_later_is_not_taken_for_killed(clone):
    plans(clone, "commit 10; exit 75", "exit 0")
    clone.plan("sleep 0.3; commit 10; exit 75", "exit 0", process=1)
    assert clone.run("sbatch", SLURM, *FLAGS).returncode == 0
    assert clone.log("scontrol") == ["requeue 4711"]
    assert [clone.runs(process) for process in range(2)] == [2, 2]
    assert not list(clone.folder.glob("slurm-*"))


def test_a_stop_of_one_task_and_a_crash_of_the_other_is_a_crash(clone):
    plans(clone, "exit 75", "exit 0")
    clone.plan("sleep 0.2; exit 1", "exit 0", process=1)
    assert clone.run("sbatch", SLURM, *FLAGS).returncode == 0
    assert clone.log("scontrol") == []
    assert [clone.runs(process) for process in range(2)] == [2, 2]


def test_a_crash_is_started_again_within_the_job(clone):
    plans(clone, "commit 10; stop_at 15", "commit 20; exit 0")
    clone.plan("sleep 0.2; exit 1", "exit 0", process=1)
    ended = clone.run("sbatch", SLURM, *FLAGS)
    assert ended.returncode == 0, ended.stderr
    assert clone.log("scontrol") == []
    assert [clone.runs(process) for process in range(2)] == [2, 2]


def test_a_mistake_counts_though_the_other_task_is_killed_for_it(clone):
    plans(clone, "exit 2")
    clone.plan("stop_at 9", process=1)
    assert clone.run("sbatch", SLURM, *FLAGS).returncode == 2
    assert [clone.runs(process) for process in range(2)] == [1, 1]
    assert not list(clone.folder.glob("slurm-*"))


@pytest.mark.parametrize(("status", "seen", "runs"), [(2, 2, 1), (7, 137, 4)])
def test_a_mistake_and_a_crash_loop_end_the_job(clone, status, seen, runs):
    """After a crash srun gives the highest status, that of the task which it has killed."""
    clone.plan(*[f"exit {status}"] * 10)
    clone.plan(*["stop_at 9"] * 10, process=1)
    assert clone.run("sbatch", SLURM, *FLAGS).returncode == seen
    assert clone.log("scontrol") == []
    assert clone.runs() == runs


@pytest.mark.parametrize("programs_too", [False, True], ids=["cgroup", "linuxproc"])
def test_sigterm_of_the_tasks_saves_and_puts_the_job_back(clone, programs_too):
    """What --signal=TERM@120 does: SLURM signals the tasks and not the script.

    With proctrack/cgroup that is the first process of each task alone, else all of its processes.
    """
    plans(clone, "stop_at 30", "exit 0")
    running = clone.begin("sbatch", SLURM, *FLAGS)
    assert running.stdout is not None
    assert [running.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    tasks = [int(pid) for pid in (clone.folder / "tasks").read_text().split()]
    for pid in [*tasks, *(clone.survivors() if programs_too else [])]:
        os.kill(pid, signal.SIGTERM)
    ended = clone.end(running)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "stopped at step 30\n" * 2
    assert clone.log("scontrol") == ["requeue 4711"]


def test_odd_names_arrive_and_proxies_do_not(clone):
    odd = ("--workdir=a 'run'", '--config.data.path=/it\'s "here" $HOME')
    plans(clone, "exit 0")
    ended = clone.run("sbatch", SLURM, *odd, http_proxy="http://p", HTTPS_PROXY="http://p")
    assert ended.returncode == 0, ended.stderr
    assert clone.arguments() == ["-m", "mae_jax.main", *odd]
    assert not [name for name in clone.variables() if name.lower().endswith("_proxy")]


def test_dry_run_shows_options_and_command(stage):
    ended = stage.run("bash", SLURM, "--dry-run", *FLAGS, "--config.data.path=/it's here")
    assert (ended.returncode, ended.stderr) == (0, "")
    check_golden("slurm.txt", ended.stdout.replace(f"{ROOT}/", "CLONE/"))
    assert stage.runs() == 0


def test_the_signal_is_for_the_tasks_and_not_for_the_script():
    options = re.findall(r"^#SBATCH --signal=(.*)$", SLURM.read_text(), re.MULTILINE)
    assert options == ["TERM@120"]  # "B:TERM@120" would be for the script alone


def test_started_without_slurm_it_says_how(stage):
    ended = stage.run("bash", SLURM, *FLAGS)
    assert ended.returncode == 2
    assert "sbatch launch/slurm.sh" in ended.stderr
    assert stage.runs() == 0


def test_submitted_from_elsewhere_it_says_where(stage):
    ended = stage.run("sbatch", SLURM, *FLAGS)
    assert ended.returncode == 2
    assert "expected to be called in the folder of the clone" in ended.stderr


def free_job_id() -> int:
    """Return the number of a job whose port, which JAX makes of it, is free on this machine.

    Source: jax/_src/clusters/slurm_cluster.py: the last 4096 ports.
    """
    for job in range(4096):
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", 65536 - 4096 + job))
            except OSError:
                continue
            return job
    raise AssertionError("no port is free")


@pytest.mark.multihost
@pytest.mark.slow
def test_jax_finds_the_processes_by_the_variables_of_slurm(clone):
    job = free_job_id()
    program = HERE / "slurm_program.py"
    for process in range(2):
        clone.plan(f'exec "$STUB_PYTHON" "{program}"', process=process)
    ended = clone.run(
        "sbatch",
        SLURM,
        *FLAGS,
        STUB_JOB_ID=str(job),
        JAX_COORDINATOR_BIND_ADDRESS=f"127.0.0.1:{65536 - 4096 + job}",
        JAX_PLATFORMS="cpu",
        PYTHONPATH=str(ROOT),
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("process")]
    assert sorted(lines) == [
        "process 0 of 2, sum 3.0",
        "process 1 of 2, sum 3.0",
    ]
