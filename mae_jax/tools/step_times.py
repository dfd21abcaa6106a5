"""Steps of several configs, timed in turn, so that what else the machine does hits all alike."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax import build
from mae_jax import config as configs
from mae_jax.errors import ConfigError
from mae_jax.tasks.finetune import FinetuneTask
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.tools import profiles, records, rounds
from mae_jax.tools.ceilings import Ceilings
from mae_jax.train import compiler, metrics
from mae_jax.train.state import TrainState

COLUMNS = {
    "config": ("config", ""),
    "image_size": ("pixels", "d"),
    "batch_size": ("batch", "d"),
    "milliseconds": ("ms a step", ".1f"),
    "fastest_milliseconds": ("fastest", ".1f"),
    "spread": ("spread", ".0%"),
    "processor_milliseconds": ("ms of processors", ".1f"),
    "images_per_second": ("images/s", ".1f"),
    "time_over_first": ("time / first", ".2f"),
    "gflop_per_image": ("GFLOP", ".3g"),
    "gflop_over_first": ("GFLOP / first", ".2f"),
    "mfu": ("MFU", ".1%"),
    "mfu_of_product": ("of a product", ".1%"),
    "temporary_mib": ("temporary MiB", ".0f"),
    "temporary_over_first": ("temporary / first", ".2f"),
    "program_mib": ("all MiB", ".0f"),
    "peak_mib": ("peak MiB", ".0f"),
    "compile_seconds": ("compiled in s", ".0f"),
    "note": ("note", ""),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A config with the sizes of a row.

    Attributes:
      name: of a config, and after blanks FIELD=VALUE in place of its own.
      batch_size: rows of a step.
      image_size: side in pixels; None: as the config has it.
    """

    name: str
    batch_size: int
    image_size: int | None = None

    def config(self) -> ConfigDict:
        """Return the configuration.

        Raises:
          ConfigError: if there is no such config or field.
        """
        config_name, *changes = self.name.split()
        fields = {"batch_size": str(self.batch_size)}
        if self.image_size is not None:
            fields["model.image_size"] = f"{self.image_size},{self.image_size}"
        for change in changes:
            field, is_given, value = change.partition("=")
            if not is_given:
                raise ConfigError(
                    f"{self.name!r}: expected FIELD=VALUE after the config, got {change!r}"
                )
            fields[field] = value
        return configs.load_config(config_name, fields)

    def key(self) -> dict[str, Any]:
        """Return what a row of this case says."""
        return {
            "what": "step",
            "config": self.name,
            "batch_size": self.batch_size,
            "image_size": self.config().model.image_size[0],
        }


