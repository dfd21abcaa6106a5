"""A module together with the normalisation of the images it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.types import Batch, Params


def normalize_images(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Return uint8 images [..., C] as float32, (x / 255 - mean) / std for each channel."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.reshape(jnp.asarray(mean, jnp.float32), shape)) / jnp.reshape(
        jnp.asarray(std, jnp.float32), shape
    )


IMAGES = ("image", "partner_image")
"""What there may be of images in a batch: an example's own, and the one it is mixed with."""


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
        """Return the batch with its images normalised, and `pixels`, its own as they were."""
        images = {name: batch[name] for name in IMAGES if name in batch}
        normal = {name: normalize_images(x, self.mean, self.std) for name, x in images.items()}
        return {**batch, "pixels": batch["image"], **normal}

    def call(
        self,
        name: str,
        params: Params,
        batch: Batch,
        *args: Any,
        extra: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the module's function `name` makes of a batch of uint8 images.

        `extra` holds the module's variables beside its parameters, if it has such.
        """
        variables = {"params": params, **(extra or {})}
        return self.module.apply(variables, self.inputs(batch), *args, method=name, **kwargs)
