from __future__ import annotations

import shlex

import pytest

from tests.launch.conftest import LAUNCH, ROOT, STUBS, check_golden

POD = LAUNCH / "tpu_pod.sh"
PLACE = ("--name=mae", "--zone=us-east5-b")
TYPE = ("--type=v6e-16",)
FLAGS = ("--config=vit_l", "--workdir=gs://bucket/run")
ODD = '--config.data.path=gs://bucket/it\'s $HOME "here"'


def states(stage, *values: str) -> None:
    (stage.folder / "states").write_text("".join(f"{value}\n" for value in values))


def verbs(stage) -> list[str]:
    """Return what gcloud was asked to do with the pod, without looks at it."""
    asked = []
    for line in stage.log("gcloud"):
        words = line.split()
        verb = words[3] if words[2:3] == ["queued-resources"] else " ".join(words[2:4])
        if "tpu_worker.sh status" in line or verb == "describe" or words[:2] == ["storage", "ls"]:
            continue
        asked.append("setup" if line.endswith("tpu_worker.sh setup") else verb)
    return asked


@pytest.mark.parametrize(
    "what", ["create", "setup", "start", "logs", "status", "stop", "watch", "delete"]
)
def test_dry_run_shows_each_command(stage, what):
    flags = [*PLACE, "--project=lab", "--dry-run"]
    if what in ("create", "watch"):
        flags += [*TYPE, "--spot", "--network=net"]
    if what in ("start", "watch"):
        flags += [*FLAGS, ODD]
    if what in ("setup", "watch"):
        flags += ["--data=gs://lab-data"]
    ended = stage.run(POD, what, *flags)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert stage.log("gcloud") == []
    check_golden(f"tpu_pod_{what}.txt", ended.stdout.replace(shlex.quote(str(ROOT)), "CLONE"))


def test_settings_may_come_from_the_environment(stage):
    by_flags = stage.run(POD, "create", *PLACE, *TYPE, "--spot", "--project=lab", "--dry-run")
    by_environment = stage.run(
        POD,
        "create",
        "--dry-run",
        TPU_NAME="mae",
        TPU_ZONE="us-east5-b",
        TPU_TYPE="v6e-16",
        TPU_SPOT="1",
        TPU_PROJECT="lab",
    )
    assert by_environment.stdout == by_flags.stdout


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v6e-64", "v2-alpha-tpuv6e"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_the_runtime_version_is_that_of_the_type(stage, accelerator, version):
    ended = stage.run(POD, "create", *PLACE, f"--type={accelerator}", "--dry-run")
    assert f"--runtime-version={version}" in ended.stdout.split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["fly"], "tpu_pod.sh: expected create, setup, start, logs, status, stop, watch or delete"),
        (["create", "--zone=us-east5-b", *TYPE], "--name: expected up to 63 small letters"),
        (["create", "--name=my pod", "--zone=z", *TYPE], "--name: expected up to 63 small letters"),
        (["create", "--name=it's", "--zone=z", *TYPE], "--name: expected up to 63 small letters"),
        (["delete", "--name=mae"], "--zone: expected a zone"),
        (["delete", "--name=mae", "--zone=a b"], "--zone: expected a zone"),
        (["setup", *PLACE, "--data=gs://a/b"], "--data: expected a bucket, as gs://NAME"),
        (["create", *PLACE], "--type: expected an accelerator type"),
        (["create", *PLACE, "--type=v9-8"], "--version: expected the runtime version of"),
        (["create", *PLACE, *TYPE, "--sopt"], "--sopt: there is no such flag of create"),
        (["start", *PLACE, "--config=vit_l"], "--workdir: expected --workdir=DIR among the flags"),
        (["start", *PLACE, "--workdir=runs/x"], "--workdir: expected a bucket (gs://...)"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(stage, flags, message):
    ended = stage.run(POD, *flags)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}")
    assert ended.stderr.count("\n") == 1
    assert stage.log("gcloud") == []


