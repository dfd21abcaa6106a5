"""The only place where a name in a configuration becomes an object."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.config import suggestion
from mae_jax.data import loader
from mae_jax.data.sources import Source, open_source
from mae_jax.data.transforms import Transform, eval_transform, train_transform
from mae_jax.errors import ConfigError
from mae_jax.lookup import find_module
from mae_jax.models.transfer import make_classifier
from mae_jax.tasks.evaluators import MaskedError, Pictures, Placement, ReadOuts
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train import optimizer as optimizers
from mae_jax.train import schedules, sharding
from mae_jax.train.step import Schedule
from mae_jax.types import Batch, Evaluator, Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
TASKS = ("pretrain",)
OPTIMIZERS = {"adamw": optimizers.adamw}

# Arrays of a batch that go to the devices; the rest (index, replaced) stays on the host.
DEVICE_FIELDS = ("image", "label", "weight")


def build_model(config: ConfigDict) -> nn.Module:
    """Return the method that `config.model` names, a module of `mae_jax.pretrain` or a dotted path.

    A configuration that has `model.num_classes` and `model.pooling` as well describes a
    `Classifier` around the method's encoder.

    Raises:
      ConfigError: if there is no such module, or its fields do not fit together.
    """
    fields = config.model.to_dict()
    name = fields.pop("name")
    head = {k: fields.pop(k) for k in ("num_classes", "pooling") if k in fields}
    module = find_module("model.name", name, "mae_jax.pretrain")
    method = module.make(**fields | {"dtype": compute_dtype(config)})
    if not head:
        return method
    return make_classifier(method.unit, method.encoder, positions=config.model.positions, **head)


def compute_dtype(config: ConfigDict) -> Any:
    """Return the dtype of the products: `auto` is bfloat16 but on a CPU."""
    name = config.model.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ConfigError(f"model.dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def build_sources(config: ConfigDict) -> tuple[Source, Source]:
    """Return the training and the held-out examples."""
    data = config.data
    fields = {"path": data.path, "held_out": data.held_out}
    train = open_source(data.source, data.split, **fields)
    return train, open_source(data.source, data.eval_split, **fields)


def build_task(config: ConfigDict, model: nn.Module) -> PretrainTask:
    """Return what the batches are for.

    Raises:
      ConfigError: if the task is unknown, or the normalisation does not fit the channels.
    """
    if config.task not in TASKS:
        raise ConfigError(
            f"task {config.task!r} is not one of {', '.join(TASKS)}"
            + suggestion(config.task, TASKS)
        )
    return PretrainTask(model, *build_normalization(config))


def build_normalization(config: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel.

    Raises:
      ConfigError: if there is not one for each channel, or a deviation is not positive.
    """
    for name in ("mean", "std"):
        values = config.data[name]
        if len(values) != config.model.channels:
            raise ConfigError(
                f"data.{name} has {len(values)} entries, model.channels is {config.model.channels};"
                f" give one for each channel, as --config.data.{name}=0.5,0.5"
            )
    if min(config.data.std) <= 0:
        raise ConfigError(f"data.std {config.data.std} must be positive")
    return config.data.mean, config.data.std


def build_mesh(config: ConfigDict) -> Mesh:
    """Return the mesh; refuse batches that cannot be split over it.

    Raises:
      ConfigError: if the batch size is not a multiple of the number of devices times the parts it
        is accumulated from, or that of evaluation not one of the number of devices.
    """
    mesh = sharding.make_mesh(config.run.mesh.data, config.run.mesh.fsdp)
    accumulation = config.run.accumulation
    if accumulation < 1:
        raise ConfigError(f"run.accumulation {accumulation}: expected at least 1")
    parts = f"{accumulation} parts (run.accumulation) on " if accumulation > 1 else ""
    for name, size, divisor, over in (
        ("batch_size", config.batch_size, mesh.size * accumulation, parts),
        ("eval.batch_size", config.eval.batch_size, mesh.size, ""),
    ):
        if size < 1 or size % divisor:
            raise ConfigError(
                f"{name} {size} cannot be split over {over}{mesh.size} devices: expected a multiple"
                f" of {divisor}"
            )
    return mesh


def build_schedule(config: ConfigDict, num_examples: int) -> tuple[Schedule, int]:
    """Return (step -> learning rate, total steps).

    Raises:
      ConfigError: if the warm-up is longer than the run, or the run empty.
    """
    optimizer, epochs = config.optimizer, config.epochs
    if not 0 <= optimizer.warmup_epochs < epochs:
        raise ConfigError(
            f"optimizer.warmup_epochs {optimizer.warmup_epochs} must be at least 0 and less than"
            f" epochs, which is {epochs}"
        )
    total = schedules.total_steps(num_examples, config.batch_size, epochs)
    schedule = functools.partial(
        schedules.warmup_cosine,
        peak=peak_learning_rate(config),
        warmup_steps=total * optimizer.warmup_epochs / epochs,
        total_steps=total,
        minimum=optimizer.min_learning_rate,
    )
    return schedule, total


