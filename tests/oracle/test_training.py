"""Training agrees with a plain PyTorch loop for fifty steps, and known mistakes are noticed."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest

from mae_jax.tasks.pretrain import PretrainTask
from tests.oracle import mae_case, training_case
from tests.oracle.agreement import (
    Trained,
    Tree,
    training_report,
    training_shares,
)
from tests.oracle.training_case import MISTAKES, TOTAL_STEPS, WARMUP_STEPS, Batch

pytestmark = pytest.mark.oracle

# A mistake shows sooner than in all fifty: in these the rate has risen, and begun to fall.
FEW_STEPS = WARMUP_STEPS + 5


class Case(NamedTuple):
    """What both sides start from."""

    task: PretrainTask
    params: Tree
    batches: list[Batch]


@pytest.fixture(scope="module")
def torch_training() -> Iterator[ModuleType]:
    """Return the other side. Imported here, so that the file can be collected without torch."""
    import torch

    from tests.oracle import torch_training

    # Products this small are done sooner by one thread, five times so on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch_training
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case() -> Case:
    task = training_case.make_task()
    params = mae_case.random_weights(task.method, seed=0)
    return Case(task, params, training_case.make_batches(task))


@pytest.fixture(scope="module")
def theirs_after_few(case: Case, torch_training: ModuleType) -> Trained:
    return torch_training.train(case.task.method, case.params, case.batches[:FEW_STEPS])


def noticed(ours: Trained, theirs: Trained, case: Case) -> dict[str, float]:
    """Return what is further apart than it may be, and print the largest."""
    print(training_report(ours, theirs, case.params))
    shares = training_shares(ours, theirs, case.params)
    return {name: share for name, share in shares.items() if not share <= 1}


def test_fifty_steps_agree(case, torch_training):
    ours = training_case.train(*case)
    theirs = torch_training.train(case.task.method, case.params, case.batches)
    assert len(theirs.losses) == TOTAL_STEPS
    # There is something to agree on: parameters went far, and the loss with them.
    assert theirs.losses[-1] < 0.6 * theirs.losses[0]
    assert noticed(ours, theirs, case) == {}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_is_noticed(case, theirs_after_few, mistake, monkeypatch):
    recipe = MISTAKES[mistake](monkeypatch)
    batches = case.batches[:FEW_STEPS]
    ours = training_case.train(case.task, case.params, batches, recipe)
    assert noticed(ours, theirs_after_few, case)
