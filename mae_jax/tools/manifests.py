"""A folder of files that one command fills in several goes: it says whose they are."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from mae_jax import config as configs
from mae_jax.errors import ConfigError
from mae_jax.files import completed


def claim(path: epath.Path, manifest: dict[str, Any], *, files: str, field: str) -> None:
    """Write a manifest into a folder, or compare it with the one that is there.

    Args:
      path: of the manifest.
      manifest: what the files depend on: dictionaries of what JSON holds.
      files: pattern of the names of the files that it stands for.
      field: of the command line that names the folder, for messages.

    Raises:
      ConfigError: if the folder's files are something else; names the first difference.
    """
    text = json.dumps(manifest, indent=2) + "\n"
    if not path.exists():
        if stray := sorted(path.parent.glob(files)):
            raise ConfigError(f"{field}={path.parent}: has {stray[0].name}, but no {path.name}")
        with completed(path, field=field) as temporary:
            temporary.write_text(text)
        return
    try:
        before = configs.flatten(json.loads(path.read_text()))
    except (ValueError, AttributeError):
        raise ConfigError(f"{field}: {path} is no manifest of {path.stem}") from None
    now = configs.flatten(json.loads(text))
    for name in now | before:
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{field}={path.parent}: made with {name} {before.get(name)!r}, not"
                f" {now.get(name)!r}: take another folder"
            )