def peak_learning_rate(config: ConfigDict) -> float:
    """Return the rate after the warm-up."""
    return schedules.scaled_learning_rate(config.optimizer.base_learning_rate, config.batch_size)


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Return the chain that yields the direction of an update."""
    optimizer = config.optimizer
    if optimizer.name not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name {optimizer.name!r} is not one of {', '.join(OPTIMIZERS)}"
        )
    for name, least, limit in (
        ("b1", 0, 1),
        ("b2", 0, 1),
        ("ema_decay", 0, 1),
        ("weight_decay", 0, math.inf),
        ("clip_norm", 0, math.inf),
        ("base_learning_rate", 0, math.inf),
    ):
        if not least <= optimizer[name] < limit:
            raise ConfigError(
                f"optimizer.{name} {optimizer[name]}: expected at least {least}, below {limit}"
            )
    return OPTIMIZERS[optimizer.name](
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
    )


def check_cadence(config: ConfigDict) -> None:
    """Refuse intervals that are not positive.

    Raises:
      ConfigError: names the field.
    """
    run, evaluation = config.run, config.eval
    for name, value, least in (
        ("run.log_every", run.log_every, 1),
        ("run.save_every", run.save_every, 1),
        ("run.keep_checkpoints", run.keep_checkpoints, 1),
        ("run.max_nonfinite_steps", run.max_nonfinite_steps, 1),
        ("run.workers", run.workers, -1),
        ("eval.every", evaluation.every, 0),
        ("eval.pictures", evaluation.pictures, 0),
        ("eval.train_examples", evaluation.train_examples, 1),
        ("eval.val_examples", evaluation.val_examples, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} {value}: expected at least {least}")


def build_transforms(config: ConfigDict) -> tuple[Transform, Transform]:
    """Return what is done to an image for training and for evaluation."""
    data = config.data
    training = train_transform(
        data.image_size,
        augment=data.augment,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        crop_fraction=data.crop_fraction,
    )
    return training, eval_transform(data.image_size, crop_fraction=data.crop_fraction)


def build_batches(
    config: ConfigDict, source: Source, transform: Transform, *, start_step: int, mesh: Mesh
) -> DeviceBatches:
    """Return the training batches on the devices, from `start_step` on."""
    workers = config.run.workers
    host = loader.train_batches(
        source,
        transform,
        channels=config.data.channels,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=loader.default_workers(loader.available_cores()) if workers < 0 else workers,
        max_bad_share=config.data.max_bad_share,
    )
    return DeviceBatches(host, put_function(mesh))


class DeviceBatches:
    """Training batches of the loader, each put on the devices when it is asked for."""

    def __init__(
        self,
        host: loader.TrainBatches,
        put: Callable[[Mapping[str, np.ndarray]], Batch],
    ):
        self._host = host
        self._put = put

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> Batch:
        return self._put(next(self._host))

    def scalars(self) -> dict[str, float]:
        """Return what is to be logged of the data."""
        return self._host.scalars()

    def close(self) -> None:
        """End the threads and processes that load."""
        self._host.close()


def put_function(mesh: Mesh) -> Callable[[Mapping[str, np.ndarray]], Batch]:
    """Return host batch -> batch on the devices, split over all of them."""
    by_row = sharding.batch_sharding(mesh)
    return lambda batch: sharding.put_batch(
        {name: batch[name] for name in DEVICE_FIELDS if name in batch}, by_row
    )


def build_evaluators(
    config: ConfigDict,
    task: PretrainTask,
    sources: Sequence[Source],
    transform: Transform,
    mesh: Mesh,
    init_params: Callable[[], Params],
) -> list[Evaluator]:
    """Return what is measured and drawn on held-out images."""
    evaluation, train, held_out = config.eval, *sources

    def batches(source: Source, limit: int, batch_size: int) -> Any:
        return loader.eval_batches(
            source,
            transform,
            channels=config.data.channels,
            batch_size=batch_size,
            limit=min(limit, len(source)),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    placement = Placement(put_function(mesh), sharding.replicated(mesh), config.seed)
    both = (
        batches(train, evaluation.train_examples, evaluation.batch_size),
        batches(held_out, evaluation.val_examples, evaluation.batch_size),
    )
    evaluators: list[Evaluator] = [MaskedError(task, *both, placement)]
    if evaluation.readouts and train.num_classes and held_out.num_classes:
        evaluators.append(ReadOuts(task, *both, placement, init_params))
    if count := min(evaluation.pictures, len(held_out)):
        rows = -(-count // mesh.size) * mesh.size
        batch = next(iter(batches(held_out, count, rows)))
        evaluators.append(Pictures(task, batch, placement, count))
    return evaluators
