"""A run that trains nothing: it measures a checkpoint and keeps the figures in `results.json`.

Each measurement is written down when it is done, so that the same command goes on where a run was
stopped.
"""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

import mae_jax
from mae_jax import api, build
from mae_jax import config as configs
from mae_jax.errors import ConfigError
from mae_jax.files import completed, encode_picture
from mae_jax.job import Job
from mae_jax.measurements import SUMMARIES, TASKS, Bench, Interrupted, Measurement
from mae_jax.request import FINISHED, STOPPED, Request
from mae_jax.train import sharding
from mae_jax.train.writers import Console

RESULTS = "results.json"


def measure(config: ConfigDict, request: Request, job: Job) -> int:
    """Measure the checkpoint `init_from`, and say and write down what comes out.

    Returns:
      The exit status: 0 finished, 75 stopped.

    Raises:
      ConfigError: for a mistake in configuration or data.
    """
    if not config.init_from:
        raise ConfigError("init_from: expected the folder of a run or a checkpoint, got nothing")
    build.check_seed(config.seed)
    folder = epath.Path(request.workdir)
    _refuse_changes(folder, config, request)
    model = api.load(config.init_from)
    of = {"checkpoint": config.init_from, "step": model.step, "averaged": model.averaged}
    results = _results(folder, of)
    job.agree({"step of init_from": model.step, "measured": sorted(results)}, last=True)
    mesh = sharding.make_mesh(config.run.mesh.data, config.run.mesh.fsdp)
    build.check_batch_size("eval.batch_size", config.eval.batch_size, mesh.size)
    placement = build.build_placement(mesh, config.seed)
    held = model.params, model.extra
    everywhere = jax.tree.map(lambda _: placement.replicated, held)
    variables = sharding.put_tree(held, everywhere)
    with job.stop_request() as stop:
        bench = Bench(config, model, variables, placement, stop)
        measurements = TASKS[config.task](bench)
        console = Console(len(measurements), quiet=jax.process_index() != 0)
        average = ", averaged" if model.averaged else ""
        console.say(
            f"mae_jax {mae_jax.__version__}: {config.task} of {config.init_from}"
            f" (step {model.step}{average}), in {request.workdir}"
        )
        try:
            for measurement in measurements:
                if measurement.name in results:
                    console.say(f"{measurement.name}: there already")
                    continue
                figures = _carry_out(measurement, folder)
                if left_out := bench.left_out():
                    figures["left_out"] = float(left_out)
                results[measurement.name] = figures
                _write(folder, config, of, results)
                console.say(_line(measurement.name, figures))
        except Interrupted:
            wanted = len(measurements)
            done = sum(measurement.name in results for measurement in measurements)
            console.say(f"stopped by {stop.name}; {done} of {wanted} measurements are saved")
            console.say(f"  go on with  {request.command()}")
            return STOPPED
    for name, figures in SUMMARIES.get(config.task, lambda results: {})(results).items():
        console.say(_line(name, figures))
        results[name] = figures
    _write(folder, config, of, results)
    console.say(f"finished: {folder / RESULTS}")
    return FINISHED


def _refuse_changes(folder: epath.Path, config: ConfigDict, request: Request) -> None:
    """Compare the configuration with the one that the folder was made with, if there is one."""
    if not (folder / "config.json").exists():
        return
    stored = json.loads((folder / "config.json").read_text())
    if stored["task"] != config.task:  # the folder of a run that trained, above all
        raise ConfigError(
            f"task is {config.task!r}, but {folder} was made with {stored['task']!r}: take another"
            " --workdir"
        )
    configs.refuse_changes(stored, config, request.allow_change, str(folder))


def _results(folder: epath.Path, of: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured before in this folder, of the same checkpoint."""
    if not (folder / RESULTS).exists():
        return {}
    results = json.loads((folder / RESULTS).read_text())
    if results["of"] != of:
        raise ConfigError(
            f"init_from is now step {of['step']} of {of['checkpoint']}, but {folder} holds figures"
            f" of step {results['of']['step']} of {results['of']['checkpoint']}: take another"
            " --workdir"
        )
    return results["figures"]


def _line(name: str, figures: dict[str, float]) -> str:
    return f"{name}:  " + "  ".join(f"{figure} {value:.4g}" for figure, value in figures.items())


def _carry_out(measurement: Measurement, folder: epath.Path) -> dict[str, float]:
    """Measure, write pictures and tables, and return the figures."""
    figures = {}
    is_first = jax.process_index() == 0
    for name, value in measurement.run():
        if isinstance(value, float):
            figures[name] = value
        elif is_first and isinstance(value, str):
            with completed(folder / "tables" / f"{name}.csv") as path:
                path.write_text(value)
        elif is_first and not isinstance(value, str):
            encoded, suffix = encode_picture(value)
            with completed(folder / "pictures" / f"{name}{suffix}") as path:
                path.write_bytes(encoded)
    return figures


def _write(
    folder: epath.Path, config: ConfigDict, of: dict[str, Any], results: dict[str, Any]
) -> None:
    if jax.process_index() != 0:
        return
    for name, text in (
        ("config.json", configs.to_json(config)),
        (RESULTS, json.dumps({"of": of, "figures": results}, indent=2) + "\n"),
    ):
        with completed(folder / name, field="--workdir") as path:
            path.write_text(text)
