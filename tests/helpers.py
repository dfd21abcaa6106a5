"""What several test files need: one way to shrink a config, and one to run the program."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from mae_jax import build
from mae_jax import config as configs

ROOT = Path(__file__).resolve().parent.parent

# Fields that make any pre-training config run in seconds; what a config is about stays.
SHRINK = {
    "batch_size": "16",
    "epochs": "2.0",
    "model.embed_dim": "16",
    "model.depth": "2",
    "model.num_heads": "2",
    "model.decoder_embed_dim": "16",
    "model.decoder_depth": "1",
    "model.decoder_num_heads": "2",
    "optimizer.warmup_epochs": "0.5",
    "eval.batch_size": "16",
    "eval.train_examples": "32",
    "eval.val_examples": "32",
    "eval.pictures": "2",
}
# More fields, which configs of some methods, or on labelled images, have.
SHRINK_SOME = {
    "data.mixup_group": "2",
    "model.norm_group": "2",
    "model.pairing_group": "2",
    "model.stem_dim": "16",
    "model.frames": "4",
}


def shrunk(name: str) -> dict[str, str]:
    """Return the fields that make a config run in seconds, of those it has; 0 (off) stays 0."""
    config = configs.load_config(name)
    fields = configs.flatten(config)
    shrink = SHRINK | SHRINK_SOME
    if "model.depths" in fields:
        stages = len(build.build_model(config).encoder.depths)
        shrink |= {"model.depths": ",".join(["1"] * stages) + ","}
    return {k: v for k, v in shrink.items() if fields.get(k, 0) != 0}


def overrides(fields: dict[str, str]) -> list[str]:
    """Return fields as flags of the command line."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def tiny_run(workdir: Path, *, config: str = "demo", **fields: str) -> list[str]:
    """Return the flags of a run on the digits of 40 steps, a few milliseconds each.

    Field names take "__" for the dot: `run__save_every="5"`. A `config` on 100 labelled digits has
    12 steps. Images that are enlarged to 64 pixels are enlarged to 32 here.
    """
    more = {name.replace("__", "."): value for name, value in fields.items()}
    tiny = shrunk(config)
    loaded = configs.load_config(config)
    if loaded.model.image_size == (64, 64):
        tiny |= {"model.image_size": "32,32"}
    if loaded.task == "pretrain":
        # 4,000 digits in batches of 16 are 250 steps an epoch.
        tiny |= {"epochs": "0.16", "optimizer.warmup_epochs": "0.04", "eval.every": "20"}
        tiny |= {"run.log_every": "5", "run.save_every": "10"}
    else:
        # 100 digits are 6 steps an epoch; all 1,000 others are measured.
        tiny |= {"eval.batch_size": "200", "eval.every": "4"}
        tiny |= {"run.log_every": "1", "run.save_every": "4"}
    return [f"--config={config}", f"--workdir={workdir}", *overrides(tiny | more)]


CACHE = ROOT / ".pytest_cache" / "jax"


def environment(**extra: str) -> dict[str, str]:
    """Return an environment in which `python -m mae_jax.main` finds this clone from anywhere.

    Programs of one shape are compiled once for all runs of the suite: three quarters of its time.
    """
    ours = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **ours, **extra}


@contextlib.contextmanager
def kept_programs(folder: str | None) -> Iterator[None]:
    """Have this process keep all that it compiles in a folder, as long as the context lasts.

    None: in none so far, but it may be set.
    """
    fields = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {field: getattr(jax.config, field) for field in fields}
    try:
        for field, value in fields.items():
            jax.config.update(field, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for field, value in before.items():
            jax.config.update(field, value)
        compilation_cache.reset_cache()


def start(flags: list[str], *, module: str = "mae_jax.main", **extra: str) -> subprocess.Popen[str]:
    """Start the program, or another, in a process group of its own, stderr joined to stdout."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", module, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**extra),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Return exit status and the rest of the output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, output


def kill(process: subprocess.Popen[str]) -> str:
    """Kill the process and those that it started; returns the rest of the output."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Return the lines of output up to the one that holds `text`."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def run(flags: list[str], **extra: str) -> tuple[int, str]:
    """Run the program to its end; returns exit status and output."""
    return finish(start(flags, **extra))


def run_here(flags: list[str]) -> tuple[int, str]:
    """Run the program in this process, with its devices: quicker. Returns as `run`."""
    from mae_jax import main as program

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = program.main(flags)
    return status, output.getvalue()


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_arrays(workdir: Path, step: int, kind: str = "checkpoints") -> dict[str, np.ndarray]:
    """Return every array of a checkpoint by path, read by Orbax alone; `kind`: or of "best"."""
    import jax
    import orbax.checkpoint as ocp

    arrays = {}
    folder = (workdir / kind / str(step)).resolve()
    for item in ("params", "train", "ema", "extra"):
        if not (folder / item).exists():  # kept by some runs alone
            continue
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder / item).item_metadata.tree
            # To the host, for the processes and devices that saved it need not be here.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            how = ocp.args.PyTreeRestore(restore_args=as_numpy)
            tree = checkpointer.restore(folder / item, args=how)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def assert_same_state(first: Path, second: Path, step: int) -> None:
    """Assert that two runs have saved the same bits at a step."""
    one, two = saved_arrays(first, step), saved_arrays(second, step)
    assert one.keys() == two.keys()
    assert len(one) > 20
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert one[name].tobytes() == two[name].tobytes(), name


def write_photographs(folder: Path, count: int, seed: int = 0) -> None:
    """Write smooth colour images of several sizes and of the kinds that people's folders hold."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: a phone held upright
    for number in range(count):
        height, width = rng.integers(40, 90, size=2)
        coarse = rng.integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        name = folder / f"photo_{number:02d}"
        kinds = [
            (image, "jpg", {"quality": 95}),
            (image.convert("L"), "jpg", {}),
            (image.convert("CMYK"), "JPEG", {}),
            (image, "jpg", {"exif": rotated}),
            (image.convert("RGBA"), "png", {}),
            (image.convert("P"), "png", {}),
            (image, "webp", {}),
        ]
        picture, suffix, options = kinds[number % len(kinds)]
        picture.save(f"{name}.{suffix}", **options)
