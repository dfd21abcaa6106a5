"""Features and labels of every example of a split, in files that can be read without us.

    python -m mae_jax.tools.extract_features --checkpoint=runs/demo --out=features
    python -m mae_jax.tools.extract_features ... --beam -- --runner=FlinkRunner ...

Flags are parsed here, without jax or flax, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status
from mae_jax.tools import beam

FORMATS = ("npz", "array_record")
POOLS = ("mean", "cls", "tokens", "logits")


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m mae_jax.tools.extract_features",
        description="Write the features of a split, in the order of its examples. The same command"
        " goes on where it was stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="a work folder, or one step's folder in it"
    )
    parser.add_argument("--out", metavar="FOLDER", help="of the files; made if missing")
    parser.add_argument(
        "--source",
        metavar="NAME",
        help="folder, tfds, digits, photos or a module of yours; this and the next two are those of"
        " the checkpoint's held-out images unless given",
    )
    parser.add_argument("--path", metavar="PATH", help="of the images")
    parser.add_argument("--split", metavar="SPLIT", help="as the source names it")
    parser.add_argument(
        "--pool",
        choices=POOLS,
        help="default: mean of the patch tokens; of a classifier, what its linear layer sees",
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, metavar="N", help="images at a time, default 256"
    )
    parser.add_argument(
        "--shard_size", type=int, default=4096, metavar="N", help="examples a file, default 4096"
    )
    parser.add_argument("--format", choices=FORMATS, default="npz", help="default: npz")
    beam.add_flag(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags, with `beam_options`.

    Raises:
      ConfigError: if a flag is unknown, missing, or has a value that cannot be.
    """
    argv, beam_options = beam.split(argv)
    flags = make_parser().parse(argv)
    flags.beam_options = beam_options
    for name in ("checkpoint", "out"):
        if not getattr(flags, name):
            raise ConfigError(f"--{name}: expected a folder, got nothing")
    if flags.batch_size < 1:
        raise ConfigError(f"--batch_size={flags.batch_size}: expected at least 1")
    if flags.shard_size < 1 or flags.shard_size % flags.batch_size:
        # Otherwise an example's batch, and with it the last bits, would depend on where we resume.
        raise ConfigError(
            f"--shard_size={flags.shard_size}: expected a multiple of --batch_size, which is"
            f" {flags.batch_size}"
        )
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags = parse(argv)
        if flags.beam:
            beam.require()
        from mae_jax.tools import features  # imports jax

        features.write(flags)
        return 0

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
