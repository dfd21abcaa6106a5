"""Layers that all networks are made of, with the initialisation and precision of MAE.

Parameters are float32; products run in `dtype`. Layer norms compute in float32.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype | type
Initializer = nn.initializers.Initializer

LAYER_NORM_EPS = 1e-6

XAVIER = nn.initializers.xavier_uniform()
# PyTorch's "truncated normal" cuts at -2 and 2, that is never; Flax's would at two deviations.
NORMAL_002 = nn.initializers.normal(0.02)
# Uniform +-1/sqrt(fan_in): what PyTorch gives the weight of any layer that is not told otherwise.
TORCH_DEFAULT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class TokenDense(nn.Dense):
    """A Dense layer over tokens [..., D] laid out as one matrix.

    With one axis to contract, the weight gradient needs no transposed copy of the activations:
    0.8 of the time of a small step on CPU.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Map [..., D] to [..., features]."""
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], self.features)


def linear(
    features: int,
    dtype: Dtype,
    name: str,
    *,
    kernel_init: Initializer = XAVIER,
    use_bias: bool = True,
) -> TokenDense:
    """Return a Dense layer as MAE initialises it: Xavier uniform weight, zero bias."""
    return TokenDense(features, kernel_init=kernel_init, use_bias=use_bias, dtype=dtype, name=name)


def layer_norm(dtype: Dtype, name: str | None, *, epsilon: float = LAYER_NORM_EPS) -> nn.LayerNorm:
    """Return a LayerNorm with float32 statistics in two passes, as PyTorch has it."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def gelu(x: jax.Array) -> jax.Array:
    """Return x * Phi(x), Phi the distribution function of the normal.

    In float32 by erf, as PyTorch has it, which takes XLA less time on a CPU than the erfc of JAX's
    own; of fewer digits by erfc, as 1 + erf has none left where Phi is small.

    Source: "Gaussian Error Linear Units (GELUs)", arXiv 1606.08415, section 2.
    """
    if x.dtype != jnp.float32:
        return nn.gelu(x, approximate=False)
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def fan_in_uniform(fan_in: int) -> Initializer:
    """Return the uniform +-1/sqrt(fan_in) that PyTorch gives weight and bias of a convolution."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


def fan_out_normal(fan_out: int) -> Initializer:
    """Return the normal of deviation sqrt(2 / fan_out), kernel area x channels out."""
    return nn.initializers.normal(math.sqrt(2.0 / fan_out))


def dropout(
    x: jax.Array, rate: float, rng: jax.Array | None, shape: tuple[int, ...] | None = None
) -> jax.Array:
    """Set values to zero, each by itself, and scale the others by 1 / (1 - rate).

    Args:
      x: any array.
      rate: probability of becoming zero, in [0, 1).
      rng: key of the draws; None: all stay.
      shape: of the draws, 1 where values share one; None: that of `x`.
    """
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape if shape is None else shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def drop_path(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Drop a residual branch [B, ...] for whole samples, and scale the kept ones by 1 / (1 - rate).

    Args:
      x: the branch.
      rate: probability of dropping, in [0, 1).
      rng: key of one draw per sample; None: nothing is dropped.

    Source: "Deep Networks with Stochastic Depth", arXiv 1603.09382, as in timm.
    """
    return dropout(x, rate, rng, (x.shape[0],) + (1,) * (x.ndim - 1))
