"""One run from configuration to checkpoint: build, restore or start, compile, train, say so."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

import mae_jax
from mae_jax import api, build, files
from mae_jax import config as configs
from mae_jax.data.readers import Reader
from mae_jax.data.sources import Source
from mae_jax.errors import ConfigError
from mae_jax.job import Job
from mae_jax.models.transfer import fill, transfer_encoder
from mae_jax.request import FINISHED, STOPPED, Request
from mae_jax.tasks.finetune import FinetuneTask
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train import compiler, metrics, sharding
from mae_jax.train.best import BestCheckpoint
from mae_jax.train.checkpoint import Checkpoints, abstract_state
from mae_jax.train.lock import FolderLock
from mae_jax.train.loop import Cadence, NonFiniteError, StepFn, train
from mae_jax.train.partition import merge, restrict, select
from mae_jax.train.profile import ProfiledStep
from mae_jax.train.resume import Resumed, newest_meta, restore_newest
from mae_jax.train.signals import StopRequest
from mae_jax.train.state import TrainState
from mae_jax.train.step import Schedule
from mae_jax.train.writers import Console, RunWriter
from mae_jax.types import Evaluator, Params

FAILED = 1


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a configuration describes, built: all that a run needs beside its folder.

    Attributes:
      task: what the batches are for.
      mesh: the devices.
      readers: of examples for training and for evaluation.
      sources: examples to train on and held out.
      schedule: step -> learning rate.
      total_steps: its end.
      init: makes the state before the first step; to be jitted.
      target: shapes, dtypes and shardings of the state.
      training: how a state begins, and the step.
    """

    task: PretrainTask | FinetuneTask
    mesh: Mesh
    readers: tuple[Reader, Reader]
    sources: tuple[Source, Source]
    schedule: Schedule
    total_steps: int
    init: Callable[[], TrainState]
    target: TrainState
    training: build.Training


def _build(config: ConfigDict) -> Parts:
    """Build everything; raises ConfigError for a mistake, before anything is compiled."""
    build.check_task(config.task)  # first, for the fields of a config depend on it
    build.check_cadence(config)
    build.check_seed(config.seed)
    if config.task == "finetune" and not config.init_from:
        raise ConfigError(
            "init_from: expected the folder of a run or a checkpoint, or scratch, got nothing"
        )
    task = build.build_task(config, build.build_model(config))
    mesh = build.build_mesh(config)
    readers = build.build_readers(config)
    build.check_prepares(config, task, build.rows_of(config, readers[0]))
    optimizer = build.build_optimizer(config)
    sources = build.build_sources(config)
    reader = config.data.get("reader", "images")
    build.check_reads(reader, sources[0], readers[0], task.module)
    schedule, total_steps = build.build_schedule(config, len(sources[0]))

    training = build.build_training(config, task, optimizer)
    init = functools.partial(training.init, config.seed)
    shapes = jax.eval_shape(init)
    target = abstract_state(shapes, sharding.state_sharding(shapes, mesh))
    sharding.check_memory(sharding.bytes_per_device(target), mesh.local_devices[0])
    return Parts(
        task=task,
        mesh=mesh,
        readers=readers,
        sources=sources,
        schedule=schedule,
        total_steps=total_steps,
        init=init,
        target=target,
        training=training,
    )


