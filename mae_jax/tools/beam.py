"""Independent pieces of work on many machines, by Apache Beam: any of its runners, by its options.

What is done with a piece is a function of it that writes files; a runner may do a piece again, or
twice at once. Beam itself is imported by `run` alone, its options stand after "--".
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from mae_jax.errors import ConfigError

if TYPE_CHECKING:
    from etils import epath

SCRATCH = "beam.tmp"  # folder of what workers write until it is whole; see `remove_scratch`
# What Beam makes of an exception in a worker is a text with the worker's traceback in it.
MISTAKE = re.compile(r"\bmae_jax\.errors\.ConfigError: (.*?)(?: \[while running .*)?$", re.M)

Piece = TypeVar("Piece", str, int)


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add --beam to a parser whose command lines go through `split` first."""
    parser.add_argument(
        "--beam",
        action="store_true",
        help="do the work with Apache Beam, whose options follow after --: -- --runner=FlinkRunner",
    )


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags that are ours, and those of Beam, which follow after "--".

    Raises:
      ConfigError: if there are some of Beam, but no --beam.
    """
    ours, theirs = list(argv), []
    if "--" in ours:
        place = ours.index("--")
        ours, theirs = ours[:place], ours[place + 1 :]
        if "--beam" not in ours:
            raise ConfigError("--: expected options of Beam after --beam alone")
    return ours, theirs


def require() -> None:
    """Refuse if Beam is not installed.

    Raises:
      ConfigError: naming the extra.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise ConfigError('--beam needs the package apache-beam: pip install "mae_jax[beam]"')


def remove_scratch(out: epath.Path) -> None:
    """Remove the scratch folder of a finished folder, if there is one, be it of a killed start."""
    if (scratch := out / SCRATCH).exists():
        scratch.rmtree()


def run(
    pieces: Iterable[Piece], make: Callable[[], Callable[[Piece], None]], options: Sequence[str]
) -> None:
    """Do every piece on some worker; returns when all are done.

    Args:
      pieces: small: all of them go through Beam's description of the job.
      make: called once for each worker, which has to have mae_jax installed; returns what is done
        with a piece. It is pickled.
      options: of Beam, such as --runner=DataflowRunner.

    Raises:
      ConfigError: if Beam refuses its options, or a worker raises one.
      RuntimeError: or what Beam makes of it, if the job ends in another way.
    """
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState

    class Work(apache_beam.DoFn):
        def setup(self) -> None:
            self.do = make()

        def process(self, piece: Piece) -> None:
            self.do(piece)

    try:
        pipeline = apache_beam.Pipeline(options=PipelineOptions(list(options)))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--beam: {' '.join(str(error).split())}") from error
    # Reshuffled, as a runner may give all that is created together to one worker otherwise.
    created = pipeline | apache_beam.Create(list(pieces)) | apache_beam.Reshuffle()
    _ = created | apache_beam.ParDo(Work())
    try:
        state = pipeline.run().wait_until_finish()
    except Exception as error:
        if mistake := MISTAKE.search(_told(error)):
            raise ConfigError(mistake[1]) from error
        raise
    if state != PipelineState.DONE:  # cancelled, say
        raise RuntimeError(f"the job of Beam ended in the state {state}")


def _told(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}: {error}"
