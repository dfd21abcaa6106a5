"""Shards of images that workers of Beam write, as `mae_jax.tools.shards` does on one machine.

A worker reads what a shard is to hold from a file in the scratch folder and leaves there what it
holds: lists of a million names are too large for Beam's description of a job.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from mae_jax.data.sources import THREADS
from mae_jax.errors import ConfigError
from mae_jax.files import completed, is_local
from mae_jax.tools import beam
from mae_jax.tools.shards import Options, Shard, ShardPlan, ensure_shard


def with_beam(
    plans: Sequence[ShardPlan], out: str, *, options: Sequence[str]
) -> Iterator[tuple[Shard, bool]]:
    """Yield each shard, after all are there, and whether it had to be written.

    Args:
      plans: of the shards.
      out: a folder or one of a bucket; all workers see it, and the images, under the same path.
      options: of Beam.

    Raises:
      ConfigError: if they do not, or if it cannot be written.
    """
    # Beam's workers run in other folders.
    out = os.path.abspath(out) if is_local(out) else out
    scratch = epath.Path(out) / beam.SCRATCH
    if scratch.exists():
        scratch.rmtree()  # of a start that was killed: its results are not those of this one
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(functools.partial(_write_plan, scratch), plans))
    beam.run([plan.file for plan in plans], functools.partial(_writer, out), options)
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(functools.partial(_read_result, scratch), plans)


def _writer(out: str) -> Callable[[str], None]:
    """Return what a worker does with the name of a shard."""
    scratch = epath.Path(out) / beam.SCRATCH

    def write(file: str) -> None:
        plan = _read_plan(scratch, file)
        if not epath.Path(plan.root).exists():
            raise ConfigError(
                f"FOLDER: expected a folder that all workers see, got nothing at {plan.root}"
            )
        shard, written = ensure_shard(plan, out, scratch)
        result = {
            "left_out": shard.left_out,
            "size": shard.size,
            "sha256": shard.sha256,
            "written": written,
        }
        with completed(_result(scratch, file), field="OUT", scratch=scratch) as temporary:
            temporary.write_text(json.dumps(result))

    return write


def _plan(scratch: epath.Path, file: str) -> epath.Path:
    return scratch / f"{file}.plan.json"


def _result(scratch: epath.Path, file: str) -> epath.Path:
    return scratch / f"{file}.result.json"


def _write_plan(scratch: epath.Path, plan: ShardPlan) -> None:
    root = os.path.abspath(plan.root) if is_local(plan.root) else plan.root
    fields = dataclasses.asdict(plan) | {"root": root}
    with completed(_plan(scratch, plan.file), field="OUT") as temporary:
        temporary.write_text(json.dumps(fields))


def _read_plan(scratch: epath.Path, file: str) -> ShardPlan:
    fields = json.loads(_read(_plan(scratch, file)))
    return ShardPlan(
        **fields
        | {
            "names": tuple(fields["names"]),
            "labels": tuple(fields["labels"]),
            "options": Options(**fields["options"]),
        }
    )


def _read_result(scratch: epath.Path, plan: ShardPlan) -> tuple[Shard, bool]:
    result = json.loads(_read(_result(scratch, plan.file)))
    left_out = result["left_out"]
    held = [one for one in zip(plan.names, plan.labels, strict=True) if one[0] not in left_out]
    shard = Shard(
        plan,
        tuple(name for name, _ in held),
        tuple(label for _, label in held),
        result["size"],
        result["sha256"],
        left_out,
    )
    return shard, result["written"]


def _read(path: epath.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise ConfigError(
            f"OUT={path.parent.parent}: expected a folder that all workers share, got no"
            f" {path.name} in {path.parent}"
        ) from None
