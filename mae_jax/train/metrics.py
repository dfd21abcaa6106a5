"""Rates and shares of a run: images per second, MFU, data stalls, goodput, time left."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

# Dense bfloat16 FLOP/s of one device from the makers' data sheets, by a part of `device_kind`;
# the first that matches counts, so longer names stand first.
PEAK_FLOPS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("V100", 125e12),
    ("TPU v6 lite", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("TPU v3", 61.5e12),
    ("TPU v2", 22.5e12),
)


def peak_flops(devices: list[jax.Device]) -> tuple[float, str]:
    """Return (FLOP/s of all devices together, where the figure is from).

    For a device that is not in the table the peak is that of a matrix product measured here, in
    bfloat16. On a CPU it is in float32, as its steps are, and simulated devices, which share one
    machine, count once.
    """
    kind = devices[0].device_kind
    for name, peak in PEAK_FLOPS:
        if name in kind:
            return peak * len(devices), f"data sheet, {kind}"
    if devices[0].platform == "cpu":
        return _measured_peak(), f"a float32 matrix product measured on this {kind}"
    peak = _measured_peak(8192, jnp.bfloat16)
    return peak * len(devices), f"a bfloat16 matrix product measured on this {kind}"


def _measured_peak(size: int = 1024, dtype: jax.typing.DTypeLike = jnp.float32) -> float:
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


class Goodput:
    """Where the time of this process went, from when this is made.

    Attributes:
      seconds: by what they were spent on.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("steps", "compiling", "data", "saving", "evaluating"), 0.0)
        self._begun = time.perf_counter()

    def add(self, what: str, seconds: float) -> None:
        """Count seconds, which a `spent_on` around them leaves out."""
        self.seconds[what] += seconds

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Count the time in this context, but for what is counted inside of it by itself."""
        begun, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.add(what, max(0.0, time.perf_counter() - begun - inside))

    def line(self, restarts: int, steps_again: int) -> str:
        """Return the share of the time that went into steps, and where the rest did.

        Args:
          restarts: of this run, before this process.
          steps_again: that had to be done once more after them.
        """
        total = max(time.perf_counter() - self._begun, 1e-9)
        spent = self.seconds | {"other": max(0.0, total - sum(self.seconds.values()))}
        shown = ", ".join(f"{what} {format_seconds(value)}" for what, value in spent.items())
        text = f"goodput {100 * self.seconds['steps'] / total:.0f} %: {shown}"
        if restarts:
            text += f"; {_counted(restarts, 'restart')}, {_counted(steps_again, 'step')} done again"
        return text


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclasses.dataclass
class Throughput:
    """Clock of the training loop; what is spent outside of steps can be left out.

    Attributes:
      batch_size: images of a global step.
      step_flops: FLOPs of a step per image.
      peak: FLOP/s of all devices.
      goodput: is told of stalls and of what is left out.
    """

    batch_size: int
    step_flops: int
    peak: float
    goodput: Goodput = dataclasses.field(default_factory=Goodput)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self._start = time.perf_counter()
        self._steps = 0
        self._stalled = 0.0

    @contextlib.contextmanager
    def excluded(self, what: str) -> Iterator[None]:
        """Leave the time in this context out of the window: it is spent on evaluating or saving."""
        begun = time.perf_counter()
        with self.goodput.spent_on(what):
            yield
        self._start += time.perf_counter() - begun

    def step(self, stalled_seconds: float) -> None:
        """Count a step and the time for which the devices waited for its data."""
        self._steps += 1
        self._stalled += stalled_seconds
        self.goodput.add("data", stalled_seconds)

    def seconds_per_step(self) -> float:
        """Return the mean over the window."""
        return (time.perf_counter() - self._start) / max(1, self._steps)

    def scalars(self) -> dict[str, float]:
        """Return images/s, MFU in [0, 1] and the share of time lost to data, for the window."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        images_per_second = self._steps * self.batch_size / seconds
        return {
            "images_per_second": images_per_second,
            "mfu": images_per_second * self.step_flops / self.peak,
            "data_stall": min(1.0, self._stalled / seconds),
        }


def format_seconds(seconds: float) -> str:
    """Return a duration as people write it: 45 s, 12:05, 3:04:05."""
    if not np.isfinite(seconds):
        return "?"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
