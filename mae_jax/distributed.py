"""How this process joins the others of its job, and how it leaves.

Flags are read here without jax; with one process `jax.distributed` is never started: it would cost
a port, and there is nobody to talk to.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mae_jax.errors import ConfigError
from mae_jax.job import Job, SeveralProcesses

MODES = ("auto", "on", "off")
NEEDED = ("coordinator_address", "num_processes", "process_id")
BIND = "coordinator_bind_address"
HEARTBEAT_SECONDS = 100
DETECTION_SECONDS = 300  # for the coordinator's name to become known


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands in a job of several.

    Attributes:
      coordinator_address: HOST:PORT at which process 0 is found by the others.
      num_processes: of the job.
      process_id: of this one.
      bind_address: HOST:PORT at which process 0 listens; None: the coordinator's address.
      heartbeat_timeout: seconds of silence after which a process counts as dead.
      local_device_ids: devices of this process; None: all of the machine.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    bind_address: str | None = None
    heartbeat_timeout: int = HEARTBEAT_SECONDS
    local_device_ids: tuple[int, ...] | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `explicit_place` reads."""
    group = parser.add_argument_group("several processes (docs/many-processes.md)")
    group.add_argument(
        "--distributed",
        choices=MODES,
        default="auto",
        help="auto: several if told, or if SLURM, a TPU pod or Open MPI says so; on: or an error",
    )
    for name, metavar, text in (
        ("coordinator_address", "HOST:PORT", "where process 0 is found"),
        ("num_processes", "N", "how many there are"),
        ("process_id", "I", "which this one is, from 0"),
        (BIND, "HOST:PORT", "where process 0 listens; default: the coordinator's address"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, help=f"{text}; or {_variable(name)}")
    group.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=HEARTBEAT_SECONDS,
        metavar="SECONDS",
        help=f"silence after which a process counts as dead (default: {HEARTBEAT_SECONDS})",
    )


def explicit_place(flags: argparse.Namespace, environ: Mapping[str, str]) -> Place | None:
    """Return the place that flags and variables give, None if they give none.

    Raises:
      ConfigError: for a value that is none, one that is missing, or flags against each other.
    """
    if flags.heartbeat_timeout < 1:
        raise ConfigError(
            f"--heartbeat_timeout: expected at least 1, got {flags.heartbeat_timeout}"
        )
    given: dict[str, str] = {}
    names: dict[str, str] = {}  # by which the user gave it
    for field in (*NEEDED, BIND):
        flag, variable = getattr(flags, field), environ.get(_variable(field))
        if flag is not None and flags.distributed == "off":
            raise ConfigError(f"--{field}: expected none with --distributed=off, got {flag}")
        if flag is not None:
            given[field], names[field] = flag, f"--{field}"
        elif variable:
            given[field], names[field] = variable, _variable(field)
    for field in (f for f in given if f.endswith("address")):
        _check_address(names[field], given[field])
    if flags.distributed == "off" or not any(field in given for field in NEEDED):
        return None
    for field in NEEDED:
        if field not in given:
            other = next(names[name] for name in NEEDED if name in given)
            raise ConfigError(f"--{field}: expected a value beside {other}, got nothing")
    count = _whole(names["num_processes"], given["num_processes"], least=1)
    index = _whole(names["process_id"], given["process_id"], least=0)
    if index >= count:
        raise ConfigError(f"{names['process_id']}: expected less than {count}, got {index}")
    return Place(
        coordinator_address=given["coordinator_address"],
        num_processes=count,
        process_id=index,
        bind_address=given.get(BIND),
        heartbeat_timeout=flags.heartbeat_timeout,
    )


def find_place(flags: argparse.Namespace, environ: Mapping[str, str]) -> Place | None:
    """Return where this process stands: as told, or as the machine has it; None: it is alone.

    Raises:
      ConfigError: as `explicit_place`, or if there must be several and nothing tells of them.
    """
    place = explicit_place(flags, environ)
    if place is None and flags.distributed != "off":
        place = _detected(environ.get(_variable(BIND)), flags)
        if place is None and flags.distributed == "on":
            raise ConfigError(
                f"--distributed=on: expected --{', --'.join(NEEDED)}, or SLURM with srun, a TPU pod"
                " or Open MPI, got none of these"
            )
    return place if place is not None and place.num_processes > 1 else None


