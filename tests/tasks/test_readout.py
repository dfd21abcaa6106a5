"""Ridge regression and nearest neighbours, against what is slow and obvious."""

from __future__ import annotations

import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.tasks import readout
from mae_jax.tasks.readout import LAMBDAS, fit_ridge, knn_top1, label_draws, linear_top1


def slow_ridge(x: np.ndarray, y: np.ndarray, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Solve the normal equations with a column of ones that is not penalised."""
    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = lam * np.eye(x.shape[1] + 1)
    penalty[-1, -1] = 0.0
    solution = np.linalg.solve(ones.T @ ones + penalty, ones.T @ y)
    return solution[:-1], solution[-1]


def slow_leave_one_out(x: np.ndarray, y: np.ndarray, lam: float) -> float:
    """Return the mean squared error of n fits, each without the example it is asked about."""
    errors = []
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        weights, intercept = slow_ridge(x[rest], y[rest], lam)
        errors.append((y[i] - x[i] @ weights - intercept) ** 2)
    return float(np.mean(errors))


def draw_problem(n: int, dim: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim)) + rng.standard_normal(dim)
    y = x @ rng.standard_normal((dim, 3)) + noise * rng.standard_normal((n, 3)) + 5.0
    return x, y


# Fewer and more examples than dimensions.
@pytest.mark.parametrize(("n", "dim"), [(14, 5), (9, 12)])
def test_fit_solves_the_normal_equations_for_every_lambda(monkeypatch, n, dim):
    x, y = draw_problem(n, dim, noise=0.5, seed=0)
    for lam in LAMBDAS:
        monkeypatch.setattr(readout, "LAMBDAS", np.array([lam]))
        weights, intercept, used = fit_ridge(x, y)
        assert used == lam
        expected_weights, expected_intercept = slow_ridge(x, y, lam)
        np.testing.assert_allclose(weights, expected_weights, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(intercept, expected_intercept, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("n", "dim", "noise"), [(14, 5, 0.01), (14, 5, 1.0), (14, 5, 10.0), (9, 12, 0.5), (9, 12, 30.0)]
)
def test_lambda_is_the_one_that_leaving_one_out_prefers(n, dim, noise):
    x, y = draw_problem(n, dim, noise, seed=1)
    errors = [slow_leave_one_out(x, y, lam) for lam in LAMBDAS]
    assert fit_ridge(x, y)[2] == LAMBDAS[int(np.argmin(errors))]


def test_errors_of_leaving_one_out_are_exact_for_every_lambda(monkeypatch):
    x, y = draw_problem(10, 4, noise=1.0, seed=2)
    seen = []
    argmin = np.argmin
    monkeypatch.setattr(readout.np, "argmin", lambda errors: seen.append(errors) or argmin(errors))
    fit_ridge(x, y)
    expected = [slow_leave_one_out(x, y, lam) for lam in LAMBDAS]
    np.testing.assert_allclose(seen[0], expected, rtol=1e-8)


def test_the_noisier_the_stronger_the_penalty():
    chosen = [fit_ridge(*draw_problem(40, 20, noise, seed=3))[2] for noise in (0.01, 3.0, 100.0)]
    assert chosen[0] < chosen[1] < chosen[2]


def test_draws_have_so_many_of_each_class_without_repetition():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    draws = label_draws(labels, per_class=7, draws=5)
    assert len(draws) == 5
    for draw in draws:
        assert len(set(draw)) == 28
        assert np.bincount(labels[draw]).tolist() == [7] * 4


def test_draws_are_fixed_and_differ_from_each_other():
    labels = np.arange(100) % 4
    first, again = label_draws(labels, 7, 5), label_draws(labels, 7, 5)
    np.testing.assert_array_equal(first, again)
    assert len({tuple(sorted(draw)) for draw in first}) == 5
    assert sorted(label_draws(labels, 7, 1, seed=1)[0]) != sorted(first[0])


def test_examples_without_a_label_are_never_drawn():
    labels = np.array([-1, 0, 0, 1, -1, 1, 0])
    for draw in label_draws(labels, 2, 20):
        assert (labels[draw] >= 0).all()


def test_class_with_too_few_examples_gives_all_of_them():
    labels = np.array([0] * 10 + [3] * 2)
    (draw,) = label_draws(labels, 5, 1)
    assert np.bincount(labels[draw]).tolist() == [5, 0, 0, 2]
    assert {10, 11} <= set(draw)


def clusters(n: int, seed: int, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Return features of well separated classes, whose numbers are not 0, 1, 2, ..."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(n) % classes
    centres = 20.0 * np.eye(classes, 16)
    return centres[numbers] + rng.standard_normal((n, 16)), 10 + 3 * numbers


def test_classes_that_can_be_separated_are():
    train, test = clusters(300, seed=0), clusters(100, seed=1)
    assert linear_top1(*train, *test) == (100.0, 0.0)
    assert knn_top1(*train, *test) == 100.0


def test_random_labels_give_chance():
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((300, 16)), rng.standard_normal((1000, 16))
    train_labels, test_labels = rng.integers(0, 10, 300), rng.integers(0, 10, 1000)
    # 10 % of 1,000, whose standard deviation is 0.95 %; five draws that are not independent.
    mean, std = linear_top1(train, train_labels, test, test_labels)
    assert abs(mean - 10.0) < 3.0
    assert 0.0 < std < 3.0
    assert abs(knn_top1(train, train_labels, test, test_labels) - 10.0) < 4.0


def noisy_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return features that are right about half of the time."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 5, 500)
    features = 1.5 * np.eye(5, 8)[labels] + rng.standard_normal((500, 8))
    return features[:300], labels[:300], features[300:], labels[300:]


def test_linear_figures_are_mean_and_deviation_over_draws_by_the_normal_equations():
    train, train_labels, test, test_labels = noisy_problem()
    mean, std = train.mean(axis=0), train.std(axis=0)
    scores = []
    for draw in label_draws(train_labels, 6, 4):
        x, y = (train[draw] - mean) / std, np.eye(5)[train_labels[draw]]
        lam = LAMBDAS[int(np.argmin([slow_leave_one_out(x, y, lam) for lam in LAMBDAS]))]
        weights, intercept = slow_ridge(x, y, lam)
        predicted = np.argmax((test - mean) / std @ weights + intercept, axis=1)
        scores.append(100 * np.mean(predicted == test_labels))
    result = linear_top1(train, train_labels, test, test_labels, per_class=6, draws=4)
    assert result == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    assert 30 < result[0] < 90


def test_single_draw_has_no_deviation():
    _, std = linear_top1(*noisy_problem(), draws=1)
    assert std == 0.0


def test_scale_and_offset_of_features_do_not_matter_to_the_linear_figure():
    train, train_labels, test, test_labels = noisy_problem()
    scale = np.logspace(-3, 3, 8)
    offset = np.linspace(-5, 5, 8)
    moved = linear_top1(train * scale + offset, train_labels, test * scale + offset, test_labels)
    assert moved == linear_top1(train, train_labels, test, test_labels)


def test_feature_that_is_constant_does_no_harm():
    train, train_labels, test, test_labels = noisy_problem()
    padded = (np.pad(x, ((0, 0), (0, 1)), constant_values=3.0) for x in (train, test))
    (train_more, test_more) = padded
    more = linear_top1(train_more, train_labels, test_more, test_labels)
    assert more == linear_top1(train, train_labels, test, test_labels)


def test_features_in_float32_give_the_same_figures():
    train, train_labels, test, test_labels = noisy_problem()
    as32 = train.astype(np.float32), train_labels, test.astype(np.float32), test_labels
    assert linear_top1(*as32) == linear_top1(train, train_labels, test, test_labels)
    assert knn_top1(*as32) == knn_top1(train, train_labels, test, test_labels)


def test_training_examples_without_a_label_give_statistics_alone():
    train, train_labels, test, test_labels = noisy_problem()
    some = np.where(np.arange(300) % 3 == 0, -1, train_labels)
    kept = some >= 0
    assert knn_top1(train, some, test, test_labels) == knn_top1(
        train[kept], some[kept], test, test_labels
    )
    assert linear_top1(train, some, test, test_labels)[0] > 30


def test_held_out_examples_without_a_label_do_not_count():
    train, train_labels, test, test_labels = noisy_problem()
    some = np.where(np.arange(200) % 3 == 0, -1, test_labels)
    kept = some >= 0
    for figure in (linear_top1, knn_top1):
        of_some = figure(train, train_labels, test, some)
        assert of_some == figure(train, train_labels, test[kept], some[kept])


@pytest.mark.parametrize("figure", [linear_top1, knn_top1])
def test_labels_are_needed_on_both_sides(figure):
    train, train_labels, test, test_labels = noisy_problem()
    with pytest.raises(ConfigError, match=r"^data: expected labelled examples to evaluate on, got"):
        figure(train, train_labels, test, np.full(200, -1))
    with pytest.raises(ConfigError, match=r"^data: expected labelled examples to learn from, got"):
        figure(train, np.full(300, -1), test, test_labels)


def unit(degrees: float, length: float = 1.0) -> list[float]:
    return [length * np.cos(np.radians(degrees)), length * np.sin(np.radians(degrees))]


def vote(bank: list[tuple[float, int]], k: int, length: float = 1.0) -> int:
    """Return the class that a query at 0 degrees gets from (degrees, class) neighbours."""
    train = np.array([unit(degrees) for degrees, _ in bank])
    labels = np.array([label for _, label in bank])
    query = np.array([unit(0.0, length)])
    (winner,) = [
        c for c in np.unique(labels) if knn_top1(train, labels, query, np.array([c]), k=k) == 100.0
    ]
    return int(winner)


def test_nearest_neighbours_vote():
    bank = [(5.0, 7), (30.0, 2), (-40.0, 2), (80.0, 4), (85.0, 4), (90.0, 4)]
    assert vote(bank, k=1) == 7
    assert vote(bank, k=3) == 2
    assert vote(bank, k=6) == 4


def test_similarity_is_the_angle_and_not_the_distance():
    train = np.array([unit(10.0, 50.0), unit(60.0, 1.0)])
    labels, query = np.array([1, 2]), np.array([unit(0.0, 0.5)])
    assert knn_top1(train, labels, query, np.array([1]), k=1) == 100.0


def test_equal_votes_go_to_the_larger_sum_of_similarities():
    # Cosines 0.996 + 0.174 against 0.766 + 0.766: the nearest alone does not decide.
    assert vote([(5.0, 1), (80.0, 1), (40.0, 2), (-40.0, 2)], k=4) == 2
    assert vote([(5.0, 2), (80.0, 2), (40.0, 1), (-40.0, 1)], k=4) == 1


def test_similarity_never_outweighs_a_vote():
    near = [(float(i), 1) for i in range(10)]
    far = [(180.0 - i, 2) for i in range(11)]
    assert vote(near + far, k=21) == 2


def test_more_neighbours_than_examples_are_all_of_them():
    bank = [(5.0, 1), (40.0, 2), (50.0, 2)]
    assert vote(bank, k=20) == vote(bank, k=3) == 2


def test_neighbours_are_found_in_sets_larger_than_a_part():
    train, train_labels = clusters(60, seed=0)
    test, test_labels = clusters(2100, seed=1)
    wrong = np.arange(2100) % 4 == 0
    labels = np.where(wrong, 5, test_labels)
    assert knn_top1(train, train_labels, test, labels, k=5) == pytest.approx(75.0)


def test_neighbours_equal_a_slow_search():
    train, train_labels, test, test_labels = noisy_problem()
    correct = 0
    for x, label in zip(test, test_labels, strict=True):
        cosine = train @ x / np.linalg.norm(train, axis=1) / np.linalg.norm(x)
        nearest = np.argsort(-cosine)[:20]
        votes = [
            ((train_labels[nearest] == c).sum(), cosine[nearest][train_labels[nearest] == c].sum())
            for c in range(5)
        ]
        correct += max(range(5), key=votes.__getitem__) == label
    figure = knn_top1(train, train_labels, test, test_labels)
    assert figure == pytest.approx(100 * correct / len(test))
