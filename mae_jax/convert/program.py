"""One conversion from a file to a file: what `mae_jax.tools.convert_checkpoint` does."""

from __future__ import annotations

import argparse
from pathlib import Path

from etils import epath

from mae_jax.convert import files, incoming, outgoing, weights
from mae_jax.convert.families import family_of
from mae_jax.convert.reader import Told
from mae_jax.errors import ConfigError
from mae_jax.files import completed, refuse_existing


def convert(flags: argparse.Namespace) -> None:
    """Convert `flags.src` into `flags.dst`, which is there in full afterwards, or not at all.

    Args:
      flags: as `mae_jax.tools.convert_checkpoint.parse` returns them.

    Raises:
      ConfigError: if the source is no good, or the destination cannot hold it; nothing is written.
    """
    destination = epath.Path(flags.dst).expanduser()
    refuse_existing(destination, "DST")
    if weights.is_ours(flags.src):
        _refuse_told(flags)
        converted, which = weights.read(flags.src)
        lines = [f"{flags.src}: a checkpoint of ours, {which}", *incoming.lines_of(converted)]
    else:
        stored = files.read(Path(flags.src).expanduser(), flags.ignore)
        told = {name: getattr(flags, name) for name in Told.__dataclass_fields__}
        converted, lines = incoming.weights_of(stored, Told(**told))
    print("\n".join(lines))
    to = flags.to or "mae_jax"
    with completed(destination, field="DST", replace=False) as temporary:
        path = Path(temporary)
        if to == "mae_jax":
            weights.write(path, converted, source=Path(flags.src).name)
        else:
            outgoing.WRITERS[to](path, converted)
            caution = family_of(converted.config).caution(converted.config)
            if caution and "decoder" in converted.parts:
                print(f"  note       {caution}")
    left_out = ", without the decoder" * (to == "timm" and "decoder" in converted.parts)
    print(f"wrote {destination} ({to}{left_out})")


def _refuse_told(flags: argparse.Namespace) -> None:
    """Refuse flags that have no meaning for a checkpoint of ours."""
    if flags.to in (None, "mae_jax"):
        raise ConfigError(
            f"--to: expected {', '.join(outgoing.WRITERS)}, for {flags.src} is a checkpoint of ours"
            " already"
        )
    for name in (*Told.__dataclass_fields__, "ignore"):
        if getattr(flags, name) not in (None, []):
            raise ConfigError(f"--{name}: {flags.src} is a checkpoint of ours, which tells it")
