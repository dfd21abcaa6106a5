"""Other libraries' weights as ours: which model they are of is read from shapes and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mae_jax.convert import families, layouts
from mae_jax.convert.families.family import Family
from mae_jax.convert.files import Stored
from mae_jax.convert.reader import Reader, Told, same_table
from mae_jax.convert.weights import Weights, depths_of, fixed_tables, model_of, shapes
from mae_jax.errors import ConfigError
from mae_jax.nn.layers import LAYER_NORM_EPS


def weights_of(stored: Stored, told: Told) -> tuple[Weights, list[str]]:
    """Return the weights in our layout, and what was recognised, a line each.

    Raises:
      ConfigError: if the names are of no known layout, an array is missing, left over or of another
        shape, the model is none of ours, or something must be told that the file does not say.
    """
    clips = layouts.of_clips(stored.state)
    # Models of clips have none for keys either.
    state = stored.state if clips else layouts.fuse_split_biases(stored.state)
    family, layout = families.recognise(state, stored.name, clips=clips)
    _check_settings(stored, family)
    reader = Reader(stored, state, layout, told)
    config = family.recipe()
    config.model.update(family.fields(reader))
    if "head" in reader.parts:
        config.task = "finetune"
        config.model.num_classes = reader.shape("head/linear/bias", 1)[0]
        by_token = reader.has("encoder/cls_token") and not layout.has("head/norm", state)
        config.model.pooling = "cls" if by_token else "mean"
    target = None if family.raw_pixels else reader.target(family.always_normalised)
    if target is not None:
        config.model.norm_pix_loss = target[0]
    statistics = reader.set_statistics(config, family.statistics)
    config.model.positions = _positions(reader, family, config)
    tables = fixed_tables(config, reader.parts, layout)
    leaves = shapes(config, reader.parts)
    _check(reader, config, leaves, tables)
    params = layout.to_ours(state, leaves, depths_of(config))
    weights = Weights(config, reader.parts, params)
    lines = [
        f"{stored.name}: {stored.kind} with the names of {layout.name}",
        *lines_of(weights),
        *([] if target is None else [f"  target     {_target_words(*target)}"]),
        f"  pixels     {statistics}",
        *_notes(stored),
        *(f"  {note}" for note in reader.notes),
        f"  arrays     {len(state)} read, all mapped",
    ]
    return weights, lines


def _check_settings(stored: Stored, family: Family) -> None:
    """Refuse a kind of transformers' model, or an activation, that is not ours."""
    for name, known in (("model_type", family.model_types), ("hidden_act", ("gelu",))):
        value = stored.config.get(name, known[0])
        if value not in known:
            raise ConfigError(
                f"{stored.name}/config.json: {name} {value!r}: expected {' or '.join(known)}"
            )


def _positions(reader: Reader, family: Family, config: Any) -> str:
    """Return what kind of positions the encoder has."""
    if "encoder/pos_embed" not in reader.layout.arrays:
        return family.positions or "none"
    config.model.positions = "learned"  # whichever it is: for a model that can be built
    return family.positions or reader.positions(model_of(config).encoder.fixed_table())


def _notes(stored: Stored) -> list[str]:
    """Return what is to be said of settings that make results differ a little."""
    eps = stored.config.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps == LAYER_NORM_EPS:
        return []
    return [f"  note       layer_norm_eps is {eps} in config.json, {LAYER_NORM_EPS} in ours"]


def _check(reader: Reader, config: Any, leaves: Mapping[str, Any], tables: layouts.Arrays) -> None:
    """Refuse arrays that are missing, left over or of another shape, by their names."""
    where, layout, state = reader.stored.name, reader.layout, reader.state
    paths = {path: leaf.shape for path, leaf in leaves.items()}
    paths |= {path: table.shape for path, table in tables.items()}
    blank = {path: np.broadcast_to(np.float32(0), shape) for path, shape in paths.items()}
    expected = layout.to_theirs(blank, model_of(config).unit, depths_of(config))
    for name in sorted(expected.keys() - state.keys()):
        if not layout.is_index(name):  # which the authors' code itself deletes when it loads
            raise ConfigError(f"{where}: {name} is missing")
    for name, array in sorted(expected.items()):
        if name in state and state[name].shape != array.shape:
            raise ConfigError(
                f"{where}: {name}: expected shape {list(array.shape)}, got"
                f" {list(state[name].shape)}"
            )
    extra = sorted(state.keys() - expected.keys())
    if extra:
        more = f" and {len(extra) - 1} more have" if len(extra) > 1 else " has"
        raise ConfigError(
            f"{where}: {extra[0]}{more} no place in this model; leave out what is to be left out"
            f" with --ignore={extra[0]}"
        )
    for name in filter(layout.is_index, state):
        if not np.array_equal(state[name], expected[name]):
            raise ConfigError(
                f"{where}: {name}: expected the places of a window in raster order, got others"
            )
    path = "decoder/pos_embed"
    if path in tables and not same_table(state[layout.arrays[path]], tables[path]):
        raise ConfigError(
            f"{where}: {layout.arrays[path]}: expected the fixed sine-cosine table, which is all"
            " that our decoder has, got another"
        )


def _target_words(normalised: bool, source: str) -> str:
    return f"{'normalised patches' if normalised else 'raw pixels'} ({source})"


def lines_of(weights: Weights) -> list[str]:
    """Return the model, its parts and its positions, in words."""
    config = weights.config
    model = model_of(config)
    encoder, unit = model.encoder, model.unit
    height, width = unit.image_size
    parts = ", ".join(weights.parts)
    if "head" in weights.parts:
        parts += f" ({config.model.num_classes} classes, {config.model.pooling} pooling)"
    return [
        f"  model      {config.model.size}: {families.family_of(config).words(encoder)}, patch"
        f" {unit.patch_size}, image {height} x {width} x {unit.channels}",
        f"  parts      {parts}",
        f"  positions  {encoder.positions}",
    ]
