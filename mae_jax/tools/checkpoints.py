"""What is in a folder of checkpoints, and whether it still is what was saved.

    python -m mae_jax.tools.checkpoints ls runs/demo
    python -m mae_jax.tools.checkpoints verify runs/demo --step=1860

Exit status: 0 all good; 1 `verify` has found damage; 2 a mistake in the command. Flags are parsed
here, without jax or flax, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status

ACTIONS = ("ls", "verify")


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m mae_jax.tools.checkpoints",
        description="List the checkpoints of a run, or read them in full and compare every array"
        " with the checksum that was saved with it. Nothing is changed.",
        epilog="Exit status: 0 all good; 1 verify has found damage; 2 a mistake in the command.",
        allow_abbrev=False,
    )
    # Not required by argparse, which would say so before it names a flag that is misspelt.
    parser.add_argument("action", choices=ACTIONS, nargs="?", help="what to do")
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        help="a work folder, its checkpoints, or its best; a bucket too",
    )
    parser.add_argument("--step", type=int, metavar="N", help="verify this step alone")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags.

    Raises:
      ConfigError: if a flag is unknown, or an argument is missing or has a value that cannot be.
    """
    flags = make_parser().parse(argv)
    if not flags.directory:
        raise ConfigError(
            f"expected {' or '.join(ACTIONS)} and DIR, got {' '.join(argv) or 'none'}"
        )
    if flags.action == "ls" and flags.step is not None:
        raise ConfigError(f"--step={flags.step}: ls lists all steps")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags = parse(argv)
        from mae_jax.tools import saved_steps  # imports jax

        if flags.action == "ls":
            return saved_steps.list_steps(flags.directory)
        return saved_steps.verify(flags.directory, flags.step)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