def run(config: ConfigDict, request: Request, job: Job) -> int:
    """Carry out a run, in every process of its job alike.

    Returns:
      The exit status: 0 finished, 75 stopped and saved, 1 stopped because it diverged.

    Raises:
      StopError: if a step or a line of its metrics cannot be written.
      ConfigError: for a mistake in configuration or data; nearly always before anything is
        compiled or written, and if data go bad later, after the state is saved.
    """
    goodput = metrics.Goodput()
    compiler.keep_programs(config.run.compilation_cache)
    parts = _build(config)
    config = build.with_kept(config, parts.readers[0])
    folder = epath.Path(request.workdir)
    # Once: of a million files it takes a while.
    fingerprint = build.data_fingerprint(parts.sources[0], parts.readers[0])
    job.agree(_data_facts(parts, fingerprint, folder))
    is_new = _refuse_changes(folder, config, request)
    given = _given(config.init_from, parts) if is_new else None
    # None makes the folder before all have looked into it: Orbax would wait for them elsewhere.
    job.agree({"init_from": given and given[1]})
    meta = {
        "config": config.to_dict(),
        "mae_jax": mae_jax.__version__,
        "jax": jax.__version__,
    }
    # Closed whatever happens, so that a save under way is completed.
    with contextlib.ExitStack() as closing:
        stop = closing.enter_context(job.stop_request())
        is_first_process = jax.process_index() == 0
        lock = closing.enter_context(FolderLock(folder, active=is_first_process))
        job.agree({})  # the others learn here that the first was refused the folder
        checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.run.keep_checkpoints, before_save=lock.check
        )
        closing.callback(checkpoints.close)
        best = None
        if config.task == "finetune":
            best = BestCheckpoint(folder / "best", "val/top1", meta, before_save=lock.check)
            closing.callback(best.close)
        # After all that is to be closed: where it ends the process, nothing waits for the others.
        closing.enter_context(job.guard())
        resumed = restore_newest(checkpoints, parts.target)
        first = 0 if resumed is None else resumed.step
        console = Console(parts.total_steps, first, quiet=not is_first_process)
        closing.callback(console.close)
        peak = metrics.peak_flops(list(parts.mesh.devices.flat))
        rows = build.rows_of(config, parts.readers[0])
        throughput = metrics.Throughput(rows, parts.task.step_flops(), peak[0], goodput)
        for line in _summary(config, request, parts, peak):
            console.say(line)
        if lock.note:
            console.say(lock.note)
        if best is not None:
            for note in best.open(anew=resumed is None):
                console.say(note)
        state = _start(parts, resumed, fingerprint, given, console)
        del given  # it would stay on the first device all through the run
        job.agree({"resume step": first}, last=True)
        if is_first_process:
            with files.writing(folder / "config.json"):
                files.write_text(folder / "config.json", configs.to_json(config))
        last_step = max(first, min(parts.total_steps, request.stop_at_step or parts.total_steps))
        if first < last_step:
            checkpoints.require_space(parts.target)
        with goodput.spent_on("compiling"):
            compiled = _compile(parts, config)
        console.say(_memory(compiled))
        step_fn: StepFn = compiled
        if request.profile_steps is not None and is_first_process:
            step_fn = profiled = ProfiledStep(
                compiled, folder / "profile", request.profile_steps, done=first
            )
            closing.callback(profiled.close)
        writer = RunWriter(folder, first_step=first, active=is_first_process)
        closing.callback(writer.close)
        batches = build.build_batches(
            config, parts.sources[0], parts.readers[0], start_step=first, mesh=parts.mesh
        )
        try:
            step = goodput.spent_on("steps")(train)(
                state,
                step_fn,
                batches,
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
                    "meta": meta,
                },
                writer=writer,
                console=console,
                throughput=throughput,
                stop=stop,
                keep_best=best.keep if best else None,
            )
        except NonFiniteError as error:
            console.close()
            return _diverged(console, request, error)
        console.close()
        if step > first:
            beat = writer.heartbeat
            console.say(goodput.line(beat.restarts, beat.steps_again))
        if best is not None and best.step is not None:
            console.say(f"best top-1 {best.value:.2f} % at step {best.step}: {best.path()}")
    return _farewell(console, config, request, step, last_step, parts.total_steps, stop)


def _data_facts(parts: Parts, fingerprint: str, folder: epath.Path) -> dict[str, Any]:
    """Return what all processes must have alike before they read what a run has saved."""
    steps = [path.name for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]
    return {
        "data": f"{len(parts.sources[0])} examples, {fingerprint}",
        "held-out data": f"{len(parts.sources[1])} examples",
        "steps that are saved": ", ".join(sorted(steps, key=int)) or "none",
    }


def _start(
    parts: Parts,
    resumed: Resumed | None,
    fingerprint: str,
    given: tuple[Params, str] | None,
    console: Console,
) -> TrainState:
    """Return the state that was restored, or a fresh one or one with weights from elsewhere.

    Says which. What is saved wins over what `_given` has returned: the same command resumes.
    """
    if resumed is not None:
        for note in resumed.notes:
            console.say(note)
        if resumed.data["fingerprint"] != fingerprint:
            console.say("note: the training data are not those of the checkpoint")
        console.say(f"resumed from step {resumed.step}")
        return resumed.state
    state = jax.jit(parts.init, out_shardings=sharding.shardings_of(parts.target))()
    if given is None:
        console.say("started from scratch")
        return state
    params, said = given
    console.say(said)
    # A part may lack what is fresh by nature, as a relative position bias that was not trained.
    where = restrict(sharding.shardings_of(parts.target.params), params)
    return state.starting_from(merge(state.params, sharding.put_tree(params, where)))


