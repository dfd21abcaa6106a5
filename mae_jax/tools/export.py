"""A trained model as one file that needs nothing of ours: a program, or named arrays.

    python -m mae_jax.tools.export --checkpoint=runs/demo --out=encoder.stablehlo
    python -m mae_jax.tools.export --checkpoint=runs/demo --out=encoder.safetensors

Flags are parsed here, without jax or flax, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status
from mae_jax.tools.extract_features import POOLS

SUFFIXES = (".stablehlo", ".safetensors")


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m mae_jax.tools.export",
        description="Write a model as a program from images to features, which jax alone runs"
        " (.stablehlo), or its parameters as named arrays (.safetensors).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="a work folder, or one step's folder in it"
    )
    parser.add_argument(
        "--out", metavar="FILE", help=f"a name that ends in {' or '.join(SUFFIXES)}"
    )
    parser.add_argument(
        "--pool",
        choices=POOLS,
        help="what the program returns, default: mean of the patch tokens; of a classifier, logits",
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags.

    Raises:
      ConfigError: if a flag is unknown, missing, or has a value that cannot be.
    """
    flags = make_parser().parse(argv)
    if not flags.checkpoint:
        raise ConfigError("--checkpoint: expected a folder, got nothing")
    suffix = os.path.splitext(flags.out or "")[1]
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"--out={flags.out or ''}: expected a name that ends in {' or '.join(SUFFIXES)}"
        )
    if flags.pool and suffix == ".safetensors":
        raise ConfigError(f"--pool={flags.pool}: a .safetensors file holds parameters, no program")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags = parse(argv)
        from mae_jax.tools import portable  # imports jax

        portable.write(flags)
        return 0

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
