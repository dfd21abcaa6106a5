"""Exceptions that a program says in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake in the configuration, the command line or the data that its message names.

    The message is one line: the field, what was expected and what came. `mae_jax.main` prints it
    and exits with status 2; all but this and `StopError` is a crash. It is a `ValueError`, so that
    users of the library can catch it without knowing this module.
    """


class StopError(RuntimeError):
    """What has kept a program from going on, such as a disk that is full; the message is one line.

    `mae_jax.main` prints it and exits with status 1.
    """
