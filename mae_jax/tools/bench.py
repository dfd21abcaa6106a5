"""How fast this is: steps, the paper's claim, memory, input pipeline, loop, others' code beside.

    python -m mae_jax.tools.bench step vit_b vit_l --batch_size=8,16
    python -m mae_jax.tools.bench encode_all vit_b --batch_size=4
    python -m mae_jax.tools.bench memory vit_b 'vit_b run.remat=block'
    python -m mae_jax.tools.bench data --workers=4
    python -m mae_jax.tools.bench peers --size=vit_s --batch_size=8
    python -m mae_jax.tools.bench loop

Flags are parsed here, without jax or flax, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status

CONFIG_HELP = "NAME_OR_PATH[:variant]; with other values in quotes: 'demo model.depth=2'"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What can be measured.

    Attributes:
      about: it, in a sentence.
      module: has `run(flags)`, which measures, prints a table and returns its rows.
      add_flags: adds the flags to a parser.
    """

    about: str
    module: str
    add_flags: Callable[[argparse.ArgumentParser], None]


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as `8,16,32`.

    Raises:
      ArgumentTypeError: if one is none, or less than 1.
    """
    try:
        numbers = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1, got {text!r}")
    return numbers


def environment_of(text: str) -> tuple[str, str]:
    """Return the label and the interpreter of `LABEL=PYTHON`.

    Raises:
      ArgumentTypeError: if there is no label, or no such program.
    """
    label, _, python = text.partition("=")
    if not label or shutil.which(os.path.expanduser(python)) is None:
        raise argparse.ArgumentTypeError(f"expected LABEL=PYTHON, a program, got {text!r}")
    return label, os.path.expanduser(python)


def whole_number(text: str) -> int:
    """Return a number.

    Raises:
      ArgumentTypeError: if it is none, or less than 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _number(parser: argparse.ArgumentParser, name: str, default: int | None, about: str) -> None:
    default_is = "" if default is None else f"; default {default}"
    parser.add_argument(
        f"--{name}", type=whole_number, default=default, metavar="N", help=about + default_is
    )


def _json_flags(parser: argparse.ArgumentParser, *, resume: bool = True) -> None:
    parser.add_argument("--json", metavar="FILE", help="lines to append the figures to")
    if resume:
        parser.add_argument(
            "--resume",
            action="store_true",
            help="what --json has of this device and these versions is not measured again",
        )


def _step_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch_size",
        type=whole_numbers,
        default=(8,),
        metavar="N[,N...]",
        help="rows of a step; more than one show how time grows; default 8",
    )
    parser.add_argument(
        "--image_size",
        type=whole_numbers,
        metavar="N[,N...]",
        help="side in pixels; default: that of the config",
    )
    _number(parser, "rounds", 5, "in which each has its turn")
    _number(parser, "steps", 1, "of a turn")
    parser.add_argument(
        "--copy", action="store_true", help="measure how fast memory is copied as well"
    )
    parser.add_argument(
        "--profile", metavar="DIR", help="write a trace of three steps, and say what took its time"
    )
    _json_flags(parser)


def _configs_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help=CONFIG_HELP)
    _step_flags(parser)


def _memory_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument(
        "--batch_size",
        type=whole_numbers,
        default=(8, 16),
        metavar="N,N",
        help="two, whose difference tells what an image needs; default 8,16",
    )
    _json_flags(parser, resume=False)


def _data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", metavar="FOLDER", help="of images; default: a corpus made once")
    parser.add_argument("--corpus", metavar="DIR", help="below which that corpus is made")
    _number(parser, "images", 600, "that are read")
    _number(parser, "repeats", 3, "of each measurement")
    _number(parser, "crops", 4, "of an image that is decoded once")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; 0: none")
    parser.add_argument("--threads", type=int, metavar="N", help="of a process")
    _json_flags(parser, resume=False)