@dataclasses.dataclass
class Contender:
    """A config whose step is compiled.

    Attributes:
      case: what it is.
      dtype: of the products.
      step: the compiled step.
      state: of the run so far; given away at each step.
      batches: synthetic, on the device, taken in turn.
      gflop: of one image and step.
      temporary: bytes that the program needs beside its arguments, as compiled.
      program: bytes that it needs in all.
      compile_seconds: of the step.
      seconds: of a step, one of each round.
      processor_seconds: the same, of all cores of the host.
      losses: one of each turn.
    """

    case: Case
    dtype: Any
    step: Any
    state: Any
    batches: Sequence[Any]
    gflop: float
    temporary: int
    program: int
    compile_seconds: float
    seconds: list[float] = dataclasses.field(default_factory=list)
    processor_seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    taken: int = 0

    def take(self, steps: int) -> None:
        """Take steps and note the seconds of each."""
        begun, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            batch = self.batches[self.taken % len(self.batches)]
            self.state, numbers = self.step(self.state, batch)
            self.taken += 1
        jax.block_until_ready((self.state, numbers))
        self.processor_seconds.append((time.process_time() - processor) / steps)
        self.seconds.append((time.perf_counter() - begun) / steps)
        self.losses.append(float(numbers["loss"]))

    def warm_up(self) -> None:
        """Take the steps that do not count."""
        self.take(rounds.WARM_UP)
        self.seconds.clear()
        self.processor_seconds.clear()


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config describes, built and not compiled.

    Attributes:
      task: what the batches are for.
      init: seed -> the state before the first step; to be jitted.
      step: (state, batch) -> (state, metrics); to be jitted, the state donated.
      batch: shapes of a batch.
      seed: of the run.
      dtype: of the products.
      remat: whether activations are made again.
    """

    task: PretrainTask | FinetuneTask
    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    batch: Mapping[str, jax.ShapeDtypeStruct]
    seed: int
    dtype: Any
    remat: bool

    def compile(self) -> tuple[jax.stages.Compiled, float]:
        """Return the compiled step, and the seconds that it took."""
        state = jax.eval_shape(self.init, self.seed)
        begun = time.perf_counter()
        lowered = jax.jit(self.step, donate_argnums=0).lower(state, self.batch)
        compiled = compiler.compile_step(lowered, jax.default_backend(), remat=self.remat)
        return compiled, time.perf_counter() - begun


def program(case: Case) -> Program:
    """Build a config's step for one device.

    Raises:
      ConfigError: if there is no such config or field, or it does not take this batch.
    """
    config = case.config()
    task = build.build_task(config, build.build_model(config))
    training = build.build_training(config, task, build.build_optimizer(config))
    rate = build.peak_learning_rate(config)
    return Program(
        task=task,
        init=training.init,
        step=functools.partial(training.step, schedule=lambda step: jnp.float32(rate)),
        batch=build.batch_of(task.module, case.batch_size),
        seed=config.seed,
        dtype=build.compute_dtype(config),
        remat=config.run.remat != "none",
    )


def contender(case: Case) -> Contender:
    """Build and compile a config's step on one device; raises as `program` does."""
    built = program(case)
    batches = [jax.device_put(synthetic(built.batch, seed)) for seed in range(rounds.BATCHES)]
    state = jax.jit(built.init)(built.seed)
    compiled, seconds = built.compile()
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory is not None else 0
    whole = temporary
    if memory is not None:
        whole += memory.argument_size_in_bytes + memory.output_size_in_bytes
        whole -= memory.alias_size_in_bytes
    gflop = built.task.step_flops() / 1e9
    return Contender(case, built.dtype, compiled, state, batches, gflop, temporary, whole, seconds)


