"""Files of array_record: what cannot be written is an `OSError`, as of any other file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from array_record.python.array_record_module import ArrayRecordWriter


@contextlib.contextmanager
def writing(path: str, options: str) -> Iterator[ArrayRecordWriter]:
    """Yield a writer of a local file, which is whole at the end.

    Raises:
      OSError: where array_record raises a RuntimeError, of a full disk for one.
    """
    try:
        writer = ArrayRecordWriter(path, options)
        yield writer
        writer.close()
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())) from error
