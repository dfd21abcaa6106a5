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


def absolute_error(output: jax.Array, target: jax.Array) -> jax.Array:
    """Return the absolute error [B, M], a mean over the values of each unit [B, M, U]."""
    return jnp.mean(jnp.abs(output - target), axis=-1)


def cross_entropy(output: jax.Array, target: jax.Array) -> jax.Array:
    """Return the cross entropy [B, M] in nats of logits [B, M, U] and classes int [B, M]."""
    own = jnp.take_along_axis(output, target[..., None], axis=-1, mode="clip")[..., 0]
    return jax.nn.logsumexp(output, axis=-1) - own


ERRORS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mse": squared_error,
    "l1": absolute_error,
    "cross_entropy": cross_entropy,
}


def example_losses(predictions: Mapping[str, Prediction]) -> jax.Array:
    """Return float32 [B], each example's share of the loss: the sum of weight x error.

    Computed in float32 whatever the compute dtype. The loss of the batch is the sum of these.
    """

    def losses(p: Prediction) -> jax.Array:
        target = p.target if p.kind == "cross_entropy" else p.target.astype(jnp.float32)
        error = ERRORS[p.kind](p.output.astype(jnp.float32), target)
        return jnp.sum(p.weight * error, axis=1)

    return functools.reduce(jnp.add, map(losses, predictions.values()))


def values(prediction: Prediction) -> jax.Array:
    """Return the targets as float32 [B, M, U], of which a mean can be taken: classes as one-hot."""
    if prediction.kind == "cross_entropy":
        return jax.nn.one_hot(prediction.target, prediction.output.shape[-1])
    return prediction.target.astype(jnp.float32)


def answered(prediction: Prediction, means: jax.Array) -> Prediction:
    """Return the prediction with the mean of `values` at each place for its output.

    Args:
      prediction: of N places.
      means: float32 [N, U]. Of classes they are frequencies, of which no class has none at all: one
        that was never met counts as one in 100,000.
    """
    if prediction.kind == "cross_entropy":
        means = jnp.log(jnp.maximum(means, 1e-5))
    output = jnp.broadcast_to(means[prediction.ids], prediction.output.shape)
    return prediction.replace(output=output)
