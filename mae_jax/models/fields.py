"""Checks of the fields of `config.model` that the methods have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mae_jax.errors import ConfigError

Size = TypeVar("Size")


def sized(sizes: Mapping[str, Size], size: str, **given: Any) -> Size:
    """Return a named size, a NamedTuple, with what is given in place of its own; None: its own.

    Raises:
      ConfigError: if there is no such size.
    """
    check_choice("size", size, tuple(sizes))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return sizes[size]._replace(**{k: v for k, v in given.items() if v is not None})  # type: ignore[attr-defined]


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a name that is none of the known ones.

    Raises:
      ConfigError: names the field.
    """
    if value not in known:
        raise ConfigError(f"model.{name} {value!r} is not one of {', '.join(known)}")


def check_width(dims: Any, width: str, heads: str) -> None:
    """Refuse a width that heads do not divide, or that sine-cosine positions do not fit.

    Args:
      dims: has the fields.
      width: name of the field of the width.
      heads: name of that of the attention heads.

    Raises:
      ConfigError: names both.
    """
    size, count = getattr(dims, width), getattr(dims, heads)
    if min(size, count) < 1 or size % 4 or size % count:
        raise ConfigError(
            f"model.{width} {size} must be a positive multiple of 4 and of model.{heads}, which is"
            f" {count}"
        )


def check_decoder(dims: Any) -> None:
    """Refuse a decoder that cannot be.

    Raises:
      ConfigError: names the field.
    """
    check_width(dims, "decoder_embed_dim", "decoder_num_heads")
    if dims.decoder_depth < 1:
        raise ConfigError("model.decoder_depth must be at least 1")
