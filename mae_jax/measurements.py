"""What can be measured of a checkpoint: each task as a list of measurements."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_jax import api, build
from mae_jax.data import imagenet
from mae_jax.data.loader import EvalBatches
from mae_jax.data.sources import Source, class_names, open_source, open_split, other_data
from mae_jax.data.sources.subset import Relabelled
from mae_jax.errors import ConfigError
from mae_jax.models.classifier import Classifier
from mae_jax.tasks import readout, robustness
from mae_jax.tasks.accuracy import Classification
from mae_jax.tasks.evaluators import Features, HostBatches, Placement
from mae_jax.train.signals import StopRequest

TFDS = "tfds:"
# Splits of the sets of TFDS.
TFDS_SPLITS = {
    "imagenet_a": "test",
    "imagenet_r": "test",
    "imagenet_sketch": "test",
    "imagenet_c": "validation",
}
SEVERITIES = range(1, robustness.SEVERITIES + 1)

Value = float | np.ndarray | str
"""A scalar, a picture or a table, as evaluators yield them."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One thing to measure.

    Attributes:
      name: of its figures.
      run: yields (name, value).
    """

    name: str
    run: Callable[[], Iterator[tuple[str, Value]]]


class Interrupted(Exception):
    """A signal came while measuring."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """A checkpoint on the devices, and what measurements share.

    Attributes:
      config: of this run.
      model: the checkpoint.
      variables: parameters and extra state of the model, on all devices.
      placement: of batches.
      stop: the wish to stop.
      opened: batches that were made since `left_out` was asked for.
    """

    config: ConfigDict
    model: api.Pretrained
    variables: tuple[Any, Any]
    placement: Placement
    stop: StopRequest
    opened: list[EvalBatches] = dataclasses.field(default_factory=list)

    def batches(
        self, source: Source, crop_fraction: float | None = None, *, one_view: bool = False
    ) -> HostBatches:
        """Return batches of all examples of a source, resized and cropped for the model.

        Args:
          source: of examples.
          crop_fraction: see `CenterCrop`; None: that of the configuration, or the checkpoint's.
          one_view: see `build.build_eval_reader`.
        """
        data = self.model.config.data
        given = self.config.data.crop_fraction if crop_fraction is None else crop_fraction
        share = self.config.data.max_bad_share
        batches = build.build_eval_batches(
            source,
            build.build_eval_reader(data, given, one_view=one_view),
            batch_size=self.config.eval.batch_size,
            max_bad_share=data.max_bad_share if share is None else share,
        )
        self.opened.append(batches)
        return Stoppable(batches, self.stop)

    def features(self) -> tuple[np.ndarray, ...]:
        """Return features and labels of the training examples, and of the held-out ones."""
        extractor = Features(self.model.task, self.placement)
        data = data_of(self.config, self.model.config)
        train, held_out = build.open_sources(data)
        for name, source in (("split", train), ("eval_split", held_out)):
            build.check_labelled(f"data.{name} {data[name]!r}", source)
        both = (
            extractor.extract(*self.variables, self.batches(s, one_view=True))
            for s in (train, held_out)
        )
        return tuple(array for pair in both for array in pair)

    def left_out(self) -> int:
        """Return how many bad examples all processes left out since this was last asked."""
        here = sum(batches.left_out for batches in self.opened)
        self.opened.clear()
        return int(np.sum(multihost_utils.process_allgather(np.asarray(here))))


class Stoppable:
    """Batches that end with `Interrupted` when a signal has come."""

    def __init__(self, batches: HostBatches, stop: StopRequest):
        self._batches, self._stop = batches, stop

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self._batches:
            if self._stop.wanted():
                raise Interrupted
            yield batch


def data_of(config: ConfigDict, of_checkpoint: ConfigDict) -> ConfigDict:
    """Return `data` of a checkpoint's configuration with what this run's has in place of it."""
    names = ("source", "path", "split", "eval_split", "held_out")
    return other_data(of_checkpoint.data, {name: config.data[name] for name in names})


def _knn(bench: Bench) -> list[Measurement]:
    """Vote among the nearest training images."""
    _check_positive(bench.config, "neighbours")

    def run() -> Iterator[tuple[str, Value]]:
        yield "top1", readout.knn_top1(*bench.features(), k=bench.config.eval.neighbours)

    return [Measurement("knn", run)]


def _few_shot(bench: Bench) -> list[Measurement]:
    """Ridge regression on a few labels a class."""
    _check_positive(bench.config, "labels_per_class", "draws")

    def run() -> Iterator[tuple[str, Value]]:
        features = bench.features()
        for count in bench.config.eval.labels_per_class:
            mean, std = readout.linear_top1(
                *features, per_class=count, draws=bench.config.eval.draws
            )
            yield f"top1_{count}", mean
            yield f"top1_{count}_std", std

    return [Measurement("few_shot", run)]


def _evaluate(bench: Bench) -> list[Measurement]:
    """Accuracy of a classifier on the held-out images."""
    classes = _num_classes(bench.model)
    data = data_of(bench.config, bench.model.config)
    source = open_split(data, data.eval_split)
    build.check_labels(f"data.eval_split {data.eval_split!r}", source, classes)

    def run() -> Iterator[tuple[str, Value]]:
        batches = bench.batches(source)
        names = class_names(source)
        views = build.build_eval_reader(bench.model.config.data).views
        accuracy = Classification(
            bench.model.task, batches, bench.placement, classes=names, views=views
        )
        return accuracy.run(*bench.variables)

    return [Measurement(f"{data.source}_{data.eval_split}", run)]


def _robustness(bench: Bench) -> list[Measurement]:
    """Accuracy of an ImageNet classifier on variants of ImageNet."""
    classes = _num_classes(bench.model)
    if classes != len(imagenet.wnids()):
        raise ConfigError(
            f"init_from {bench.config.init_from}: expected a classifier of ImageNet's"
            f" {len(imagenet.wnids())} classes, got one of {classes}"
        )
    sets = {name: place for name, place in bench.config.sets.items() if place}
    if not sets:
        names = ", ".join(f"sets.{name}" for name in bench.config.sets)
        raise ConfigError(f"{names}: expected a folder or tfds:NAME for at least one, got nothing")
    found = []
    for name, place in sets.items():
        columns = None
        if name in imagenet.FILES:
            columns = imagenet.columns(imagenet.wnids_of(name)).tolist()
        accuracy = Classification(
            bench.model.task, (), bench.placement, columns=columns, details=False
        )
        if name == "imagenet_c":
            for corruption in robustness.ALEXNET_ERRORS:
                for severity in SEVERITIES:
                    between = "_" if place.startswith(TFDS) else "/"
                    where = f"{place}/{corruption}{between}{severity}"
                    title = f"{name}/{corruption}/{severity}"
                    # They are cut already.
                    found.append(_on_set(bench, accuracy, name, title, where, 1.0))
        else:
            found.append(_on_set(bench, accuracy, name, name, place, None))
    return found


def _on_set(
    bench: Bench,
    accuracy: Classification,
    name: str,
    title: str,
    place: str,
    crop_fraction: float | None,
) -> Measurement:
    """Return the measurement on one set, whose classes are named by WordNet ids.

    The set is opened when its turn comes: ImageNet-C has millions of files. `accuracy` is shared by
    its 75 parts, so that the model is compiled once.
    """
    if not place.startswith(TFDS) and not os.path.isdir(os.path.expanduser(place)):
        raise ConfigError(f"sets.{name}: expected a folder of images or tfds:NAME, got {place}")

    def run() -> Iterator[tuple[str, Value]]:
        batches = bench.batches(_open_set(name, place), crop_fraction)
        return accuracy.on(batches).run(*bench.variables)

    return Measurement(title, run)


def _open_set(name: str, place: str) -> Source:
    """Return the images of a set, labelled by their place among its classes."""
    if place.startswith(TFDS):
        path, split = place.removeprefix(TFDS), TFDS_SPLITS[name]
        source = open_source("tfds", split, path=path, held_out=0.0)
    else:
        source = open_source("folder", "all", path=place, held_out=0.0)
    names = class_names(source)
    if not names:
        raise ConfigError(
            f"sets.{name}: expected classes named by WordNet ids, got none in {place}"
        )
    imagenet.columns(names, field=f"sets.{name}")  # refuses what is no class of ImageNet
    wnids = imagenet.wnids_of(name if name in imagenet.FILES else "imagenet2012")
    place_of = {wnid: number for number, wnid in enumerate(wnids)}
    return Relabelled(source, [place_of.get(wnid, -1) for wnid in names], wnids)


def _corruption_error(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the mean corruption error, if all corruptions were measured."""
    errors = {
        corruption: [
            1 - results[title]["top1"] / 100
            for severity in SEVERITIES
            if (title := f"imagenet_c/{corruption}/{severity}") in results
        ]
        for corruption in robustness.ALEXNET_ERRORS
    }
    if not any(errors.values()):
        return {}
    mce, mean_error = robustness.mean_corruption_error(errors)
    return {"imagenet_c": {"mce": mce, "mean_error": mean_error}}


TASKS: dict[str, Callable[[Bench], list[Measurement]]] = {
    "knn": _knn,
    "few_shot": _few_shot,
    "evaluate": _evaluate,
    "robustness": _robustness,
}
SUMMARIES = {"robustness": _corruption_error}


def _check_positive(config: ConfigDict, *names: str) -> None:
    """Refuse numbers of `config.eval`, or lists of such, below 1."""
    for name in names:
        if min(np.atleast_1d(config.eval[name]), default=1) < 1:
            raise ConfigError(f"eval.{name} {config.eval[name]}: expected at least 1")


def _num_classes(model: api.Pretrained) -> int:
    if not isinstance(model.module, Classifier):
        raise ConfigError("init_from: expected a fine-tuned classifier, got a pre-trained model")
    return model.module.num_classes
