"""Batch normalisation of features without scale and bias, by named groups of examples."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError


class FeatureNorm(nn.Module):
    """Normalise each feature with the statistics of a group of examples, or with running ones.

    Variables: `batch_stats`: `mean` and `var`, float32 [D]. A batch is cut into n equal groups,
    row r belonging to group r mod n, so that groups do not depend on devices, nor on the parts a
    batch is accumulated from. (In the official code a group is what a GPU holds.)

    In training the biased variance normalises and the unbiased one is averaged, as PyTorch has it;
    the running statistics move towards the mean over groups, where PyTorch keeps the first
    device's.

    Attributes:
      group_size: examples of a group, at least 2.
      momentum: of the running statistics; PyTorch's momentum is 1 minus this.
      epsilon: added to the variance.

    Source: arXiv 1502.03167; facebookresearch/mae `main_linprobe.py` (BatchNorm1d without affine,
    eps 1e-6).
    """

    group_size: int
    momentum: float = 0.9
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
        """Normalise features [B, D]; returns float32 [B, D].

        Raises:
          ConfigError: if groups do not fill the batch, unless running statistics are used.
        """
        x = x.astype(jnp.float32)
        size = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (size,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (size,), jnp.float32)
        if use_running_average:
            return (x - mean.value[None]) * jax.lax.rsqrt(var.value + self.epsilon)[None]
        if self.group_size < 2 or len(x) % self.group_size:
            raise ConfigError(
                f"model.norm_group {self.group_size}: expected at least 2, and a number that"
                f" divides the {len(x)} examples of a batch or of its parts"
            )
        groups = x.reshape(self.group_size, -1, size)
        group_mean, group_var = groups.mean(axis=0), groups.var(axis=0)  # [n, D]
        unbiased = group_var * (self.group_size / (self.group_size - 1))
        for running, now in ((mean, group_mean), (var, unbiased)):
            kept = self.momentum * running.value
            running.value = kept + (1 - self.momentum) * now.mean(axis=0)
        normal = (groups - group_mean[None]) * jax.lax.rsqrt(group_var + self.epsilon)[None]
        return normal.reshape(x.shape)
