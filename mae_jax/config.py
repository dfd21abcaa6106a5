"""Finding, loading, overriding, checking and comparing configurations. Imports no jax."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.errors import ConfigError

# Tasks that measure a checkpoint and train nothing.
MEASUREMENTS = ("knn", "few_shot", "evaluate", "robustness")

PACKAGE = Path(__file__).resolve().parent
LONGEST_SHOWN = 80  # characters of a value in a message


def config_folders() -> list[Path]:
    """Return where names of configs are looked up: the clone's folder, then the installed copy."""
    clone = [PACKAGE.parent / "configs"] if (PACKAGE.parent / "setup.py").is_file() else []
    return [*clone, PACKAGE / "configs"]


def known_configs() -> list[str]:
    """Return the names that `--config` knows."""
    return sorted(
        {
            path.stem
            for folder in config_folders()
            for path in folder.glob("*.py")
            if path.stem != "__init__"
        }
    )


def find_config(name: str) -> Path:
    """Return the file of a config given as a path or a name.

    Raises:
      ConfigError: if there is none.
    """
    # `configs/demo.py` means the same as `demo`, wherever the command is given.
    stem = name.removeprefix("configs/").removesuffix(".py")
    candidates = [Path(name).expanduser(), *(f / f"{stem}.py" for f in config_folders())]
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigError(
        f"--config={name}: no such file, nor one of {', '.join(known_configs())}"
        + suggestion(name, known_configs())
    )


def load_config(name: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Return a config with overrides applied, locked.

    Args:
      name: `NAME_OR_PATH[:variant]`.
      overrides: dotted field -> text from the command line.

    Raises:
      ConfigError: if the file is missing or not a config, the variant or a field unknown, or a
        value of the wrong type.
    """
    location, _, variant = name.partition(":")
    path = find_config(location)
    spec = importlib.util.spec_from_file_location(f"mae_jax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={location}: {path.name} has no function get_config")
    takes_variant = bool(inspect.signature(module.get_config).parameters)
    if variant and not takes_variant:
        raise ConfigError(f"--config={name}: {path.stem} has no variants, got {variant!r}")
    try:
        config = module.get_config(variant) if takes_variant else module.get_config()
    except ValueError as error:
        raise ConfigError(f"--config={name}: {error}") from error
    for field, text in (overrides or {}).items():
        override(config, field, text)
    config.lock()
    return config


def override(config: ConfigDict, field: str, text: str) -> None:
    """Set a dotted field from the text of a command line, with the type it has.

    A single value for a field that holds several, all alike, stands for all of them.

    Raises:
      ConfigError: if the field is unknown or the text is not a value of its type.
    """
    if field == "task":
        raise ConfigError(
            f"--config.task={text}: a config is for one task, here {config.task!r}; take another"
            f" --config: {', '.join(known_configs())}"
        )
    *parents, last = field.split(".")
    node: Any = config
    for name in [*parents, last]:
        if not isinstance(node, ConfigDict) or name not in node:
            raise ConfigError(
                f"--config.{field}: there is no such field" + suggestion(field, flatten(config))
            )
        parent, node = node, node[name]
    if isinstance(node, ConfigDict):
        raise ConfigError(f"--config.{field}: a group of fields ({', '.join(node)}), not a field")
    kind = parent.get_type(last)
    parent[last] = _parse(field, text, node, kind)


def _parse(field: str, text: str, current: Any, kind: type) -> Any:
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if kind is tuple and current is None:  # has no value yet: depths, whole numbers
        current = (0,)
    if kind is tuple and isinstance(value, str) and (not current or isinstance(current[0], str)):
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    if kind is tuple and not isinstance(value, (tuple, list)):
        value = (value,) * max(1, len(current))
    if kind is tuple:
        parts = [_cast(part, type(current[0]) if current else type(part)) for part in value]
        if None not in parts:
            return tuple(parts)
    else:
        cast = _cast(value, kind)
        if cast is not None:
            return cast
    expected = f"{len(current)} x {type(current[0]).__name__}" if kind is tuple else kind.__name__
    raise ConfigError(f"--config.{field}={text}: expected {expected}, got {text!r}")


def _cast(value: Any, kind: type) -> Any:
    """Return the value as `kind`, None if it is none; an int is a float, a bool is no int."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    return None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known name, or nothing."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # the right field in the wrong group
        by_last = {full.rsplit(".", 1)[-1]: full for full in known}
        last = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.6)
        close = [by_last[match] for match in last]
    return f"; did you mean {close[0]}?" if close else ""


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted field -> value, with tuples as lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_json(config: ConfigDict) -> str:
    """Return the configuration as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def refuse_changes(
    stored: Mapping[str, Any], config: ConfigDict, allowed: Iterable[str], where: str
) -> None:
    """Compare a configuration with the one a folder was made with.

    What is under `run` (how often to log, how many workers) may change; a field in `allowed` may,
    or a group named there.

    Raises:
      ConfigError: if another field differs; names the first and both values.
    """
    before, now = flatten(stored), flatten(config)
    free = ("run", *allowed)
    for field in allowed:
        if not any(name == field or name.startswith(f"{field}.") for name in before | now):
            raise ConfigError(
                f"--allow_change={field}: there is no such field" + suggestion(field, now)
            )
    for name in sorted(before | now):
        if before.get(name) == now.get(name):
            continue
        if any(name == field or name.startswith(f"{field}.") for field in free):
            continue
        raise ConfigError(
            f"{name} is {_shown(now.get(name))}, but {where} was made with"
            f" {_shown(before.get(name))}:"
            f" take another --workdir, or allow it with --allow_change={name}"
        )


def _shown(value: Any) -> str:
    """Return a value for a message; of a long one, a vocabulary, the beginning."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