def _given(init_from: str, parts: Parts) -> tuple[Params, str] | None:
    """Return the parameters that `init_from` has for this run, and in words which they are.

    The encoder must fit, up to the size of the grid; another part that does not, a decoder or a
    head, is left out, and stays fresh.

    Raises:
      ConfigError: if there is no such checkpoint, or its encoder does not fit.
    """
    if init_from in ("", "scratch"):
        return None
    source, fresh, module = api.load(init_from), parts.target.params, parts.task.module
    vocabulary = getattr(parts.readers[0], "kept", {}).get("vocabulary")
    if vocabulary and vocabulary != source.config.data.get("vocabulary"):
        raise ConfigError(
            f"data.vocabulary: expected the word pieces of init_from {init_from}, got others: take"
            f" --config.data.vocabulary={init_from}"
        )
    try:
        encoder = transfer_encoder(
            source.params["encoder"], source.module.encoder, module.encoder, fresh["encoder"]
        )
    except ConfigError as error:
        raise ConfigError(
            f"init_from {init_from}: expected an encoder as config.model describes it: {error}"
        ) from error
    taken, notes = {"encoder": encoder}, []
    for part in sorted(fresh.keys() - {"encoder"}):
        if part not in source.params:
            notes.append(f"the {part} is fresh, for it has none")
            continue
        try:
            taken[part] = fill(fresh[part], source.params[part], part)
        except ConfigError as error:
            notes.append(f"the {part} is fresh: {error}")
    names = " and ".join(taken) if len(taken) > 1 else "the encoder"
    average = ", averaged" if source.averaged else ""
    said = "; ".join([names, *notes])
    return taken, f"started from {init_from} (step {source.step}{average}): {said}"


def _evaluators(parts: Parts, config: ConfigDict) -> list[Evaluator]:
    """Return what is measured and drawn on held-out images."""
    # The untrained parameters alone: the optimiser's state is not even computed.
    init_params = jax.jit(
        lambda: parts.init().params, out_shardings=sharding.shardings_of(parts.target.params)
    )
    return build.build_evaluators(
        config, parts.task, parts.sources, parts.readers[1], parts.mesh, init_params
    )


def _compile(parts: Parts, config: ConfigDict) -> jax.stages.Compiled:
    """Compile the step once, ahead of time: another shape is then an error, not a new program."""
    by_row = sharding.batch_sharding(parts.mesh)
    batch = build.batch_of(parts.task.module, build.rows_of(config, parts.readers[0]), by_row)
    step = functools.partial(parts.training.step, schedule=parts.schedule)
    lowered = compiler.lower_step(step, parts.target, batch)
    platform = parts.mesh.devices.flat[0].platform
    return compiler.compile_step(lowered, platform, remat=config.run.remat != "none")


def _refuse_changes(folder: epath.Path, config: ConfigDict, request: Request) -> bool:
    """Compare the configuration with that of the newest checkpoint; return whether there is none.

    Of one whose configuration is damaged, with that of the one before.
    """
    if not (folder / "checkpoints").exists():
        return True
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    steps, stored = checkpoints.steps(), newest_meta(checkpoints)
    checkpoints.close()
    if stored is not None:
        configs.refuse_changes(stored["config"], config, request.allow_change, str(folder))
    return not steps


def _summary(
    config: ConfigDict, request: Request, parts: Parts, peak: tuple[float, str]
) -> list[str]:
    """Return the lines a run starts with."""
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in parts.target.params.items()
    }
    shape = parts.task.module.example()["image"].shape
    what = "images" if len(shape) == 3 else "clips"
    views = parts.readers[0].views
    crops = f", {views} crops of each" if views > 1 else ""
    train_source, held_out = parts.sources
    classes = (
        f"{train_source.num_classes} classes"
        if train_source.num_classes and held_out.num_classes
        else "no labels, so no read-outs"
    )
    state_bytes = sharding.bytes_per_device(parts.target)
    by_name = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    trained = select(parts.target.params, parts.training.trainable)
    trained_size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    if trained_size < sum(counts.values()):
        by_name += f"; {trained_size / 1e6:.2f} M are trained"
    rate = build.peak_learning_rate(config)
    per_part = config.batch_size // config.run.accumulation
    accumulated = f" in parts of {per_part}" if config.run.accumulation > 1 else ""
    averaged = ", their average" if config.optimizer.ema_decay else ""
    workers, threads = build.workers_and_threads(config)
    loading = f"{threads} thread{'' if threads == 1 else 's'}"
    if workers:
        loading = f"{workers} worker{'' if workers == 1 else 's'} x {loading}"
    return [
        f"mae_jax {mae_jax.__version__}: {config.model.name} {config.model.size}"
        f" on {config.data.source}, in {request.workdir}",
        f"  model     {sum(counts.values()) / 1e6:.2f} M parameters ({by_name}),"
        f" {parts.task.step_flops() / 1e9:.4g} GFLOP per {what[:-1]} and step,"
        f" {jnp.dtype(build.compute_dtype(config)).name}",
        f"  data      {len(train_source):,} {what} to train on, {len(held_out):,} held out,"
        f" {classes}; {' x '.join(map(str, shape))}; {loading}",
        f"  schedule  {parts.total_steps:,} steps of {config.batch_size} {what}{crops}{accumulated}"
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