def test_a_pod_is_created_set_up_and_trained_by_hand(stage):
    for process in range(2):
        stage.plan("echo at work; stop_at 30", "exit 0", process=process)
    states(stage, "ACTIVE")
    assert stage.run(POD, "setup", *PLACE).returncode == 0
    assert "--python 3.12" in stage.log("uv")[0]
    assert stage.run(POD, "start", *PLACE, *FLAGS, ODD).returncode == 0
    for process in range(2):
        log = stage.folder / f"home.{process}/mae_jax_run/log"
        stage.wait_for(lambda log=log: log.exists() and "ready" in log.read_text())
        assert stage.arguments(process) == ["-m", "mae_jax.main", *FLAGS, ODD]
    again = stage.run(POD, "start", *PLACE, *FLAGS)
    assert again.stdout == "is running already\n" * 2
    assert stage.run(POD, "status", *PLACE).stdout == "ACTIVE\n" + "state: running\n" * 2
    assert "at work" in stage.run(POD, "logs", *PLACE).stdout
    assert stage.run(POD, "stop", *PLACE).stdout == "state: ended 75\n" * 2
    assert "stopped at step 30" in stage.run(POD, "logs", *PLACE).stdout
    assert [stage.runs(process) for process in range(2)] == [1, 1]


def test_the_bucket_with_the_data_is_mounted_and_again_after_a_restart(stage):
    for process in range(2):
        stage.plan("exit 0", process=process)
    assert stage.run(POD, "setup", *PLACE, "--data=gs://lab-data").returncode == 0
    call = "--implicit-dirs -o ro lab-data /mnt/data"
    assert stage.log("gcsfuse") == [call] * 2
    assert stage.run(POD, "start", *PLACE, *FLAGS).returncode == 0
    assert stage.log("gcsfuse") == [call] * 4  # the stub never mounts anything
    for process in range(2):
        stage.wait_for((stage.folder / f"home.{process}/mae_jax_run/status").exists)


def test_watch_makes_a_preempted_pod_anew_and_ends_with_the_run(stage):
    for process in range(2):
        stage.plan("commit 10; stop_at 30", "commit 40; exit 0", process=process)
    states(stage, "ABSENT", "PROVISIONING", "ACTIVE", "SUSPENDED", "ABSENT", "ACTIVE")
    ended = stage.run(POD, "watch", *PLACE, *TYPE, "--spot", *FLAGS)
    assert ended.returncode == 0, ended.stderr
    assert verbs(stage) == [
        *("create", "tpu-vm scp", "setup", "tpu-vm ssh"),
        *("delete", "create", "tpu-vm scp", "setup", "tpu-vm ssh"),
    ]
    assert [stage.runs(process) for process in range(2)] == [2, 2]
    assert "the pod is SUSPENDED" in ended.stderr
    assert "the run has finished" in ended.stderr


@pytest.mark.parametrize(("status", "runs"), [(2, 1), (7, 4)])
def test_watch_ends_with_the_status_of_a_run_that_is_not_to_be_started_again(stage, status, runs):
    for process in range(2):
        stage.plan(*[f"exit {status}"] * 10, process=process)
    states(stage, "ACTIVE")
    ended = stage.run(POD, "watch", *PLACE, *TYPE, *FLAGS)
    assert ended.returncode == status
    assert f"the run has ended with status {status}" in ended.stderr
    assert [stage.runs(process) for process in range(2)] == [runs, runs]


def test_watch_starts_again_what_was_stopped(stage):
    for process in range(2):
        stage.plan("stop_at 30", "exit 0", process=process)
    states(stage, "ACTIVE")
    assert stage.run(POD, "setup", *PLACE).returncode == 0
    assert stage.run(POD, "start", *PLACE, *FLAGS).returncode == 0
    for process in range(2):
        log = stage.folder / f"home.{process}/mae_jax_run/log"
        stage.wait_for(lambda log=log: log.exists() and "ready" in log.read_text())
    assert stage.run(POD, "stop", *PLACE).returncode == 0
    assert stage.run(POD, "watch", *PLACE, *TYPE, *FLAGS).returncode == 0
    assert [stage.runs(process) for process in range(2)] == [2, 2]


@pytest.mark.parametrize("flags", [FLAGS, (*FLAGS, ODD)], ids=["same", "mended"])
def test_watch_starts_again_what_an_earlier_one_saw_end(stage, flags):
    """The mistake may be mended in the flags, or in what they name."""
    for process in range(2):
        stage.plan("exit 2", "exit 0", process=process)
    states(stage, "ACTIVE")
    assert stage.run(POD, "watch", *PLACE, *TYPE, *FLAGS).returncode == 2
    ended = stage.run(POD, "watch", *PLACE, *TYPE, *flags)
    assert ended.returncode == 0, ended.stderr
    assert [stage.arguments(process, run=2)[2:] for process in range(2)] == [[*flags]] * 2


