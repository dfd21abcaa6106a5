"""What is measured and drawn while pre-training: errors, read-outs, pictures.

An evaluator is an object with `run(params, extra)` that yields (name, value). Batches come from
the host with `image`, `label` and `weight` (0 = padding or in place of a bad example); sums are
kept there in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.losses import reconstruction
from mae_jax.tasks import pictures, readout
from mae_jax.tasks.inputs import ImageModel
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.types import Batch, Params, Prediction, Rng, Stream

HostBatches = Iterable[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Placement:
    """How evaluators get at devices.

    Attributes:
      put: host batch -> the same on the devices.
      replicated: the sharding of what every device has in full.
      seed: of the run; the masks of evaluation are fixed by it.
    """

    put: Callable[[dict[str, np.ndarray]], Batch]
    replicated: jax.sharding.Sharding
    seed: int

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of parameters and more, compiled, whose results the host can read.

        Each device has the parameters in full for it, spread as they may be, for XLA would spread
        the activations likewise: see `mae_jax.train.sharding.whole`.
        """

        @functools.wraps(function)  # its name is that of the program
        def on_whole(params: Params, *others: Any) -> Any:
            return function(jax.lax.with_sharding_constraint(params, self.replicated), *others)

        return jax.jit(on_whole, out_shardings=self.replicated)

    def mask_key(self, number: int) -> jax.Array:
        """Return the key of the masks of an evaluation batch, the same at every step."""
        return Rng(jax.random.key(self.seed), number).key(Stream.EVAL_MASK)


class MaskedError:
    """The loss on held-out images under fixed masks, beside that of predicting the mean.

    The mean predictor answers with the mean over training images of each value at its place in
    the grid: what can be known without seeing the image. Yields `loss` and `mean_predictor_loss`.
    """

    def __init__(
        self, task: PretrainTask, train: HostBatches, held_out: HostBatches, placement: Placement
    ):
        self._train, self._held_out, self._placement = train, held_out, placement

        def predict(params: Params, batch: Batch, key: jax.Array) -> dict[str, Prediction]:
            plan = task.method.plan(key, len(batch["image"]))
            return task.call("predict", params, batch, plan)

        def sums(params: Params, batch: Batch, key: jax.Array) -> dict[str, tuple]:
            predictions = predict(params, batch, key)
            return {name: _sums_by_place(p, batch["weight"]) for name, p in predictions.items()}

        def losses(params: Params, means: dict, batch: Batch, key: jax.Array) -> tuple:
            predictions = predict(params, batch, key)
            of_mean = {
                name: reconstruction.answered(p, means[name]) for name, p in predictions.items()
            }
            # The weights of a batch sum to 1 over its examples: undo that, then weigh padding out.
            scale = batch["weight"] * len(batch["weight"])
            totals = [
                (reconstruction.example_losses(x) * scale).sum() for x in (predictions, of_mean)
            ]
            # Counted here, for the host has the rows of its own process alone.
            return *totals, batch["weight"].sum()

        self._sums = placement.compiled(sums)
        self._losses = placement.compiled(losses)
        self._means: dict[str, np.ndarray] | None = None

    def run(self, params: Params, extra: Any) -> Iterator[tuple[str, float]]:
        """Yield the two losses.

        Raises:
          ConfigError: if none of the held-out examples can be used.
        """
        if self._means is None:
            self._means = self._mean_targets(params)
        total, of_mean, count = 0.0, 0.0, 0.0
        for number, batch in enumerate(self._held_out):
            key = self._placement.mask_key(number)
            values = self._losses(params, self._means, self._placement.put(batch), key)
            total += float(values[0])
            of_mean += float(values[1])
            count += float(values[2])
        if not count:
            raise ConfigError("data: expected examples to evaluate on that can be used, got none")
        yield "loss", total / count
        yield "mean_predictor_loss", of_mean / count

    def _mean_targets(self, params: Params) -> dict[str, np.ndarray]:
        """Return the mean target of each place, float32 [N, U]; targets do not depend on params."""
        totals: dict[str, list[np.ndarray]] = {}
        for number, batch in enumerate(self._train):
            key = self._placement.mask_key(number)
            sums = jax.device_get(self._sums(params, self._placement.put(batch), key))
            for name, parts in sums.items():
                so_far = totals.setdefault(name, [np.zeros(p.shape, np.float64) for p in parts])
                totals[name] = [a + b for a, b in zip(so_far, parts, strict=True)]
        return {
            name: (total / np.maximum(count, 1)[:, None]).astype(np.float32)
            for name, (total, count) in totals.items()
        }


