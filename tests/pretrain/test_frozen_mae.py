"""Agreement with transformers' ViTMAE on stored numbers, and that known mistakes break it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_jax.pretrain import mae
from tests.oracle import agreement, mae_case
from tests.oracle.frozen import Frozen, load

VARIANTS = {"norm_pix": True, "raw": False}


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    """Return the stored case; `tests/oracle/make_frozen_mae.py` says how it was made."""
    return load(Path(__file__).parent / "frozen_mae_small.npz")


def run(frozen: Frozen, variant: str, *, compiled: bool) -> agreement.Result:
    model = mae.make(**mae_case.SMALL, norm_pix_loss=VARIANTS[variant])
    return mae_case.run(model, frozen.params, **frozen.inputs, compiled=compiled)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_predictions_and_gradients_are_those_of_transformers(frozen, variant):
    ours = run(frozen, variant, compiled=True)
    shares = agreement.shares(ours, frozen.results[variant], agreement.SMALL)
    assert {name: share for name, share in shares.items() if not share <= 1} == {}


@pytest.mark.slow
def test_they_are_too_when_run_operation_by_operation(frozen):
    ours = run(frozen, "norm_pix", compiled=False)
    assert agreement.agrees(ours, frozen.results["norm_pix"], agreement.SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", mae_case.MISTAKES)
def test_a_known_mistake_is_noticed(frozen, mistake, monkeypatch):
    mae_case.MISTAKES[mistake](monkeypatch)
    ours = run(frozen, "norm_pix", compiled=False)
    assert not agreement.agrees(ours, frozen.results["norm_pix"], agreement.SMALL)
