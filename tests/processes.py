"""Jobs of several processes on loopback: started together, and never outliving the test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence

from tests.helpers import start


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def job(
    flags: Sequence[str],
    count: int,
    *,
    only: dict[int, Sequence[str]] | None = None,
    devices: int = 1,
    **extra: str,
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the program `count` times as one job; whatever is left of it is killed at the end.

    Args:
      flags: of all processes.
      count: of processes.
      only: more flags of some processes, by their index.
      devices: of each process.
      **extra: variables of all.
    """
    place = {
        "MAE_JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "MAE_JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    processes: list[subprocess.Popen[str]] = []
    try:
        for index in range(count):
            own = [*flags, *(only or {}).get(index, ())]
            processes.append(start(own, **(place | {"MAE_JAX_PROCESS_ID": str(index)} | extra)))
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # its workers included
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def outcomes(
    processes: Sequence[subprocess.Popen[str]], timeout: float = 240
) -> list[tuple[int, str]]:
    """Return exit status and output of each process, in their order."""
    found = []
    for process in processes:  # each writes little, so that none waits for its reader
        output, _ = process.communicate(timeout=timeout)
        found.append((process.returncode, output))
    return found


def run_job(flags: Sequence[str], count: int, **options) -> list[tuple[int, str]]:
    """Run a job to its end; arguments as in `job`, results as in `outcomes`."""
    with job(flags, count, **options) as processes:
        return outcomes(processes)
