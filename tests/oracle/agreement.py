"""How agreement with another implementation is measured. Needs neither jax nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Tree = Mapping[str, np.ndarray]
"""Arrays by their path in our parameters, such as `encoder/block_00/attn/qkv/kernel`."""


class Result(NamedTuple):
    """What a step computes: the loss, the predictions [B, M, U] and the gradients by path."""

    loss: float
    predictions: np.ndarray
    gradients: Tree


class Trained(NamedTuple):
    """What training leaves: the loss of each step, before its update, and parameters by path."""

    losses: np.ndarray
    params: Tree


class Tolerance(NamedTuple):
    """How far two results may be apart.

    Attributes:
      loss: difference over the loss.
      predictions: largest difference over the largest prediction.
      gradient: of each leaf, norm of the difference over the norm.
      floor: is added to the latter, as a share of the norm of all gradients together.
    """

    loss: float
    predictions: float
    gradient: float
    floor: float = 1e-7


SMALL = Tolerance(loss=1e-6, predictions=3e-6, gradient=5e-6)
FULL_SIZE = Tolerance(loss=1e-5, predictions=5e-5, gradient=5e-5)
TRAINED_LOSS = 1e-4
TRAINED_CHANGE = 1e-3


def split_qkv(tree: Tree) -> dict[str, np.ndarray]:
    """Return the leaves to compare: query, key and value apart, and no key bias.

    A bias of all keys adds the same to each logit of a query, so softmax does not see it: its
    gradient is zero but for rounding, and there is nothing to compare.
    """
    leaves: dict[str, np.ndarray] = {}
    for path, array in tree.items():
        if "/qkv/" in path:
            for name, part in zip("qkv", np.split(array, 3, axis=-1), strict=True):
                leaves[path.replace("/qkv/", f"/{name}/")] = part
        else:
            leaves[path] = array
    return {path: array for path, array in leaves.items() if not path.endswith("/k/bias")}


def shares(ours: Result, theirs: Result, tolerance: Tolerance) -> dict[str, float]:
    """Return the share of its tolerance that each difference takes; above 1 is disagreement."""
    scale = np.abs(theirs.predictions).max()
    result = {
        "loss": abs(ours.loss - theirs.loss) / abs(theirs.loss) / tolerance.loss,
        "predictions": np.abs(ours.predictions - theirs.predictions).max()
        / scale
        / tolerance.predictions,
    }
    mine, others = split_qkv(ours.gradients), split_qkv(theirs.gradients)
    assert mine.keys() == others.keys()
    norm = _norm(*others.values())
    for path, array in others.items():
        allowed = tolerance.gradient * _norm(array) + tolerance.floor * norm
        result[path] = _norm(mine[path].astype(np.float64) - array) / allowed
    return {name: float(value) for name, value in result.items()}


def training_shares(ours: Trained, theirs: Trained, start: Tree) -> dict[str, float]:
    """Return the share of its tolerance that each difference takes; above 1 is disagreement.

    Args:
      ours: what our training left.
      theirs: what the other left.
      start: parameters of both before.

    Returns:
      `losses`, the largest relative difference over `TRAINED_LOSS`, and for each parameter by path
      the norm of the difference over that of its change from the start, over `TRAINED_CHANGE`.
    """
    assert ours.losses.shape == theirs.losses.shape
    difference = np.abs(ours.losses - theirs.losses) / np.abs(theirs.losses)
    result = {"losses": difference.max() / TRAINED_LOSS}
    mine, others, before = map(split_qkv, (ours.params, theirs.params, start))
    assert mine.keys() == others.keys() == before.keys()
    for path, array in others.items():
        change = array.astype(np.float64) - before[path]
        result[path] = _norm(mine[path].astype(np.float64) - array) / _norm(change) / TRAINED_CHANGE
    return {name: float(value) for name, value in result.items()}


def agrees(ours: Result, theirs: Result, tolerance: Tolerance) -> bool:
    """Return whether every difference is within its tolerance; NaN is not."""
    return all(share <= 1 for share in shares(ours, theirs, tolerance).values())


def report(ours: Result, theirs: Result, tolerance: Tolerance) -> str:
    """Return the shares of loss and predictions, and the largest of the gradients, as a line."""
    by_name = shares(ours, theirs, tolerance)
    loss, predictions = by_name.pop("loss"), by_name.pop("predictions")
    worst = max(by_name, key=lambda path: by_name[path])
    return (
        f"of its tolerance: loss {loss:.3g}, predictions {predictions:.3g},"
        f" gradients at most {by_name[worst]:.3g} ({worst})"
    )


def training_report(ours: Trained, theirs: Trained, start: Tree) -> str:
    """Return the share of the losses, and the largest two of the parameters, as a line."""
    by_name = training_shares(ours, theirs, start)
    losses = by_name.pop("losses")
    worst = sorted(by_name, key=lambda path: -by_name[path])[:2]
    leaves = ", ".join(f"{by_name[path]:.3g} ({path})" for path in worst)
    return f"of its tolerance: losses {losses:.3g}, parameters at most {leaves}"


def _norm(*arrays: np.ndarray) -> float:
    return float(np.sqrt(sum(np.square(a, dtype=np.float64).sum() for a in arrays)))
