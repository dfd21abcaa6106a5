"""Records of array_record files, as TFDS and `mae_jax.tools.prepare_data` write them."""

from __future__ import annotations

from typing import Any


def read(records: Any, index: int) -> Any:
    """Return `records[index]` of a random-access data source over array_record files.

    Raises:
      OSError: if it is damaged or not there; array_record raises `RuntimeError` for either.
    """
    try:
        return records[index]
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())) from error
