"""The reconstruction loss of the whole family: weighted errors between outputs and targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mae_jax.types import Prediction


def squared_error(output: jax.Array, target: jax.Array) -> jax.Array:
    """Return the squared error [B, M], a mean over the values of each unit [B, M, U]."""
    return jnp.mean(jnp.square(output - target), axis=-1)


ERRORS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"mse": squared_error}


def example_losses(predictions: Mapping[str, Prediction]) -> jax.Array:
    """Return float32 [B], each example's share of the loss: the sum of weight x error.

    Computed in float32 whatever the compute dtype. The loss of the batch is the sum of these.
    """

    def losses(p: Prediction) -> jax.Array:
        error = ERRORS[p.kind](p.output.astype(jnp.float32), p.target.astype(jnp.float32))
        return jnp.sum(p.weight * error, axis=1)

    return functools.reduce(jnp.add, map(losses, predictions.values()))