def _sums_by_place(prediction: Prediction, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the sums of targets [N, U] and their number [N] for each of the N places.

    What has no weight in the loss, padding of a text for one, does not count.
    """
    target, places = reconstruction.values(prediction), prediction.places
    ids = jnp.broadcast_to(prediction.ids, target.shape[:2])
    counted = weight[:, None] * (prediction.weight > 0)
    total = jnp.zeros((places, target.shape[-1])).at[ids].add(target * counted[..., None])
    return total, jnp.zeros(places).at[ids].add(counted)


class Features:
    """The features of whole sets of examples, on the host.

    Args:
      task: a model whose module has `features`.
      placement: of batches on the devices.
    """

    def __init__(self, task: ImageModel, placement: Placement):
        self._placement = placement

        def features(params: Params, extra: Any, batch: Batch) -> tuple[jax.Array, ...]:
            # Labels and weights too, for the host has the rows of its own process alone.
            out = task.call("features", params, batch, extra=extra)
            return out, batch["label"], batch["weight"]

        self._features = placement.compiled(features)

    def extract(
        self, params: Params, extra: Any, batches: HostBatches
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return features float32 [n, D] and labels int32 [n] of all examples of weight 1."""
        features, labels = [], []
        for batch in batches:
            of_batch = self._features(params, extra, self._placement.put(batch))
            out, label, weight = jax.device_get(of_batch)
            features.append(out[weight > 0])
            labels.append(label[weight > 0])
        return np.concatenate(features), np.concatenate(labels)


class ReadOuts:
    """Linear and k-NN accuracy of features, beside those of this run's encoder before training.

    Yields `linear_top1`, `linear_top1_std`, `knn_top1` and the same with `random_` in front, all in
    percent. See `mae_jax.tasks.readout`. Nothing where no example has a label, as none of TFDS's
    test images of ImageNet has.
    """

    def __init__(
        self,
        task: PretrainTask,
        train: HostBatches,
        held_out: HostBatches,
        placement: Placement,
        init_params: Callable[[], Params],
    ):
        self._train, self._held_out = train, held_out
        self._init_params = init_params
        self._features = Features(task, placement)

    def run(self, params: Params, extra: Any) -> Iterator[tuple[str, float]]:
        """Yield this encoder's figures, then the untrained one's."""
        yield from self._figures(params).items()
        yield from self._random_figures.items()

    @cached_property
    def _random_figures(self) -> dict[str, float]:
        figures = self._figures(self._init_params())
        return {f"random_{name}": value for name, value in figures.items()}

    def _figures(self, params: Params) -> dict[str, float]:
        train, train_labels = self._features.extract(params, {}, self._train)
        test, test_labels = self._features.extract(params, {}, self._held_out)
        if not ((train_labels >= 0).any() and (test_labels >= 0).any()):
            return {}  # what is trained needs no labels
        mean, std = readout.linear_top1(train, train_labels, test, test_labels)
        knn = readout.knn_top1(train, train_labels, test, test_labels)
        return {"linear_top1": mean, "linear_top1_std": std, "knn_top1": knn}


class Pictures:
    """A grid of held-out images with what the method makes of them. Yields `pictures`.

    Of clips, a strip and a film.
    """

    def __init__(
        self, task: PretrainTask, batch: Mapping[str, np.ndarray], placement: Placement, count: int
    ):
        self._task, self._placement, self._count = task, placement, count
        self._batch = dict(batch)

        def panels(params: Params, batch: Batch, key: jax.Array) -> Any:
            plan = task.method.plan(key, len(batch["image"]))
            return task.call("panels", params, batch, plan)

        self._panels = placement.compiled(panels)

    def run(self, params: Params, extra: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the picture, uint8 [height, width, 3], and for clips [F, height, width, 3]."""
        batch = self._placement.put(self._batch)
        panels = jax.device_get(self._panels(params, batch, self._placement.mask_key(0)))
        for picture in pictures.draw(self._columns(panels)):
            yield "pictures", picture

    def _columns(self, panels: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return panels, on the host, as colours, uint8 [count, ..., H, W, 3], by caption."""
        mean, std = self._task.mean, self._task.std
        return {
            caption: pictures.to_uint8(panels[name].images, mean, std, panels[name].hidden)[
                : self._count
            ]
            for name, caption in self._task.method.panel_captions().items()
        }
