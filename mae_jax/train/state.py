"""What a run has to remember from step to step."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mae_jax.train.partition import select
from mae_jax.types import Params


class Counters(flax.struct.PyTreeNode):
    """Updates skipped because a loss or gradient was not finite: in all, and in a row (int32)."""

    nonfinite_steps: jax.Array
    nonfinite_in_a_row: jax.Array


class TrainState(flax.struct.PyTreeNode):
    """All that changes while training.

    Attributes:
      step: int32, steps done; also the position in the data.
      params: float32 parameters.
      extra: state that is not trained (batch statistics); {} if none.
      opt_state: the optimiser's.
      counters: see `Counters`.
      ema: exponential moving average of the parameters; None: none is kept.
    """

    step: jax.Array
    params: Params
    extra: Any
    opt_state: optax.OptState
    counters: Counters
    ema: Params | None = None

    @classmethod
    def create(
        cls,
        params: Params,
        extra: Any,
        optimizer: optax.GradientTransformation,
        *,
        averaged: bool = False,
        trainable: Any | None = None,
    ) -> TrainState:
        """Return the state before the first step.

        Args:
          params: all parameters.
          extra: state that is not trained.
          optimizer: knows the trainable parameters alone.
          averaged: whether to keep an average.
          trainable: tree of bools like `params`; None: all are.
        """
        # Three arrays and not one: the step donates the state, and no buffer can be donated twice.
        step, in_all, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        counters = Counters(in_all, in_a_row)
        # A copy, for the same reason.
        ema = jax.tree.map(jnp.copy, params) if averaged else None
        return cls(step, params, extra, optimizer.init(select(params, trainable)), counters, ema)

    def starting_from(self, params: Params) -> TrainState:
        """Return this state before the first step with other parameters, and their average."""
        ema = None if self.ema is None else jax.tree.map(jnp.copy, params)
        return self.replace(params=params, ema=ema)

    def best_params(self) -> Params:
        """Return the parameters to measure and to draw with: the averaged ones, where kept."""
        return self.params if self.ema is None else self.ema
