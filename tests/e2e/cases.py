"""A run in parts, with a kill, against the same in one: for every task and every method."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from tests.helpers import (
    assert_same_state,
    kill,
    metrics,
    read_until,
    run_here,
    start,
    tiny_run,
)

STEPS = 40
LABELLED = {"steps": 12, "stop": 3, "saved": 4}
"""Of a tiny run: all steps, one at which to stop, and the next one that is saved."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A task that a run may have.

    Attributes:
      config: of the run.
      fields: that make it tiny, and bring in all that is drawn.
      steps: of the whole run.
      stop: a step in the middle, at which nothing is saved or evaluated.
      saved: the next one that is saved.
      changes: fields, each another experiment, with what the refusal says.
      items: of a checkpoint, beside those of every one.
    """

    config: str
    fields: dict[str, str]
    steps: int
    stop: int
    saved: int
    changes: tuple[dict[str, str], ...]
    items: tuple[str, ...] = ()

    def flags(self, workdir: Path, **more: str) -> list[str]:
        return tiny_run(workdir, config=self.config, **self.fields | more)


def assert_same_losses(case: Case, whole: Path, workdir: Path) -> None:
    """Assert that a run in parts has logged what the whole one has, each step once."""
    expected = {r["step"]: r["train/loss"] for r in metrics(whole) if "train/loss" in r}
    rows = [row for row in metrics(workdir) if "train/loss" in row]
    for row in rows:
        assert row["train/loss"] == expected.get(row["step"], row["train/loss"])
    steps = [row["step"] for row in rows]
    assert len(steps) == len(set(steps))
    assert steps[-1] == case.steps


def assert_parts_equal_the_whole(case: Case, whole: Path, workdir: Path) -> None:
    """Stop, go on, kill, go on: the bits and losses are those of the run in one, `whole`."""
    status, output = run_here([*case.flags(workdir), f"--stop_at_step={case.stop}"])
    assert status == 0, output
    assert f"saved step {case.stop}" in output
    assert f"finished at step {case.stop} of {case.steps}" in output

    # As many devices as here, for the bits depend on them.
    process = start(case.flags(workdir), JAX_NUM_CPU_DEVICES=str(jax.device_count()))
    output = "".join(read_until(process, f"saved step {case.saved}"))
    kill(process)
    assert f"resumed from step {case.stop}" in output

    status, output = run_here(case.flags(workdir))
    assert status == 0, output
    assert "resumed from step" in output
    assert "started from scratch" not in output
    assert f"finished at step {case.steps}" in output
    assert_same_state(whole, workdir, case.steps)
    assert_same_losses(case, whole, workdir)


def assert_changes_are_refused(case: Case, whole: Path) -> None:
    """Assert that another experiment in the same folder is refused by name, and nothing is lost."""
    before = metrics(whole)
    for change in case.changes:
        ((name, value),) = change.items()
        status, output = run_here(case.flags(whole, **change))
        assert status == 2
        assert f"error: {name.replace('__', '.')} is {value!r}".replace("'", "") in (
            output.replace("'", "")
        )
        assert f"{whole} was made with" in output
    assert metrics(whole) == before
