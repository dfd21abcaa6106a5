"""How well a classifier does on a whole set: top-1, top-5, loss, and who is taken for whom."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.tasks import confusion
from mae_jax.tasks.evaluators import HostBatches, Placement
from mae_jax.tasks.inputs import ImageModel
from mae_jax.types import Batch, Params

COLUMNS = ("class", "examples", "correct", "top1", "most_confused_with", "confused")


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """What became of the examples of one class.

    Attributes:
      number: of the class.
      examples: how many there are.
      correct: of these, how many are predicted to be what they are.
      confused_with: the class that most of the others are taken for; None if there is none.
      confused: how many are.
    """

    number: int
    examples: int
    correct: int
    confused_with: int | None
    confused: int


@dataclasses.dataclass(frozen=True)
class Results:
    """Sums over the labelled examples of a set of K classes.

    Attributes:
      count: of examples.
      correct_top1: how many have their class in front.
      correct_top5: how many have it among the first five.
      loss_sum: of the cross entropies, in nats, without label smoothing.
      examples: int64 [K], how many there are of each class.
      confusion: int64 [K, K], those with a prediction, by true class (row) and predicted class
        (column).
    """

    count: int
    correct_top1: int
    correct_top5: int
    loss_sum: float
    examples: np.ndarray
    confusion: np.ndarray

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100.0 * self.correct_top1 / self.count

    @property
    def top5(self) -> float:
        """Share of examples whose class is among the first five, in percent."""
        return 100.0 * self.correct_top5 / self.count

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats."""
        return self.loss_sum / self.count

    def per_class(self) -> list[ClassRow]:
        """Return what became of each class, in the order of their numbers."""
        rows = []
        for number, taken_for in enumerate(self.confusion):
            wrong = taken_for.copy()
            wrong[number] = 0
            other = int(wrong.argmax())
            rows.append(
                ClassRow(
                    number,
                    int(self.examples[number]),
                    int(taken_for[number]),
                    other if wrong[other] else None,
                    int(wrong[other]),
                )
            )
        return rows

    def table(self, classes: Sequence[str] = ()) -> str:
        """Return `per_class` as CSV; `top1` and `confused` are percent of the class's examples.

        Args:
          classes: names in the order of the labels; numbers stand for those that are missing.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.per_class():
            other = row.confused_with
            writer.writerow(
                (
                    confusion.class_name(row.number, classes),
                    row.examples,
                    row.correct,
                    _percent(row.correct, row.examples),
                    "" if other is None else confusion.class_name(other, classes),
                    "" if other is None else _percent(row.confused, row.examples),
                )
            )
        return text.getvalue()


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.2f}" if whole else ""


def judge(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Return for each example what accuracy is counted from.

    Equal logits rank by their index, as arg-max has it, so that a constant model is not always
    right. An example whose largest logit is not finite (NaN counts as the largest) has no
    prediction; it is wrong, as one is whose own logit is not finite.

    Args:
      logits: float32 [B, K].
      labels: int32 [B] in 0 ... K - 1; others give no meaningful row.

    Returns:
      rank: int32 [B], how many classes are in front of the true one; K where it is wrong anyway.
      prediction: int32 [B], -1 where there is none.
      loss: float32 [B], cross entropy in nats.
    """
    classes = logits.shape[1]
    labels = jnp.clip(labels, 0, classes - 1)[:, None]
    own = jnp.take_along_axis(logits, labels, axis=1)
    in_front = (logits > own) | ((logits == own) & (jnp.arange(classes)[None] < labels))
    predicts = jnp.isfinite(logits.max(axis=1))
    return {
        "rank": jnp.where(predicts & jnp.isfinite(own[:, 0]), in_front.sum(axis=1), classes),
        "prediction": jnp.where(predicts, logits.argmax(axis=1), -1),
        "loss": jax.nn.logsumexp(logits, axis=1) - own[:, 0],
    }


