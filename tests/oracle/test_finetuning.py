"""Fine-tuning and linear probing agree with plain PyTorch loops, and mistakes are noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from tests.oracle import classifier_case as case
from tests.oracle.agreement import Trained, Tree, training_report, training_shares
from tests.oracle.classifier_case import (
    FINETUNING_MISTAKES,
    PROBING_MISTAKES,
    TOTAL_STEPS,
    Batch,
    Finetuning,
    Probed,
    Probing,
)

pytestmark = pytest.mark.oracle

STATISTICS = 1e-5  # largest difference over the largest value
LOGITS = 1e-4


@pytest.fixture(scope="module")
def theirs() -> Iterator[ModuleType]:
    """Return the other side. Imported here, so that the file can be collected without torch."""
    import torch

    from tests.oracle import torch_classifier

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small are done sooner by one
    yield torch_classifier
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return case.make_batches()


@pytest.fixture(scope="module")
def finetuned(theirs, batches) -> Trained:
    return theirs.finetune(weights(), batches, Finetuning())


@pytest.fixture(scope="module")
def probed(theirs, batches) -> Probed:
    return theirs.probe(probe_weights(), batches, Probing())


def weights(pooling: str = "mean") -> Tree:
    return case.random_weights(case.classifier(pooling))


def probe_weights() -> Tree:
    return case.random_weights(case.classifier("cls", norm_group=case.BATCH_SIZE))


def noticed(ours: Trained, theirs: Trained, start: Tree) -> dict[str, float]:
    """Return what is further apart than it may be, and print the largest."""
    print(training_report(ours, theirs, start))
    shares = training_shares(ours, theirs, start)
    return {name: share for name, share in shares.items() if not share <= 1}


def head(params: Tree) -> Tree:
    return {path: array for path, array in params.items() if path.startswith("head/")}


def noticed_probing(ours: Probed, theirs: Probed, start: Tree) -> dict[str, float]:
    """Return the same of what linear probing leaves."""
    shares = {
        name: float(np.abs(mine - other).max() / np.abs(other).max() / tolerance)
        for name, mine, other, tolerance in (
            ("mean", ours.mean, theirs.mean, STATISTICS),
            ("var", ours.var, theirs.var, STATISTICS),
            ("logits", ours.logits, theirs.logits, LOGITS),
        )
    }
    print("of its tolerance:", ", ".join(f"{name} {share:.3g}" for name, share in shares.items()))
    wrong = {name: share for name, share in shares.items() if not share <= 1}
    return wrong | noticed(ours.trained, theirs.trained, head(start))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_twenty_steps_of_fine_tuning_agree(theirs, batches, pooling):
    params, recipe = weights(pooling), Finetuning(pooling)
    other = theirs.finetune(params, batches, recipe)
    assert len(other.losses) == TOTAL_STEPS
    assert other.losses[-1] < 0.8 * other.losses[0]  # there is something to agree on
    assert noticed(case.finetune(params, batches, recipe), other, params) == {}


@pytest.mark.parametrize(
    "recipe",
    [Probing(), Probing(norm_groups=2), Probing(weight_decay=1e-2)],
    ids=["one group", "two groups", "decay"],
)
def test_twenty_steps_of_linear_probing_agree(theirs, batches, recipe):
    params = probe_weights()
    other = theirs.probe(params, batches, recipe)
    assert len(other.trained.losses) == TOTAL_STEPS
    assert other.trained.losses[-1] < 0.8 * other.trained.losses[0]
    assert noticed_probing(case.probe(params, batches, recipe), other, params) == {}


@pytest.mark.parametrize("mistake", FINETUNING_MISTAKES)
def test_a_mistake_in_fine_tuning_is_noticed(finetuned, batches, mistake):
    fields, change = FINETUNING_MISTAKES[mistake]
    params, recipe = weights(), dataclasses.replace(Finetuning(), **fields)
    assert noticed(case.finetune(params, batches, recipe, change), finetuned, params)


@pytest.mark.parametrize("mistake", PROBING_MISTAKES)
def test_a_mistake_in_linear_probing_is_noticed(probed, batches, mistake):
    fields, change = PROBING_MISTAKES[mistake]
    params, recipe = probe_weights(), dataclasses.replace(Probing(), **fields)
    assert noticed_probing(case.probe(params, batches, recipe, change), probed, params)
