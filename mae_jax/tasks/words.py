"""What a method that sees images and captions knows of words that are hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.tasks.evaluators import HostBatches, Placement
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.types import Batch, MaskPlan, Params


def hiding(
    plan: Mapping[str, MaskPlan], scored: jax.Array, padding: jax.Array, rng: jax.Array
) -> dict[str, MaskPlan]:
    """Return a plan with as many hidden places of `text` as `plan`, those that are scored first.

    Then places without a word, then words at random: as many others as possible stay to be seen.

    Args:
      plan: of a batch of B captions of L places.
      scored: bool [B, L], words to hide.
      padding: bool [B, L], places without a word.
      rng: of the other words.
    """
    order = jax.random.uniform(rng, scored.shape) + jnp.where(scored, 2, jnp.where(padding, 1, 0))
    ids = jnp.argsort(order, axis=1).astype(jnp.int32)
    keep = plan["text"].ids_keep.shape[1]
    return {**plan, "text": MaskPlan(ids_keep=ids[:, :keep], ids_mask=ids[:, keep:])}


def hidden_places(plan: MaskPlan, rows: int) -> jax.Array:
    """Return bool [rows, N], True where a place is hidden."""
    ids = jnp.broadcast_to(plan.ids_mask, (rows, plan.ids_mask.shape[1]))
    count = plan.ids_keep.shape[1] + plan.ids_mask.shape[1]
    return jnp.zeros((rows, count), bool).at[jnp.arange(rows)[:, None], ids].set(True)


class WordAccuracy:
    """How often the likeliest word is the true one, at hidden places of certain words.

    Those words are hidden wherever they stand in held-out captions. Beside the words that stay, the
    network sees the patches that its masks leave of the image, or, for `_without_image`, the words
    and nothing else: neither patches nor places for them, as a text without an image is trained on.
    A network that is never trained on such may be worse than words allow; what always answering the
    commonest of the hidden words gives stands beside.

    Yields `word_top1`, `word_top1_without_image` and `word_top1_commonest`, in percent.
    """

    def __init__(
        self,
        task: PretrainTask,
        held_out: HostBatches,
        placement: Placement,
        scored: Sequence[int],
    ):
        """Compile nothing yet.

        Args:
          task: of a method with the function `words`, whose plan is of `image` and `text`.
          held_out: batches with `image`, `text`, `padding` and `weight`.
          placement: of batches on the devices.
          scored: ids of the words.
        """
        self._held_out, self._placement = held_out, placement
        ids = np.asarray(scored, np.int32)

        def count(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, ...]:
            text, padding = batch["text"], batch["padding"]
            of_word = (text[..., None] == ids[None, None]) & ~padding[..., None]  # [B, L, words]
            rng, plan_rng = jax.random.split(key)
            plan = task.method.plan(plan_rng, len(text))
            plan = hiding(plan, of_word.any(axis=-1), padding, rng)
            hidden = hidden_places(plan["text"], len(text))
            asked = (of_word & hidden[..., None]) * batch["weight"][:, None, None]

            def right(plan: Mapping[str, MaskPlan]) -> jax.Array:
                words = task.call("words", params, batch, plan)
                return jnp.sum(asked.sum(axis=-1) * (words == text))

            return right(plan), right({"text": plan["text"]}), asked.sum(axis=(0, 1))

        self._count = placement.compiled(count)

    def run(self, params: Params, extra: Any) -> Iterator[tuple[str, float]]:
        """Yield the three figures.

        Raises:
          ConfigError: if none of the words is in the held-out captions.
        """
        totals = np.zeros(2)
        asked: np.ndarray | float = 0.0
        for number, batch in enumerate(self._held_out):
            key = self._placement.mask_key(number)
            counted = jax.device_get(self._count(params, self._placement.put(batch), key))
            totals += np.asarray(counted[:2], np.float64)
            asked = asked + np.asarray(counted[2], np.float64)
        count = np.sum(asked)
        if not count:
            raise ConfigError("data.scored_words: expected words of held-out captions, got others")
        for name, value in zip(
            ("word_top1", "word_top1_without_image", "word_top1_commonest"),
            (*totals, np.max(asked)),
            strict=True,
        ):
            yield name, float(100 * value / count)
