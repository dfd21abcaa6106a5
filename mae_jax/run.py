"""One run from configuration to checkpoint: build, restore or start, compile, train, say so."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

import mae_jax
from mae_jax import api, build
from mae_jax import config as configs
from mae_jax.data.sources import Source
from mae_jax.data.transforms import Transform
from mae_jax.errors import ConfigError
from mae_jax.models.transfer import fill, transfer_encoder
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train import metrics, sharding
from mae_jax.train.checkpoint import Checkpoints, abstract_state
from mae_jax.train.loop import Cadence, NonFiniteError, train
from mae_jax.train.signals import StopRequest
from mae_jax.train.state import TrainState
from mae_jax.train.step import Schedule, train_step
from mae_jax.train.writers import Console, RunWriter
from mae_jax.types import Evaluator, Params, Rng, Stream

FINISHED, FAILED, STOPPED = 0, 1, 75


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for beside the configuration.

    Attributes:
      workdir: folder of the run.
      stop_at_step: end there, in the middle of the schedule; None: at its end.
      allow_change: fields that may differ from those the folder was made with.
      argv: the flags as they were given, to be repeated in messages.
    """

    workdir: str
    stop_at_step: int | None = None
    allow_change: Sequence[str] = ()
    argv: Sequence[str] = ()

    def command(self, *more: str) -> str:
        """Return the command that was given, with flags added or, if given before, replaced."""
        names = tuple(f"{flag.partition('=')[0]}=" for flag in more)
        kept = [flag for flag in self.argv if not flag.startswith(names)]
        return shlex.join([_interpreter(), "-m", "mae_jax.main", *kept, *more])


