"""Accuracy over a whole set: every count by hand or by another library, whatever the batches."""

from __future__ import annotations

import csv
import io
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from mae_jax.errors import ConfigError
from mae_jax.models.transfer import make_classifier
from mae_jax.tasks import confusion
from mae_jax.tasks.accuracy import Classification, Results, judge
from mae_jax.tasks.inputs import ImageModel
from mae_jax.train import sharding
from tests.tasks.test_evaluators import HostBatches, placement_on
from tests.weights import random_params

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


@pytest.fixture(scope="module")
def one_device() -> Any:
    return placement_on(sharding.make_mesh(1, 1, jax.devices()[:1]))


@pytest.fixture(scope="module")
def eight_devices() -> Any:
    return placement_on(sharding.make_mesh(4, 2))


class Table(nn.Module):
    """A model that looks the logits of an image up by its first two pixel values."""

    num_images: int
    num_classes: int

    @nn.compact
    def logits(self, batch: Any) -> jax.Array:
        shape = (self.num_images, self.num_classes)
        table = self.param("table", nn.initializers.zeros, shape)
        numbers = (batch["image"][:, 0, 0, :2] * 255).round().astype(int)
        return table[numbers[:, 0] + 256 * numbers[:, 1]]


def numbered(count: int) -> np.ndarray:
    """Return the images that `Table` knows."""
    images = np.zeros((count, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return images


def evaluator(
    logits: np.ndarray, labels: list[int] | np.ndarray, placement: Any, **fields: Any
) -> tuple[Classification, Any]:
    """Return the evaluator of a model with these logits, in batches of 8, and its parameters."""
    task = ImageModel(Table(*logits.shape), (0.0,) * 3, (1.0,) * 3)
    batches = HostBatches(numbered(len(logits)), np.asarray(labels), 8)
    return Classification(task, batches, placement, **fields), {"table": logits}


def measure(
    logits: list | np.ndarray, labels: list[int] | np.ndarray, placement: Any, **fields: Any
) -> Results:
    made, params = evaluator(np.asarray(logits, np.float32), labels, placement, **fields)
    return made.measure(params, {})


def drawn(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits that are right more often than not, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.standard_normal((count, classes)) + 2.0 * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


@pytest.fixture(scope="module")
def real(tiny_mae) -> tuple[ImageModel, Any, np.ndarray, np.ndarray]:
    """Return a classifier with random weights of ten classes, and 1,003 images with labels."""
    model = tiny_mae(depth=1)
    classifier = make_classifier(model.unit, model.encoder, 10)
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (1003, 4, 4, 3), np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    params = random_params(classifier.init, np.zeros((1, 32, 32, 3), np.float32))
    return ImageModel(classifier, MEAN, STD), params, images, rng.integers(0, 10, 1003)


@pytest.fixture(scope="module")
def whole(real, one_device) -> Results:
    task, params, images, labels = real
    held_out = HostBatches(images, labels, 1003)
    return Classification(task, held_out, one_device).measure(params, {})


@pytest.mark.parametrize(
    ("batch_size", "devices"),
    [(7, "one_device"), (64, "one_device"), (64, "eight_devices"), (1008, "eight_devices")],
)
def test_1003_images_give_equal_counts_for_any_batch_size_and_device_count(
    real, whole, batch_size, devices, request
):
    task, params, images, labels = real
    held_out = HostBatches(images, labels, batch_size)
    placement = request.getfixturevalue(devices)
    results = Classification(task, held_out, placement).measure(params, {})
    assert results.count == whole.count == 1003
    assert (results.correct_top1, results.correct_top5) == (whole.correct_top1, whole.correct_top5)
    np.testing.assert_array_equal(results.confusion, whole.confusion)
    assert results.loss == pytest.approx(whole.loss, rel=1e-6)


def test_figures_of_a_real_classifier_are_those_of_its_logits_in_numpy(real, whole):
    task, params, images, labels = real
    batch = {"image": images}
    logits = np.asarray(jax.jit(lambda p: task.call("logits", p, batch))(params), np.float64)
    order = np.argsort(-logits, axis=1)
    assert whole.correct_top1 == (order[:, 0] == labels).sum()
    assert whole.correct_top5 == (order[:, :5] == labels[:, None]).sum()
    assert len(np.unique(order[:, 0])) > 3, "the classifier is to tell images apart"
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(1003), labels]
    assert whole.loss == pytest.approx(losses.mean(), rel=1e-6)
    np.testing.assert_array_equal(
        whole.confusion, confusion_matrix(labels, order[:, 0], labels=np.arange(10))
    )
    assert whole.top1 == 100 * whole.correct_top1 / 1003
    assert whole.top5 == 100 * whole.correct_top5 / 1003


def test_four_examples_by_hand(one_device):
    logits = [
        [9, 8, 7, 6, 5, 4, 3],  # label 0: first
        [9, 8, 7, 6, 5, 4, 3],  # label 4: fifth
        [9, 8, 7, 6, 5, 4, 3],  # label 5: sixth
        [0, 0, 0, 0, 0, 0, 1],  # label 6: first
    ]
    results = measure(logits, [0, 4, 5, 6], one_device)
    assert (results.count, results.correct_top1, results.correct_top5) == (4, 2, 3)
    assert (results.top1, results.top5) == (50.0, 75.0)
    expected = np.zeros((7, 7), int)
    expected[[0, 4, 5, 6], [0, 0, 0, 6]] = 1
    np.testing.assert_array_equal(results.confusion, expected)
    assert results.confusion.dtype == np.int64
    tail = np.log(sum(np.exp(-k) for k in range(7)))
    last = np.log(6 + np.e) - 1
    assert results.loss == pytest.approx((3 * tail + 0 + 4 + 5 + last) / 4, rel=1e-6)


def test_a_constant_model_is_right_for_its_first_classes_alone(one_device):
    results = measure(np.zeros((70, 7)), np.arange(70) % 7, one_device)
    assert (results.correct_top1, results.correct_top5) == (10, 50)
    np.testing.assert_array_equal(results.confusion[:, 0], 10)
    assert results.loss == pytest.approx(np.log(7), rel=1e-6)


@pytest.mark.parametrize("label", range(4))
def test_ties_go_to_the_smaller_index_as_in_arg_max(label):
    logits = np.array([[1.0, 3.0, 3.0, 3.0]], np.float32)
    out = judge(logits, np.array([label]))
    assert int(out["prediction"][0]) == 1
    assert int(out["rank"][0]) == {0: 3, 1: 0, 2: 1, 3: 2}[label]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("logits", "rank", "prediction"),
    [
        ([0, 1, 2, 3, 4, 5], 3, 5),
        ([0, 1, NAN, 3, 4, 5], 6, -1),  # its own
        ([NAN, 1, 9, 3, 4, 5], 6, -1),  # another one: NaN is the largest
        ([NAN] * 6, 6, -1),
        ([0, 1, INF, 3, 4, 5], 6, -1),
        ([0, 1, -INF, 3, 4, 5], 6, 5),
        ([-INF, 1, 9, 3, 4, 5], 0, 2),  # a class that is ruled out
        ([-INF] * 6, 6, -1),
    ],
)
def test_logits_that_are_not_finite_are_wrong(logits, rank, prediction):
    out = judge(np.array([logits], np.float32), np.array([2]))
    assert int(out["rank"][0]) == rank
    assert int(out["prediction"][0]) == prediction


@pytest.mark.parametrize("classes", [3, 8])
def test_a_model_that_has_diverged_is_always_wrong(one_device, classes):
    made, params = evaluator(np.full((12, classes), NAN, np.float32), [0, 1, 2] * 4, one_device)
    results = made.measure(params, {})
    assert (results.count, results.correct_top1, results.correct_top5) == (12, 0, 0)
    assert np.isnan(results.loss)
    assert not results.confusion.any()
    assert results.examples[:3].tolist() == [4, 4, 4]
    figures = dict(made.run(params, {}))
    assert figures["top1"] == 0.0
    assert "0,4,0,0.00,,\n" in figures["per_class"]


def test_examples_without_a_label_and_padding_do_not_count(one_device):
    logits, labels = drawn(21, 6)  # three of 24 rows are padding
    hidden = labels.copy()
    hidden[::4] = -1
    some, shown = measure(logits, hidden, one_device), hidden >= 0
    alone = measure(logits[shown], labels[shown], one_device)
    assert some.count == alone.count == 15
    assert (some.correct_top1, some.correct_top5) == (alone.correct_top1, alone.correct_top5)
    np.testing.assert_array_equal(some.confusion, alone.confusion)
    assert some.loss == pytest.approx(alone.loss, rel=1e-6)


def test_padding_does_not_count(one_device):
    logits, labels = drawn(21, 6)
    results = measure(logits, labels, one_device)
    assert results.count == 21
    assert results.correct_top1 == (logits.argmax(axis=1) == labels).sum()
    expected = confusion_matrix(labels, logits.argmax(axis=1), labels=range(6))
    np.testing.assert_array_equal(results.confusion, expected)
    np.testing.assert_array_equal(results.examples, np.bincount(labels, minlength=6))


def test_counts_take_in_the_rows_of_all_processes(one_device):
    logits, labels = drawn(21, 6)

    class Half(HostBatches):
        """What one of two processes has, beside what the other one adds."""

        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield {name: rows[:4] for name, rows in batch.items()} | {"whole": batch}

    task = ImageModel(Table(*logits.shape), (0.0,) * 3, (1.0,) * 3)
    put = one_device.put
    both = type(one_device)(lambda b: put(b["whole"]), one_device.replicated, one_device.seed)
    made = Classification(task, Half(numbered(21), labels, 8), both)
    assert made.measure({"table": logits}, {}).count == 21


# The columns of ImageNet-A or R among 1,000: every fifth, in an order of their own.
COLUMNS = np.random.default_rng(3).permutation(np.arange(2, 1000, 5))


def test_two_hundred_of_a_thousand_columns_are_taken_out_before_the_arg_max(one_device):
    count, rng = 40, np.random.default_rng(4)
    labels = rng.integers(0, 200, count)
    logits = rng.uniform(-1, 1, (count, 1000)).astype(np.float32)
    logits[np.arange(count), COLUMNS[labels]] = 2.0
    # A class that is no possible answer is in front everywhere: over all 1,000 nothing is right.
    logits[:, 0] = 3.0
    wrong = labels == labels[0]
    logits[wrong, COLUMNS[(labels[0] + 1) % 200]] = 2.5

    results = measure(logits, labels, one_device, columns=COLUMNS)
    assert results.correct_top1 == count - wrong.sum() > 30
    assert results.correct_top5 == count
    assert results.confusion.shape == (200, 200)
    assert results.confusion[labels[0], (labels[0] + 1) % 200] == wrong.sum()
    chosen = logits[:, COLUMNS].astype(np.float64)
    losses = np.log(np.exp(chosen).sum(axis=1)) - chosen[np.arange(count), labels]
    assert results.loss == pytest.approx(losses.mean(), rel=1e-6)
    over_all = measure(logits, COLUMNS[labels], one_device)
    assert over_all.correct_top1 == 0
    assert over_all.loss > results.loss + 0.5


@pytest.mark.parametrize(
    ("columns", "got"), [([0, 6], "got 6"), ([-1, 0], "got -1"), ([1, 1], "got repeated")]
)
def test_columns_that_the_model_does_not_have_are_refused(one_device, columns, got):
    with pytest.raises(ConfigError, match=f"columns: .* the model's 6 logits, {got}"):
        evaluator(np.zeros((4, 6), np.float32), [0] * 4, one_device, columns=columns)


@pytest.mark.parametrize(
    ("labels", "fields", "message"),
    [
        ([0, 6, 2, -1], {}, "expected labels below 6, .* got 6$"),
        ([0, 2, 1, -1], {"columns": [3, 4]}, "expected labels below 2, .* got 2$"),
        ([-1] * 4, {}, "expected labelled examples .* got none$"),
    ],
)
def test_labels_that_cannot_be_measured_are_refused(one_device, labels, fields, message):
    with pytest.raises(ConfigError, match=message):
        measure(np.zeros((4, 6)), labels, one_device, **fields)


def test_figures_come_with_picture_and_table_or_without(one_device):
    logits, labels = drawn(21, 6)
    made, params = evaluator(logits, labels, one_device, classes=tuple("abcdef"))
    names = ["top1", "top5", "loss", "confusion", "per_class"]
    values = dict(made.run(params, {}))
    assert list(values) == names
    results = made.measure(params, {})
    assert [values[name] for name in names[:3]] == [results.top1, results.top5, results.loss]
    assert all(type(values[name]) is float for name in names[:3])
    np.testing.assert_array_equal(
        values["confusion"], confusion.picture(results.confusion, tuple("abcdef"))
    )
    assert values["per_class"] == results.table(tuple("abcdef"))

    made, params = evaluator(logits, labels, one_device, details=False)
    assert [name for name, _ in made.run(params, {})] == names[:3]


def test_five_classes_or_fewer_have_no_top5(one_device):
    logits, labels = drawn(21, 5)
    made, params = evaluator(logits, labels, one_device, details=False)
    assert [name for name, _ in made.run(params, {})] == ["top1", "loss"]
    assert made.measure(params, {}).top5 == 100.0


def test_the_table_by_hand(one_device):
    #        true:       0  0  0  0  1  1  2        nothing of class 3
    predicted = np.array([0, 2, 1, 2, 1, 1, 0])
    labels = [0, 0, 0, 0, 1, 1, 2]
    results = measure(np.eye(4)[predicted], labels, one_device)
    table = results.table(("cat, tabby", "dog", "fox"))
    assert list(csv.reader(io.StringIO(table))) == [
        ["class", "examples", "correct", "top1", "most_confused_with", "confused"],
        ["cat, tabby", "4", "1", "25.00", "fox", "50.00"],
        ["dog", "2", "2", "100.00", "", ""],
        ["fox", "1", "0", "0.00", "cat, tabby", "100.00"],
        ["3", "0", "0", "", "", ""],
    ]
    assert "\r" not in table
    row = results.per_class()[0]
    assert (row.examples, row.correct, row.confused_with, row.confused) == (4, 1, 2, 2)


class Shifted(nn.Module):
    """A model whose answer depends on state beside its parameters."""

    num_classes: int = 6

    @nn.compact
    def logits(self, batch: Any) -> jax.Array:
        shift = self.variable("batch_stats", "shift", np.zeros, (6,))
        gain = self.param("gain", nn.initializers.ones, ())
        return gain * jax.nn.one_hot(batch["label"], 6) + shift.value[None]


def test_the_views_of_an_example_are_averaged_as_probabilities(one_device):
    # Three views lean to class 0, which one nearly rules out: averaged logits would say 1.
    of_clip = np.log([[0.001, 0.6, 0.399], *[[0.65, 0.349, 0.001]] * 3])
    logits = np.concatenate([of_clip, [[0, 0, -200.0]] * 4])
    results = measure(logits, [0, 0, 0, 0, 1, 1, 1, 1], one_device, views=4)
    assert results.examples.tolist() == [1, 1, 0]
    assert results.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    expected = -np.log((0.001 + 3 * 0.65) / 4) - np.log(0.5)
    assert results.loss_sum == pytest.approx(expected, rel=1e-5)
    sure = measure([[0.0, -300.0, -300.0]] * 2, [1, 1], one_device, views=2)
    assert sure.loss == pytest.approx(300.0)  # and not infinite


def test_state_beside_the_parameters_reaches_the_model(one_device):
    labels = np.arange(12) % 6
    task = ImageModel(Shifted(), (0.0,) * 3, (1.0,) * 3)
    made = Classification(task, HostBatches(numbered(12), labels, 8), one_device)
    params, states = {"gain": np.float32(1)}, (np.zeros(6), 5 * np.eye(6)[3])
    top1 = [
        made.measure(params, {"batch_stats": {"shift": shift.astype(np.float32)}}).correct_top1
        for shift in states
    ]
    assert top1 == [12, 2]
