"""What a run leaves in its folder and on the terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from mae_jax.errors import StopError
from mae_jax.train.writers import Console, RunWriter

PROGRESS = {"train/loss": 0.98765, "train/learning_rate": 1.5e-4, "train/images_per_second": 1234.5}


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`, by a reader that takes strict JSON alone."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def write(workdir: Path, steps: list[int], **options: Any) -> None:
    writer = RunWriter(workdir, **options)
    for step in steps:
        writer.scalars(step, {"train/loss": step / 8})
    writer.close()


def test_each_call_is_one_line_of_json(tmp_path):
    writer = RunWriter(tmp_path / "deep" / "run")
    writer.scalars(1, {"train/loss": 0.5, "train/learning_rate": np.float32(0.25)})
    writer.scalars(2, {"val/loss": np.float64(1.5)})
    # At once, and not when the run is over.
    assert rows(tmp_path / "deep" / "run") == [
        {"step": 1, "train/loss": 0.5, "train/learning_rate": 0.25},
        {"step": 2, "val/loss": 1.5},
    ]
    writer.close()


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    writer = RunWriter(tmp_path)
    writer.scalars(1, {"a": float("nan"), "b": float("inf"), "c": -np.inf, "d": np.float32("nan")})
    writer.scalars(2, {"a": 0.0})
    writer.close()
    assert rows(tmp_path) == [
        {"step": 1, "a": None, "b": None, "c": None, "d": None},
        {"step": 2, "a": 0.0},
    ]


def test_resumed_run_drops_what_came_after_its_checkpoint_and_goes_on(tmp_path):
    write(tmp_path, [1, 5, 10, 15, 20])
    write(tmp_path, [15, 25], first_step=10)
    assert [row["step"] for row in rows(tmp_path)] == [1, 5, 10, 15, 25]
    assert [row["train/loss"] for row in rows(tmp_path)] == [s / 8 for s in (1, 5, 10, 15, 25)]


def test_resumed_run_drops_a_line_cut_by_a_kill(tmp_path):
    write(tmp_path, [1, 5])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')
    write(tmp_path, [10], first_step=8)
    assert [row["step"] for row in rows(tmp_path)] == [1, 5, 10]


def test_run_from_scratch_starts_an_empty_file(tmp_path):
    write(tmp_path, [0, 1, 5])
    write(tmp_path, [2])
    assert [row["step"] for row in rows(tmp_path)] == [2]


def test_file_is_there_before_the_first_row(tmp_path):
    RunWriter(tmp_path).close()
    assert rows(tmp_path) == []


def test_pictures_are_written_as_they_are(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    writer = RunWriter(tmp_path)
    writer.picture(40, "pictures", image)
    writer.picture(40, "attention", 255 - image)
    writer.close()
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "step_40.png",
        "attention_step_40.png",
    }
    np.testing.assert_array_equal(Image.open(tmp_path / "pictures" / "step_40.png"), image)
    other = Image.open(tmp_path / "pictures" / "attention_step_40.png")
    np.testing.assert_array_equal(other, 255 - image)


def test_tables_are_written_as_they_are(tmp_path):
    writer = RunWriter(tmp_path)
    writer.table(40, "per_class", "class,top1\nzero,98.00\n")
    writer.table(80, "per_class", "class,top1\nzero,99.00\n")
    writer.close()
    tables = {path.name: path.read_text() for path in (tmp_path / "tables").iterdir()}
    assert tables == {
        "per_class_step_40.csv": "class,top1\nzero,98.00\n",
        "per_class_step_80.csv": "class,top1\nzero,99.00\n",
    }


def test_tensorboard_gets_the_scalars_too(tmp_path):
    write(tmp_path, [1, 2])
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()


@pytest.mark.parametrize("first_step", [0, 40])
def test_tensorboard_drops_what_a_killed_run_has_left(tmp_path, first_step):
    RunWriter(tmp_path, first_step=first_step).close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    events = [Event.FromString(record) for record in records(path)]
    (start,) = (event for event in events if event.HasField("session_log"))
    assert start.session_log.status == SessionLog.START
    assert start.step == first_step + 1


def records(path: Path) -> Iterator[bytes]:
    """Yield the records of a TFRecord file: a length, its checksum, the record, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[12 + length + 4 :]


@pytest.mark.parametrize("what", ["scalars", "picture"])
def test_what_tensorboards_file_does_not_take_is_one_line_at_once(tmp_path, monkeypatch, what):
    writer = RunWriter(tmp_path)

    def full(self: RecordWriter, record: bytes = b"") -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    write = {
        "scalars": lambda: writer.scalars(1, {"train/loss": 1.0}),
        "picture": lambda: writer.picture(1, "pictures", np.zeros((2, 2, 3), np.uint8)),
    }[what]
    with pytest.raises(StopError, match=r"cannot be written: No space left on device$"):
        write()
    monkeypatch.setattr(RecordWriter, "flush", full)
    writer.close()  # nothing in place of the error that is on its way


def test_writer_that_is_not_active_writes_nothing(tmp_path):
    writer = RunWriter(tmp_path / "run", active=False)
    writer.scalars(1, {"train/loss": 0.5})
    writer.picture(1, "pictures", np.zeros((2, 2, 3), np.uint8))
    writer.table(1, "per_class", "class\n")
    writer.flush()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_progress_is_plain_lines(capsys):
    console = Console(200)
    console.advance(20)
    console.progress(20, PROGRESS, seconds_left=725.0)
    console.say("saved step 20")
    console.close()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "step 20/200  loss 0.9877  lr 1.50e-04  1234 images/s  12:05 left",
        "saved step 20",
    ]
    assert err == ""


def test_quiet_console_prints_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console = Console(200, quiet=True)
    console.say("hello")
    console.advance(3)
    console.progress(3, PROGRESS, 1.0)
    console.close()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_a_bar_that_goes_on_where_the_run_does(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console(200, first_step=50)
    console.advance(100)
    console.progress(100, PROGRESS, seconds_left=45.0)
    console.say("saved step 100")
    console.close()
    assert capsys.readouterr().out == "saved step 100\n"
    shown = terminal.getvalue()
    before, _, after = shown.partition(" 100/200")
    assert " 50/200" in before
    assert "loss 0.9877  lr 1.50e-04  1234 images/s  45 s left" in after


def test_bar_appears_with_the_first_step(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console(200)
    console.say("started from scratch")
    assert terminal.getvalue() == ""
    console.advance(1)
    assert " 0/200" in terminal.getvalue()  # it is drawn again after a tenth of a second
    console.close()
    assert capsys.readouterr().out == "started from scratch\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "pictures", "tables"])
def test_what_cannot_be_written_is_one_line(tmp_path, name):
    writer = RunWriter(tmp_path)
    if name == "metrics.jsonl":
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("not a folder")
    write = {
        "metrics.jsonl": lambda: writer.scalars(1, {"train/loss": 1.0}),
        "pictures": lambda: writer.picture(1, "pictures", np.zeros((2, 2, 3), np.uint8)),
        "tables": lambda: writer.table(1, "classes", "a,b"),
    }[name]
    with pytest.raises(StopError) as stopped:
        write()
    reason = "Is a directory" if name == "metrics.jsonl" else "File exists"
    assert str(stopped.value) == f"{tmp_path / name} cannot be written: {reason}"
    writer.close()
