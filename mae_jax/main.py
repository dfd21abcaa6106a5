"""The command line: `python -m mae_jax.main --config=NAME_OR_PATH[:variant] ...`.

Flags are parsed here, without jax or flax, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ml_collections import ConfigDict

import mae_jax
from mae_jax import config as configs
from mae_jax import distributed
from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status
from mae_jax.request import Request


def make_parser() -> Parser:
    """Return the parser of all flags but the overrides of fields."""
    parser = Parser(
        prog="python -m mae_jax.main",
        description="Pre-train a masked autoencoder, fine-tune or probe its encoder, or measure a"
        " checkpoint. The same command on the same folder resumes.",
        epilog="Exit status: 0 finished; 75 stopped by a signal, saved, start again; 2 a mistake in"
        " configuration or data; 1 the loss stayed not finite, or a crash."
        f" Configs: {', '.join(configs.known_configs())}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="NAME_OR_PATH[:VARIANT]", help="what to run; always needed"
    )
    parser.add_argument(
        "--config.FIELD", metavar="VALUE", dest="_", help="set a field, as --config.batch_size=64"
    )
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/CONFIG[_VARIANT]")
    parser.add_argument(
        "--stop_at_step", type=int, metavar="N", help="end in the middle of the schedule"
    )
    parser.add_argument(
        "--allow_change",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on in a folder although this field differs; may be repeated",
    )
    parser.add_argument(
        "--profile_steps", metavar="A:B", help="write a profile of these steps to DIR/profile"
    )
    distributed.add_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return flags and overrides (dotted field -> text).

    Raises:
      ConfigError: if a flag is unknown, lacks its value or has one of the wrong type.
    """
    overrides, rest = {}, []
    for argument in argv:
        if argument.startswith("--config."):
            field, equals, value = argument.removeprefix("--config.").partition("=")
            if not equals:
                raise ConfigError(f"{argument}: expected {argument}=VALUE")
            overrides[field] = value
        else:
            rest.append(argument)
    flags = make_parser().parse(rest)
    if not flags.config:
        names = ", ".join(configs.known_configs())
        raise ConfigError(f"--config: expected a path or one of {names}, got nothing")
    if flags.stop_at_step is not None and flags.stop_at_step < 1:
        raise ConfigError(f"--stop_at_step={flags.stop_at_step}: expected at least 1")
    flags.profile_steps = _profile_steps(flags.profile_steps)
    distributed.explicit_place(flags, os.environ)
    return flags, overrides


def _profile_steps(text: str | None) -> tuple[int, int] | None:
    """Return first and last step of `A:B`."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--profile_steps: expected A:B with 1 <= A <= B, got {text!r}")
    return int(first), int(last)


def default_workdir(config: str) -> str:
    """Return `runs/<config>[_<variant>]`."""
    location, _, variant = config.partition(":")
    return f"runs/{Path(location).stem}" + (f"_{variant}" if variant else "")


def _facts(config: ConfigDict, request: Request) -> dict[str, object]:
    """Return what all processes of a job must have alike before they build anything."""
    versions = {f"version of {name}": metadata.version(name) for name in ("jax", "jaxlib")}
    return {
        **configs.flatten(config),
        **versions,
        "version of mae_jax": mae_jax.__version__,
        "--stop_at_step": request.stop_at_step,
        "--allow_change": sorted(request.allow_change),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags, overrides = parse(argv)
        config = configs.load_config(flags.config, overrides)
        from mae_jax.files import require_bucket  # imports libraries of pictures and storage

        if config.task in configs.MEASUREMENTS:
            from mae_jax.measure import measure as run  # imports jax
        else:
            from mae_jax.run import run

        request = Request(
            workdir=os.path.expanduser(flags.workdir or default_workdir(flags.config)),
            stop_at_step=flags.stop_at_step,
            allow_change=flags.allow_change,
            argv=argv,
            profile_steps=flags.profile_steps,
        )
        require_bucket(request.workdir, "--workdir")
        with distributed.joined(distributed.find_place(flags, os.environ)) as job:
            job.agree_on_folder(request.workdir)
            job.agree({"--num_processes": job.count, **_facts(config, request)})
            return run(config, request, job)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