def _interpreter() -> str:
    """Return how this Python is called from here: by name if on the path, else by its file."""
    # Not by resolving links: every environment's python is a link to the same file.
    if os.path.dirname(shutil.which("python") or "") == os.path.dirname(sys.executable):
        return "python"
    below = os.path.relpath(sys.executable)
    return sys.executable if below.startswith("..") else below


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a configuration describes, built: all that a run needs beside its folder.

    Attributes:
      task: what the batches are for.
      mesh: the devices.
      transforms: of images for training and for evaluation.
      sources: examples to train on and held out.
      optimizer: gives the direction of an update.
      schedule: step -> learning rate.
      total_steps: its end.
      init: makes the state before the first step; to be jitted.
      target: shapes, dtypes and shardings of the state.
    """

    task: PretrainTask
    mesh: Mesh
    transforms: tuple[Transform, Transform]
    sources: tuple[Source, Source]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    total_steps: int
    init: Callable[[], TrainState]
    target: TrainState


def _build(config: ConfigDict) -> Parts:
    """Build everything; raises ConfigError for a mistake, before anything is compiled."""
    build.check_cadence(config)
    task = build.build_task(config, build.build_model(config))
    mesh = build.build_mesh(config)
    transforms = build.build_transforms(config)
    optimizer = build.build_optimizer(config)
    sources = build.build_sources(config)
    schedule, total_steps = build.build_schedule(config, len(sources[0]))

    def init() -> TrainState:
        images = jnp.zeros((1, *config.data.image_size, config.data.channels), jnp.uint8)
        key = Rng(jax.random.key(config.seed), 0).key(Stream.INIT)
        averaged = config.optimizer.ema_decay > 0
        return TrainState.create(*task.init(key, {"image": images}), optimizer, averaged=averaged)

    shapes = jax.eval_shape(init)
    target = abstract_state(shapes, sharding.state_sharding(shapes, mesh))
    return Parts(task, mesh, transforms, sources, optimizer, schedule, total_steps, init, target)


def run(config: ConfigDict, request: Request) -> int:
    """Carry out a run.

    Returns:
      The exit status: 0 finished, 75 stopped and saved, 1 stopped because it diverged.

    Raises:
      ConfigError: for a mistake in configuration or data; nearly always before anything is
        compiled or written, and if data go bad later, after the state is saved.
    """
    parts = _build(config)
    folder = epath.Path(request.workdir)
    _refuse_changes(folder, config, request)
    fingerprint = parts.sources[0].fingerprint()  # once: of a million files it takes a while
    # Closed whatever happens, so that a save under way is completed.
    with (
        StopRequest() as stop,
        contextlib.closing(
            Checkpoints(folder / "checkpoints", keep=config.run.keep_checkpoints)
        ) as checkpoints,
    ):
        first = checkpoints.latest_step() or 0
        is_first_process = jax.process_index() == 0
        console = Console(parts.total_steps, first, quiet=not is_first_process)
        peak = metrics.peak_flops(list(parts.mesh.devices.flat))
        for line in _summary(config, request, parts, peak):
            console.say(line)
        state = _start(parts, checkpoints, fingerprint, config.init_from, console)
        if is_first_process:
            (folder / "config.json").write_text(configs.to_json(config))
        step_fn = _compile(parts, config)
        console.say(_memory(step_fn))
        last_step = max(first, min(parts.total_steps, request.stop_at_step or parts.total_steps))
        try:
            step = train(
                state,
                step_fn,
                build.build_batches(
                    config, parts.sources[0], parts.transforms[0], start_step=first, mesh=parts.mesh
                ),
                Cadence(
                    total_steps=parts.total_steps,
                    last_step=last_step,
                    log_every=config.run.log_every,
                    eval_every=config.eval.every,
                    save_every=config.run.save_every,
                    max_nonfinite_steps=config.run.max_nonfinite_steps,
                ),
                evaluators=_evaluators(parts, config),
                checkpoints=checkpoints,
                save_items=lambda step: {
                    "data": {"next_step": step, "fingerprint": fingerprint},
                    "meta": {
                        "config": config.to_dict(),
                        "mae_jax": mae_jax.__version__,
                        "jax": jax.__version__,
                    },
                },
                writer=RunWriter(folder, first_step=first, active=is_first_process),
                console=console,
                throughput=metrics.Throughput(
                    config.batch_size, parts.task.method.step_flops(), peak[0]
                ),
                stop=stop,
            )
        except NonFiniteError as error:
            console.close()
            return _diverged(console, request, error)
        console.close()
    return _farewell(console, config, request, step, last_step, parts.total_steps, stop)


def _start(
    parts: Parts, checkpoints: Checkpoints, fingerprint: str, init_from: str, console: Console
) -> TrainState:
    """Return the newest state saved, or a fresh one or one with weights from elsewhere; say which.

    A state that is saved wins over `init_from`: the same command resumes.
    """
    newest = checkpoints.latest_step()
    if newest is None:
        state = jax.jit(parts.init, out_shardings=_shardings(parts.target))()
        if not init_from:
            console.say("started from scratch")
            return state
        params, said = _transferred(init_from, state.params, parts)
        console.say(said)
        params = jax.device_put(params, _shardings(parts.target.params))
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return state.replace(params=params, ema=ema)
    state = checkpoints.restore(newest, parts.target)
    if checkpoints.read_json(newest, "data")["fingerprint"] != fingerprint:
        console.say("note: the training data are not those of the checkpoint")
    console.say(f"resumed from step {newest}")
    return state


def _transferred(init_from: str, fresh: Params, parts: Parts) -> tuple[Params, str]:
    """Return `fresh` with what the checkpoint `init_from` has of it, and a line that says what.

    The encoder must fit, up to the size of the grid; a decoder that does not fit stays fresh.
    """
    source = api.load(init_from)
    module = parts.task.method
    encoder = transfer_encoder(
        source.params["encoder"], source.module.encoder, module.encoder, fresh["encoder"]
    )
    params = {**fresh, "encoder": encoder}
    note = "the encoder; the decoder is fresh, for it has none"
    if "decoder" in source.params:
        try:
            params["decoder"] = fill(fresh["decoder"], source.params["decoder"], "decoder")
            note = "encoder and decoder"
        except ConfigError as error:
            note = f"the encoder; the decoder is fresh: {error}"
    average = ", averaged" if source.averaged else ""
    return params, f"started from {init_from} (step {source.step}{average}): {note}"


def _evaluators(parts: Parts, config: ConfigDict) -> list[Evaluator]:
    """Return what is measured and drawn on held-out images."""
    # The untrained parameters alone: the optimiser's state is not even computed.
    init_params = jax.jit(
        lambda: parts.init().params, out_shardings=_shardings(parts.target.params)
    )
    return build.build_evaluators(
        config, parts.task, parts.sources, parts.transforms[1], parts.mesh, init_params
    )


def _shardings(target: Any) -> Any:
    """Return the shardings of a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: leaf.sharding, target)


