"""The tool for checkpoints: what it lists, what it finds, and its exit status."""

from __future__ import annotations

import datetime
import os
import shutil
from pathlib import Path

import pytest

from mae_jax.tools import checkpoints as program
from tests.checkpoints import tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a work folder with the steps 3 and 5, with an average."""
    folder = tmp_path_factory.mktemp("saved")
    return write_checkpoint(folder, tiny_config(), steps=(3, 5), averaged=True)


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip(step: Path, item: str) -> None:
    """Flip a bit in the largest file of an item."""
    files = [path for path in (step / item).rglob("*") if path.is_file()]
    files = [path for path in files if path.name != "commit_success.txt"]
    largest = max(files, key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 4
    largest.write_bytes(raw)


def run(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> tuple[int, list[str]]:
    status = program.main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    return status, (captured.out + captured.err).splitlines()


def test_steps_are_listed_with_what_they_hold(workdir, capsys):
    (workdir / "checkpoints" / "4.refused").mkdir()
    (workdir / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    for path in (workdir / "checkpoints" / "3").rglob("*"):
        os.utime(path, (0, datetime.datetime(2001, 2, 3, 12).timestamp()))
    status, lines = run(capsys, "ls", workdir)
    assert status == 0
    assert len(lines) == 4
    size = sum(p.stat().st_size for p in (workdir / "checkpoints/3").rglob("*") if p.is_file())
    assert lines[0].startswith(f"step 3  {size:,} bytes  2001-02-03 ")
    assert "  complete  pretrain mae vit_s, mae_jax 0.0.7  " in lines[0]
    assert lines[0].endswith("[checksums data ema meta params train]")
    assert lines[1].startswith("step 5  ")
    assert lines[2:] == [
        "4.refused  0 bytes  set aside",
        "6.orbax-checkpoint-tmp  0 bytes  not a step",
    ]
    assert run(capsys, "ls", workdir / "checkpoints")[1] == lines


def test_what_a_step_lacks_is_listed(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints" / "3" / "ema")
    (workdir / "checkpoints" / "5" / "checksums" / "metadata").write_text("{}")
    (workdir / "checkpoints" / "7").mkdir()
    status, lines = run(capsys, "ls", workdir)
    assert status == 0
    assert "  without ema  pretrain mae" in lines[0]
    assert "  checksums is damaged (checksum)  [" in lines[1]
    assert "  it has no item 'meta'  []" in lines[2]


def test_intact_steps_are_called_so(workdir, capsys):
    status, lines = run(capsys, "verify", workdir)
    assert status == 0
    assert [line.split(",")[0] for line in lines] == ["step 3: intact", "step 5: intact"]
    assert int(lines[0].split()[-2]) > 40  # arrays: parameters, their average, the step, counters


@pytest.mark.parametrize("item", ["params", "ema", "train", "data", "meta", "checksums"])
def test_damage_to_an_item_is_found_and_named(workdir, capsys, item):
    flip(workdir / "checkpoints" / "3", item)
    status, lines = run(capsys, "verify", workdir)
    assert status == 1
    assert len(lines) == 2
    assert lines[0].startswith(f"step 3: {item}")
    assert lines[1].startswith("step 5: intact")
    assert run(capsys, "verify", workdir, "--step=3")[0] == 1
    assert run(capsys, "verify", workdir, "--step=5") == (0, lines[1:])


@pytest.mark.parametrize("item", ["params", "ema", "train", "data", "meta", "checksums"])
def test_item_that_was_lost_is_named(workdir, capsys, item):
    shutil.rmtree(workdir / "checkpoints" / "5" / item)
    status, lines = run(capsys, "verify", workdir)
    assert (status, lines[1]) == (1, f"step 5: it has no item '{item}'")


def test_empty_folder_with_a_number_is_damage(workdir, capsys):
    (workdir / "checkpoints" / "9").mkdir()
    status, lines = run(capsys, "verify", workdir)
    assert (status, lines[2]) == (1, "step 9: it holds no arrays")


def test_step_without_checksums_is_read_and_it_is_said(workdir, capsys):
    step = workdir / "checkpoints" / "5"
    shutil.rmtree(step / "checksums")
    (step / "_CHECKPOINT_METADATA").unlink()
    status, lines = run(capsys, "verify", workdir, "--step=5")
    assert status == 0
    assert lines[0].startswith("step 5: can be read, but has no checksums, ")


def test_nothing_is_changed(workdir, capsys):
    flip(workdir / "checkpoints" / "3", "params")
    (workdir / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    before = {p: p.is_file() and p.read_bytes() for p in sorted(workdir.rglob("*"))}
    for action in ("ls", "verify"):
        run(capsys, action, workdir)
    assert {p: p.is_file() and p.read_bytes() for p in sorted(workdir.rglob("*"))} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: expected ls or verify and DIR, got none"),
        (["ls"], "error: expected ls or verify and DIR, got ls"),
        (["ls", ".", "--step=3"], "--step=3: ls lists all steps"),
        (["list", "."], "choose from"),
        (["verify", "nowhere"], "DIR: expected a folder of checkpoints, got nowhere"),
        (["verify", "."], "DIR: expected a folder of checkpoints, got none in ."),
        (["verify", ".", "--stepp=3"], "--stepp: there is no such flag; did you mean --step"),
        (["verify", ".", "--step=x"], "invalid int value"),
    ],
)
def test_mistakes_are_one_line_and_status_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, lines = run(capsys, *flags)
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_step_that_is_not_there_is_a_mistake(workdir, capsys):
    status, lines = run(capsys, "verify", workdir, "--step=4")
    assert status == 2
    assert lines == [f"error: --step=4: expected a step of {workdir}, one of 3, 5"]
