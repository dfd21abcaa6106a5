"""Files that are there in full or not at all, on disks and in buckets; pictures as files."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
from etils import epath
from PIL import Image

from mae_jax.errors import ConfigError, StopError

MILLISECONDS = 120  # of a frame of a film

# gcsfs and s3fs keep for ever what they have listed: what other hosts write later would not be
# seen, or read cut to its old length. Who has set this otherwise keeps that.
for _protocol in ("gcs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is of this machine's file system, and not of a bucket."""
    return "://" not in os.fspath(path)


def require_bucket(path: epath.PathLike, field: str) -> None:
    """Raise `ConfigError` unless a path is local, or its bucket is there and may be read."""
    if is_local(path):
        return
    scheme, _, rest = os.fspath(path).partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    try:
        files, name = fsspec.core.url_to_fs(bucket)
        files.info(name)
    except Exception as error:  # each storage has its own
        missing = isinstance(error, FileNotFoundError)  # it says no more than what was asked for
        reason = "" if missing else f": {error}".splitlines()[0]
        raise ConfigError(
            f"{field}: expected a bucket that is there and may be read, got {bucket}{reason}"
        ) from error


def errors_of(path: str | os.PathLike[str]) -> type[Exception]:
    """Return what reading and writing at a path may raise: each storage has errors of its own."""
    return OSError if is_local(path) else Exception


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what is said of a file that cannot be written into one line.

    Raises:
      StopError: for any of `errors_of`.
    """
    try:
        yield
    except errors_of(path) as error:
        raise StopError(f"{path} cannot be written: {words_of(error)}") from error


def words_of(error: Exception) -> str:
    """Return in one line what a file system or a storage says."""
    return (getattr(error, "strerror", None) or f"{error}" or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def needs_to_write(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what is said of a work folder that cannot be written to into one line.

    Raises:
      ConfigError: for any of `errors_of` that is not in one line already.
    """
    try:
        yield
    except (ConfigError, StopError):
        raise
    except errors_of(workdir) as error:
        raise ConfigError(
            f"--workdir={workdir}: expected a folder to write to, got: {words_of(error)}"
        ) from error


def write_text(path: epath.Path, text: str, *, beside: str = "new") -> None:
    """Make or replace a file, which others see in full or not at all.

    Args:
      path: in a folder that is there.
      text: what is to be in it.
      beside: suffix of the name that is written to before it is renamed; an object of a bucket is
        there in full by itself, and a rename would copy it.
    """
    if not is_local(path):
        path.write_text(text)
        return
    temporary = path.with_name(f"{path.name}.{beside}")
    temporary.write_text(text)
    temporary.replace(path)


def create_text(path: epath.Path, text: str) -> bool:
    """Make a file if there is none: of several processes that try, one succeeds.

    Returns:
      Whether this one has.
    """
    try:
        if is_local(path):
            with Path(path).open("x") as file:
                file.write(text)
        else:
            files, name = fsspec.core.url_to_fs(os.fspath(path))
            files.pipe_file(name, text.encode(), mode="create")
    except FileExistsError:
        return False
    return True


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
        raise ConfigError(f"{field}: cannot write {path}: {words_of(error)}") from error


@contextlib.contextmanager
def written_locally(path: epath.Path) -> Iterator[str]:
    """Yield a local path to write a file to, for libraries that know no buckets; it is `path`'s."""
    if is_local(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = epath.Path(folder) / path.name
        yield os.fspath(local)
        local.copy(path, overwrite=True)


@contextlib.contextmanager
def read_locally(path: epath.Path) -> Iterator[str]:
    """Yield a local path to read the file `path` from, a copy if that is in a bucket."""
    if is_local(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield os.fspath(path.copy(epath.Path(folder) / path.name))


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)
