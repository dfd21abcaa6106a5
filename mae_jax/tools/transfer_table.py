"""How well each use of a pre-trained encoder does with few labels: a table, on the digits.

python -m mae_jax.tools.transfer_table --checkpoint=runs/demo --out=runs/demo_transfer
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m mae_jax.tools.transfer_table",
        description="Train with few labels from a checkpoint of `make demo`, in each of the ways"
        " that the paper uses its encoders, and compare. Figures that are there already stay.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="of a run of config demo")
    parser.add_argument("--out", metavar="DIR", help="folder of results and table")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="label draws; default 3")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags = make_parser().parse(argv)
        for name in ("checkpoint", "out"):
            if not getattr(flags, name):
                raise ConfigError(f"--{name}: expected a folder, got nothing")
        from mae_jax.tools import few_labels  # imports jax

        return few_labels.compare(flags.checkpoint, flags.out, seeds=flags.seeds)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
