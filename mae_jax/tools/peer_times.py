"""Training steps of MAE beside the same in other people's code, each in a process of its own.

All start with the same settings of the allocator and, on a CPU, on the same cores; the parent lets
one after the other take steps, in an order that changes from round to round. What is compared are
seconds of the processor, which other work on the machine disturbs least; with `--wall`, for a GPU,
seconds, one contender after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mae_jax import config as configs
from mae_jax.config import suggestion
from mae_jax.errors import ConfigError
from mae_jax.tools import records, rounds

IN_JAX = ("ours", "plain", "m3ae_public")
PEERS = ("eager", "sdpa", "compile", "official")  # in PyTorch: what the ratio is to
CONTENDERS = IN_JAX + PEERS
GIVEN = ("official", "m3ae_public")  # with a checkout
DTYPES = ("float32", "bfloat16")
MASK_RATIO = 0.75
# What a process would be measured on: this one takes no hold of the device.
PLACE = """
import json, jax
from mae_jax.tools import records
print(json.dumps(records.environment() | records.installed()))
"""


@dataclasses.dataclass(frozen=True)
class Dims:
    """The dimensions of a model; all contenders have the same."""

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16

    def gflop(self) -> float:
        """Return the FLOPs of a training step per image, in 1e9, as `Method.step_flops` counts."""
        count, unit = (self.image_size // self.patch_size) ** 2, 3 * self.patch_size**2
        keep = int(count * (1 - MASK_RATIO))

        def blocks(depth: int, tokens: int, width: int) -> int:
            return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)

        embed = 2 * keep * unit * self.embed_dim
        forward = (
            embed
            + blocks(self.depth, keep + 1, self.embed_dim)
            + 2 * (keep + 1) * self.embed_dim * self.decoder_embed_dim
            + blocks(self.decoder_depth, count + 1, self.decoder_embed_dim)
            + 2 * (count - keep) * self.decoder_embed_dim * unit
        )
        return (3 * forward - embed) / 1e9


# The sizes of `mae_jax.pretrain.mae`, which imports jax, at 224 pixels; and small ones to try with.
SIZES = {
    "vit_s": Dims(224, 16, 384, 12, 6, 256, 4, 8),
    "vit_b": Dims(224, 16, 768, 12, 12),
    "vit_l": Dims(224, 16, 1024, 24, 16),
    "vit_h": Dims(224, 14, 1280, 32, 16),
    "tiny": Dims(32, 4, 192, 12, 3, 128, 4, 4),
    "toy": Dims(32, 8, 32, 2, 2, 16, 1, 2),
}

COLUMNS = {
    "contender": ("contender", ""),
    "batch_size": ("batch", "d"),
    "milliseconds": ("ms a step", ".1f"),
    "fastest_milliseconds": ("fastest", ".1f"),
    "spread": ("spread", ".0%"),
    # Of the clock, where those of the processor are compared, and the other way round.
    "other_milliseconds": ("by the other clock", ".1f"),
    "time_over_peer": ("time / PyTorch", ".2f"),
    "images_per_second": ("images/s", ".1f"),
    "mfu": ("MFU", ".1%"),
    "peak_mib": ("peak MiB", ".0f"),
    "start_seconds": ("starts in s", ".0f"),
    "note": ("note", ""),
}


class Contender:
    """A process with a model in it.

    Attributes:
      ready: what it has said of itself; `left_out` is in it if it cannot take steps.
      answers: one for each turn.
    """

    def __init__(self, spec: Mapping[str, Any], xla_flags: str):
        """Start the process."""
        self.answers: list[dict[str, Any]] = []
        self.ready: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [spec["python"], "-m", "mae_jax.tools.peer_process", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(spec, xla_flags),
        )

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def wait(self) -> bool:
        """Wait until it can take steps; return whether it can."""
        self.ready = self._answer()
        return "left_out" not in self.ready

    def take(self, steps: int) -> bool:
        """Let it take steps; return whether it is still there."""
        said = self._ask(str(steps))
        if "left_out" in said:
            self.ready = said
            return False
        self.answers.append(said)
        return True

    def end(self) -> None:
        """Let it end, and hear what it says at the end."""
        self.ready |= self._ask("")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it says is said below
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        return {"left_out": f"ended with status {self._process.wait()}"}


def environment(spec: Mapping[str, Any], xla_flags: str) -> dict[str, str]:
    """Return the environment of a contender's process."""
    threads = str(spec["threads"])
    ours = {
        # With glibc's defaults every step maps and unmaps its large buffers.
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if xla_flags:
        ours["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
    return {**os.environ, **ours}


def specs(flags: argparse.Namespace, batch_size: int) -> list[dict[str, Any]]:
    """Return what the processes are told.

    Raises:
      ConfigError: if a flag has a value that there is not.
    """
    for name, value, known in (
        ("size", flags.size, tuple(SIZES)),
        ("dtype", flags.dtype, DTYPES),
    ):
        if value not in known:
            raise ConfigError(
                f"--{name}={value}: expected one of {', '.join(known)}" + suggestion(value, known)
            )
    dims = dataclasses.asdict(SIZES[flags.size])
    side = dims["image_size"]
    fields = {name: value for name, value in dims.items() if name != "image_size"}
    config = " ".join(
        [
            "vit_b",
            *(f"model.{name}={value}" for name, value in fields.items()),
            f"model.image_size={side},{side}",
            f"model.mask_ratio={MASK_RATIO}",
            f"model.dtype={flags.dtype}",
        ]
    )
    recipe = configs.load_config("vit_b", {"batch_size": str(batch_size)}).optimizer
    adamw = {name: recipe[name] for name in ("b1", "b2", "eps", "weight_decay")}
    adamw["learning_rate"] = recipe.base_learning_rate * batch_size / 256
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if flags.threads > len(cores) > 0 and not flags.wall:
        raise ConfigError(f"--threads={flags.threads}: expected at most {len(cores)}, the cores")
    shared = {
        "dims": dims,
        "config": config,
        "batch_size": batch_size,
        "dtype": flags.dtype,
        "mask_ratio": MASK_RATIO,
        "adamw": adamw,
        "threads": flags.threads,
        # Those of a GPU are in each other's way on one core, and the GPU is what is measured.
        "cores": [] if flags.wall else cores[-flags.threads :],
        "official": flags.official and os.path.abspath(os.path.expanduser(flags.official)),
        "m3ae_public": flags.m3ae_public and os.path.abspath(os.path.expanduser(flags.m3ae_public)),
    }
    names = chosen(flags)
    own = [{**shared, "name": name, "row": name, "python": sys.executable} for name in names]
    also = [
        {**shared, "name": name, "row": f"{name} ({label})", "python": python}
        for label, python in flags.also or ()
        for name in names
        if name.partition("@")[0] in IN_JAX
    ]
    return own + also


def chosen(flags: argparse.Namespace) -> list[str]:
    """Return the names of the contenders.

    Raises:
      ConfigError: if there is no such contender, or its checkout is not given.
    """
    if not flags.contenders:
        return [name for name in CONTENDERS if name not in GIVEN or getattr(flags, name)]
    names = [name.strip() for name in flags.contenders.split(",") if name.strip()]
    for name in names:
        kind, at, more = name.partition("@")
        if kind not in CONTENDERS or (at and (kind != "ours" or not more)):
            raise ConfigError(
                f"--contenders={name}: expected one of {', '.join(CONTENDERS)} or ours@FLAGS"
                + suggestion(kind, CONTENDERS)
            )
        if kind in GIVEN and not getattr(flags, kind):
            raise ConfigError(f"--contenders={name}: expected --{kind} as well, its checkout")
    return names


def run(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what the flags of `bench peers` ask for; print a table and return its rows.

    Raises:
      ConfigError: if a flag has a value that there is not.
    """
    groups = [
        group
        for batch_size in flags.batch_size
        for group in _groups(specs(flags, batch_size), apart=flags.wall)
    ]
    known = records.read(flags.json) if flags.resume else []
    rows: list[dict[str, Any]] = []
    for group in groups:
        done = [records.find(known, **key(spec, flags)) for spec in group]
        found = [dict(row) for row in done if row is not None]
        # Of the same turns: proportions to one contender in PyTorch.
        if len(found) < len(group) or len({row["peer"] for row in found if "peer" in row}) > 1:
            found = _measured(group, flags)
            if flags.json:
                records.append(flags.json, found, records.host())
        rows += found
    rows = compared(rows) if flags.wall else rows
    print(f"\n{heading(rows, flags)}\n\n{records.table(rows, COLUMNS)}", flush=True)
    return rows


def _groups(every: Sequence[dict[str, Any]], *, apart: bool) -> list[list[dict[str, Any]]]:
    """Return which contenders are there at a time: all, or each by itself."""
    return [[spec] for spec in every] if apart else [list(every)]


def key(spec: Mapping[str, Any], flags: argparse.Namespace) -> dict[str, Any]:
    """Return what a row of this contender says."""
    return {
        "what": "peers",
        "contender": spec["row"],
        "size": flags.size,
        "batch_size": spec["batch_size"],
        "dtype": spec["dtype"],
        "clock": "wall" if flags.wall else "processor",
        "threads": None if flags.wall else flags.threads,
        "xla_flags": flags.xla_flags,
        "place": _place(spec["python"]) if flags.json else None,
    }


@functools.cache
def _place(python: str) -> dict[str, Any] | None:
    """Return the device and the versions of an interpreter's process; None: it cannot say."""
    command = [python, "-c", PLACE]
    own = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _measured(group: Sequence[dict[str, Any]], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of contenders that have their turns together."""
    made: list[Contender] = []
    try:
        for spec in group:
            _, _, own = spec["name"].partition("@")
            in_ours = (flags.xla_flags or "") if spec["name"].startswith("ours") else ""
            made.append(Contender(spec, f"{in_ours} {own}".strip()))
            # One after the other: compiling takes memory, and cores from nobody's measurement.
            print(f"{spec['row']}, batch {spec['batch_size']} ...", file=sys.stderr, flush=True)
            if not made[-1].wait():
                print(f"{spec['row']}: {made[-1].ready['left_out']}", file=sys.stderr, flush=True)
        there = [one for one in made if "left_out" not in one.ready]
        for number in range(flags.rounds):
            for one in rounds.turn(there, number):
                if "left_out" not in one.ready:
                    one.take(flags.steps)
        for one in there:
            if "left_out" not in one.ready:
                one.end()
        rows = [
            {**key(spec, flags), **_row(one, spec, flags)}
            for spec, one in zip(group, made, strict=True)
        ]
        return rows if flags.wall else compared(rows)
    finally:
        for one in made:
            one.close()


def _row(one: Contender, spec: Mapping[str, Any], flags: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a contender."""
    said = one.ready
    if "left_out" in said:
        return {"note": said["left_out"]}
    clock = [answer["wall" if flags.wall else "processor"] for answer in one.answers]
    other = [answer["processor" if flags.wall else "wall"] for answer in one.answers]
    median = statistics.median(clock)
    gflop = SIZES[flags.size].gflop()
    rate = spec["batch_size"] / median
    peak = _peak(said["environment"]["device"])
    notes = [said["note"]] if said["note"] else []
    if not said["trained"]:
        notes.append("its weights or its loss did not change")
    return {
        **said["environment"],
        "milliseconds": 1e3 * median,
        "fastest_milliseconds": 1e3 * min(clock),
        "spread": rounds.spread(clock),
        "other_milliseconds": 1e3 * statistics.median(other),
        "images_per_second": rate,
        "gflop_per_image": gflop,
        "mfu": 1e9 * gflop * rate / peak if peak else None,
        "peak_mib": said["peak_bytes"] / 2**20 if said["peak_bytes"] else None,
        "start_seconds": said["start_seconds"],
        "compile_seconds": said["compile_seconds"],
        "loss": said["loss"],
        "steps": flags.steps,
        "seconds": clock,
        "note": "; ".join(notes) or None,
    }


def _peak(device: str) -> float | None:
    """Return the FLOP/s that a data sheet gives a device; None: there is none."""
    if device == "cpu":
        return None
    from mae_jax.train.metrics import PEAK_FLOPS

    return next((peak for name, peak in PEAK_FLOPS if name in device), None)


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their time in proportion to that of the fastest in PyTorch.

    Rows of one batch size are compared round by round; of several the best of each contender is
    taken, images a second, and the other rows stay without a proportion.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["contender"]
        rate = row.get("images_per_second", 0.0)
        if rate and (name not in best or rate > best[name]["images_per_second"]):
            best[name] = row
    peers = [best[name] for name in PEERS if name in best]
    if not peers:
        return [dict(row) for row in rows]
    peer = max(peers, key=lambda row: row["images_per_second"])

    def proportion(row: dict[str, Any]) -> float:
        if row["clock"] == "processor":
            return rounds.ratio(row["seconds"], peer["seconds"])
        return peer["images_per_second"] / row["images_per_second"]

    return [
        {**row, "time_over_peer": proportion(row), "peer": peer["contender"]}
        if row is best.get(row["contender"])
        else dict(row)
        for row in rows
    ]


def heading(rows: Sequence[Mapping[str, Any]], flags: argparse.Namespace) -> str:
    """Return the line above a table: what was measured, and on what."""
    versions = {
        name: " and ".join(sorted({row[name] for row in rows if name in row}))
        for name in records.LIBRARIES
    }
    row = next((row for row in rows if "device" in row), {})
    clock = (
        "in seconds of the clock, one after the other"
        if flags.wall
        else f"in seconds of the processor, {flags.threads} threads each, in turn"
    )
    return (
        f"{flags.size} at {SIZES[flags.size].image_size} pixels, {flags.dtype}, on"
        f" {row.get('device', 'nothing')} ({records.host()['processor']}), {clock};"
        f" {', '.join(f'{name} {version}' for name, version in versions.items() if version)}"
    )
