"""Weights with the configuration that they belong to, and our own folders of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

import mae_jax
from mae_jax import api, build
from mae_jax.convert.families import family_of
from mae_jax.convert.layouts import Layout
from mae_jax.convert.reader import PRETRAINED
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters and what they are of.

    Attributes:
      config: the configuration of a run that would have made them.
      parts: `("encoder",)`, or with `"decoder"` or `"head"`.
      params: float32 arrays by our path.
    """

    config: ConfigDict
    parts: tuple[str, ...]
    params: dict[str, np.ndarray]


def model_of(config: ConfigDict) -> Any:
    """Return the pre-training model or the classifier of a configuration.

    Raises:
      ConfigError: if nobody else has such a model.
    """
    family_of(config)
    return build.build_model(config)


def depths_of(config: ConfigDict) -> tuple[int, ...]:
    """Return the blocks of each stage of the encoder, by which others count them."""
    return model_of(config).encoder.depths


def shapes(config: ConfigDict, parts: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each parameter by our path."""
    return flat(api.abstract_variables(model_of(config), config, parts)[0])


def fixed_tables(config: ConfigDict, parts: Sequence[str], layout: Layout) -> dict[str, np.ndarray]:
    """Return the tables that our model computes and others, who have a place for them, store.

    By the path that they would have with us.
    """
    model = model_of(config)
    tables = {}
    if model.encoder.positions == "fixed":
        tables["encoder/pos_embed"] = model.encoder.fixed_table()
    if "decoder" in parts:
        rows = ((int(model.encoder.use_cls_token), 0), (0, 0))
        tables["decoder/pos_embed"] = np.pad(model.decoder.fixed_table(), rows)[None]
    return {path: table for path, table in tables.items() if layout.holds([path])}


def flat(params: Params) -> dict[str, Any]:
    """Return the leaves of a tree by their path."""
    return traverse_util.flatten_dict(params, sep="/")


def is_ours(path: str) -> bool:
    """Return whether `path` is a folder of a run, its checkpoints, or one of them."""
    folder = epath.Path(path).expanduser()
    if not folder.is_dir():
        return False
    if (folder / "checkpoints").is_dir() or _is_step(folder):
        return True
    return any(map(_is_step, folder.iterdir()))


def _is_step(folder: epath.Path) -> bool:
    return folder.name.isdigit() and (folder / "params").is_dir()


def read(path: str) -> tuple[Weights, str]:
    """Return the weights of a run or a checkpoint of ours, their average where one is kept.

    Returns:
      The weights, and which they are, in words.

    Raises:
      ConfigError: if there is no checkpoint, or it does not fit its configuration.
    """
    loaded = api.load(path)
    params = flat(jax.device_get(loaded.params))
    parts = tuple(part for part in (*PRETRAINED, "head") if part in loaded.params)
    which = f"step {loaded.step}" + ", averaged weights" * loaded.averaged
    return Weights(loaded.config, parts, params), which


def write(path: Path, weights: Weights, source: str) -> None:
    """Write a folder that `mae_jax.api.load` reads, with the weights as its step 0."""
    meta = {
        "config": weights.config.to_dict(),
        "mae_jax": mae_jax.__version__,
        "jax": jax.__version__,
        "source": source,
        "parts": list(weights.parts),
    }
    params = {name: jnp.asarray(array) for name, array in weights.params.items()}
    checkpoints = Checkpoints(path / "checkpoints")
    try:
        checkpoints.save_params(traverse_util.unflatten_dict(params, sep="/"), meta=meta)
    finally:
        checkpoints.close()
