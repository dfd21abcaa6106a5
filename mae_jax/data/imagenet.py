"""The classes of ImageNet (ILSVRC-2012) by WordNet id, and those that ImageNet-A and -R have.

A classifier's output k is class k of the 1,000 ids in sorted order, which is the order of class
folders, of TFDS and of the official weights. ImageNet-A and ImageNet-R have 200 of the classes
each, not the same 200; they are scored by the arg-max over these columns of the output.

Sources of the lists: the 1,000 ids are the labels of `imagenet2012` in tensorflow-datasets
(Apache-2.0); those of A (arXiv 1907.07174) and R (arXiv 2006.16241) are lists of timm (Apache-2.0),
equal to those in the authors' evaluation programs (hendrycks/natural-adv-examples,
hendrycks/imagenet-r).
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence

import numpy as np

from mae_jax.errors import ConfigError

FILES = {"imagenet2012": "imagenet_1k", "imagenet_a": "imagenet_a", "imagenet_r": "imagenet_r"}


def wnids() -> tuple[str, ...]:
    """Return the 1,000 WordNet ids of ILSVRC-2012 in the order of their labels, which is sorted."""
    return wnids_of("imagenet2012")


@functools.cache
def wnids_of(name: str) -> tuple[str, ...]:
    """Return the WordNet ids of the classes of a set, sorted.

    Args:
      name: "imagenet2012" (1,000 of them), "imagenet_a" (200) or "imagenet_r" (200).

    Raises:
      ConfigError: if it is another one.
    """
    if name not in FILES:
        raise ConfigError(f"classes of ImageNet: expected {', '.join(FILES)}, got {name!r}")
    file = importlib.resources.files("mae_jax.data") / f"{FILES[name]}.txt"
    return tuple(file.read_text(encoding="ascii").split())


def columns(names: Sequence[str], *, field: str = "data.path") -> np.ndarray:
    """Return the label among ImageNet's 1,000 of each class, int32 [N].

    Args:
      names: WordNet ids, such as the names of class folders.
      field: of the configuration, for messages.

    Raises:
      ConfigError: naming the first that is no class of ImageNet.
    """
    label_of = {name: label for label, name in enumerate(wnids())}
    for name in names:
        if name not in label_of:
            raise ConfigError(
                f"{field}: expected classes named by WordNet ids of ImageNet, such as n01440764,"
                f" got {name!r}"
            )
    return np.array([label_of[name] for name in names], np.int32)
