"""What the devices of a pod send each other in a step, and the batch that is worth the while.

    python -m mae_jax.tools.communication [CONFIG ...] [--mfu=0.5]

prints the table of `docs/scaling.md`. Nothing is measured: the bytes follow from the shapes of the
parameters (`tests/train/test_compiled.py` counts them in a compiled step), speeds are the makers'.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mae_jax import config as configs
from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status

CONFIGS = ("vit_b", "vit_l", "vit_h")

# How often what a collective works on passes through a device's links, but for the part of it that
# a device has already: an all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
# With parameters spread over devices: in the forward pass, and again in the backward pass.
GATHERS = 2


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and their links.

    Attributes:
      name: for the table.
      device_kind: a name in `metrics.PEAK_FLOPS`.
      devices: how many.
      link: bytes/s that a device sends over its fast links, while it receives as many.
      node: devices that those links join; 0: all.
      network: bytes/s of a device to other nodes.
    """

    name: str
    device_kind: str
    devices: int
    link: float
    node: int = 0
    network: float = math.inf

    def seconds(self, exchanged: Mapping[str, int]) -> float:
        """Return the time that collectives of these bytes take, if nothing is in the way.

        In each node first, then each device with those of the other nodes that hold its part.
        """
        size = self.node or self.devices
        nodes = self.devices // size
        within = (size - 1) / size / self.link
        across = (nodes - 1) / nodes / size / self.network
        passed = sum(PASSES[name] * count for name, count in exchanged.items())
        return passed * (within + across)


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (read in 2026). v4: "All-reduce bandwidth per
# Pod" 1.1 PB/s by 4096 chips; the others: half of "Bidirectional ICI bandwidth per chip", which
# for v5e and v6e is their all-reduce bandwidth per pod by 256 chips as well.
# H100: NVIDIA's data sheet of the H100 SXM, NVLink 900 GB/s for both directions; that of the DGX
# H100, 8 ConnectX-7 of 400 Gb/s for 8 GPUs.
MACHINES = (
    Machine("TPU v4", "TPU v4", 256, 1.1e15 / 4096),
    Machine("TPU v5e", "TPU v5 lite", 256, 400e9 / 2),
    Machine("TPU v5p", "TPU v5", 256, 1200e9 / 2),
    Machine("TPU v6e", "TPU v6 lite", 256, 800e9 / 2),
    Machine("H100, 1 node", "H100", 8, 900e9 / 2),
    Machine("H100, 32 nodes", "H100", 256, 900e9 / 2, node=8, network=400e9 / 8),
)


def exchanged(params: Any, fsdp: int) -> dict[str, int]:
    """Return the bytes of what the collectives of a step work on, by collective.

    Args:
      params: tree of shapes.
      fsdp: devices over which they are spread; 1: each has a copy.
    """
    import jax
    from jax.sharding import PartitionSpec

    from mae_jax.train.sharding import leaf_spec

    total = spread = 0
    for leaf in jax.tree.leaves(params):
        size = leaf.size * leaf.dtype.itemsize
        total += size
        spread += size if leaf_spec(leaf.shape, fsdp) != PartitionSpec() else 0
    return {
        "all-reduce": total - spread,
        "all-gather": GATHERS * spread,
        "reduce-scatter": spread,
    }


def images_to_hide(seconds: float, flops: float, rate: float) -> int:
    """Return the smallest batch of a device whose computing takes as long.

    Args:
      seconds: of communication.
      flops: of an image and step.
      rate: FLOP/s that a device reaches.
    """
    return math.ceil(seconds * rate / flops)


def table(names: Sequence[str], mfu: float) -> list[str]:
    """Return the lines of the table, in Markdown.

    Args:
      names: of configs.
      mfu: share of the peak that a device reaches while it computes.

    Raises:
      ConfigError: if there is no such config.
    """
    import jax

    from mae_jax import build
    from mae_jax.train.metrics import PEAK_FLOPS

    lines = [
        "| | | exchanged | copies: sent | time | images | spread: sent | time | images |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        config = configs.load_config(name)
        task = build.build_task(config, build.build_model(config))
        variables = functools.partial(build.initial_variables, config, task, 0)
        params, _ = jax.eval_shape(variables)
        for machine in MACHINES:
            cells = [name, machine.name, f"{exchanged(params, 1)['all-reduce'] / 1e6:.0f} MB"]
            for fsdp in (1, machine.devices):
                bytes_of = exchanged(params, fsdp)
                passed = sum(PASSES[kind] * count for kind, count in bytes_of.items())
                seconds = machine.seconds(bytes_of)
                rate = mfu * dict(PEAK_FLOPS)[machine.device_kind]
                share = (machine.devices - 1) / machine.devices
                cells += [
                    f"{passed * share / 1e6:.0f} MB",
                    f"{seconds * 1e3:.1f} ms",
                    str(images_to_hide(seconds, task.step_flops(), rate)),
                ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""

    def program() -> int:
        parser = Parser(
            prog="python -m mae_jax.tools.communication",
            description="Print what a step sends between devices, and the batch that hides it.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("configs", nargs="*", default=CONFIGS, metavar="CONFIG", help="what")
        parser.add_argument("--mfu", type=float, default=0.5, help="share of the peak")
        flags = parser.parse(sys.argv[1:] if argv is None else argv)
        if not 0 < flags.mfu <= 1:
            raise ConfigError(f"--mfu: expected a share, above 0 and at most 1, got {flags.mfu:g}")
        print("\n".join(table(flags.configs, flags.mfu)))
        return 0

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
