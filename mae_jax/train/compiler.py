"""Where compiled programs are kept."""

from __future__ import annotations

import os
from typing import Any

import jax
from etils import epath

from mae_jax.errors import ConfigError


def keep_programs(setting: str) -> str:
    """Have jax keep what it compiles, so that a run that starts again need not compile again.

    Args:
      setting: a folder; "auto": that of the environment variable `JAX_COMPILATION_CACHE_DIR`, or
        else `mae_jax` in the user's cache; "": none.

    Returns:
      The folder, or "".

    Raises:
      ConfigError: if it cannot be written to; a folder of "auto" is left out silently then.
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
