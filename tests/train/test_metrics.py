"""Rates and shares of a run, by a clock that the test moves."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from mae_jax.train import metrics
from mae_jax.train.metrics import Goodput, Throughput, format_seconds, peak_flops


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_images_per_second_and_mfu_are_those_of_the_window(clock):
    throughput = Throughput(batch_size=64, step_flops=1_000_000, peak=1e9)
    for _ in range(5):
        clock.now += 0.5
        throughput.step(0.0)
    # 320 images in 2.5 seconds, each 1e6 FLOPs of 1e9 a second.
    assert throughput.scalars() == pytest.approx(
        {"images_per_second": 128.0, "mfu": 0.128, "data_stall": 0.0}
    )
    assert throughput.seconds_per_step() == pytest.approx(0.5)


def test_stall_is_the_share_of_time_without_data(clock):
    throughput = Throughput(8, 1, 1.0)
    for stalled in (0.5, 0.0, 1.0, 0.0):
        clock.now += 2.0
        throughput.step(stalled)
    assert throughput.scalars()["data_stall"] == pytest.approx(1.5 / 8.0)


def test_stall_is_never_more_than_all_of_the_time(clock):
    throughput = Throughput(8, 1, 1.0)
    clock.now += 1.0
    throughput.step(3.0)
    assert throughput.scalars()["data_stall"] == 1.0


def test_time_that_is_excluded_counts_nowhere(clock):
    throughput = Throughput(10, 1, 1.0)
    clock.now += 1.0
    throughput.step(0.25)
    with throughput.excluded("evaluating"):
        clock.now += 30.0
    assert throughput.scalars()["images_per_second"] == pytest.approx(10.0)
    assert throughput.scalars()["data_stall"] == pytest.approx(0.25)
    assert throughput.seconds_per_step() == pytest.approx(1.0)


def test_window_starts_anew(clock):
    throughput = Throughput(10, 1, 1.0)
    clock.now += 100.0
    throughput.step(50.0)
    throughput.reset()
    clock.now += 1.0
    throughput.step(0.0)
    assert throughput.scalars()["images_per_second"] == pytest.approx(10.0)
    assert throughput.scalars()["data_stall"] == 0.0


def test_window_without_time_or_steps_has_finite_figures(clock):
    throughput = Throughput(10, 1, 1.0)
    assert throughput.seconds_per_step() == 0.0
    assert throughput.scalars() == {"images_per_second": 0.0, "mfu": 0.0, "data_stall": 0.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (45.9, "45 s"),
        (59.99, "59 s"),
        (60, "1:00"),
        (725, "12:05"),
        (3599.9, "59:59"),
        (3600, "1:00:00"),
        (3 * 3600 + 4 * 60 + 5, "3:04:05"),
        (100 * 3600, "100:00:00"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_duration_is_written_as_people_do(seconds, text):
    assert format_seconds(seconds) == text


def devices_of(kind: str, count: int = 1, platform: str = "gpu") -> list:
    return [types.SimpleNamespace(device_kind=kind, platform=platform)] * count


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v6 lite", 918e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("TPU v3", 61.5e12),
        ("TPU v2", 22.5e12),
    ],
)
def test_peak_of_a_known_device_is_its_data_sheets_times_their_number(kind, peak):
    flops, source = peak_flops(devices_of(kind, count=4))
    assert flops == 4 * peak
    assert source == f"data sheet, {kind}"


def test_peak_of_an_unknown_device_is_measured_and_says_so(monkeypatch):
    rates = {(): 5e10, (8192, jnp.bfloat16): 7e13}
    monkeypatch.setattr(metrics, "_measured_peak", lambda *how: rates[how])
    # Simulated devices share one machine: their number does not count.
    assert peak_flops(devices_of("cpu", count=8, platform="cpu")) == (
        5e10,
        "a float32 matrix product measured on this cpu",
    )
    assert peak_flops(devices_of("NVIDIA A10G", count=8)) == (
        8 * 7e13,
        "a bfloat16 matrix product measured on this NVIDIA A10G",
    )


def test_measured_peak_is_the_flops_of_a_product_over_its_time(monkeypatch):
    clock = Clock()

    def perf_counter() -> float:
        clock.now += 0.25
        return clock.now

    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=perf_counter))
    assert metrics._measured_peak(32) == pytest.approx(2 * 32**3 / 0.25)


def test_peak_of_this_machine_can_be_measured():
    flops, source = peak_flops(jax.devices())
    assert flops > 0
    assert source.endswith(f"measured on this {jax.devices()[0].device_kind}")


def test_goodput_says_where_the_time_went(clock):
    goodput = Goodput()
    clock.now += 5.0  # building
    with goodput.spent_on("compiling"):
        clock.now += 10.0
    with goodput.spent_on("steps"):
        clock.now += 80.0
        goodput.add("data", 3.0)  # of these 80
        with goodput.spent_on("saving"):
            clock.now += 2.0
    assert goodput.seconds == {
        "steps": 77.0,
        "compiling": 10.0,
        "data": 3.0,
        "saving": 2.0,
        "evaluating": 0.0,
    }
    clock.now += 3.0
    # 77 of 100 seconds; 5 before and 3 after belong to nothing.
    line = "steps 1:17, compiling 10 s, data 3 s, saving 2 s, evaluating 0 s, other 8 s"
    assert goodput.line(0, 0) == f"goodput 77 %: {line}"
    assert goodput.line(1, 20).endswith("; 1 restart, 20 steps done again")
    assert goodput.line(2, 1).endswith("; 2 restarts, 1 step done again")


def test_time_of_a_context_that_fails_is_counted(clock):
    goodput = Goodput()

    @goodput.spent_on("steps")
    def fail():
        clock.now += 4.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert goodput.seconds["steps"] == 4.0


def test_goodput_hears_of_stalls_and_of_what_a_window_leaves_out(clock):
    throughput = Throughput(10, 1, 1.0)
    throughput.step(0.5)
    with throughput.excluded("saving"):
        clock.now += 2.0
    assert throughput.goodput.seconds["data"] == 0.5
    assert throughput.goodput.seconds["saving"] == 2.0
