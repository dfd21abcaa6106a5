"""Our side of the comparison of MAE with other implementations: weights, inputs, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.losses.reconstruction import example_losses
from mae_jax.models import decoder, vit
from mae_jax.nn import blocks, patches
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.pretrain import mae
from mae_jax.types import Params
from tests.oracle.agreement import Result, Tree
from tests.weights import random_params

BATCH_SIZE = 4
SMALL: dict[str, Any] = {
    "size": "vit_s",
    "image_size": (20, 20),
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 4,
    "decoder_embed_dim": 8,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
"""Fields of `mae.make`: 4 + 2 blocks, and so narrow that weights and gradients fit a small file."""


def random_weights(model: mae.MaskedAutoencoder, seed: int) -> dict[str, np.ndarray]:
    """Return weights by path.

    The class token has no position, so the first norm sees its variance of 4e-4 alone, and shows
    a wrong epsilon.
    """
    image = jnp.zeros((1, *model.unit.image_size, model.unit.channels))
    plan = model.plan(jax.random.key(0), 1)
    tree = random_params(model.init, {"image": image}, plan, method="predict", seed=seed)
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {path: np.asarray(flat[path]) for path in sorted(flat)}


def random_inputs(
    model: mae.MaskedAutoencoder, batch_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images float32 [B, H, W, C] and noise float32 [B, N]."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((batch_size, *model.unit.image_size, model.unit.channels))
    return image.astype(np.float32), rng.random((batch_size, model.unit.count), np.float32)


def nested(params: Tree) -> Params:
    """Return weights by path as the tree that a module takes."""
    return traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in params.items()}, sep="/")


def run(
    model: mae.MaskedAutoencoder,
    params: Tree,
    image: np.ndarray,
    noise: np.ndarray,
    *,
    compiled: bool = True,
) -> Result:
    """Return loss, predictions and gradients of our model.

    Args:
      model: its parameters are `params`.
      params: arrays by path.
      image: float32 [B, H, W, C].
      noise: float32 [B, N].
      compiled: as one program; else operation by operation, which is quicker for a small model
        that is run a few times with changes.
    """
    plan = model.plan(jax.random.key(0), len(image), jnp.asarray(noise))

    def loss(params: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        predictions = model.apply({"params": params}, {"image": image}, plan, method="predict")
        return example_losses(predictions).sum(), predictions["image"].output

    step = jax.value_and_grad(loss, has_aux=True)
    step = jax.jit(step) if compiled else step
    (value, output), gradients = step(nested(params), jnp.asarray(image))
    flat = traverse_util.flatten_dict(gradients, sep="/")
    return Result(float(value), np.asarray(output), {k: np.asarray(v) for k, v in flat.items()})


def _tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(blocks, "gelu", lambda x: flax.linen.gelu(x, approximate=True))


def _epsilon(value: float) -> Callable[[pytest.MonkeyPatch], None]:
    norm = flax.linen.LayerNorm

    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(flax.linen, "LayerNorm", lambda **fields: norm(**fields | {"epsilon": value}))

    return apply


def _biased_variance(patch: pytest.MonkeyPatch) -> None:
    def statistics(units: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = units.mean(axis=-1, keepdims=True)
        return mean, jnp.sqrt(jnp.var(units, axis=-1, keepdims=True) + patches.NORM_PIX_EPS)

    patch.setattr(patches, "unit_statistics", statistics)


def _positions(table: Callable[[int, tuple[int, int]], np.ndarray]) -> Callable[..., None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        for module in (vit, decoder):
            patch.setattr(module, "sincos_2d", table)

    return apply


def _row_first(embed_dim: int, grid_size: tuple[int, int]) -> np.ndarray:
    return np.roll(sincos_2d(embed_dim, grid_size), embed_dim // 2, axis=1)


def _end_point_included(embed_dim: int, grid_size: tuple[int, int]) -> np.ndarray:
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / (quarter - 1))
    row, column = np.divmod(np.arange(grid_size[0] * grid_size[1]), grid_size[1])
    angles = np.concatenate([np.outer(column, frequencies), np.outer(row, frequencies)], axis=1)
    x, y = np.split(angles, 2, axis=1)
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return table.astype(np.float32)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "tanh GELU": _tanh_gelu,
    "LayerNorm epsilon 1e-5": _epsilon(1e-5),
    "LayerNorm epsilon 1e-12": _epsilon(1e-12),
    "biased variance": _biased_variance,
    "row-first positions": _positions(_row_first),
    "frequencies over D/4 - 1": _positions(_end_point_included),
}
"""What other ports got wrong, each as a patch of our code. Biased variance shows in the target
alone, so only with `norm_pix_loss`."""
