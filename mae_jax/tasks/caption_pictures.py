"""Pictures of a method that sees captions too: its panels, and what it makes of hidden words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mae_jax.tasks import captions
from mae_jax.tasks.evaluators import Pictures, Placement
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.tasks.words import hidden_places
from mae_jax.types import Batch, Params


class CaptionPictures(Pictures):
    """Held-out images in rows, each over its caption. Yields `pictures`; see `captions.grid`.

    Args:
      task: of a method with the function `words`, whose plan is of `image` and `text`.
      batch: with `image`, `text` and `padding`.
      placement: of batches on the devices.
      count: how many rows are shown.
      pieces: ids -> word pieces.
    """

    def __init__(
        self,
        task: PretrainTask,
        batch: Mapping[str, np.ndarray],
        placement: Placement,
        count: int,
        pieces: Callable[[Iterable[int]], list[str]],
    ):
        super().__init__(task, batch, placement, count)
        self._pieces = pieces

        def words(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, ...]:
            plan = task.method.plan(key, len(batch["image"]))  # that of the panels
            hidden = hidden_places(plan["text"], len(batch["text"]))
            lengths = (~batch["padding"]).sum(axis=1)
            # The captions too, for the host has the rows of its own process alone.
            return task.call("words", params, batch, plan), hidden, batch["text"], lengths

        self._words = placement.compiled(words)

    def run(self, params: Params, extra: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the picture, uint8 [height, width, 3]."""
        batch, key = self._placement.put(self._batch), self._placement.mask_key(0)
        panels = jax.device_get(self._panels(params, batch, key))
        predicted, hidden, true, lengths = jax.device_get(self._words(params, batch, key))
        lengths = lengths[: self._count]
        words = [self._pieces(row[:length]) for row, length in zip(true, lengths, strict=False)]
        answers = [
            self._pieces(row[:length]) for row, length in zip(predicted, lengths, strict=False)
        ]
        yield "pictures", captions.grid(self._columns(panels), words, answers, hidden)
