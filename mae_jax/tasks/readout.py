"""How good are features? Two answers that train nothing: ridge regression and nearest neighbours.

Plain numpy in float64 on the host: the sets are small, and the figures repeat exactly.
"""

from __future__ import annotations

import numpy as np

from mae_jax.errors import ConfigError

LAMBDAS = np.logspace(-3, 5, 33)


def label_draws(labels: np.ndarray, per_class: int, draws: int, seed: int = 0) -> list[np.ndarray]:
    """Return `draws` fixed choices of indices with `per_class` examples of each class.

    Args:
      labels: int [n]; -1 (no label) is never drawn. A class with fewer examples gives all it has.
      per_class: labels a class.
      draws: how many choices.
      seed: of the choices; the same in every run, so that runs can be compared.
    """
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels) if c >= 0]
    return [
        np.concatenate([rng.permutation(members)[:per_class] for members in classes])
        for _ in range(draws)
    ]


def fit_ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit ridge regression with an intercept; lambda by leave-one-out squared error.

    The leave-one-out residual of a linear smoother is (y - prediction) / (1 - leverage), so one
    decomposition serves all of `LAMBDAS`.

    Args:
      x: float [n, D].
      y: float [n, classes].

    Returns:
      weights [D, classes], intercept [classes], lambda.
    """
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    u, s, vt = np.linalg.svd(x - x_mean, full_matrices=False)
    projected = u.T @ (y - y_mean)
    errors = []
    for lam in LAMBDAS:
        shrink = s**2 / (s**2 + lam)
        residual = y - y_mean - u @ (shrink[:, None] * projected)
        leverage = 1.0 / len(x) + (u**2) @ shrink
        errors.append(np.mean((residual / np.maximum(1.0 - leverage, 1e-12)[:, None]) ** 2))
    lam = float(LAMBDAS[int(np.argmin(errors))])
    weights = vt.T @ ((s / (s**2 + lam))[:, None] * projected)
    return weights, y_mean - x_mean @ weights, lam


def linear_top1(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    per_class: int = 10,
    draws: int = 5,
) -> tuple[float, float]:
    """Return mean and standard deviation over label draws of the top-1 accuracy, in percent.

    Features are standardised with the statistics of all of `train`, whose labels beyond
    `per_class` are not used.

    Args:
      train: float [n, D].
      train_labels: int [n].
      test: float [m, D].
      test_labels: int [m]; those with -1 (no label) do not count.
      per_class: labels a class.
      draws: label draws.

    Raises:
      ConfigError: if no example of either has a label.
    """
    test, test_labels = _labelled(train_labels, test, test_labels)
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    train, test = (train - mean) / (std + 1e-8), (test - mean) / (std + 1e-8)
    classes = np.unique(train_labels[train_labels >= 0])
    scores = []
    for chosen in label_draws(train_labels, per_class, draws):
        targets = (train_labels[chosen, None] == classes).astype(np.float64)
        weights, intercept, _ = fit_ridge(train[chosen], targets)
        predicted = classes[np.argmax(test @ weights + intercept, axis=1)]
        scores.append(100.0 * np.mean(predicted == test_labels))
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if draws > 1 else 0.0


def knn_top1(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    k: int = 20,
) -> float:
    """Return the top-1 accuracy, in percent, of `knn_predictions`; see `linear_top1`."""
    test, test_labels = _labelled(train_labels, test, test_labels)
    predicted = knn_predictions(train, train_labels, test, k=k)
    return 100.0 * float(np.mean(predicted == test_labels))


def knn_predictions(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, *, k: int
) -> np.ndarray:
    """Return the labels int [m] that the k most similar of `train` vote for.

    Similarity is the cosine; equal votes are decided by the larger sum of similarities. Arguments
    as in `linear_top1`; unlabelled training examples are left out.
    """
    labelled = train_labels >= 0
    train, train_labels = _unit_length(train[labelled]), train_labels[labelled]
    classes, numbers = np.unique(train_labels, return_inverse=True)
    k = min(k, len(train))
    predicted = []
    rows_at_once = max(1, 2**27 // len(train))  # 1 GiB of similarities
    for start in range(0, len(test), rows_at_once):
        end = start + rows_at_once
        similarity = _unit_length(test[start:end]) @ train.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        rows = np.arange(len(nearest))[:, None]
        votes = np.zeros((len(nearest), len(classes)))
        # A vote counts 1, and at most 1e-3 in all for similarity: it decides ties alone.
        weight = 1.0 + 1e-3 * (1.0 + similarity[rows, nearest]) / (2.0 * k)
        np.add.at(votes, (rows, numbers[nearest]), weight)
        predicted.append(classes[votes.argmax(axis=1)])
    return np.concatenate(predicted)


def _labelled(
    train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out of `test` what has no label."""
    labelled = test_labels >= 0
    for what, count in (("learn from", (train_labels >= 0).sum()), ("evaluate on", labelled.sum())):
        if not count:
            raise ConfigError(f"data: expected labelled examples to {what}, got none")
    return test[labelled], test_labels[labelled]


def _unit_length(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
