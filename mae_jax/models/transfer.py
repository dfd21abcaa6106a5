"""Taking an encoder elsewhere: other heads, other image sizes, learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.models.classifier import POOLINGS, Classifier
from mae_jax.models.vit import ViTEncoder
from mae_jax.nn.patches import PatchUnit
from mae_jax.nn.pos_embed import resize_table, sincos_2d
from mae_jax.types import Params


def make_classifier(
    unit: PatchUnit,
    encoder: ViTEncoder,
    num_classes: int,
    *,
    pooling: str = "mean",
    image_size: tuple[int, int] | None = None,
    positions: str = "learned",
    drop_path_rate: float = 0.0,
) -> Classifier:
    """Return a classifier around an encoder like `encoder`.

    Args:
      unit: of the pre-training model.
      encoder: of the pre-training model.
      num_classes: number of logits.
      pooling: "mean" or "cls".
      image_size: (height, width) if it is another one than in pre-training.
      positions: "learned", as the official fine-tuning has them, or "fixed".
      drop_path_rate: see `ViTEncoder`.

    Raises:
      ConfigError: if the pooling is unknown or needs a class token that is not there.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"model.pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    if pooling == "cls" and not encoder.use_cls_token:
        raise ConfigError("model.pooling 'cls' needs a class token, model.use_cls_token is False")
    if num_classes < 1:
        raise ConfigError(f"model.num_classes {num_classes}: expected at least 1")
    unit = PatchUnit(image_size or unit.image_size, unit.patch_size, unit.channels)
    encoder = encoder.clone(
        grid_size=unit.grid_size,
        positions=positions,
        final_norm=pooling == "cls",
        drop_path_rate=drop_path_rate,
        parent=None,
        name=None,
    )
    return Classifier(unit=unit, encoder=encoder, num_classes=num_classes, pooling=pooling)


def transfer_encoder(
    params: Params, source: ViTEncoder, target: ViTEncoder, fresh: Params
) -> Params:
    """Return the parameters of `source` as those of `target`.

    What `target` has no use for is left out (the final norm before mean pooling, a mask token); a
    mask token that `source` has not is the fresh one.
    Learned positions are those of `source`, or its fixed table where it has learned none, resized
    where the grids differ; fixed positions need nothing.

    Args:
      params: the subtree `encoder` of the source.
      source: the encoder they belong to.
      target: the encoder to be filled.
      fresh: parameters of the target.

    Raises:
      ConfigError: if a parameter is missing or has another shape; names it.
    """
    if target.positions == "learned":
        prefix = int(source.use_cls_token)
        table = params.get("pos_embed")
        if table is None:
            fixed = sincos_2d(source.embed_dim, source.grid_size)
            table = np.pad(fixed, ((prefix, 0), (0, 0)))[None]
        table = resize_table(np.asarray(table), source.grid_size, target.grid_size, prefix)
        params = {**params, "pos_embed": jnp.asarray(table)}
    if "mask_token" in fresh:
        params = {"mask_token": fresh["mask_token"], **params}
    return fill(fresh, params, "encoder")


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
