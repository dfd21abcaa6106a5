"""Our weights as other libraries' files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mae_jax.convert import files
from mae_jax.convert.families import family_of
from mae_jax.convert.layouts import Layout
from mae_jax.convert.weights import Weights, depths_of, fixed_tables, model_of
from mae_jax.errors import ConfigError


def state_of(weights: Weights, layout: Layout) -> dict[str, np.ndarray]:
    """Return the arrays by the names of `layout`, position tables and indices among them.

    Raises:
      ConfigError: if the layout has no place for one.
    """
    params = weights.params | fixed_tables(weights.config, weights.parts, layout)
    return layout.to_theirs(params, model_of(weights.config).unit, depths_of(weights.config))


def layout_of(weights: Weights, to: str) -> Layout:
    """Return the layout that holds the weights in the kind of file that `--to` names.

    Raises:
      ConfigError: if there is none such for the method, or nobody has such a model.
    """
    family = family_of(weights.config)
    if to not in family.targets:
        raise ConfigError(
            f"--to: expected {' or '.join(family.targets)}, the only kind of file that others have"
            f" for model.name {family.method}, got {to}"
        )
    layouts = family.targets[to]
    return next((layout for layout in layouts if layout.holds(weights.params)), layouts[0])


def write_official(path: Path, weights: Weights) -> None:
    """Write a `.pth` file as the authors' code does: encoder, encoder and decoder, or classifier.

    Raises:
      ConfigError: if it is a ViT without the class token that theirs has.
    """
    layout = layout_of(weights, "official")
    if "encoder/cls_token" in layout.arrays:
        _need_cls_token(weights, "the official MAE")
    write = family_of(weights.config).write or files.write_torch
    write(path, state_of(weights, layout))


def write_timm(path: Path, weights: Weights) -> None:
    """Write a safetensors file for timm's ViT, which has no decoder."""
    layout = layout_of(weights, "timm")
    parts = tuple(part for part in weights.parts if part != "decoder")
    params = {k: v for k, v in weights.params.items() if k.split("/")[0] in parts}
    encoder = dataclasses.replace(weights, parts=parts, params=params)
    files.write_safetensors(path, state_of(encoder, layout))


def write_transformers(path: Path, weights: Weights) -> None:
    """Write a folder for transformers, 4 and 5.

    Raises:
      ConfigError: if they have no such model.
    """
    layout_of(weights, "transformers")
    describe = family_of(weights.config).transformers
    assert describe is not None  # as there is a layout
    layout, config = describe(weights, model_of(weights.config))
    files.write_folder(path, state_of(weights, layout), config)


def _need_cls_token(weights: Weights, whose: str) -> None:
    if not model_of(weights.config).encoder.use_cls_token:
        raise ConfigError(f"model.use_cls_token False: a ViT of {whose} has a class token")


WRITERS = {
    "official": write_official,
    "transformers": write_transformers,
    "timm": write_timm,
}
"""By the name that `--to` takes; each writes to a path where there is nothing yet."""