def _compile(parts: Parts, config: ConfigDict) -> jax.stages.Compiled:
    """Compile the step once, ahead of time: another shape is then an error, not a new program."""
    by_row = sharding.batch_sharding(parts.mesh)
    image_shape = (config.batch_size, *config.data.image_size, config.data.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(image_shape, np.uint8, sharding=by_row),
        "label": jax.ShapeDtypeStruct((config.batch_size,), np.int32, sharding=by_row),
    }
    jitted = jax.jit(
        functools.partial(
            train_step,
            task=parts.task,
            optimizer=parts.optimizer,
            schedule=parts.schedule,
            seed=config.seed,
            accumulation=config.run.accumulation,
            ema_decay=config.optimizer.ema_decay,
        ),
        in_shardings=(_shardings(parts.target), by_row),
        out_shardings=(_shardings(parts.target), sharding.replicated(parts.mesh)),
        donate_argnums=0,
    )
    return jitted.lower(parts.target, batch).compile()


def _refuse_changes(folder: epath.Path, config: ConfigDict, request: Request) -> None:
    """Compare the configuration with the one of the newest checkpoint, if there is one."""
    if not (folder / "checkpoints").exists():
        return
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    latest = checkpoints.latest_step()
    stored = None if latest is None else checkpoints.read_json(latest, "meta")["config"]
    checkpoints.close()
    if stored is not None:
        configs.refuse_changes(stored, config, request.allow_change, str(folder))


def _summary(
    config: ConfigDict, request: Request, parts: Parts, peak: tuple[float, str]
) -> list[str]:
    """Return the lines a run starts with."""
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in parts.target.params.items()
    }
    height, width = config.data.image_size
    train_source, held_out = parts.sources
    classes = (
        f"{train_source.num_classes} classes"
        if train_source.num_classes and held_out.num_classes
        else "no labels, so no read-outs"
    )
    state_bytes = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(parts.target)
    )
    by_name = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    rate = build.peak_learning_rate(config)
    per_part = config.batch_size // config.run.accumulation
    accumulated = f" in parts of {per_part}" if config.run.accumulation > 1 else ""
    averaged = ", their average" if config.optimizer.ema_decay else ""
    return [
        f"mae_jax {mae_jax.__version__}: {config.model.name} {config.model.size}"
        f" on {config.data.source}, in {request.workdir}",
        f"  model     {sum(counts.values()) / 1e6:.2f} M parameters ({by_name}),"
        f" {parts.task.method.step_flops() / 1e9:.4g} GFLOP per image and step,"
        f" {jnp.dtype(build.compute_dtype(config)).name}",
        f"  data      {len(train_source):,} images to train on, {len(held_out):,} held out,"
        f" {classes}; {height} x {width} x {config.data.channels}",
        f"  schedule  {parts.total_steps:,} steps of {config.batch_size} images{accumulated}"
        f" ({config.epochs:g} epochs), learning rate {rate:.3g}"
        f" after {config.optimizer.warmup_epochs:g} epochs",
        f"  devices   {parts.mesh.size} x {parts.mesh.devices.flat[0].device_kind}"
        f" (data {parts.mesh.shape['data']}, fsdp {parts.mesh.shape['fsdp']}),"
        f" {peak[0] / 1e12:.3g} TFLOP/s ({peak[1]})",
        f"  memory    {state_bytes / 2**30:.3f} GiB of parameters{averaged} and optimiser state"
        " per device",
    ]


def _memory(compiled: jax.stages.Compiled) -> str:
    """Return the line on what the compiled step needs beside the state."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "compiled"
    return f"compiled; a step needs {analysis.temp_size_in_bytes / 2**30:.3f} GiB more per device"


def _diverged(console: Console, request: Request, error: NonFiniteError) -> int:
    """Say why the run ended, and how it may go on; return the exit status."""
    console.say(f"stopped: {error}")
    console.say("  lower optimizer.base_learning_rate or set optimizer.clip_norm; go on with")
    console.say(f"  {request.command('--allow_change=optimizer')}")
    return FAILED


def _farewell(
    console: Console,
    config: ConfigDict,
    request: Request,
    step: int,
    last_step: int,
    total_steps: int,
    stop: StopRequest,
) -> int:
    """Say where everything is and how to go on; return the exit status."""
    folder = epath.Path(request.workdir)
    if step < last_step:
        console.say(f"stopped at step {step} of {total_steps} by {stop.name}; everything is saved")
        console.say(f"  go on with  {request.command()}")
        return STOPPED
    note = "" if step >= total_steps else f" of {total_steps}, as --stop_at_step asks"
    console.say(f"finished at step {step}{note}: {folder / 'checkpoints' / str(step)}")
    if (folder / "pictures").exists():
        console.say(f"  pictures    {folder / 'pictures'}")
    more = [f"--config.epochs={2 * config.epochs:g}", "--allow_change=epochs"]
    if step < total_steps:
        more = [f"--stop_at_step={total_steps}"]
    console.say(f"  go on with  {request.command(*more)}")
    return FINISHED
