"""Finding the module that a name in a configuration stands for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

from mae_jax.errors import ConfigError


def find_module(
    field: str, name: str, package: str, functions: Sequence[str] = ("make",)
) -> ModuleType:
    """Return the module `name` of `package`, or, when `name` holds a dot, that module of anybody's.

    Args:
      field: of the configuration, for the message.
      name: what it says.
      package: dotted name of the package that short names are looked up in.
      functions: that the module is to have.

    Raises:
      ConfigError: if there is no such module, or it lacks a function.
    """
    known = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))
    module_name = name if "." in name else f"{package}.{name}"
    try:
        if name not in known and ("." not in name or name.startswith(".")):
            raise ModuleNotFoundError(name=module_name)
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        raise ConfigError(
            f"{field}: expected {', '.join(known)} or the dotted name of a module, got {name!r}"
        ) from None
    for function in functions:
        if not hasattr(module, function):
            raise ConfigError(f"{field}: the module {module_name} has no function {function}")
    return module
