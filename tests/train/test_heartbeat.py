"""The file that says how far a run is, and what its restarts have cost."""

from __future__ import annotations

import json
import types

import pytest

from mae_jax.train import heartbeat
from mae_jax.train.heartbeat import Heartbeat


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=1000.0)
    times = types.SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 7e8 + clock.now)
    monkeypatch.setattr(heartbeat, "time", times)
    return clock


def read(folder):
    return json.loads((folder / "heartbeat.json").read_text())


def test_a_run_begins_with_a_beat(tmp_path, clock):
    Heartbeat(tmp_path, 0)
    expected = {"step": 0, "time": 7e8 + 1000.0, "restarts": 0, "steps_again": 0}
    assert read(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_beats_are_written_every_ten_seconds_at_most(tmp_path, clock):
    beat = Heartbeat(tmp_path, 0)
    clock.now += 9.9
    beat.beat(5)
    assert read(tmp_path)["step"] == 0
    clock.now += 0.1
    beat.beat(6)
    assert read(tmp_path)["step"] == 6
    beat.write(7)
    assert read(tmp_path)["step"] == 7


def test_restarts_and_what_they_lost_are_counted(tmp_path, clock):
    Heartbeat(tmp_path, 0).write(37)  # killed
    second = Heartbeat(tmp_path, 30)
    assert (second.restarts, second.steps_again) == (1, 7)
    second.write(45)
    third = Heartbeat(tmp_path, 45)  # stopped and saved: nothing is lost
    assert (third.restarts, third.steps_again) == (2, 7)
    assert read(tmp_path) | {"time": 0} == {"step": 45, "time": 0, "restarts": 2, "steps_again": 7}


def test_a_broken_file_is_as_none(tmp_path, clock):
    (tmp_path / "heartbeat.json").write_text('{"step": ')
    beat = Heartbeat(tmp_path, 3)
    assert (beat.restarts, beat.steps_again) == (0, 0)


def test_other_processes_write_nothing(tmp_path, clock):
    beat = Heartbeat(tmp_path / "run", 0, active=False)
    beat.beat(1)
    beat.write(2)
    assert not (tmp_path / "run").exists()


def test_a_beat_that_cannot_be_written_ends_no_run(tmp_path, clock):
    heart = Heartbeat(tmp_path, 0)
    (tmp_path / "heartbeat.json.new").mkdir()
    heart.write(7)
    assert read(tmp_path)["step"] == 0
    (tmp_path / "heartbeat.json.new").rmdir()
    heart.write(8)
    assert read(tmp_path)["step"] == 8
