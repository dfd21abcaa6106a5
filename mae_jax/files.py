"""Files and folders that are there in full or not at all, and pictures as files."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import uuid
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
    path: epath.Path,
    *,
    field: str = "--out",
    replace: bool = True,
    scratch: epath.Path | None = None,
) -> Iterator[epath.Path]:
    """Yield a name beside `path` to write to, a file or a folder; it becomes `path` at the end.

    If anything is raised it is removed instead. Folders that are missing are made. A process that
    is killed leaves what has that name, and the next one removes it.

    Args:
      path: what is to be there.
      field: for messages.
      replace: whether a file that is there may be replaced.
      scratch: folder on the same disk in which to write under a name that nobody else has, so that
        several machines may write the same file at once; whoever gave it removes it.

    Raises:
      ConfigError: if it cannot be written, or is there and may not be replaced.
    """
    if scratch is None:
        temporary = path.with_name(f"{path.name}.tmp")
    else:
        temporary = scratch / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        if not replace:
            refuse_existing(path, field)
        for folder in {path.parent, temporary.parent}:
            folder.mkdir(parents=True, exist_ok=True)
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


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is one of a bucket, as gs://NAME/..."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def written_locally(path: epath.Path) -> Iterator[str]:
    """Yield a local path to write a file to, for libraries that know no buckets; it is `path`'s."""
    if not is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = epath.Path(folder) / path.name
        yield os.fspath(local)
        local.copy(path, overwrite=True)


@contextlib.contextmanager
def read_locally(path: epath.Path) -> Iterator[str]:
    """Yield a local path to read the file `path` from, a copy if that is in a bucket."""
    if not is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield os.fspath(path.copy(epath.Path(folder) / path.name))


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)
