"""Choosing, gathering and putting back units. 1 = removed, 0 = seen, everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.types import MaskPlan


def keep_count(count: int, mask_ratio: float) -> int:
    """Return K = int(N (1 - r)), the floor of the floating-point product, as the official code.

    Args:
      count: N, the number of units.
      mask_ratio: r, the share to hide.

    Raises:
      ConfigError: if nothing would be kept or nothing hidden.
    """
    keep = int(count * (1 - mask_ratio))
    if not 0 < keep < count:
        raise ConfigError(
            f"mask_ratio {mask_ratio} keeps {keep} of {count} units; at least one must be kept and"
            " one hidden"
        )
    return keep


def random_plan(
    rng: jax.Array, batch_size: int, count: int, keep: int, noise: jax.Array | None = None
) -> MaskPlan:
    """Hide units uniformly at random, one mask per image.

    Args:
      rng: key of the noise; not used when `noise` is given.
      batch_size: B.
      count: N, the units of an image.
      keep: K, how many units stay: those with the smallest noise, in the order of it.
      noise: float [B, N] to use in place of `rng`, so that a caller can fix the masks.

    Raises:
      ValueError: if `noise` has another shape.

    Source: MAE, arXiv 2111.06377, section 3; facebookresearch/mae `random_masking`.
    """
    if noise is None:
        noise = jax.random.uniform(rng, (batch_size, count))
    if noise.shape != (batch_size, count):
        raise ValueError(f"expected noise [{batch_size}, {count}], got {list(noise.shape)}")
    ids = jnp.argsort(noise, axis=1).astype(jnp.int32)
    return MaskPlan(ids_keep=ids[:, :keep], ids_mask=ids[:, keep:])


def take(units: jax.Array, ids: jax.Array) -> jax.Array:
    """Gather units [B, N, U] at `ids` [R, K], R = B or 1; returns [B, K, U]."""
    if ids.shape[0] == 1:
        return jnp.take(units, ids[0], axis=1, mode="clip")
    return jnp.take_along_axis(units, ids[..., None], axis=1, mode="clip")


def ids_restore(plan: MaskPlan) -> jax.Array:
    """Return int32 [R, N]: where each unit, in image order, stands in kept-then-hidden order."""
    return jnp.argsort(jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1), axis=1)


def restore(ordered: jax.Array, plan: MaskPlan) -> jax.Array:
    """Bring [B, N, U] from kept-then-hidden order back to image order."""
    return take(ordered, ids_restore(plan))


def mask_of(plan: MaskPlan) -> jax.Array:
    """Return the 0/1 mask float32 [R, N] in image order; 1 = removed."""
    removed = jnp.concatenate(
        [jnp.zeros(plan.ids_keep.shape), jnp.ones(plan.ids_mask.shape)], axis=1
    )
    return jnp.take_along_axis(removed, ids_restore(plan), axis=1)
