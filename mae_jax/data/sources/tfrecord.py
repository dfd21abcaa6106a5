"""Records of TFRecord files in any order, without TensorFlow.

A file is a chain of records: the length (8 bytes, little-endian), a checksum of it (4 bytes), the
data, a checksum of them (4 bytes). Hopping from length to length finds where each begins. Checksums
are not looked at: a damaged length does not lead to the end of the file, damaged data do not parse
or are no image, and a flipped bit within an image passes, as it does in a folder of images.

Source: https://www.tensorflow.org/tutorials/load_data/tfrecord, "TFRecords format details".
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mae_jax.errors import ConfigError

BEFORE, AFTER = 12, 4  # bytes around the data
THREADS = 16  # that find records: on a network disk each hop is a wait


@dataclasses.dataclass(frozen=True)
class Part:
    """Records `skip` ... `skip + take - 1` of the `total` ones of a local file."""

    filename: str
    skip: int
    take: int
    total: int


class Records:
    """The records of some parts of files, one after the other. Picklable; many threads may read.

    Opening reads 8 bytes a record.

    Attributes:
      parts: where the records are.
      parse: bytes of a record -> what `records[i]` returns.
    """

    def __init__(self, parts: Sequence[Part], parse: Callable[[bytes], Any]):
        self.parts = [part for part in parts if part.take]
        self.parse = parse
        with ThreadPoolExecutor(THREADS) as pool:
            spans = list(pool.map(_spans, self.parts))
        self._spans = np.concatenate(spans) if spans else np.empty((0, 2), np.int64)
        self._file = np.repeat(np.arange(len(self.parts)), [len(rows) for rows in spans])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        """Read and parse one record.

        Raises:
          OSError: if it cannot be read, or is damaged so that it cannot be parsed.
        """
        filename = self.parts[self._file[index]].filename
        start, length = self._spans[index].tolist()
        with open(filename, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, start)
        try:
            return self.parse(data)
        except Exception as error:  # a damaged record raises nearly anything
            raise OSError(f"damaged at byte {start} of {filename}: {error}") from error


def _spans(part: Part) -> np.ndarray:
    """Return (start, length) in bytes of the data of each record of a part, int64 [take, 2]."""
    spans, place = [], 0
    try:
        with open(part.filename, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while place < size and len(header := os.pread(file.fileno(), 8, place)) == 8:
                (length,) = struct.unpack("<Q", header)
                spans.append((place + BEFORE, length))
                place += BEFORE + length + AFTER
    except OSError as error:
        raise ConfigError(
            f"data.path: expected a readable file, got {error.strerror} at {part.filename}"
        ) from error
    if place != size or len(spans) != part.total:
        raise ConfigError(
            f"data.path: expected {part.total} TFRecords that end at byte {size} of"
            f" {part.filename}, got {len(spans)} that end at {place}: it is damaged or no TFRecord"
        )
    return np.array(spans[part.skip : part.skip + part.take], np.int64)
