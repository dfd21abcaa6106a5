"""A folder of images as array_record shards, which are read faster than many small files.

    python -m mae_jax.tools.prepare_data FOLDER OUT --short_side=256
    python -m mae_jax.tools.prepare_data --verify OUT
    python -m mae_jax.tools.prepare_data FOLDER OUT --beam -- --runner=FlinkRunner ...

The same command goes on where it was stopped. Train on it with `--config.data.source=prepared
--config.data.path=OUT`. Flags are parsed here, without numpy, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status
from mae_jax.tools import beam


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m mae_jax.tools.prepare_data",
        description="Write the images of a folder as array_record shards with a manifest. The same"
        " command goes on where it was stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER OUT", help="of the images; of the shards"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the files of OUT with their SHA-256 instead"
    )
    parser.add_argument(
        "--short_side",
        type=int,
        default=0,
        metavar="S",
        help="resize images whose shorter side is larger; default: none",
    )
    parser.add_argument(
        "--quality", type=int, default=95, metavar="Q", help="of resized JPEG; default 95"
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="of the training images; default: one for each 128 MiB, at least 16",
    )
    parser.add_argument("--processes", type=int, metavar="P", help="default: one for each core")
    parser.add_argument(
        "--max_bad_share",
        type=float,
        default=0.001,
        metavar="X",
        help="of images that may be left out; ten may in any case; default 0.001",
    )
    beam.add_flag(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags, with `folder` (None with --verify), `out` and `beam_options`.

    Raises:
      ConfigError: if a flag is unknown, missing, or has a value that cannot be.
    """
    argv, beam_options = beam.split(argv)
    flags = make_parser().parse(argv)
    flags.beam_options = beam_options
    expected = "OUT" if flags.verify else "FOLDER OUT"
    if len(flags.folders) != len(expected.split()) or "" in flags.folders:
        given = " ".join(flags.folders) or "nothing"
        raise ConfigError(f"expected {expected}, got {given}")
    *folder, flags.out = map(os.path.expanduser, flags.folders)
    flags.folder = folder[0] if folder else None
    if flags.beam and (flags.verify or flags.processes):
        other = "--verify" if flags.verify else "--processes"
        raise ConfigError(f"--beam: expected no {other} with it, Beam's options say how many")
    if flags.folder is not None and _is_within(flags.out, flags.folder):
        raise ConfigError(f"OUT={flags.out}: expected a folder outside of FOLDER={flags.folder}")
    for name, least in (("short_side", 0), ("shards", 1), ("processes", 1)):
        if (value := getattr(flags, name)) is not None and value < least:
            raise ConfigError(f"--{name}={value}: expected at least {least}")
    if not 1 <= flags.quality <= 100:
        raise ConfigError(f"--quality={flags.quality}: expected in [1, 100]")
    if not 0 <= flags.max_bad_share <= 1:
        raise ConfigError(f"--max_bad_share={flags.max_bad_share}: expected in [0, 1]")
    return flags


def _is_within(path: str, folder: str) -> bool:
    if ("://" in path) != ("://" in folder):
        return False
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags = parse(argv)
        from mae_jax.data.processes import available_cores
        from mae_jax.files import require_bucket
        from mae_jax.tools import beam_shards, shards  # imports numpy and Pillow

        processes = flags.processes or available_cores()
        for field, path in (("FOLDER", flags.folder), ("OUT", flags.out)):
            if path is not None:
                require_bucket(path, field)
        if flags.verify:
            shards.verify(flags.out, processes=processes)
            return 0
        ensure: shards.Ensure = functools.partial(shards.in_processes, processes=processes)
        if flags.beam:
            beam.require()
            ensure = functools.partial(beam_shards.with_beam, options=flags.beam_options)
        plan = shards.plan(
            flags.folder, shards.Options(flags.short_side, flags.quality), flags.shards
        )
        shards.prepare(plan, flags.out, ensure=ensure, max_bad_share=flags.max_bad_share)
        return 0

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
