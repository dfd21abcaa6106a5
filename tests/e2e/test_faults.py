"""The program under faults that befall it: signals at odd moments, disks, folders, orphans."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cases import STEPS
from tests.helpers import (
    assert_same_state,
    finish,
    metrics,
    read_until,
    run,
    run_here,
    start,
    tiny_run,
    write_photographs,
)

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run, of one device, as those that are started."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, output = run(tiny_run(workdir))
    assert status == 0, output
    return workdir


def steps(workdir: Path) -> list[int]:
    """Return the steps that are committed."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def wait_for_a_save(workdir: Path) -> None:
    """Return while a step is being written."""
    limit = time.monotonic() + 120
    while not list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")):
        assert time.monotonic() < limit
        time.sleep(0.001)


def assert_goes_on_to_the_same_bits(whole: Path, workdir: Path, first: int) -> None:
    status, output = run(tiny_run(workdir))
    assert status == 0, output
    assert f"resumed from step {first}" in output
    assert_same_state(whole, workdir, STEPS)


def test_a_signal_before_the_run_has_begun_ends_it_at_once(tmp_path):
    process = start(tiny_run(tmp_path / "run"))
    process.terminate()
    assert finish(process) == (-signal.SIGTERM, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_while_the_step_is_compiled_saves_step_0(whole, tmp_path):
    workdir = tmp_path / "run"
    # Compiled anew, which takes seconds.
    process = start(tiny_run(workdir), JAX_ENABLE_COMPILATION_CACHE="0")
    read_until(process, "started from scratch")
    process.terminate()
    status, output = finish(process)
    assert status == 75, output
    assert f"stopped at step 0 of {STEPS} by SIGTERM; everything is saved" in output
    assert steps(workdir) == [0]
    assert_goes_on_to_the_same_bits(whole, workdir, 0)


@pytest.mark.drill
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_within_a_save_ends_when_that_and_its_own_step_are_saved(whole, tmp_path, times):
    workdir = tmp_path / "run"
    process = start(tiny_run(workdir, run__save_every="1"))
    wait_for_a_save(workdir)
    for _ in range(times):
        process.terminate()
    status, output = finish(process)
    assert status == 75, output
    newest = steps(workdir)[-1]
    assert f"stopped at step {newest} of {STEPS} by SIGTERM; everything is saved" in output
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert_goes_on_to_the_same_bits(whole, workdir, newest)


@pytest.mark.drill
def test_a_second_ctrl_c_ends_it_at_once_and_the_last_save_stays(whole, tmp_path):
    workdir = tmp_path / "run"
    process = start(tiny_run(workdir, epochs="40.0"))
    read_until(process, "saved step 10")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    status, output = finish(process)
    # The second one may come before Python has seen the first: then they are one.
    assert status in (-signal.SIGINT, 75), output
    assert steps(workdir)[-1] >= 10


def of_its_own(pid: int) -> Iterator[int]:
    """Yield the processes of a process's group that are alive."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] not in "ZX":
            yield int(name)


@pytest.mark.drill
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes in /proc")
def test_data_workers_of_a_run_that_is_killed_or_stopped_end_with_it(tmp_path):
    for number, ended in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        flags = tiny_run(tmp_path / number.name, epochs="40.0", run__workers="2")
        process = start(flags)
        try:
            read_until(process, "step 10/")
            assert len(list(of_its_own(process.pid))) >= 1 + 2
            process.send_signal(number)  # to the program alone
            assert finish(process)[0] == ended
            limit = time.monotonic() + 30
            while left := list(of_its_own(process.pid)):
                assert time.monotonic() < limit, left
                time.sleep(0.1)
        finally:
            for pid in of_its_own(process.pid):
                os.kill(pid, signal.SIGKILL)


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    workdir = tmp_path / "file" / "run"
    status, output = run_here(tiny_run(workdir))
    expected = "expected a folder to write to, got: Not a directory"
    assert (status, output) == (2, f"error: --workdir={workdir}: {expected}\n")


NAMES = {
    "space and letters": "a run ÄÖ é 日本",
    "long": "/".join(["n" * 200] * 10),
    "quotes": 'it\'s "a" $run',
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_can_be_worked_in(tmp_path, name):
    workdir = tmp_path / NAMES[name]
    for end in (2, 3):
        status, output = run_here([*tiny_run(workdir), f"--stop_at_step={end}"])
        assert status == 0, output
    assert "resumed from step 2" in output
    assert steps(workdir) == [2, 3]


@pytest.mark.slow
def test_a_relative_folder_and_one_below_home_can_be_worked_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for end, workdir in ((2, "run"), (3, "~/run"), (4, "./elsewhere/../run")):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        status, output = run_here([*tiny_run(Path(workdir)), f"--stop_at_step={end}"])
        assert status == 0, output
    assert steps(tmp_path / "run") == [2, 3, 4]


def folder_run(workdir: Path, pictures: Path, **fields: str) -> list[str]:
    """Return the flags of a run on a folder of photographs."""
    data = {"data__source": "folder", "data__path": str(pictures), "data__augment": "none"}
    data |= {"data__mean": "0.5,0.5,0.5", "data__std": "0.25,0.25,0.25", "model__channels": "3"}
    epochs = {"epochs": "20.0", "optimizer__warmup_epochs": "1.0", "eval__every": "0"}
    return tiny_run(workdir, **data | epochs | fields)


@pytest.mark.slow
def test_data_that_have_changed_since_the_checkpoint_are_noted_and_used(tmp_path):
    pictures = tmp_path / "pictures"
    write_photographs(pictures, 18)
    flags = folder_run(tmp_path / "run", pictures)
    assert run_here([*flags, "--stop_at_step=2"])[0] == 0
    (pictures / "photo_03.jpg").rename(pictures / "another.jpg")
    status, output = run_here([*flags, "--stop_at_step=3"])
    assert status == 0, output
    assert "note: the training data are not those of the checkpoint\nresumed from step 2" in output


@pytest.mark.drill
def test_images_that_vanish_while_it_trains_are_replaced_and_counted(tmp_path):
    pictures = tmp_path / "pictures"
    write_photographs(pictures, 34)
    process = start(folder_run(tmp_path / "run", pictures, run__log_every="1"))
    read_until(process, "step 1/")
    for path in sorted(pictures.iterdir())[:3]:
        path.unlink()
    status, output = finish(process)
    assert status == 0, output
    assert "Traceback" not in output
    bad = [row["train/bad_examples"] for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert 1 <= bad[-1] <= 3


def limit_files(pid: int, size: int) -> None:
    """Let no file of a process grow beyond a number of bytes from now on: as on a full disk."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.drill
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
@pytest.mark.parametrize(
    ("log_every", "save_every", "line"),
    [
        (1, 100, "stopped: {workdir}/metrics.jsonl cannot be written: File too large"),
        (1000, 10, "stopped: checkpoint of step {step} was not saved: "),
    ],
)
def test_a_disk_that_takes_nothing_more_ends_the_run_with_one_line(
    tmp_path, log_every, save_every, line
):
    """In a row of metrics, and in a save, after whose failure Orbax's threads may complain."""
    workdir = tmp_path / "run"
    fields = {"run__log_every": str(log_every), "run__save_every": str(save_every)}
    flags = tiny_run(workdir, epochs="40.0", eval__every="0", **fields)
    process = start(flags)
    read_until(process, f"saved step {save_every}\n")
    limit_files(process.pid, 1)
    status, output = finish(process)
    assert status == 1, output
    stopped = [said for said in output.splitlines() if said.startswith("stopped: ")]
    kept = steps(workdir)
    assert len(stopped) == 1, output
    assert stopped[0].startswith(line.format(workdir=workdir, step=kept[-1] + save_every))
    assert not (workdir / "lock").exists()
    rows = metrics(workdir)  # whole lines
    assert rows[-1]["step"] >= 1
    # There is room again.
    status, output = run([*flags, f"--stop_at_step={kept[-1] + 1}"])
    assert status == 0, output
    assert f"resumed from step {kept[-1]}" in output
