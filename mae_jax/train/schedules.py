"""Learning-rate arithmetic as pure functions of the step."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError

REFERENCE_BATCH = 256


def scaled_learning_rate(base_learning_rate: float, batch_size: int) -> float:
    """Return base rate x global batch / 256 (the linear scaling rule, arXiv 1706.02677)."""
    return base_learning_rate * batch_size / REFERENCE_BATCH


def warmup_cosine(
    step: jax.Array | int,
    *,
    peak: float | jax.Array,
    warmup_steps: float,
    total_steps: int,
    minimum: float = 0.0,
) -> jax.Array:
    """Return the float32 rate of an update: linear warm-up from exactly 0, then half a cosine.

    Args:
      step: number of updates before this one, so the first update has step 0.
      peak: rate at the end of the warm-up.
      warmup_steps: may be fractional.
      total_steps: where the rate reaches `minimum`.
      minimum: last rate.

    Source: facebookresearch/mae `util/lr_sched.py`, there in fractional epochs.
    """
    step = jnp.asarray(step, jnp.float32)
    warm = peak * step / max(warmup_steps, 1e-9)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
    cosine = minimum + (peak - minimum) * 0.5 * (1.0 + jnp.cos(math.pi * jnp.minimum(progress, 1)))
    return jnp.where(step < warmup_steps, warm, cosine)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return full batches in an epoch, at least 1 (a set smaller than the batch is repeated)."""
    return max(1, num_examples // batch_size)


def total_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Return the updates of a run; ImageNet, batch 4096, 800 epochs: 249,600.

    Raises:
      ConfigError: if that is none.
    """
    steps = round(epochs * steps_per_epoch(num_examples, batch_size))
    if steps < 1:
        raise ConfigError(f"epochs {epochs} is less than one step of batch_size {batch_size}")
    return steps
