"""Where examples come from: one module a source, each with `make(split, **fields) -> Source`.

`data.source` in a configuration names a module of this package, or, when it holds a dot, any
importable module of the user's that has such a `make`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import ConfigError
from mae_jax.lookup import find_module

EVAL_SPLITS = ("val", "validation", "test")
THREADS = 16  # that read examples for their labels
ALLOWED_BAD = 10  # in any case: a share says little about a few images


class Source(Protocol):
    """Examples that can be read in any order. Picklable; `__getitem__` is called by many threads.

    A source may have more: `labels`, the label of each example (see `labels_of`), `classes`, the
    names of the classes (see `class_names`), and, where examples have captions, a function
    `captions`, which iterates over all of them without reading images.

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

        And what a reader of its kind takes more: `caption`, a text or several, for one.

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


def open_split(data: ConfigDict, split: str) -> Source:
    """Return a split of the source that `config.data` names, opened with its `source_fields`.

    Raises:
      ConfigError: as `open_source` does.
    """
    return open_source(data.source, split, **source_fields(data))


def source_fields(data: ConfigDict) -> dict[str, Any]:
    """Return what the `make` of the source of `data` gets beside the split.

    It is `path`, `held_out` (None, which stands for the source's own, is left out) and those
    fields of `data` that it names among its arguments.

    Raises:
      ConfigError: if the source is unknown.
    """
    make = find_module("data.source", data.source, __name__).make
    named = inspect.signature(make).parameters.keys() - {"split"}
    fields = {name: data[name] for name in sorted(named | {"path", "held_out"}) if name in data}
    if fields.get("held_out", 0) is None:
        del fields["held_out"]
    return fields


def other_data(data: ConfigDict, given: Mapping[str, Any]) -> ConfigDict:
    """Return `data` of a checkpoint's configuration with other examples in place of its own.

    With another source, nothing of `data` that says where examples are is kept, and `held_out` is
    that source's own (None) unless given.

    Args:
      data: says how examples are read, too.
      given: values for `source`, `path`, `split`, `eval_split` and `held_out`; None: none.
    """
    fields = data.to_dict()
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("source", data.source) != data.source:
        fields |= {"path": "", "split": "train", "eval_split": "validation", "held_out": None}
    return ConfigDict(fields | given)


def labels_of(source: Source) -> np.ndarray:
    """Return the labels, int32 [N], -1 for none.

    They are the source's `labels`. A source without that attribute is read as a whole, for
    ImageNet some minutes; an example that cannot be read has the label -1.
    """
    labels = getattr(source, "labels", None)
    if labels is None:

        def read(index: int) -> int:
            try:
                return source[index]["label"]
            except OSError:
                return -1

        with ThreadPoolExecutor(THREADS) as pool:
            labels = list(pool.map(read, range(len(source))))
    return np.asarray(labels, np.int32)


def allowed_bad(share: float, examples: int) -> int:
    """Return how many of some examples may be bad: a share, or `ALLOWED_BAD` if that is more."""
    return max(ALLOWED_BAD, int(share * examples))


def class_names(source: Source) -> tuple[str, ...]:
    """Return the names of the classes in the order of their labels; empty if they have none."""
    return tuple(getattr(source, "classes", ()))


def refuse_other_data(name: str, path: str, held_out: float, fixed: float) -> None:
    """Refuse fields that have no meaning for packaged data, whose split is fixed.

    Args:
      name: of the source.
      path: `data.path`.
      held_out: `data.held_out`.
      fixed: the share that is held out.

    Raises:
      ConfigError: if there is a path, or another share.
    """
    if path:
        raise ConfigError(f"data.path: expected '' with data.source={name}, got {path!r}")
    if held_out != fixed:
        raise ConfigError(
            f"data.held_out: expected {fixed} with data.source={name}, whose split is fixed, "
            f"got {held_out}"
        )


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


def held_out_split(split: str, exists: Callable[[str], bool]) -> str | None:
    """Return the one of `EVAL_SPLITS` that stands for `split`, for sources that may have several.

    Args:
      split: if it is one of them and exists, it is the one; else the first that exists is.
      exists: whether the data have a split of that name.

    Returns:
      None if the data have none of them.
    """
    names = (split, *EVAL_SPLITS) if split in EVAL_SPLITS else EVAL_SPLITS
    return next(filter(exists, names), None)
