"""The program on a folder that is damaged, full, or in use by another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mae_jax.train import checkpoint
from tests.e2e.cases import STEPS
from tests.helpers import assert_same_state, kill, metrics, read_until, run_here, start, tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]


@pytest.fixture(scope="module")
def whole(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run, with the steps 20, 30 and 40."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, output = run_here(tiny_run(workdir))
    assert status == 0, output
    assert not (workdir / "lock").exists()
    return workdir


@pytest.fixture
def killed(whole: Path, tmp_path: Path) -> Path:
    """Return the folder of a run that was killed after step 30."""
    workdir = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    return workdir


def damage(step: Path) -> None:
    """Flip a bit in the middle of each file that holds parameters."""
    for pattern in ("d/*", "ocdbt.process_*/d/*"):
        for path in (step / "params").glob(pattern):
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)


def test_a_run_goes_on_from_the_step_before_the_damaged_one_to_the_same_bits(whole, killed):
    checkpoints = killed / "checkpoints"
    damage(checkpoints / "30")
    status, output = run_here(tiny_run(killed))
    assert status == 0, output
    lines = output.splitlines()
    (skipped,) = [line for line in lines if line.startswith("skipped")]
    assert skipped.startswith("skipped step 30: params")
    assert skipped.endswith("; kept as 30.refused")
    assert lines[lines.index(skipped) + 1] == "resumed from step 20"
    assert "Traceback" not in output
    assert {path.name for path in checkpoints.iterdir()} == {"20", "30", "30.refused", "40"}
    assert_same_state(whole, killed, 30)
    assert_same_state(whole, killed, STEPS)
    steps = [row["step"] for row in metrics(killed) if "train/loss" in row]
    # What the killed run has logged of steps 21 to 30 is gone; the first step is logged as well.
    assert steps == [1, 5, 10, 15, 20, 21, 25, 30, 35, 40]


def test_a_run_without_any_good_step_stops_and_touches_nothing(killed):
    for step in ("20", "30"):
        damage(killed / "checkpoints" / step)
    before = {path: path.is_file() and path.read_bytes() for path in killed.rglob("*")}
    status, output = run_here(tiny_run(killed))
    assert status == 2
    (line,) = output.splitlines()
    # Orbax may meet the damage of the two at another place first, or at the same.
    folder = killed / "checkpoints"
    if line.endswith("; nor any older step"):
        assert line.startswith(f"error: cannot restore {folder / '30'}: params")
    else:
        assert line.startswith(f"error: cannot restore any step of {folder}: step 30: params")
        assert "; step 20: params" in line
    assert {path: path.is_file() and path.read_bytes() for path in killed.rglob("*")} == before


def room_for(monkeypatch: pytest.MonkeyPatch, free: list[int]) -> None:
    """Make the disk have so much room at each question, and none afterwards."""
    usage = lambda path: SimpleNamespace(free=free.pop(0) if free else 0)  # noqa: E731
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)


@pytest.mark.drill
def test_a_disk_without_room_for_one_step_is_refused_before_anything_is_compiled(
    tmp_path, monkeypatch
):
    room_for(monkeypatch, [])
    status, output = run_here(tiny_run(tmp_path / "run"))
    assert status == 2
    assert "bytes free for a checkpoint, got 0" in output.splitlines()[-1]
    assert "compiled" not in output


@pytest.mark.drill
def test_a_disk_that_becomes_full_ends_the_run_and_leaves_what_is_saved(
    whole, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    room_for(monkeypatch, [10**12] * 3)  # at the start, for step 10 and for step 20
    status, output = run_here(tiny_run(workdir))
    assert status == 2
    assert "bytes free for a checkpoint, got 0" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"10", "20"}
    assert not (workdir / "lock").exists()
    monkeypatch.undo()
    status, output = run_here(tiny_run(workdir))
    assert "resumed from step 20" in output
    assert_same_state(whole, workdir, STEPS)


def test_a_save_that_fails_ends_the_run_with_one_line(tmp_path, monkeypatch):
    def fail(manager: object) -> None:
        raise OSError("the disk is on fire\nand more")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", fail)
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "close", lambda manager: None)
    status, output = run_here(tiny_run(tmp_path / "run"))
    assert status == 1
    line = "stopped: checkpoint of step 10 was not saved: the disk is on fire"
    assert output.splitlines()[-1] == line
    assert "saved step 10" not in output


@pytest.mark.drill
def test_a_folder_in_use_is_refused_and_free_at_once_when_the_run_is_killed(tmp_path):
    workdir = tmp_path / "run"
    # Long enough to be there still.
    flags = tiny_run(workdir, epochs="40.0")
    process = start(flags)
    try:
        read_until(process, "saved step 10")
        status, output = run_here(flags)
        assert status == 2
        assert f"got one of process {process.pid} on" in output
        assert process.poll() is None
    finally:
        kill(process)
    assert (workdir / "lock").exists()
    status, output = run_here([*flags, "--stop_at_step=11"])
    assert f"took over the lock of process {process.pid} on" in output
    assert "resumed from step" in output
    assert "saved step" in output or "finished at step" in output
    assert not (workdir / "lock").exists()
