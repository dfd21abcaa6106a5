"""Where examples come from: one module a source, each with `make(split, **fields) -> Source`.

`data.source` in a configuration names a module of this package, or, when it holds a dot, any
importable module of the user's that has such a `make`.
"""

from __future__ import annotations

from typing import Any, Protocol

from mae_jax.errors import ConfigError
from mae_jax.lookup import find_module

EVAL_SPLITS = ("val", "validation", "test")


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
    """Open a split of the source `name`.

    Args:
      name: a module of this package, or a dotted module name.
      split: as the source names its splits; see `is_training` for those of two splits.
      **fields: what the source's `make` takes, `path` and `held_out` for example.

    Raises:
      ConfigError: if the source or the split is unknown, or the source refuses its fields.
    """
    return find_module("data.source", name, __name__).make(split, **fields)


def is_training(split: str) -> bool:
    """Return whether `split` is the training one, for sources that have two.

    Raises:
      ConfigError: if it is neither "train" nor one of `EVAL_SPLITS`.
    """
    if split != "train" and split not in EVAL_SPLITS:
        raise ConfigError(
            f"data.split, data.eval_split: expected train, {', '.join(EVAL_SPLITS)}, got {split!r}"
        )
    return split == "train"
