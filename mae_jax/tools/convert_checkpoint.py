"""Weights of other libraries as a checkpoint of ours, and a checkpoint of ours as theirs.

    python -m mae_jax.tools.convert_checkpoint mae_pretrain_vit_base.pth runs/official_b
    python -m mae_jax.tools.convert_checkpoint runs/vit_b vit_b.pth --to=official
    python -m mae_jax.tools.convert_checkpoint hivit_base.pth runs/official_hivit

Flags are parsed here, without jax or flax, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status

TARGETS = ("mae_jax", "official", "transformers", "timm")
TRUTH = {"true": True, "false": False}


def image_size(text: str) -> tuple[int, int]:
    """Parse `H,W` or, for a square, one number."""
    sides = text.split(",")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected height,width in pixels, got {text!r}")
    return int(sides[0]), int(sides[-1])


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def truth(text: str) -> bool:
    """Parse `true` or `false`."""
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return TRUTH[text.lower()]


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m mae_jax.tools.convert_checkpoint",
        description="Convert weights of the official MAE, HiViT, MixMIM and UM-MAE, of timm and of"
        " transformers to ours and back. What SRC is, is told by its contents.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "src",
        nargs="?",
        metavar="SRC",
        help="a PyTorch or safetensors file, a folder of transformers, or a run of ours",
    )
    parser.add_argument("dst", nargs="?", metavar="DST", help="what is to be written; must be new")
    parser.add_argument("--to", choices=TARGETS, help="default: mae_jax")
    parser.add_argument(
        "--norm_pix_loss",
        type=truth,
        metavar="true|false",
        help="whether a decoder predicts normalised patches, where SRC does not say",
    )
    parser.add_argument(
        "--image_size",
        type=image_size,
        metavar="H,W",
        help="where it is not a square, or SRC does not say",
    )
    for name in ("num_heads", "decoder_num_heads"):
        parser.add_argument(
            f"--{name}", type=positive, metavar="N", help="where SRC and its width do not tell"
        )
    parser.add_argument("--frames", type=positive, metavar="N", help="of a clip, of VideoMAE")
    parser.add_argument(
        "--window_size", type=positive, metavar="N", help="of UM-MAE's Swin (default: 16)"
    )
    parser.add_argument(
        "--compat_decoder_order",
        type=truth,
        metavar="true|false",
        help="whether a decoder of UM-MAE's pyramids was trained with the released code's order of"
        " positions (default: true)",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="NAME",
        help="an array of SRC to leave out; * stands for any letters; may be repeated",
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags.

    Raises:
      ConfigError: if a flag is unknown, missing, or has a value that cannot be.
    """
    flags = make_parser().parse(argv)
    for name in ("src", "dst"):
        if not getattr(flags, name):
            raise ConfigError("expected SRC and DST: what to convert, and what to write")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags = parse(argv)
        from mae_jax.convert import program as conversion  # imports jax

        conversion.convert(flags)
        return 0

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
