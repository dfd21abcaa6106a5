"""Where examples come from: one module a source, each with `make(split, **fields) -> Source`.

`data.source` in a configuration names a module of this package, or, when it holds a dot, any
importable module of the user's that has such a `make`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

from mae_jax.errors import ConfigError


class Source(Protocol):
    """Examples that can be read in any order. Picklable; `__getitem__` is called by many threads.

    Attributes:
      num_classes: number of classes; 0 if the examples have no labels.
      exif: whether an EXIF rotation in encoded images is to be applied.
    """

    num_classes: int
    exif: bool

    def __len__(self) -> int:
        """Return the number of examples, at least 1."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image`, encoded bytes or uint8 [H, W, C], and `label`, an int (-1: none).

        Raises:
          OSError: if the example cannot be read; the loader then takes the next one.
        """
        ...

    def describe(self, index: int) -> str:
        """Name the example (a path, say) for messages."""
        ...

    def fingerprint(self) -> str:
        """Return a short hexadecimal digest by which another set of examples is noticed."""
        ...


def open_source(name: str, split: str, **fields: Any) -> Source:
    """Open the split `train` or `val` of the source `name`.

    Args:
      name: a module of this package, or a dotted module name.
      split: "train" or "val".
      **fields: what the source's `make` takes, `path` and `held_out` for example.

    Raises:
      ConfigError: if the source or the split is unknown, or the source refuses its fields.
    """
    if split not in ("train", "val"):
        raise ConfigError(f"split: expected train or val, got {split!r}")
    module_name = name if "." in name else f"{__name__}.{name}"
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    try:
        if name not in known and ("." not in name or name.startswith(".")):
            raise ModuleNotFoundError(name=module_name)
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        raise ConfigError(
            f"data.source: expected {', '.join(known)} or the dotted name of a module, got {name!r}"
        ) from None
    return module.make(split, **fields)
