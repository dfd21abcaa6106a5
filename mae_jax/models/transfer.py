"""Taking an encoder elsewhere: other heads, other image sizes, learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.models.classifier import POOLINGS, Classifier
from mae_jax.models.encoder import Encoder
from mae_jax.nn.patches import Unit
from mae_jax.nn.pos_embed import resize_relative_table, resize_table
from mae_jax.types import Params


def make_classifier(
    unit: Unit,
    encoder: Encoder,
    num_classes: int,
    *,
    pooling: str = "mean",
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
    positions: str | None = None,
    drop_path_rate: float = 0.0,
    norm_group: int = 0,
    head_dropout: float = 0.0,
) -> Classifier:
    """Return a classifier around an encoder like `encoder`.

    Args:
      unit: of the pre-training model.
      encoder: of the pre-training model.
      num_classes: number of logits.
      pooling: "mean" or "cls".
      image_size: (height, width) if it is another one than in pre-training.
      frames: of a clip, likewise.
      positions: "learned", "fixed" or "none"; None: as the official fine-tuning has them.
      drop_path_rate: see `Encoder`.
      norm_group: of a linear probe's batch norm; see `ClassifierHead`.
      head_dropout: share of what the linear layer sees that is 0 in training.

    Raises:
      ConfigError: if the pooling is unknown or needs a class token that is not there, a number is
        out of range, or units do not fit the size.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"model.pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    if pooling == "cls" and not encoder.use_cls_token:
        raise ConfigError("model.pooling 'cls' needs a class token, model.use_cls_token is False")
    if num_classes < 1:
        raise ConfigError(f"model.num_classes {num_classes}: expected at least 1")
    for name, rate in (("drop_path_rate", drop_path_rate), ("head_dropout", head_dropout)):
        if not 0 <= rate < 1:
            raise ConfigError(f"model.{name} {rate}: expected at least 0, below 1")
    if norm_group < 0 or norm_group == 1:
        raise ConfigError(f"model.norm_group {norm_group}: expected 0 (none) or at least 2")
    if image_size is not None or frames is not None:
        unit = unit.resized(image_size or unit.image_size, frames)
    encoder = encoder.as_backbone(
        grid_size=unit.grid_size,
        positions=positions or encoder.classifier_positions,
        final_norm=pooling == "cls" or norm_group > 0 or encoder.norms_before_pooling,
        drop_path_rate=drop_path_rate,
    )
    return Classifier(
        unit=unit,
        encoder=encoder,
        num_classes=num_classes,
        pooling=pooling,
        norm_group=norm_group,
        head_dropout=head_dropout,
    )


# Parameters that an encoder may have though the one it starts from has not: they stay fresh.
MAY_BE_FRESH = ("mask_token", "table")


def transfer_encoder(params: Params, source: Encoder, target: Encoder, fresh: Params) -> Params:
    """Return the parameters of `source` as those of `target`.

    What `target` has no use for is left out (the final norm before mean pooling, a mask token), as
    is a mask token or a table of relative positions that `source` has not: it stays the caller's
    fresh one. Learned positions are those of `source`, or its fixed table where it has learned
    none, resized where the grids differ, as are tables of relative positions; fixed positions need
    nothing: they are made anew for any grid.

    Args:
      params: the subtree `encoder` of the source.
      source: the encoder they belong to.
      target: the encoder to be filled.
      fresh: parameters of the target, or their shapes.

    Raises:
      ConfigError: if the two are of different kinds, a parameter is missing or has another shape,
        or learned positions or M3AE's type vectors would be lost; names it.
    """
    if type(source) is not type(target):
        raise ConfigError(
            "model.name: expected the method of the encoder to start from, a"
            f" {type(source).__name__}, got one with a {type(target).__name__}"
        )
    if target.positions == "fixed" and "pos_embed" in params:
        raise ConfigError(
            "model.positions 'fixed': the encoder to start from has learned positions; take learned"
        )
    has, wants = ("image_type" in tree for tree in (params, fresh))
    if has != wants:
        raise ConfigError(
            f"model.use_type_vectors {wants}: the encoder to start from has"
            f" {'' if has else 'not '}been trained with them; take {has}"
        )
    given = traverse_util.flatten_dict(params, sep="/")
    wanted = traverse_util.flatten_dict(fresh, sep="/")
    if target.positions == "learned":
        prefix, table = int(source.use_cls_token), given.get("pos_embed")
        if table is None:
            table = source.fixed_table()
        grids = source.position_grid, target.position_grid
        given["pos_embed"] = jnp.asarray(resize_table(np.asarray(table), *grids, prefix))
    for path, leaf in wanted.items():
        if path.endswith("/table") and path in given and given[path].shape != leaf.shape:
            size = leaf.shape[0], leaf.shape[1]
            given[path] = jnp.asarray(resize_relative_table(np.asarray(given[path]), size))
    missing = {path for path in wanted if path.rpartition("/")[2] in MAY_BE_FRESH} - given.keys()
    kept = {path: leaf for path, leaf in wanted.items() if path not in missing}
    nested = [traverse_util.unflatten_dict(tree, sep="/") for tree in (kept, given)]
    return fill(nested[0], nested[1], "encoder")


def fill(shapes: Params, params: Params, name: str) -> Params:
    """Return the leaves of `params` that `shapes` has; others are left out.

    Args:
      shapes: tree of arrays or of their shapes.
      params: tree with at least these leaves.
      name: of the subtree, for messages.

    Raises:
      ConfigError: if a leaf is missing or has another shape; names it.
    """
    wanted = traverse_util.flatten_dict(shapes, sep="/")
    given: Mapping[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in wanted.items():
        if path not in given:
            raise ConfigError(f"{name}/{path} is missing")
        if given[path].shape != leaf.shape:
            raise ConfigError(
                f"{name}/{path}: expected shape {list(leaf.shape)}, got {list(given[path].shape)}"
            )
    return traverse_util.unflatten_dict({path: given[path] for path in wanted}, sep="/")
