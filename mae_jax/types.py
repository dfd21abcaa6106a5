"""What the parts hand to each other: arrays by name, mask plans, predictions and protocols.

Letters for axes: B batch, N units of an image, K units kept, M = N - K units hidden, U values of a
unit, D width, H W C image, T tokens of a sequence, R = B or 1 (one mask each, or one for all).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import flax.struct
import jax
import numpy as np

Batch = Mapping[str, Any]
"""Named arrays of one step: `image` uint8 [B, H, W, C], or [B, F, H, W, C] where examples are clips
of F frames; `label` int32 [B] (-1: none); ..."""

Params = Any
"""A tree of float32 arrays, as linen makes it."""


class MaskPlan(flax.struct.PyTreeNode):
    """Which units an encoder is to see and which a decoder is to predict.

    Attributes:
      ids_keep: int32 [R, K] units seen, in the order in which they are gathered (not sorted).
      ids_mask: int32 [R, N - K] units hidden. Together the two are a permutation of 0 ... N - 1.
      replaced: bool [R, K], units kept of which the encoder is to see the place alone, with a
        learned token there; None: there are none, and the encoder has no such token.
    """

    ids_keep: jax.Array
    ids_mask: jax.Array
    replaced: jax.Array | None = None


class Prediction(flax.struct.PyTreeNode):
    """What a method predicts, what it should have been, and how much each unit counts.

    Attributes:
      output: float32 [B, M, U] predicted values, or logits of U classes.
      target: float32 [B, M, U] true values, or int32 [B, M] true classes.
      ids: int32 [R, M] the place of each predicted unit, in 0 ... N - 1.
      weight: float32 [B, M]; the loss is the sum of weight x error, so that a method's way of
        averaging (per batch, per sample, over valid words) is data.
      places: N, how many places there are.
      kind: the error between output and target; see `mae_jax.losses.reconstruction`.
    """

    output: jax.Array
    target: jax.Array
    ids: jax.Array
    weight: jax.Array
    places: int = flax.struct.field(pytree_node=False)
    kind: str = flax.struct.field(pytree_node=False, default="mse")


class Panel(flax.struct.PyTreeNode):
    """One column of a picture: images, or clips, and their pixels that have nothing to show.

    Attributes:
      images: float32 [B, H, W, C] or [B, F, H, W, C], in the normalised space of the network's
        input.
      hidden: float32 [B, H, W, 1] or [B, F, H, W, 1], 1 where the pixel is to be painted grey, 2
        where dark, for what is hidden in another way; None: nowhere.
    """

    images: jax.Array
    hidden: jax.Array | None = None


class Stream(enum.IntEnum):
    """Independent sources of randomness of a step. The numbers are part of reproducibility."""

    INIT = 0
    MASK = 1
    DROP_PATH = 2
    EVAL_MASK = 3
    ERASING = 4
    MIXUP = 5
    DROPOUT = 6


class Rng(flax.struct.PyTreeNode):
    """Keys of one step: a pure function of (seed, stream, step), never consumed.

    Attributes:
      seed: the typed key of the run.
      step: int32 scalar.
    """

    seed: jax.Array
    step: jax.Array | int

    def key(self, stream: Stream) -> jax.Array:
        """Return `fold_in(fold_in(seed, stream), step)`."""
        return jax.random.fold_in(jax.random.fold_in(self.seed, int(stream)), self.step)


class Method(Protocol):
    """A pre-training method: a linen module whose parameters are `encoder`, `decoder`, ...

    A plan is a `MaskPlan`, or a tree of such for a method that hides units of several kinds.
    """

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and dtypes of the arrays of one example, without a batch axis."""
        ...

    def plan(self, rng: jax.Array, batch_size: int, noise: jax.Array | None = None) -> MaskPlan:
        """Choose units to hide. Needs no parameters; may be called on an unbound module."""
        ...

    def plan_of_mask(self, mask: np.ndarray) -> MaskPlan:
        """Return the plan of a caller's own 0/1 mask [R, N], 1 = removed.

        Raises:
          ConfigError: if it is no mask of this method.
        """
        ...

    def prepare(self, batch: Batch) -> Batch:
        """Return a global batch with what examples need of each other, before it is cut."""
        ...

    def predict(
        self, batch: Batch, plan: MaskPlan, *, drop_path_rng: jax.Array | None = None
    ) -> dict[str, Prediction]:
        """Predict what `plan` hides; `batch` holds normalised float32 images."""
        ...

    def encode(self, batch: Batch, plan: MaskPlan | None = None) -> jax.Array:
        """Return float32 [B, T, D], the encoder's tokens of what `plan` keeps, or of all."""
        ...

    def features(self, batch: Batch, plan: MaskPlan | None = None) -> jax.Array:
        """Return float32 [B, D], the mean of the patch tokens of `encode`."""
        ...

    def panels(self, batch: Batch, plan: MaskPlan) -> dict[str, Panel]:
        """Return the columns of a picture; `panel_captions` orders and names them."""
        ...

    def panel_captions(self) -> dict[str, str]:
        """Return the caption of each panel, in the order in which they are shown."""
        ...

    def step_flops(self) -> int:
        """Return the FLOPs of one training step per image, two a multiply-add."""
        ...


class Task(Protocol):
    """What a batch is for. The train step knows tasks through this alone."""

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
        """Return fresh parameters and extra state (batch statistics; {} if none)."""
        ...

    def prepare(self, batch: Batch, rng: Rng) -> Batch:
        """Return the global batch with all that is drawn for each example, masks for one.

        The step calls it before it cuts the batch into parts, so that an example's draws do not
        depend on how many parts there are. Arrays have B rows, or 1 that is shared by all.
        """
        ...

    def step_flops(self) -> int:
        """Return the FLOPs of one training step per image, two a multiply-add."""
        ...

    def loss(
        self, params: Params, extra: Any, batch: Batch, rng: Rng
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """Return the scalar loss of a prepared batch, a mean over it, and (metrics, new extra).

        Of a batch in parts, loss, metrics, gradients and new extra state are means over the parts.
        """
        ...


class Evaluator(Protocol):
    """Something to measure or draw now and then."""

    def run(self, params: Params, extra: Any) -> Iterator[tuple[str, float | np.ndarray | str]]:
        """Yield (name, value): a scalar, a picture or a table (text in CSV).

        A picture is uint8 [H, W, 3], a film uint8 [F, H, W, 3].
        """
        ...
