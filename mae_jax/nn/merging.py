"""Four neighbouring tokens become one, between the stages of a pyramid."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.nn.layers import (
    LAYER_NORM_EPS,
    XAVIER,
    Dtype,
    Initializer,
    fan_out_normal,
    layer_norm,
    linear,
)


def neighbours(x: jax.Array, *, column_major: bool = False) -> jax.Array:
    """Return the tokens [..., H, W, D] of each 2 x 2 side by side, [..., H / 2, W / 2, 4 D].

    Args:
      x: a grid, or units of t x t tokens.
      column_major: the order (row, column) is (0, 0), (1, 0), (0, 1), (1, 1), as in Swin's merging;
        else (0, 0), (0, 1), (1, 0), (1, 1), as in a convolution.
    """
    *lead, h, w, d = x.shape
    x = x.reshape(*lead, h // 2, 2, w // 2, 2, d)
    x = jnp.moveaxis(x, -4, -2 if column_major else -3)
    return x.reshape(*lead, h // 2, w // 2, 4 * d)


class PatchMerge(nn.Module):
    """Concatenate 2 x 2 neighbours, norm them together, and map 4 D to 2 D without bias.

    Parameters: `norm` [4 D], `reduction`.

    Source: Swin Transformer, arXiv 2103.14030, section 3.1; used by HiViT and MixMIM.
    """

    dtype: Dtype = jnp.float32
    epsilon: float = LAYER_NORM_EPS
    kernel_init: Initializer = XAVIER

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., H, W, D] to [..., H / 2, W / 2, 2 D]."""
        width = x.shape[-1]
        x = neighbours(x, column_major=True)
        x = layer_norm(self.dtype, "norm", epsilon=self.epsilon)(x)
        reduction = linear(
            2 * width, self.dtype, "reduction", kernel_init=self.kernel_init, use_bias=False
        )
        return reduction(x)


class ConvDownsample(nn.Module):
    """Norm each token, if at all, and map 2 x 2 neighbours: a convolution of stride 2, with bias.

    Parameters: `norm` [D] with `use_norm`, `proj` {kernel [4 D, features], bias}.

    Source: implus/UM-MAE, `PatchMerge`, with the norm in Swin and without in PVT.
    """

    features: int
    use_norm: bool = True
    dtype: Dtype = jnp.float32
    epsilon: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., H, W, D] to [..., H / 2, W / 2, features]."""
        if self.use_norm:
            x = layer_norm(self.dtype, "norm", epsilon=self.epsilon)(x)
        init = fan_out_normal(4 * self.features)
        return linear(self.features, self.dtype, "proj", kernel_init=init)(neighbours(x))
