"""What the command lines of all programs have in common: a typo is answered in one line, status 2.

Imports neither jax nor flax, so that the answer comes at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from mae_jax.config import suggestion
from mae_jax.errors import ConfigError, StopError

FAILED, USER_MISTAKE = 1, 2


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are `ConfigError`; it names the flag that may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse cannot take."""
        raise ConfigError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return the flags.

        Raises:
          ConfigError: if a flag is unknown, lacks its value or has one of the wrong type.
        """
        # Intermixed: words between the flags belong to a program's positional arguments.
        flags, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].partition("=")[0]
            raise ConfigError(f"{name}: there is no such flag" + suggestion(name, known))
        return flags


def exit_status(program: Callable[[], int]) -> int:
    """Run a program; returns its exit status.

    A mistake of the user becomes one line on stderr and 2, what keeps it from going on one and 1.
    """
    try:
        return program()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except StopError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return FAILED
