"""Texts without an image: the lines of a file, read one by one."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from etils import epath

from mae_jax.errors import ConfigError
from mae_jax.files import words_of


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """The lines of a UTF-8 file that are not blank. Picklable: holds where they are, not what.

    Attributes:
      path: of the file.
      spans: int64 [N, 2], the first byte of each line and the one after its last.
    """

    path: str
    spans: np.ndarray

    def __len__(self) -> int:
        """Return N."""
        return len(self.spans)

    def fingerprint(self) -> str:
        """Digest where the lines are, and so how many and how long, not what they say."""
        return hashlib.blake2b(self.spans.astype("<i8").tobytes(), digest_size=8).hexdigest()

    def __getitem__(self, index: int) -> str:
        """Return a line; bytes that are no UTF-8 become question marks in a diamond.

        Raises:
          OSError: if the file is gone.
        """
        start, stop = self.spans[index].tolist()
        with epath.Path(self.path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start).decode(errors="replace").strip()


def open_lines(name: str, field: str) -> Lines:
    """Find the lines of a file.

    Args:
      name: of the file.
      field: of the configuration, for the message.

    Raises:
      ConfigError: if it cannot be read, or has no line that is not blank.
    """
    path = epath.Path(name).expanduser()
    spans, start = [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    spans.append((start, start + len(line)))
                start += len(line)
    except OSError as error:
        raise ConfigError(
            f"{field}: expected a file with a text on each line, got {words_of(error)} at {path}"
        ) from error
    if not spans:
        raise ConfigError(f"{field}: expected a file with a text on each line, got none in {path}")
    return Lines(str(path), np.array(spans, np.int64))
