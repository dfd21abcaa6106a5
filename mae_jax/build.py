"""The only place where a name in a configuration becomes an object."""

from __future__ import annotations

import dataclasses
import functools
import inspect
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

from mae_jax.config import MEASUREMENTS, suggestion
from mae_jax.data import loader
from mae_jax.data.processes import available_cores
from mae_jax.data.readers import Reader, find_reader
from mae_jax.data.sources import Source, class_names, labels_of, open_split
from mae_jax.data.sources.subset import Subset
from mae_jax.errors import ConfigError
from mae_jax.lookup import find_module
from mae_jax.models.transfer import make_classifier
from mae_jax.nn.blocks import REMATS
from mae_jax.tasks.accuracy import Classification
from mae_jax.tasks.caption_pictures import CaptionPictures
from mae_jax.tasks.erasing import RandomErasing
from mae_jax.tasks.evaluators import MaskedError, Pictures, Placement, ReadOuts
from mae_jax.tasks.finetune import FinetuneTask
from mae_jax.tasks.mixup import Mixup
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.tasks.readout import label_draws
from mae_jax.tasks.words import WordAccuracy
from mae_jax.train import optimizer as optimizers
from mae_jax.train import schedules, sharding
from mae_jax.train.state import TrainState
from mae_jax.train.step import Schedule, train_step
from mae_jax.types import Batch, Evaluator, Params, Rng, Stream

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
TASKS = ("pretrain", "finetune")
# Each with the fields of `config.optimizer` that it takes.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], tuple[str, ...]]] = {
    "adamw": (optimizers.adamw, ("b1", "b2", "eps", "weight_decay", "clip_norm")),
    "lars": (optimizers.lars, ("momentum", "weight_decay", "trust_coefficient")),
}
# Fields of `config.model` that describe a classifier around the encoder.
HEAD_FIELDS = ("num_classes", "pooling", "drop_path_rate", "norm_group", "head_dropout")

# The least value of fields of `config.eval`; a task has those that mean something to it.
EVAL_LEAST = {"every": 0, "pictures": 0, "train_examples": 1, "val_examples": 1}

# Arrays of a batch that stay on the host.
HOST_FIELDS = ("index", "asked", "replaced", "by_pillow")


def build_model(config: ConfigDict) -> nn.Module:
    """Return the method that `config.model` names, a module of `mae_jax.pretrain` or a dotted path.

    A configuration that has `model.num_classes` (and more of `HEAD_FIELDS`) as well describes a
    `Classifier` around the method's encoder.

    Raises:
      ConfigError: if there is no such module, or its fields do not fit together.
    """
    fields = config.model.to_dict()
    name = fields.pop("name")
    head = {k: fields.pop(k) for k in HEAD_FIELDS if k in fields}
    module = find_module("model.name", name, "mae_jax.pretrain")
    taken = inspect.signature(module.make).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        for field in sorted(fields.keys() - taken.keys()):
            raise ConfigError(
                f"model.{field}: a field that model.name {name!r} has not; start from a config of"
                " that method"
            )
    method = _executed(module.make(**fields | {"dtype": compute_dtype(config)}), config)
    if not head:
        return method
    return make_classifier(
        method.unit, method.encoder, positions=config.model.get("positions"), **head
    )


def _executed(method: nn.Module, config: ConfigDict) -> nn.Module:
    """Return a method that is run as `config.run` says: the same function, at another cost.

    A kernel that these devices do not have is left out: a model trained with it loads anywhere.

    Raises:
      ConfigError: if there is no such way.
    """
    run = config.run
    remat = run.get("remat", "none")
    if remat not in REMATS:
        raise ConfigError(f"run.remat {remat!r} is not one of {', '.join(REMATS)}")
    parts = {}
    for name in ("encoder", "decoder"):
        kernel = run.get("attention", {}).get(name, "xla")
        if kernel not in ("xla", "cudnn"):
            raise ConfigError(f"run.attention.{name} {kernel!r} is not one of xla, cudnn")
        changes: dict[str, Any] = {}
        if remat != "none":
            changes["remat"] = remat
        if kernel == "cudnn" and _has_cudnn(config):
            changes["attention"] = functools.partial(_cudnn_attention, part=name)
        part: Any = getattr(method, name, None)
        if changes and all(hasattr(part, field) for field in changes):
            parts[name] = part.clone(**changes)
    return method.clone(**parts) if parts else method