def synthetic(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict[str, np.ndarray]:
    """Return a batch of these shapes: noise for pixels, 0 for labels and the like."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 256, array.shape, dtype=np.uint8)
        if array.dtype == np.uint8
        else np.zeros(array.shape, array.dtype)
        for name, array in shapes.items()
    }


def run(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what the flags of `bench step` ask for; print a table and return its rows.

    Configs of one batch and image size have their turns together, and are measured again together
    where a row of one of them is missing in the file. One of another device, of other versions, or
    beside another first config, does not count.

    Raises:
      ConfigError: if a config is none.
    """
    rows = measure(flags.configs, flags)
    print(f"\n{heading(rows)}\n\n{records.table(rows, COLUMNS)}", flush=True)
    for row in rows:
        if "operations" in row:
            print(f"\n{row['config']}, batch {row['batch_size']}, its longest operations:\n")
            print(profiles.table(row["operations"]), flush=True)
    return rows


def measure(names: Sequence[str], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of `run`, which are in the file by then."""
    groups = [
        [Case(name, batch_size, image_size) for name in names]
        for image_size in flags.image_size or (None,)
        for batch_size in flags.batch_size
    ]
    # Mistakes come before any work.
    keys = [[case.key() | {"first": group[0].name} for case in group] for group in groups]
    place = records.environment()
    known = records.read(flags.json) if flags.resume else []
    rows: list[dict[str, Any]] = []
    for group, group_keys in zip(groups, keys, strict=True):
        done = [records.find(known, **place, **key) for key in group_keys]
        found = [dict(row) for row in done if row is not None]
        if len(found) < len(group):
            found = [
                {**place, **key, **row}
                for key, row in zip(group_keys, _measured(group, flags), strict=True)
            ]
            if flags.json:
                records.append(flags.json, found)
        rows += found
    return rows


def _measured(group: Sequence[Case], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of cases that have their turns together."""
    made: dict[Case, Contender] = {}
    ceilings: dict[Any, Ceilings] = {}
    for case in group:
        try:
            one = contender(case)
            one.warm_up()
            made[case] = one
            if one.dtype not in ceilings:
                ceilings[one.dtype] = Ceilings(one.dtype, copy=flags.copy)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not rounds.no_memory(error):
                raise
    for number in range(flags.rounds):
        for one in rounds.turn(list(made.values()), number):
            one.take(flags.steps)
        for ceiling in ceilings.values():
            ceiling.measure()
    first = made.get(group[0])
    rows: list[dict[str, Any]] = []
    for case in group:
        if case not in made:
            rows.append({"note": rounds.DOES_NOT_FIT})
            continue
        rows.append(_row(made[case], first, ceilings[made[case].dtype]))
    if flags.profile:  # at the end: it adds to the times
        for case, row in zip(group, rows, strict=True):
            if case in made:
                row["operations"] = profiles.profile(made[case].take, flags.profile)
    return rows


def _row(one: Contender, first: Contender | None, ceilings: Ceilings) -> dict[str, Any]:
    """Return the figures of a contender, and what they are in proportion to the first's."""
    median = statistics.median(one.seconds)
    rate = one.case.batch_size / median
    flops = rate * one.gflop * 1e9
    device = jax.devices()[0]
    peak, source = metrics.peak_flops([device])
    on_cpu = device.platform == "cpu"
    statistics_ = device.memory_stats() or {}
    row = {
        "dtype": jnp.dtype(one.dtype).name,
        "milliseconds": 1e3 * median,
        "fastest_milliseconds": 1e3 * min(one.seconds),
        "spread": rounds.spread(one.seconds),
        "processor_milliseconds": 1e3 * statistics.median(one.processor_seconds)
        if on_cpu
        else None,
        "images_per_second": rate,
        "gflop_per_image": one.gflop,
        # Where no data sheet gives a peak, the one that is measured has to do.
        "mfu": flops / peak if source.startswith("data sheet") else None,
        "mfu_of_product": flops / ceilings.flops,
        "product_tflops": ceilings.flops / 1e12,
        "copy_gb_per_second": ceilings.bytes_per_second / 1e9 or None,
        "temporary_mib": one.temporary / 2**20,
        "program_mib": one.program / 2**20,
        # Of the process so far: the contenders of a round are there together.
        "peak_mib": statistics_["peak_bytes_in_use"] / 2**20
        if "peak_bytes_in_use" in statistics_
        else None,
        "compile_seconds": one.compile_seconds,
        "rounds": len(one.seconds),
        "loss": [one.losses[0], one.losses[-1]],
        "note": None if one.losses[0] != one.losses[-1] else "the loss did not change",
    }
    if first is not None:
        row |= {
            "time_over_first": rounds.ratio(one.seconds, first.seconds),
            "gflop_over_first": one.gflop / first.gflop,
            "temporary_over_first": one.temporary / max(1, first.temporary),
        }
    return row


def heading(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the line above a table: what was measured on, and its ceilings."""
    row = next((row for row in rows if "milliseconds" in row), rows[0])
    parts = [f"{row['device']} ({row['processor']}, {row['cores']} cores)", f"jax {row['jax']}"]
    if "dtype" in row:
        parts += [row["dtype"], f"a matrix product: {row['product_tflops']:.3g} TFLOP/s"]
    if row.get("copy_gb_per_second"):
        parts.append(f"a copy: {row['copy_gb_per_second']:.0f} GB/s")
    return ", ".join(parts)
