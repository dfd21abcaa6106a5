"""Twenty kills of a pod of two processes, at any moment, from which `restart.sh` recovers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import assert_same_state, metrics, overrides, shrunk
from tests.launch.conftest import LAUNCH, ROOT, Stage, is_alive

KILLS = 20
STEPS = 600
SECONDS = 240  # for one thing to happen
FIELDS = {
    "epochs": str(STEPS / 250),
    "eval.every": "0",
    "eval.readouts": "False",
    "eval.pictures": "0",
    "run.save_every": "5",  # a step is done in milliseconds
    "run.log_every": "5",
}


@contextlib.contextmanager
def pod(stage: Stage, workdir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start `local.sh` with two processes and its loop, what it says in `said` of the folder."""
    variables = {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        # Of these runs alone: a kill may come while a program is put there.
        "JAX_COMPILATION_CACHE_DIR": str(stage.folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    flags = overrides(shrunk("demo") | FIELDS)
    command = [LAUNCH / "local.sh", "--processes=2", "--config=demo", f"--workdir={workdir}"]
    with (stage.folder / "said").open("wb") as said:
        running = subprocess.Popen(
            [*command, *flags],
            env=stage.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield running
    finally:
        if running.poll() is None:
            running.terminate()  # passed on to all, who save
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                for pid in stage.programs().values():
                    os.kill(pid, signal.SIGKILL)
                running.kill()
                running.wait()


def newest(checkpoints: Path) -> int:
    """Return the newest step that is committed, -1 for none."""
    return max((int(p.name) for p in checkpoints.glob("*") if p.name.isdecimal()), default=-1)


def is_saving(checkpoints: Path) -> bool:
    return any(checkpoints.glob("*.orbax-checkpoint-tmp"))


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in metrics(workdir) if "train/loss" in row}


def moments(rng: random.Random) -> Iterator[str]:
    """Yield when to kill, without end: the loop gives up after three starts without a new step."""
    in_a_row = 0
    while True:
        moment = rng.choice(["starting", "training", "saving"])
        in_a_row = in_a_row + 1 if moment == "starting" else 0
        if in_a_row < 3:
            yield moment


@pytest.mark.drill
@pytest.mark.multihost
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes in /proc")
def test_twenty_kills_of_two_processes_at_any_moment_end_in_the_same_bits(stage):
    """Either process, drawn at random: as it starts, between two saves, and within a save."""
    whole, killed = stage.folder / "whole", stage.folder / "run"
    with pod(stage, whole) as running:
        assert running.wait(900) == 0, (stage.folder / "said").read_text()
    rng = random.Random(9)
    checkpoints = killed / "checkpoints"
    seen: set[int] = set()
    within = 0
    with pod(stage, killed) as running:

        def said() -> str:
            return (stage.folder / "said").read_text()[-3000:]

        def wait_for(condition: Callable[[], bool]) -> None:
            limit = time.monotonic() + SECONDS
            while not condition():
                assert running.poll() is None, f"it has ended:\n{said()}"
                assert time.monotonic() < limit, f"waited in vain:\n{said()}"
                time.sleep(0.002)

        def new_programs() -> dict[str, int]:
            return {n: pid for n, pid in stage.programs().items() if pid not in seen}

        for kill, moment in zip(range(KILLS), moments(rng), strict=False):
            wait_for(lambda: len(new_programs()) == 2)
            programs = new_programs()
            seen.update(programs.values())
            before = newest(checkpoints)
            if moment == "starting":
                time.sleep(rng.uniform(0, 10))
            else:
                wait_for(lambda before=before: newest(checkpoints) > before)
                time.sleep(rng.uniform(0, 0.3))
            if moment == "saving":
                wait_for(lambda: is_saving(checkpoints))
            victim = rng.choice(sorted(programs))
            os.kill(programs[victim], signal.SIGKILL)
            left = is_saving(checkpoints)
            within += left
            print(f"kill {kill + 1}: process {victim}, {moment}, step {before} before,"
                  f" {newest(checkpoints)} now{', within a save' if left else ''}")  # fmt: skip
        assert running.wait(900) == 0, said()
    restarts = (stage.folder / "said").read_text().count("; restart ")
    assert restarts == KILLS, said()  # and no other
    assert within >= 3
    assert not [pid for pid in seen if is_alive(pid)]
    assert_same_state(whole, killed, STEPS)
    expected, found = losses(whole), losses(killed)
    assert found.keys() >= expected.keys()
    assert {step: found[step] for step in expected} == expected
