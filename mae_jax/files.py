"""Files and folders that are there in full or not at all, and pictures as files."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image

from mae_jax.errors import ConfigError

MILLISECONDS = 120  # of a frame of a film


def encode_picture(picture: np.ndarray) -> tuple[bytes, str]:
    """Return a picture uint8 [H, W, 3] as PNG, or a film [F, H, W, 3] as GIF, and the suffix."""
    encoded = io.BytesIO()
    if picture.ndim == 3:
        Image.fromarray(picture).save(encoded, "PNG")
        return encoded.getvalue(), ".png"
    first, *others = (Image.fromarray(frame) for frame in picture)
    first.save(encoded, "GIF", save_all=True, append_images=others, duration=MILLISECONDS, loop=0)
    return encoded.getvalue(), ".gif"


def refuse_existing(path: epath.Path, field: str) -> None:
    """Raise `ConfigError` if there is something at `path`, a broken link included."""
    if path.exists() or os.path.lexists(path):
        raise ConfigError(f"{field}: {path} is there already; expected the name of something new")


@contextlib.contextmanager
def completed(
    path: epath.Path, *, field: str = "--out", replace: bool = True
) -> Iterator[epath.Path]:
    """Yield a name beside `path` to write to, a file or a folder; it becomes `path` at the end.

    If anything is raised it is removed instead. Folders that are missing are made. A process that
    is killed leaves what has that name, and the next one removes it.

    Args:
      path: what is to be there.
      field: for messages.
      replace: whether a file that is there may be replaced.

    Raises:
      ConfigError: if it cannot be written, or is there and may not be replaced.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        if not replace:
            refuse_existing(path, field)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        try:
            yield temporary
            if not replace:
                refuse_existing(path, field)
            temporary.replace(path)
        except BaseException:
            _remove(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"{field}: cannot write {path}: {error.strerror or error}") from error


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)
