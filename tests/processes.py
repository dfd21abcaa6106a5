"""Jobs of several processes on loopback: started together, and never outliving the test."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from tests.helpers import kill, start


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def told(count: int) -> list[dict[str, str]]:
    """Return the variables by which each process of a job is told its place."""
    common = {
        "MAE_JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "MAE_JAX_NUM_PROCESSES": str(count),
    }
    return [common | {"MAE_JAX_PROCESS_ID": str(index)} for index in range(count)]


def by_slurm(count: int) -> list[dict[str, str]]:
    """Return the variables that `srun` sets, by which JAX finds the place of each process."""
    common = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    return [
        common | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)} for index in range(count)
    ]


@contextlib.contextmanager
def job(
    flags: Sequence[str],
    places: Sequence[dict[str, str]],
    *,
    only: dict[int, Sequence[str]] | None = None,
    devices: int = 1,
    module: str = "mae_jax.main",
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the program as several processes; whatever is left of them is killed at the end.

    Args:
      flags: of all processes.
      places: variables of each, as `told` or `by_slurm` returns them.
      only: more flags of some processes, by their index.
      devices: of each process.
      module: another program.
    """
    processes: list[subprocess.Popen[str]] = []
    try:
        for index, place in enumerate(places):
            own = [*flags, *(only or {}).get(index, ())]
            place = place | {"JAX_NUM_CPU_DEVICES": str(devices)}
            processes.append(start(own, module=module, **place))
        yield processes
    finally:
        for process in processes:
            kill(process)


def outcomes(
    processes: Sequence[subprocess.Popen[str]], timeout: float = 240
) -> list[tuple[int, str]]:
    """Return exit status and output of each process, in their order."""
    found = []
    for process in processes:  # each writes little, so that none waits for its reader
        output, _ = process.communicate(timeout=timeout)
        found.append((process.returncode, output))
    return found


def run_job(flags: Sequence[str], count: int, **options: Any) -> list[tuple[int, str]]:
    """Run a job to its end; options as in `job`, results as in `outcomes`."""
    with job(flags, told(count), **options) as processes:
        return outcomes(processes)