def _peers_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="vit_s", metavar="NAME", help="default vit_s")
    parser.add_argument(
        *("--batch_size", "--batch_sizes"),
        type=whole_numbers,
        default=(8,),
        metavar="N[,N...]",
        help="images of a step; of several the best counts, for each by itself; default 8",
    )
    _number(parser, "rounds", 7, "in which each has its turn")
    _number(parser, "steps", 2, "of a turn")
    _number(parser, "threads", 1, "and cores, of each process")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="or bfloat16")
    parser.add_argument(
        "--contenders",
        metavar="LIST",
        help="names with commas between; ours@FLAGS is ours with flags of XLA; default: all",
    )
    parser.add_argument("--official", metavar="DIR", help="a checkout of facebookresearch/mae")
    parser.add_argument("--m3ae_public", metavar="DIR", help="a checkout of young-geng's")
    parser.add_argument("--xla_flags", metavar="FLAGS", help="for ours")
    parser.add_argument(
        "--also",
        action="append",
        type=environment_of,
        metavar="LABEL=PYTHON",
        help="the interpreter of another environment, with another jax, say: its contenders in JAX"
        " take part as well",
    )
    parser.add_argument(
        "--wall",
        action="store_true",
        help="one contender after the other, in wall time, as a GPU needs it",
    )
    _json_flags(parser)


def _loop_flags(parser: argparse.ArgumentParser) -> None:
    _number(parser, "leaves", 1200, "arrays of the state")
    _number(parser, "steps", 1000, "of a round")
    _number(parser, "rounds", 5, "")
    _json_flags(parser, resume=False)


BENCHMARKS = {
    "step": Benchmark(
        "Time training steps on synthetic images, config after config in turn, and say what each"
        " costs in proportion to the first. Checkpoints, data and logging are left out.",
        "step_times",
        _configs_flags,
    ),
    "encode_all": Benchmark(
        "Time the steps of a config against the same with mask tokens in the encoder, which then"
        " sees all units: the paper's claim about speed.",
        "encode_all",
        _configs_flags,
    ),
    "memory": Benchmark(
        "Say how much memory the step of each config needs, as compiled, in all and for an image."
        " Nothing runs.",
        "memory_sizes",
        _memory_flags,
    ),
    "data": Benchmark(
        "Time reading images, cropping and resizing them, against decoding alone and against"
        " Pillow.",
        "data_times",
        _data_flags,
    ),
    "loop": Benchmark(
        "Time the training loop with steps that do nothing: what it costs beside them, logging"
        " included.",
        "loop_times",
        _loop_flags,
    ),
    "peers": Benchmark(
        "Time training steps of MAE against the same in PyTorch and in plain JAX, each in a process"
        " of its own, round after round, in seconds of the processor.",
        "peer_times",
        _peers_flags,
    ),
}


def make_parser(what: str | None = None) -> Parser:
    """Return the parser of the flags of a benchmark; None: of what comes before them."""
    if what is not None:
        parser = Parser(
            prog=f"python -m mae_jax.tools.bench {what}",
            description=BENCHMARKS[what].about,
            allow_abbrev=False,
        )
        BENCHMARKS[what].add_flags(parser)
        return parser
    parser = Parser(
        prog="python -m mae_jax.tools.bench",
        description="Measure speed. "
        + " ".join(f"{name}: {one.about}" for name, one in BENCHMARKS.items()),
        allow_abbrev=False,
    )
    known = ", ".join(BENCHMARKS)
    parser.add_argument(
        "what", nargs="?", metavar="WHAT", help=f"{known}; `WHAT --help` lists its flags"
    )
    return parser


def parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """Return the benchmark asked for, and its flags.

    Raises:
      ConfigError: if there is no such benchmark or flag, or a value is none.
    """
    if not argv or argv[0] not in BENCHMARKS:
        flags = make_parser().parse(argv[:1])
        raise ConfigError(f"expected one of {', '.join(BENCHMARKS)}, got {flags.what!r}")
    what = argv[0]
    flags = make_parser(what).parse(argv[1:])
    if not getattr(flags, "configs", True):
        raise ConfigError(f"{what}: expected at least one config, got none")
    if getattr(flags, "resume", False) and not flags.json:
        raise ConfigError("--resume: expected --json as well, the file that has what is done")
    return what, flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        what, flags = parse(argv)
        # Imports jax.
        importlib.import_module(f"mae_jax.tools.{BENCHMARKS[what].module}").run(flags)
        return 0

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
