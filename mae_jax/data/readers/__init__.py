"""What makes the arrays of an example out of what a source gives: one module a kind of data.

`data.reader` in a configuration names a module of this package (`images` where there is no such
field), or, when it holds a dot, any importable module of the user's. It has `training(config) ->
Reader` and `evaluation(data, given=None) -> Reader`, where `data` is `config.data`
and `given` a `crop_fraction` in place of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import ConfigError
from mae_jax.lookup import find_module


class Reader(Protocol):
    """Decodes, crops, tokenises ...; picklable, without state.

    Attributes:
      field: the name in an example of what it decodes, "image" or "video".
      views: V, rows of a batch that an example becomes. Where it is not 1, `image` has V in front.
    """

    @property
    def field(self) -> str:
        """The name in an example of what is decoded."""
        ...

    @property
    def views(self) -> int:
        """Rows of a batch that an example becomes."""
        ...

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator, *, exif: bool = False
    ) -> dict[str, np.ndarray]:
        """Return the arrays of an example, those of all examples of one shape: `image` uint8, ...

        Args:
          example: what a source gives.
          rng: of everything that is random.
          exif: apply the rotation that EXIF data ask for; see `Source`.

        Raises:
          BadExample, OSError: if the example cannot be used; the loader then takes the next one.
          ConfigError: if no example could be.
        """
        ...


def find_reader(data: ConfigDict) -> ModuleType:
    """Return the module that `data.reader` names.

    Raises:
      ConfigError: if there is none.
    """
    functions = "training", "evaluation"
    return find_module("data.reader", data.get("reader", "images"), __name__, functions)


def check_counts(data: ConfigDict, *names: str) -> None:
    """Refuse fields of `data` that are to count something and do not.

    Raises:
      ConfigError: names the first that is below 1.
    """
    for name in names:
        if data[name] < 1:
            raise ConfigError(f"data.{name}: expected at least 1, got {data[name]}")
