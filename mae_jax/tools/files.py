"""Files that are there in full or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from etils import epath

from mae_jax.errors import ConfigError


@contextlib.contextmanager
def completed(path: epath.Path) -> Iterator[epath.Path]:
    """Yield a name beside `path` to be written to; it becomes `path` unless something is raised.

    Folders that are missing are made. A process that is killed leaves the file of that name, and
    the next one writes over it.

    Raises:
      ConfigError: if it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"--out: cannot write {path}: {error.strerror or error}") from error