def test_watch_starts_another_run_after_one_that_has_finished(stage):
    for process in range(2):
        stage.plan("exit 0", "commit 20; exit 0", process=process)
    states(stage, "ACTIVE")
    for workdir in ("gs://bucket/run", "gs://bucket/another"):
        flags = ("--config=vit_l", f"--workdir={workdir}")
        assert stage.run(POD, "watch", *PLACE, *TYPE, *flags).returncode == 0
    assert [stage.runs(process) for process in range(2)] == [2, 2]
    assert (stage.folder / "bucket/bucket/another/checkpoints/20").is_dir()


def test_watch_goes_on_watching_its_run_and_refuses_another_meanwhile(stage):
    for process in range(2):
        stage.plan("stop_at 30", "exit 99", process=process)
    states(stage, "ACTIVE")
    assert stage.run(POD, "setup", *PLACE).returncode == 0
    assert stage.run(POD, "start", *PLACE, *FLAGS, ODD).returncode == 0
    other = stage.run(POD, "watch", *PLACE, *TYPE, *FLAGS)
    assert other.returncode == 2
    assert "error: the workers run with other flags than these" in other.stderr
    same = stage.begin(POD, "watch", *PLACE, *TYPE, *FLAGS, ODD)
    looks = len(stage.log("gcloud"))
    stage.wait_for(lambda: len(stage.log("gcloud")) > looks + 4)
    same.terminate()
    stage.end(same)
    assert stage.run(POD, "stop", *PLACE).stdout == "state: ended 75\n" * 2
    assert [stage.runs(process) for process in range(2)] == [1, 1]


def test_a_setup_that_fails_half_way_is_done_again(stage):
    """Here gcsfuse cannot be installed at first: another program holds the lock of apt."""
    programs = stage.folder / "programs"
    programs.mkdir()
    for stub in STUBS.iterdir():
        if stub.name not in ("gcsfuse", "sudo"):
            (programs / stub.name).symlink_to(stub)
    acted = {
        "curl": "",
        "lsb_release": "echo jammy",
        "sudo": '''
            echo "$*" >>"$STUB/sudo.log"
            case "$*" in
              tee*) exec cat >/dev/null ;;
              apt-get*install*) ;;
              *) exit 0 ;;
            esac
            if [ ! -e "$STUB/locked" ]; then touch "$STUB/locked"; exit 100; fi
            ln -sf "$STUB_FOLDER/gcsfuse" "$STUB/programs/"''',
    }
    for name, lines in acted.items():
        (programs / name).write_text(f"#!/bin/bash\n{lines}\n")
        (programs / name).chmod(0o755)
    for process in range(2):
        stage.plan("exit 0", process=process)
    states(stage, "ACTIVE")
    path = stage.environment["PATH"].replace(str(STUBS), str(programs))
    ended = stage.run(POD, "watch", *PLACE, *TYPE, *FLAGS, "--data=gs://lab-data", PATH=path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("cannot set up the workers") == 1
    assert [stage.runs(process) for process in range(2)] == [1, 1]
    # By the `setup` that one worker came through, then by that of both, and by `start`.
    assert len(stage.log("gcsfuse")) == 1 + 2 + 2
    calls = [line for line in stage.log("sudo") if line.startswith("apt-get")]
    assert calls
    assert all("-o DPkg::Lock::Timeout=300" in call for call in calls)


def test_watch_gives_up_requests_that_fail(stage):
    states(stage, "ABSENT", "FAILED", "ABSENT", "FAILED", "ABSENT", "FAILED")
    ended = stage.run(POD, "watch", *PLACE, *TYPE, *FLAGS)
    assert ended.returncode == 1
    assert "the request has failed 3 times running" in ended.stderr
    assert verbs(stage) == ["create", "delete"] * 3


def test_watch_gives_up_when_no_pod_may_be_made(stage):
    (stage.folder / "no_quota").touch()
    states(stage, "ABSENT")
    ended = stage.run(POD, "watch", *PLACE, *TYPE, *FLAGS)
    assert ended.returncode == 1
    assert verbs(stage) == ["create"] * 3


def test_watch_waits_while_the_state_cannot_be_told(stage):
    for process in range(2):
        stage.plan("exit 0", process=process)
    states(stage, "BROKEN", "BROKEN", "BROKEN", "BROKEN", "ACTIVE")
    ended = stage.run(POD, "watch", *PLACE, *TYPE, *FLAGS)
    assert ended.returncode == 0
    assert "there is no network" in ended.stderr
    assert "create" not in verbs(stage)