class Classification:
    """Accuracy of a classifier on held-out images, equal for any batch size and device count.

    Yields `top1` and `top5` in percent and `loss` in nats (no `top5` of five classes or fewer:
    it would be 100); then the picture `confusion` and the table `per_class`.

    Args:
      task: a classifier; its module has `logits` and `num_classes`.
      held_out: labelled examples; those with the label -1 do not count.
      placement: of batches on the devices.
      classes: names in the order of the labels.
      columns: the logits that the labels stand for, in the order of the labels; None: all. They
        are taken out before arg-max and soft-max: the other classes are no possible answer.
      details: yield the picture and the table too.
      views: V, how many rows one after the other are of one example. Its probabilities are the mean
        of theirs, as clips and crops of a video are averaged.

    Raises:
      ConfigError: if `columns` are not different indices of the logits.
    """

    def __init__(
        self,
        task: ImageModel,
        held_out: HostBatches,
        placement: Placement,
        *,
        classes: Sequence[str] = (),
        columns: Sequence[int] | None = None,
        details: bool = True,
        views: int = 1,
    ):
        self._held_out, self._placement = held_out, placement
        self._classes, self._details = classes, details
        logits_of_model = task.module.num_classes
        chosen = np.arange(logits_of_model) if columns is None else np.asarray(columns)
        # Checked here, for on the device an index beyond the end takes the last column.
        inside = (chosen >= 0) & (chosen < logits_of_model)
        if not inside.all() or len(np.unique(chosen)) != len(chosen):
            raise ConfigError(
                f"columns: expected different indices of the model's {logits_of_model} logits, got"
                f" {', '.join(map(str, chosen[~inside][:5])) or 'repeated ones'}"
            )
        self._num_classes = len(chosen)

        def judged(params: Params, extra: Any, batch: Batch) -> dict[str, jax.Array]:
            logits = task.call("logits", params, batch, extra=extra)
            if columns is not None:
                logits = logits[:, chosen]
            if views > 1:
                # The logarithm of the mean probability, in a form in which none becomes 0.
                of_views = jax.nn.log_softmax(logits).reshape(-1, views, logits.shape[1])
                logits = jax.nn.logsumexp(of_views, axis=1) - jnp.log(views)
            # Labels and weights too, for the host has the rows of its own process alone.
            rows = {name: batch[name][::views] for name in ("label", "weight")}
            return rows | judge(logits, rows["label"])

        self._judged = placement.compiled(judged)

    def on(self, held_out: HostBatches) -> Classification:
        """Return the same measurement of other examples; nothing is compiled again."""
        other = copy.copy(self)
        other._held_out = held_out
        return other

    def run(self, params: Params, extra: Any) -> Iterator[tuple[str, float | np.ndarray | str]]:
        """Yield the figures, then picture and table."""
        results = self.measure(params, extra)
        yield "top1", results.top1
        if self._num_classes > 5:
            yield "top5", results.top5
        yield "loss", results.loss
        if self._details:
            yield "confusion", confusion.picture(results.confusion, self._classes)
            yield "per_class", results.table(self._classes)

    def measure(self, params: Params, extra: Any) -> Results:
        """Return the sums over the held-out examples.

        Raises:
          ConfigError: if no example has a label, or one has a label that the model cannot answer.
        """
        top1 = top5 = 0
        loss_sum = 0.0
        examples = np.zeros(self._num_classes, np.int64)
        matrix = np.zeros((self._num_classes, self._num_classes), np.int64)
        for batch in self._held_out:
            rows = jax.device_get(self._judged(params, extra, self._placement.put(batch)))
            rows = _labelled(rows)
            label, prediction = rows["label"], rows["prediction"]
            if label.max(initial=0) >= self._num_classes:
                raise ConfigError(
                    f"data: expected labels below {self._num_classes}, the number of classes of the"
                    f" model or of columns, got {label.max()}"
                )
            top1 += int((rows["rank"] < 1).sum())
            top5 += int((rows["rank"] < min(5, self._num_classes)).sum())
            loss_sum += float(rows["loss"].sum(dtype=np.float64))
            np.add.at(examples, label, 1)
            np.add.at(matrix, (label[prediction >= 0], prediction[prediction >= 0]), 1)
        count = int(examples.sum())
        if not count:
            raise ConfigError("data: expected labelled examples to evaluate on, got none")
        return Results(count, top1, top5, loss_sum, examples, matrix)


def _labelled(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leave out padding, what stands in place of bad examples, and examples without a label."""
    counted = (rows["weight"] > 0) & (rows["label"] >= 0)
    return {name: values[counted] for name, values in rows.items()}
