"""Ctrl-C and SIGTERM as a wish to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_jax.train.signals import StopRequest

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
