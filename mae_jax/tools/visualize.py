"""What a trained model makes of your own photographs: a picture for each mask you ask for.

    python -m mae_jax.tools.visualize --checkpoint=runs/demo --images=FOLDER --mask_ratio=0.5,0.75

Flags are parsed here, without jax or flax, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a parser of one or more values separated by commas."""

    def parse_values(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected {kind.__name__}, or several with commas between, got {text!r}"
            ) from None

    return parse_values


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m mae_jax.tools.visualize",
        description="Draw what a model makes of images of any size and kind. Several ratios, masks"
        " or seeds stand side by side in one picture.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="a work folder, or one step's folder in it"
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="FILES_OR_FOLDER",
        help="files, with commas between, or a folder; may be repeated, more files may follow",
    )
    parser.add_argument("more", nargs="*", metavar="FILE", help="as --images")
    parser.add_argument(
        "--mask_ratio", type=several(float), metavar="RATIO,...", help="default: that of training"
    )
    parser.add_argument(
        "--mask",
        type=several(str),
        metavar="MASK,...",
        help="a sampling (random, block, grid; tube, frame of clips), or a file: an image whose"
        " white hides, or .npy with 1 = hidden; default: as in training",
    )
    parser.add_argument("--seed", type=several(int), default=[0], metavar="N,...", help="default 0")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="images, default 8")
    parser.add_argument(
        "--out", default="visualize.png", metavar="FILE.png", help="default: visualize.png here"
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags.

    Raises:
      ConfigError: if a flag is unknown, missing, or has a value that cannot be.
    """
    flags = make_parser().parse(argv)
    flags.images += flags.more
    for name in ("checkpoint", "images"):
        if not getattr(flags, name):
            raise ConfigError(
                f"--{name}: expected a folder{' or files' * (name == 'images')}, got nothing"
            )
    if flags.limit < 1:
        raise ConfigError(f"--limit={flags.limit}: expected at least 1")
    if not all(0 <= seed < 2**32 for seed in flags.seed):
        raise ConfigError(f"--seed: expected numbers from 0 to 2**32 - 1, got {flags.seed}")
    if not flags.out.lower().endswith(".png"):
        raise ConfigError(f"--out={flags.out}: expected a name that ends in .png")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags = parse(argv)
        from mae_jax.tools import comparison  # imports jax

        comparison.write(flags)
        return 0

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
