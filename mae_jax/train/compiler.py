"""How programs are compiled, and where they are kept."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from mae_jax.errors import ConfigError
from mae_jax.train import sharding

OPTIONS: dict[str, dict[str, Any]] = {
    # In the order that XLA chooses by itself, made for cores that have nothing to do, a step needs
    # a quarter more temporary memory, and 2 to 9 % more time; see docs/benchmarks.md.
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
}
"""What XLA is told, by platform; `XLA_FLAGS` in the environment says the rest."""


def lower_step(step: Callable[..., Any], target: Any, batch: Any) -> jax.stages.Lowered:
    """Trace a training step that leaves state and batch where they are, and the state donated.

    Args:
      step: (state, batch, whole=...) -> (state, metrics), as `train_step`.
      target: the state, of `jax.ShapeDtypeStruct` leaves with shardings.
      batch: likewise.
    """
    placed = sharding.shardings_of(target)
    jitted = jax.jit(
        functools.partial(step, whole=functools.partial(sharding.whole, shardings=placed.params)),
        in_shardings=(placed, sharding.shardings_of(batch)),
        out_shardings=(placed, sharding.replicated(placed.step.mesh)),
        donate_argnums=0,
    )
    return jitted.lower(target, batch)


def compile_step(
    lowered: jax.stages.Lowered, platform: str, *, remat: bool = False
) -> jax.stages.Compiled:
    """Compile a training step.

    Args:
      lowered: the step.
      platform: `cpu`, `gpu` or `tpu`, whose `OPTIONS` it is compiled with.
      remat: whether it makes activations again. It is compiled without options then: the order
        that is good for any other step calls for them all at once.
    """
    options = None if remat else OPTIONS.get(platform)
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        # Options come and go with versions of XLA, and none is worth a run that does not start.
        if options is None or not any(name in str(error) for name in options):
            raise
    return lowered.compile()


def keep_programs(setting: str) -> str:
    """Have jax keep what it compiles, so that a run that starts again need not compile again.

    Args:
      setting: a folder; "auto": that of the environment variable `JAX_COMPILATION_CACHE_DIR`, or
        else `mae_jax` in the user's cache; "": none.

    Returns:
      The folder, or "".

    Raises:
      ConfigError: if it cannot be made; a folder of "auto" is left out silently then.
    """
    if not setting:
        jax.config.update("jax_enable_compilation_cache", False)
    if not _setting("jax_enable_compilation_cache"):
        return ""
    given = _setting("jax_compilation_cache_dir")
    if setting == "auto" and given:
        return str(given)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = epath.Path(f"{base}/mae_jax/compiled" if setting == "auto" else setting).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if setting == "auto":
            return ""
        raise ConfigError(
            f"run.compilation_cache {setting}: expected a folder, got {error.strerror}"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return str(folder)


def _setting(name: str) -> Any:
    """Return a setting of jax."""
    return getattr(jax.config, name)
