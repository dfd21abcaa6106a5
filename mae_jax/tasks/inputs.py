"""A module together with the normalisation of the images it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.types import Batch, Params


def normalize_images(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Return uint8 images [B, H, W, C] as float32, (x / 255 - mean) / std for each channel."""
    shape = (1, 1, 1, -1)
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.reshape(jnp.asarray(mean, jnp.float32), shape)) / jnp.reshape(
        jnp.asarray(std, jnp.float32), shape
    )


@dataclasses.dataclass(frozen=True)
class ImageModel:
    """A module whose functions take a batch with normalised images.

    Attributes:
      module: a linen module.
      mean: of each channel, in [0, 1].
      std: of each channel, in (0, 1].
    """

    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def inputs(self, batch: Batch) -> Batch:
        """Return the batch with its images normalised."""
        return {**batch, "image": normalize_images(batch["image"], self.mean, self.std)}

    def call(self, name: str, params: Params, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's function `name` makes of a batch of uint8 images."""
        return self.module.apply(
            {"params": params}, self.inputs(batch), *args, method=name, **kwargs
        )
