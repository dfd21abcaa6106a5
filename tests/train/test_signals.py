"""Ctrl-C and SIGTERM as a wish to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_jax.train.signals import SharedStopRequest, StopRequest
from tests.memory_store import Memory

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, object]]:
    """Put back what a test that fails may leave."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_wished_before_a_signal():
    with StopRequest() as stop:
        assert stop.name is None
    assert stop.name is None


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_sets_the_wish_and_raises_nothing(name):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.name == name
    assert stop.name == name


def test_handlers_of_before_are_back_afterwards(handlers):
    with StopRequest():
        assert all(signal.getsignal(number) != handlers[number] for number in NUMBERS)
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers


def test_handlers_of_before_are_back_after_a_signal_and_an_error(handlers):
    def crash() -> None:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers


def test_second_ctrl_c_ends_the_process_at_once():
    program = """
        import os, signal
        from mae_jax.train.signals import StopRequest
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            print("first", stop.name, flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("second", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "first SIGINT\n"
    assert done.returncode == -signal.SIGINT


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_all_processes_stop_at_the_same_question(ahead):
    """Wherever each is when the request comes: one may be a step or two behind the others."""
    count = 3
    store = Memory()
    stops = [SharedStopRequest(store, index, count) for index in range(count)]
    for stop in stops:
        stop._thread.start()
    try:
        asked = [10, 10 + ahead, 10]
        for stop, times in zip(stops, asked, strict=True):
            assert not any(stop.wanted() for _ in range(times))
        store.put("stop/request", "SIGTERM to process 1")
        for stop in stops:
            stop._thread.join(30)
        for index, stop in enumerate(stops):
            while not stop.wanted():
                asked[index] += 1
                assert asked[index] < 100
        assert asked == [10 + ahead] * count
        assert {stop.name for stop in stops} == {"SIGTERM to process 1"}
    finally:
        for stop in stops:
            stop._leaving.set()


def test_no_process_gets_an_answer_while_the_others_have_not_said_how_often_they_asked():
    store = Memory()
    stop = SharedStopRequest(store, 0, 2)
    stop._thread.start()
    answers = []
    try:
        assert not stop.wanted()
        store.put("stop/request", "SIGINT to process 1")
        store.wait_for("stop/asked/0")
        asking = threading.Thread(target=lambda: answers.append(stop.wanted()))
        asking.start()
        asking.join(0.2)
        assert answers == []
        store.put("stop/asked/1", "3")
        asking.join(30)
        assert answers == [False]
        assert [stop.wanted() for _ in range(2)] == [False, True]
    finally:
        stop._leaving.set()


def test_a_signal_becomes_a_request_to_all(handlers):
    store = Memory()
    with SharedStopRequest(store, 1, 2):
        os.kill(os.getpid(), signal.SIGTERM)
        assert store.texts["stop/request"] == "SIGTERM to process 1"
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers


def test_a_stop_request_that_nobody_makes_ends_its_thread():
    with SharedStopRequest(Memory(), 0, 2) as stop:
        assert not stop.wanted()
    assert not stop._thread.is_alive()
