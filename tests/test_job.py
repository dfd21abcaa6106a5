"""What processes agree on, with a store in this process and a thread for each of them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from mae_jax import job
from mae_jax.errors import ConfigError, StopError
from mae_jax.job import Job, SeveralProcesses
from tests.memory_store import Memory


class Ended(Exception):
    """In place of the end of a process."""


@pytest.fixture(autouse=True)
def no_process_ends(monkeypatch):
    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(job.os, "_exit", end)
    monkeypatch.setattr(job, "LAST_SECONDS", 0.0)
    monkeypatch.setattr(job, "TRAIN_SECONDS", 0.2)


def together(count: int, act: Callable[[Job], object]) -> list[object]:
    """Return what `act` returns or raises in each of `count` processes."""
    store, results = Memory(), [None] * count

    def one(index: int) -> None:
        try:
            results[index] = act(SeveralProcesses(store, index, count))
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_one_process_agrees_with_itself(tmp_path):
    alone = Job()
    alone.agree({"seed": 1}, last=True)
    alone.agree_on_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyError), alone.guard():
        raise KeyError


@pytest.mark.parametrize("count", [2, 5])
def test_processes_with_the_same_facts_go_on(count):
    def act(one: Job) -> str:
        one.agree({"seed": 1})
        one.agree({"data": "a", "resume step": 3}, last=True)
        return "trains"

    assert together(count, act) == ["trains"] * count


def test_a_difference_is_named_with_both_values_on_all_processes():
    def act(one: Job) -> None:
        one.agree({"seed": 1, "batch_size": 32 if one.index == 2 else 16})

    assert [str(error) for error in together(4, act)] == [
        "batch_size: expected the same on all processes, got 16 on process 0, 32 on process 2"
    ] * 4


def test_of_many_differences_the_first_few_are_named():
    facts = "abcde"

    def act(one: Job) -> None:
        one.agree(dict.fromkeys(facts[one.index :], one.index))

    message = str(together(2, act)[0])
    assert message.startswith("a: expected the same on all processes, got 0 on process 0, nothing")
    assert message.count("expected the same") == 3
    assert message.endswith("; and 2 more")


def test_a_folder_that_all_see_is_agreed_on_and_left_as_it_was(tmp_path):
    def act(one: Job) -> str:
        one.agree_on_folder(tmp_path)
        return "goes on"

    assert together(3, act) == ["goes on"] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_one_process_does_not_share_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "FOLDER_SECONDS", 0.1)

    def act(one: Job) -> None:
        one.agree_on_folder(tmp_path / ("elsewhere" if one.index == 1 else "shared"))

    for error in together(3, act):
        assert isinstance(error, ConfigError)
        assert "expected a folder that all processes share, but process 1 does not see" in str(
            error
        )
        assert "elsewhere" in str(error)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_mistake_of_one_process_before_the_start_ends_all_with_status_2(wrong, capsys):
    def act(one: Job) -> None:
        with one.guard():
            one.agree({"seed": 1})
            if one.index == wrong:
                raise ConfigError("data.path: expected a folder, got nothing there")
            one.agree({"data": "a"}, last=True)

    results = together(3, act)
    assert all(isinstance(error, Ended) and error.args == (2,) for error in results)
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == sorted(
        ["error: data.path: expected a folder, got nothing there"]
        + [f"error: process {wrong}: data.path: expected a folder, got nothing there"] * 2
    )


def test_a_mistake_that_all_meet_ends_all_with_status_2(capsys):
    def act(one: Job) -> None:
        with one.guard():
            one.agree({}, last=True)
            raise ConfigError("data: too many are bad")

    assert all(error.args == (2,) for error in together(3, act))
    assert capsys.readouterr().err == "error: data: too many are bad\n" * 3


def test_a_mistake_of_one_process_in_training_waits_for_nobody_for_long(capsys):
    def act(one: Job) -> object:
        with one.guard():
            one.agree({}, last=True)
            if one.index == 1:
                raise ConfigError("data: too many are bad")
        return "in a collective"

    first, second = together(2, act)
    assert first == "in a collective"
    assert second.args == (2,)
    assert capsys.readouterr().err == "error: data: too many are bad\n"


def test_a_crash_ends_its_process_at_once_and_is_shown(capsys):
    def act(one: Job) -> object:
        with one.guard():
            if one.index == 1:
                raise ZeroDivisionError("crash")
        return "goes on"

    first, second = together(2, act)
    assert first == "goes on"
    assert second.args == (1,)
    said = capsys.readouterr().err
    assert said.startswith("process 1 of 2:\nTraceback")
    assert "ZeroDivisionError: crash" in said


def test_what_keeps_one_process_from_going_on_ends_it_with_one_line(capsys):
    def act(one: Job) -> object:
        with one.guard():
            if one.index == 1:
                raise StopError("checkpoint of step 3 was not saved: the disk is full")
        return "goes on"

    first, second = together(2, act)
    assert (first, second.args) == ("goes on", (1,))
    assert capsys.readouterr().err == (
        "stopped: checkpoint of step 3 was not saved: the disk is full\n"
    )


def test_a_folder_that_cannot_be_written_to_is_named_by_all(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "run"

    def act(one: Job) -> None:
        with one.guard():
            one.agree_on_folder(folder)

    assert all(error.args == (2,) for error in together(3, act))
    said = f"--workdir={folder}: expected a folder to write to, got: Not a directory"
    lines = [f"error: {said}"] + [f"error: process 0: {said}"] * 2
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(lines)