def _detected(bind_variable: str | None, flags: argparse.Namespace) -> Place | None:
    """Return the place that JAX reads from what started this process, None if nothing tells."""
    # Not by initialize() itself: it says nothing before it acts, and listens on all interfaces.
    from jax._src import clusters

    known = (
        *(clusters.OmpiCluster, clusters.SlurmCluster),
        *(clusters.GkeTpuCluster, clusters.GceTpuCluster),
    )
    for cluster in known:
        if not cluster.is_env_present():
            continue
        try:
            address, count, index, devices = cluster.auto_detect_unset_distributed_params(
                None, None, None, None, cluster.name, DETECTION_SECONDS
            )
        except (LookupError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--distributed={flags.distributed}: expected {cluster.name} to say where this"
                f" process stands, got {error!r}; take --distributed=off for one process"
            ) from error
        assert address is not None and count is not None and index is not None
        return Place(
            coordinator_address=address,
            num_processes=count,
            process_id=index,
            bind_address=flags.coordinator_bind_address or bind_variable,
            heartbeat_timeout=flags.heartbeat_timeout,
            local_device_ids=None if devices is None else tuple(devices),
        )
    return None


@contextlib.contextmanager
def joined(place: Place | None) -> Iterator[Job]:
    """Join the job, and leave it so that no process waits for one that is gone.

    Args:
      place: of this process; None: it is alone.
    """
    job = Job() if place is None else _join(place)
    with job.guard():
        yield job


def _join(place: Place) -> Job:
    """Start `jax.distributed`."""
    import jax
    from jax._src import distributed

    bind = None
    if place.process_id == 0:
        bind = _listening_address(place)
        _check_free(bind)
        print(
            f"{place.num_processes} processes meet at {place.coordinator_address}, process 0"
            f" listens on {bind}",
            flush=True,
        )
    # Ours, which knows SIGINT as well, is in mae_jax.train.signals.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=place.coordinator_address,
        num_processes=place.num_processes,
        process_id=place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind,
        heartbeat_timeout_seconds=place.heartbeat_timeout,
    )
    # There is no public way to the coordinator's texts.
    store = ClientStore(distributed.global_state.client)
    return SeveralProcesses(store, place.process_id, place.num_processes)


class ClientStore:
    """The texts that the coordinator of JAX keeps; see `mae_jax.train.signals.Store`."""

    def __init__(self, client: Any):
        self._client = client

    def put(self, name: str, text: str) -> None:
        """Set a text; one that is there is replaced."""
        self._client.key_value_set(f"mae_jax/{name}", text, allow_overwrite=True)

    def get(self, name: str, seconds: float) -> str | None:
        """Return a text as soon as it is there, None if it does not come in time."""
        import jax

        try:
            return self._client.blocking_key_value_get(f"mae_jax/{name}", int(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise


def _listening_address(place: Place) -> str:
    """Return where process 0 listens: as asked, else at the coordinator's address alone.

    Raises:
      ConfigError: if the coordinator's host is not known here.
    """
    if place.bind_address is not None:
        return place.bind_address
    host, _, port = place.coordinator_address.rpartition(":")
    try:
        address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ConfigError(
            f"--coordinator_address: expected an address of process 0, got"
            f" {place.coordinator_address}, which it does not know ({error.strerror}); to listen"
            f" everywhere take --{BIND}=0.0.0.0:{port}"
        ) from error
    if _is_loopback(str(address)) and not _is_loopback(host.strip("[]")):
        print(
            f"note: {host} is {address} on its own machine, which no other can reach; if processes"
            f" run elsewhere, take --{BIND}=0.0.0.0:{port}",
            file=sys.stderr,
        )
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


def _check_free(address: str) -> None:
    """Refuse a port that is taken, which the coordinator would share without a word."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise ConfigError(
                f"--{BIND}: expected an address of this machine with a free port, got {address}"
                f" ({error.strerror})"
            ) from error


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _variable(field: str) -> str:
    return f"MAE_JAX_{field.upper()}"


def _check_address(name: str, text: str) -> None:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"{name}: expected HOST:PORT, got {text!r}")


def _whole(name: str, text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}: expected a whole number of at least {least}, got {text!r}")
    return int(text)
