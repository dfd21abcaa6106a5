"""Which steps are profiled; the profiler itself is a toy but in one test."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mae_jax.train.profile import ProfiledStep


@pytest.fixture
def events(monkeypatch):
    """What happens in which order: "on", "off" and the number of each batch."""
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("off"))
    return events


def stepping(events, steps, *, done, until):
    """Take the steps after `done` up to `until`."""

    def step_fn(state, batch):
        events.append(batch)
        return state, {}

    profiled = ProfiledStep(step_fn, "nowhere", steps, done=done)
    for number in range(done + 1, until + 1):
        profiled(None, number)
    profiled.close()
    return events


def test_the_steps_asked_for_are_profiled(events):
    assert stepping(events, (2, 3), done=0, until=5) == [1, "on", 2, 3, "off", 4, 5]


def test_one_step_is_profiled(events):
    assert stepping(events, (2, 2), done=0, until=3) == [1, "on", 2, "off", 3]


def test_a_run_that_goes_on_among_them_profiles_the_rest(events):
    assert stepping(events, (2, 6), done=4, until=7) == ["on", 5, 6, "off", 7]


def test_a_run_that_ends_among_them_ends_the_profile(events):
    assert stepping(events, (2, 6), done=0, until=3) == [1, "on", 2, 3, "off"]


def test_a_run_that_goes_on_after_them_profiles_nothing(events):
    assert stepping(events, (2, 3), done=3, until=5) == [4, 5]


def test_a_profile_is_written(tmp_path):
    profiled = ProfiledStep(
        lambda state, batch: (state, {"loss": jnp.ones(())}), tmp_path, (1, 1), done=0
    )
    profiled(jnp.zeros(3), None)
    assert list(tmp_path.rglob("*.xplane.pb"))