def _cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, part: str, **extra: jax.Array
) -> jax.Array:
    """Attend by cuDNN's kernel; see `mae_jax.nn.attention.AttentionFn`.

    Raises:
      ConfigError: if there is a bias or a mask, of which the kernel takes few shapes; so early as a
        model is traced for its shapes, before anything is compiled.
    """
    if extra:
        raise ConfigError(
            f"run.attention.{part} cudnn: expected attention without biases and masks, got one with"
            f" a {' and a '.join(sorted(extra))}; take xla"
        )
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _has_cudnn(config: ConfigDict) -> bool:
    return jax.default_backend() == "gpu" and compute_dtype(config) == jnp.bfloat16


def check_attention(config: ConfigDict) -> None:
    """Refuse to train with a kernel that these devices do not have.

    Raises:
      ConfigError: names the field.
    """
    for name, kernel in config.run.attention.items():
        if kernel == "cudnn" and not _has_cudnn(config):
            raise ConfigError(
                f"run.attention.{name} cudnn: expected an NVIDIA GPU and model.dtype bfloat16,"
                f" got {jax.default_backend()} and {jnp.dtype(compute_dtype(config)).name}"
            )


def compute_dtype(config: ConfigDict) -> Any:
    """Return the dtype of the products: `auto` is bfloat16 but on a CPU."""
    name = config.model.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ConfigError(f"model.dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def build_sources(config: ConfigDict) -> tuple[Source, Source]:
    """Return the training and the held-out examples.

    Raises:
      ConfigError: if there are none such, or, for a classifier, their labels do not fit it.
    """
    data = config.data
    loader.check_bad_share(data.max_bad_share)  # now, not when the step has been compiled
    train, held_out = open_sources(data)
    if config.task == "finetune":
        for name, source in (("split", train), ("eval_split", held_out)):
            check_labels(f"data.{name} {data[name]!r}", source, config.model.num_classes)
        if data.per_class:
            train = few_labels(train, data.per_class, config.seed)
    return train, held_out


def open_sources(data: ConfigDict) -> tuple[Source, Source]:
    """Return the training and the held-out examples that `config.data` names."""
    return open_split(data, data.split), open_split(data, data.eval_split)


def check_labels(name: str, source: Source, num_classes: int) -> None:
    """Refuse examples that a classifier cannot be trained or measured on.

    Raises:
      ConfigError: if they have no labels, or of another number of classes. (A list without names of
        classes may lack the last ones.)
    """
    check_labelled(name, source)
    may_lack = not class_names(source)
    if source.num_classes > num_classes or (source.num_classes < num_classes and not may_lack):
        raise ConfigError(
            f"model.num_classes {num_classes}: {name} has {source.num_classes} classes"
        )


def check_labelled(name: str, source: Source) -> None:
    """Refuse examples without labels.

    Raises:
      ConfigError: names the field `name`.
    """
    if not source.num_classes:
        raise ConfigError(f"{name}: expected labelled images, got images without labels")


def few_labels(source: Source, per_class: int, seed: int) -> Source:
    """Return a source with `per_class` examples of each class, drawn by the seed.

    Raises:
      ConfigError: if `per_class` is not positive, or a class has fewer.
    """
    if per_class < 1:
        raise ConfigError(f"data.per_class {per_class}: expected at least 1, or 0 for all")
    labels = labels_of(source)
    fewest = int(np.bincount(labels[labels >= 0], minlength=source.num_classes).min())
    if fewest < per_class:
        raise ConfigError(f"data.per_class {per_class}: a class has {fewest} images")
    return Subset(source, label_draws(labels, per_class, 1, seed)[0])


def check_task(task: str) -> None:
    """Refuse an unknown task; one that measures is not for those who call this.

    Raises:
      ConfigError: names the known ones.
    """
    if task not in TASKS:
        raise ConfigError(
            f"task {task!r} is not one of {', '.join((*TASKS, *MEASUREMENTS))}"
            + suggestion(task, (*TASKS, *MEASUREMENTS))
        )


def build_task(config: ConfigDict, model: nn.Module) -> PretrainTask | FinetuneTask:
    """Return what the batches are for.

    Raises:
      ConfigError: if the task is unknown, or the normalisation does not fit the channels.
    """
    check_task(config.task)
    normalization = build_normalization(config)
    if config.task == "pretrain":
        return PretrainTask(model, *normalization)
    data, erasing, mixup = config.data, None, None
    if data.erasing_probability:
        erasing = RandomErasing(data.erasing_probability)
    if data.mixup_alpha or data.cutmix_alpha:
        mixup = Mixup(
            config.model.num_classes,
            data.mixup_group,
            mixup_alpha=data.mixup_alpha,
            cutmix_alpha=data.cutmix_alpha,
            mixup_switch_probability=data.mixup_switch_probability,
            mixup_probability=data.mixup_probability,
            label_smoothing=data.label_smoothing,
        )
    if not 0 <= data.label_smoothing < 1:
        raise ConfigError(
            f"data.label_smoothing {data.label_smoothing}: expected at least 0, below 1"
        )
    return FinetuneTask(
        model,
        *normalization,
        mixup=mixup,
        erasing=erasing,
        label_smoothing=data.label_smoothing,
        trainable_blocks=config.optimizer.trainable_blocks,
    )


def initial_variables(
    config: ConfigDict, task: PretrainTask | FinetuneTask, seed: int | jax.Array
) -> tuple[Params, Any]:
    """Return the fresh parameters and extra state that a run of this seed starts with."""
    # Two, for a method that takes images in pairs.
    batch = {
        name: jnp.zeros(array.shape, array.dtype)
        for name, array in batch_of(task.module, 2).items()
    }
    return task.init(Rng(jax.random.key(seed), 0).key(Stream.INIT), batch)


def batch_of(module: nn.Module, rows: int, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of a training batch: what the module takes, and `label`.

    Args:
      module: a method or a classifier.
      rows: of the batch.
      sharding: of each array.
    """
    arrays = {**module.example(), "label": jax.ShapeDtypeStruct((), jnp.int32)}
    return {
        name: jax.ShapeDtypeStruct((rows, *array.shape), array.dtype, sharding=sharding)
        for name, array in arrays.items()
    }


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


def rows_of(config: ConfigDict, read: Reader) -> int:
    """Return the rows of a training batch: those of `batch_size` examples."""
    return config.batch_size * read.views


def check_reads(name: str, source: Source, read: Reader, module: nn.Module) -> None:
    """Refuse a reader that does not make what a module takes; reads one example.

    Args:
      name: of the reader.
      source: of examples.
      read: the reader.
      module: a method or a classifier.

    Raises:
      ConfigError: names both.
    """
    rng = np.random.default_rng(0)
    try:
        arrays = loader.LoadExample(source, read).random_map(0, rng)
    except KeyError as error:
        raise ConfigError(
            f"data.reader {name!r}: expected examples with {read.field}, which data.source does not"
            " give"
        ) from error
    for field, expected in module.example().items():
        if field not in arrays:
            raise ConfigError(
                f"data.reader {name!r}: model.name takes {field}, which this reader does not make"
            )
        shape = arrays[field].shape
        if field == "image" and read.views > 1:
            shape = shape[1:]
        if shape != expected.shape:
            raise ConfigError(
                f"data.reader {name!r}: expected {field} {list(expected.shape)}, as the model takes"
                f" it, got {list(shape)}"
            )


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
    check_batch_size("batch_size", config.batch_size, mesh.size, accumulation)
    check_batch_size("eval.batch_size", config.eval.batch_size, mesh.size)
    return mesh


def check_prepares(config: ConfigDict, task: PretrainTask | FinetuneTask, rows: int) -> None:
    """Refuse a batch of which a task cannot make what its examples need of each other.

    Args:
      config: of the run.
      task: what the batches are for.
      rows: of a batch; see `rows_of`.

    Raises:
      ConfigError: says why; a batch that cannot be paired, for example.
    """
    if isinstance(task, FinetuneTask):
        if task.mixup is not None:
            task.mixup.check(rows)
        group, part = config.model.norm_group, rows // max(1, config.run.accumulation)
        if group and part % group:
            raise ConfigError(
                f"model.norm_group {group}: expected a number that divides the {part} images of a"
                " batch, or of a part of it (run.accumulation)"
            )
    batch = batch_of(task.module, rows)
    jax.eval_shape(lambda batch: task.prepare(batch, Rng(jax.random.key(0), 0)), batch)


def check_batch_size(name: str, size: int, devices: int, parts: int = 1) -> None:
    """Refuse a batch that cannot be split evenly.

    Args:
      name: of the field.
      size: of the batch.
      devices: over which it is spread.
      parts: that it is accumulated from.

    Raises:
      ConfigError: if it is no multiple of devices x parts.
    """
    over = f"{parts} parts (run.accumulation) on " if parts > 1 else ""
    if size < 1 or size % (devices * parts):
        raise ConfigError(
            f"{name} {size} cannot be split over {over}{devices} devices: expected a multiple of"
            f" {devices * parts}"
        )


def build_schedule(
    config: ConfigDict, num_examples: int, peak: float | jax.Array | None = None
) -> tuple[Schedule, int]:
    """Return (step -> learning rate, total steps).

    Args:
      config: of the run.
      num_examples: to train on.
      peak: rate after the warm-up; None: that of the configuration.

    Raises:
      ConfigError: if the warm-up is longer than the run, or the run empty.
    """
    optimizer, epochs = config.optimizer, config.epochs
    highest = peak_learning_rate(config)
    if optimizer.min_learning_rate > highest > 0:
        raise ConfigError(
            f"optimizer.min_learning_rate {optimizer.min_learning_rate:g}: expected at most the"
            f" rate after the warm-up, which is {highest:g} at batch_size {config.batch_size}"
        )
    if not 0 <= optimizer.warmup_epochs < epochs:
        raise ConfigError(
            f"optimizer.warmup_epochs {optimizer.warmup_epochs} must be at least 0 and less than"
            f" epochs, which is {epochs}"
        )
    total = schedules.total_steps(num_examples, config.batch_size, epochs)
    schedule = functools.partial(
        schedules.warmup_cosine,
        peak=peak_learning_rate(config) if peak is None else peak,
        warmup_steps=total * optimizer.warmup_epochs / epochs,
        total_steps=total,
        minimum=optimizer.min_learning_rate,
    )
    return schedule, total


def peak_learning_rate(config: ConfigDict) -> float:
    """Return the rate after the warm-up."""
    return schedules.scaled_learning_rate(config.optimizer.base_learning_rate, config.batch_size)


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Return the chain that yields the direction of an update.

    Raises:
      ConfigError: if the optimiser is unknown, or a field missing or out of range.
    """
    optimizer = config.optimizer
    if optimizer.name not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name {optimizer.name!r} is not one of {', '.join(OPTIMIZERS)}"
        )
    make, names = OPTIMIZERS[optimizer.name]
    below_one = ("b1", "b2", "ema_decay", "momentum")
    for name in (*names, "ema_decay", "base_learning_rate", "min_learning_rate"):
        if name not in optimizer:
            raise ConfigError(
                f"optimizer.{name}: optimizer.name={optimizer.name} needs this field, which the"
                " config has not"
            )
        limit = 1 if name in below_one else math.inf
        if not 0 <= optimizer[name] < limit:
            raise ConfigError(
                f"optimizer.{name} {optimizer[name]}: expected at least 0, below {limit}"
            )
    fields = {name: optimizer[name] for name in names}
    if "no_decay" in optimizer:
        fields["no_decay"] = optimizer.no_decay
    return make(**fields)


def build_trainable(
    config: ConfigDict, model: nn.Module, params: Params
) -> tuple[Any | None, Any | None]:
    """Return which parameters are trained, and by what their rates are multiplied.

    Args:
      config: of any task.
      model: the method or the classifier.
      params: the parameters, or their shapes.

    Returns:
      Trees like `params`, or None for all of them, or for 1.

    Raises:
      ConfigError: if a field is out of range.
    """
    if config.task == "pretrain":
        return None, None
    decay, blocks = config.optimizer.layer_decay, config.optimizer.trainable_blocks
    if not 0 < decay <= 1:
        raise ConfigError(f"optimizer.layer_decay {decay}: expected above 0, at most 1")
    trainable = optimizers.trainable_mask(params, blocks, model.layer_id)
    factors = optimizers.layer_factors(params, decay, model.layer_id, model.encoder.top_layer)
    return trainable, factors


@dataclasses.dataclass(frozen=True)
class Training:
    """How a state begins and how it takes a step.

    Attributes:
      init: seed -> the state before the first step; to be jitted.
      step: (state, batch, schedule=...) -> (state, metrics), with the seed of the configuration
        unless `seed=...`; to be jitted.
      trainable: see `train_step`.
    """

    init: Callable[[int | jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    trainable: Any | None


def build_training(
    config: ConfigDict,
    task: PretrainTask | FinetuneTask,
    optimizer: optax.GradientTransformation,
) -> Training:
    """Return how a run of a configuration begins, and its step.

    Raises:
      ConfigError: if a field is out of range.
    """
    check_attention(config)
    variables = functools.partial(initial_variables, config, task)
    shapes = jax.eval_shape(variables, 0)[0]
    trainable, factors = build_trainable(config, task.module, shapes)
    ema_decay = config.optimizer.ema_decay

    def init(seed: int | jax.Array) -> TrainState:
        return TrainState.create(
            *variables(seed), optimizer, averaged=ema_decay > 0, trainable=trainable
        )

    step = functools.partial(
        train_step,
        task=task,
        optimizer=optimizer,
        seed=config.seed,
        accumulation=config.run.accumulation,
        ema_decay=ema_decay,
        trainable=trainable,
        rate_factors=factors,
    )
    return Training(init, step, trainable)


def check_seed(seed: int) -> None:
    """Raise `ConfigError` for a seed that the order of the data cannot take."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed}: expected a number from 0 to 2**32 - 1")


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
        ("run.threads", run.threads, -1),
        *(
            (f"eval.{name}", evaluation[name], least)
            for name, least in EVAL_LEAST.items()
            if name in evaluation
        ),
    ):
        if value < least:
            raise ConfigError(f"{name} {value}: expected at least {least}")


def build_readers(config: ConfigDict) -> tuple[Reader, Reader]:
    """Return what reads examples for training and for evaluation."""
    training = find_reader(config.data).training(config)
    return training, build_eval_reader(with_kept(config, training).data)


def with_kept(config: ConfigDict, read: Reader) -> ConfigDict:
    """Return the configuration with what has to be kept with a model: its vocabulary, learnt."""
    kept = getattr(read, "kept", {})
    if not kept:
        return config
    config = config.copy_and_resolve_references()
    config.data.update(kept)
    return config


def data_fingerprint(source: Source, read: Reader) -> str:
    """Return a digest by which other training data are noticed: examples, and what a reader adds.

    Without such additions it is the source's own.
    """
    added = getattr(read, "fingerprint", "")  # of a reader of captions with texts beside them
    return f"{source.fingerprint()}-{added}" if added else source.fingerprint()


def build_eval_reader(
    data: ConfigDict, given: float | None = None, *, one_view: bool = False
) -> Reader:
    """Return what reads examples for evaluation.

    Args:
      data: of the configuration that the model was trained with.
      given: a `crop_fraction` in place of that of `data`; None: none.
      one_view: of a film, the central clip alone, whatever its classifier is evaluated on; beside
        an image no text that is not its own.
    """
    if one_view:
        data = data.copy_and_resolve_references().unlock()
        alone = {"test_clips": 1, "test_crops": 1, "unpaired_text": ""}
        data.update({name: value for name, value in alone.items() if name in data})
    return find_reader(data).evaluation(data, given)


def workers_and_threads(config: ConfigDict) -> tuple[int, int]:
    """Return how many processes load training examples, and threads in each, or without any."""
    cores, workers, threads = available_cores(), config.run.workers, config.run.threads
    if workers < 0:
        workers = loader.default_workers(cores)
    return workers, loader.default_threads(workers, cores) if threads < 0 else threads


def build_batches(
    config: ConfigDict, source: Source, read: Reader, *, start_step: int, mesh: Mesh
) -> DeviceBatches:
    """Return the training batches on the devices, from `start_step` on."""
    workers, threads = workers_and_threads(config)
    host = loader.train_batches(
        source,
        read,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=workers,
        threads=threads,
        max_bad_share=config.data.max_bad_share,
    )
    return DeviceBatches(host, put_function(mesh))


class DeviceBatches:
    """Training batches of the loader, each put on the devices when it is asked for.

    The loop asks for the next one while the devices work on a step, and `put` does not wait: the
    copy overlaps the step. The loader's threads or workers are at least one batch ahead.
    """

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
        {name: rows for name, rows in batch.items() if name not in HOST_FIELDS}, by_row
    )


def build_placement(mesh: Mesh, seed: int) -> Placement:
    """Return how evaluators get at the devices of a mesh."""
    return Placement(put_function(mesh), sharding.replicated(mesh), seed)


def build_eval_batches(
    source: Source,
    read: Reader,
    *,
    batch_size: int,
    limit: int | None = None,
    max_bad_share: float,
) -> loader.EvalBatches:
    """Return this process's part of the batches of an evaluation; `limit` None: of all examples."""
    return loader.eval_batches(
        source,
        read,
        batch_size=batch_size,
        limit=None if limit is None else min(limit, len(source)),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_share=max_bad_share,
    )


def build_evaluators(
    config: ConfigDict,
    task: PretrainTask | FinetuneTask,
    sources: Sequence[Source],
    read: Reader,
    mesh: Mesh,
    init_params: Callable[[], Params],
) -> list[Evaluator]:
    """Return what is measured and drawn on held-out images: of a classifier, on all of them."""
    evaluation, train, held_out = config.eval, *sources
    placement = build_placement(mesh, config.seed)

    def batches(source: Source, limit: int | None, batch_size: int) -> loader.EvalBatches:
        return build_eval_batches(
            source,
            read,
            batch_size=batch_size,
            limit=limit,
            max_bad_share=config.data.max_bad_share,
        )

    if isinstance(task, FinetuneTask):
        whole = batches(held_out, None, evaluation.batch_size)
        names = class_names(held_out)
        return [Classification(task, whole, placement, classes=names, views=read.views)]
    both = (
        batches(train, evaluation.train_examples, evaluation.batch_size),
        batches(held_out, evaluation.val_examples, evaluation.batch_size),
    )
    evaluators: list[Evaluator] = [MaskedError(task, *both, placement)]
    if evaluation.readouts and train.num_classes and held_out.num_classes:
        evaluators.append(ReadOuts(task, *both, placement, init_params))
    words = getattr(read, "words", None)  # of a reader of captions
    if words is not None and (scored := config.data.scored_words):
        ids = words.ids_of(scored, "data.scored_words")
        evaluators.append(WordAccuracy(task, both[1], placement, ids))
    if count := min(evaluation.pictures, len(held_out)):
        rows = -(-count // mesh.size) * mesh.size
        batch = next(iter(batches(held_out, count, rows)))
        if words is None:
            evaluators.append(Pictures(task, batch, placement, count))
        else:
            evaluators.append(CaptionPictures(task, batch, placement, count, words.pieces))
    return evaluators
