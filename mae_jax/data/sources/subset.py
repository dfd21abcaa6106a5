"""Some examples of a source. Made from another source, not named in a configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mae_jax.data.sources import Source, class_names, labels_of


class Subset:
    """The examples `indices` of `source`, in this order. Has labels and names if `source` has.

    Attributes:
      source: where they are read.
      indices: int64 [N].
    """

    labels: np.ndarray  # int32 [N]; not there if `source` has none at hand

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        """Choose examples.

        Raises:
          ValueError: if there is no index, or one is out of range.
        """
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        if not len(self.indices) or not 0 <= self.indices.min() <= self.indices.max() < len(source):
            raise ValueError(f"expected indices in 0 ... {len(source) - 1}, got {self.indices}")
        self.num_classes = source.num_classes
        self.exif = source.exif
        self.classes = class_names(source)
        if hasattr(source, "labels"):
            self.labels = labels_of(source)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> str:
        """Name the example as its source does."""
        return self.source.describe(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Digest the source's fingerprint and the indices."""
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=8)
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


class Relabelled:
    """The examples of `source` with other labels. Made from another source, as `Subset` is.

    Attributes:
      source: where they are read.
      table: int32, the new label of each old one, -1 for none.
      classes: names of the new classes.
    """

    def __init__(self, source: Source, table: Sequence[int] | np.ndarray, classes: Sequence[str]):
        self.source = source
        self.table = np.asarray(table, np.int32)
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)
        self.exif = source.exif

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        label = int(example["label"])
        return {**example, "label": int(self.table[label]) if label >= 0 else -1}

    def describe(self, index: int) -> str:
        """Name the example as its source does."""
        return self.source.describe(index)

    def fingerprint(self) -> str:
        """Digest the source's fingerprint and the table."""
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=8)
        digest.update(self.table.astype("<i4").tobytes())
        return digest.hexdigest()
