"""Accuracy on hidden words, with the image and without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn import masking
from mae_jax.pretrain import m3ae
from mae_jax.tasks.evaluators import Placement
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.tasks.words import WordAccuracy, hidden_places, hiding
from mae_jax.train import sharding
from mae_jax.types import MaskPlan
from tests.weights import quick_jit

LENGTH, KEPT = 6, 2
DIGITS = (10, 11, 12)  # ids of the words that are scored
# Captions of two words that are scored, of one, of none, of one beside more padding than is hidden.
TEXT = np.array(
    [[5, 10, 6, 7, 12, 0], [12, 5, 6, 0, 0, 0], [5, 6, 7, 8, 9, 5], [11, 0, 0, 0, 0, 0]], np.int32
)
PADDING = TEXT == 0


def plan_of(rows: int) -> dict[str, MaskPlan]:
    key = jax.random.key(0)
    return {
        "image": masking.random_plan(key, rows, 4, 1),
        "text": masking.random_plan(key, rows, LENGTH, KEPT),
    }


@pytest.fixture(scope="module", params=[1, 4])
def hidden(request) -> np.ndarray:
    """What is hidden in 200 draws, bool [200, 4, 6]; of masks for all, and one for each."""
    scored = jnp.isin(TEXT, jnp.array(DIGITS)) & ~PADDING

    @quick_jit
    def draw(rng: jax.Array) -> jax.Array:
        plan = hiding(plan_of(request.param), scored, jnp.asarray(PADDING), rng)
        assert plan["image"].ids_keep.shape == (request.param, 1)
        masking.check_plan(plan["text"], 4, LENGTH)
        return hidden_places(plan["text"], 4)

    return np.stack([draw(jax.random.key(seed)) for seed in range(200)])


class TestHiding:
    def test_as_many_as_ever(self, hidden):
        np.testing.assert_array_equal(hidden.sum(axis=2), LENGTH - KEPT)

    def test_scored_words_first_then_padding(self, hidden):
        assert hidden[:, np.isin(TEXT, DIGITS)].all()
        assert hidden[:, :3][:, PADDING[:3]].all()

    def test_others_at_random(self, hidden):
        share = hidden.mean(axis=0)
        assert ((share[0, [0, 2, 3]] > 0.2) & (share[0, [0, 2, 3]] < 0.5)).all()  # one of three
        np.testing.assert_allclose(share[1, [1, 2]], 0.0)  # all padding is hidden before them
        assert ((share[2] > 0.5) & (share[2] < 0.85)).all()  # four of six


def test_hidden_places_are_those_of_the_mask():
    ids = np.random.default_rng(0).permuted(np.arange(7)[None].repeat(3, axis=0), axis=1)
    for rows in (1, 3):
        plan = MaskPlan(ids[:rows, :3], ids[:rows, 3:])
        expected = [[place in plan.ids_mask[r % rows] for place in range(7)] for r in range(3)]
        got = quick_jit(hidden_places, static_argnums=1)(plan, 3)
        np.testing.assert_array_equal(got, expected)


class Sees(nn.Module):
    """A method that takes every hidden word for the one that the first pixel of the image names.

    Without an image, for `bias`. At places that are seen it says nonsense.
    """

    @nn.nowrap
    def plan(self, rng: jax.Array, batch_size: int) -> dict[str, MaskPlan]:
        return plan_of(1)

    @nn.compact
    def words(self, batch: Any, plan: dict[str, MaskPlan]) -> jax.Array:
        bias = self.param("bias", nn.initializers.zeros, (), jnp.int32)
        named = batch["pixels"][:, 0, 0, 0].astype(jnp.int32) if "image" in plan else bias
        hidden = hidden_places(plan["text"], len(batch["text"]))
        answer = jnp.broadcast_to(jnp.reshape(named, (-1, 1)), hidden.shape)
        return jnp.where(hidden, answer, -1)


class HostBatches:
    """Two batches, the last row of the second one repeated to fill it."""

    def __init__(self, images: np.ndarray, text: np.ndarray):
        self._images, self._text = images, text

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for start, weight in ((0, [1, 1, 1, 1]), (4, [1, 1, 1, 0])):
            rows = np.minimum(np.arange(start, start + 4), 6)
            yield {
                "image": self._images[rows],
                "text": self._text[rows],
                "padding": self._text[rows] == 0,
                "weight": np.array(weight, np.float32),
            }


@pytest.fixture(scope="module")
def placement() -> Placement:
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    by_row = sharding.batch_sharding(mesh)
    return Placement(
        lambda batch: sharding.put_batch(batch, by_row), sharding.replicated(mesh), seed=3
    )


# Scored words: 10, 12 | 12 | none | 11 | 10 | 11, 12 | 12.
SEVEN = np.concatenate([TEXT, [[10, 5, 0, 0, 0, 0], [11, 6, 12, 0, 0, 0], [12, 0, 0, 0, 0, 0]]])
NAMED = np.array([10, 12, 5, 5, 11, 12, 12], np.uint8)  # right: 10 | 12 | | none | none | 12 | 12


def test_only_hidden_scored_words_of_examples_that_count_are_counted(placement):
    images = np.broadcast_to(NAMED[:, None, None, None], (7, 8, 8, 1))
    task = PretrainTask(Sees(), (0.5,), (0.25,))
    batches = HostBatches(images, SEVEN.astype(np.int32))
    evaluator = WordAccuracy(task, batches, placement, DIGITS)
    assert list(evaluator.run({"bias": jnp.int32(11)}, {})) == [
        ("word_top1", pytest.approx(100 * 4 / 8)),
        ("word_top1_without_image", pytest.approx(100 * 2 / 8)),
        ("word_top1_commonest", pytest.approx(100 * 4 / 8)),
    ]
    evaluator._held_out = HostBatches(images, np.full_like(SEVEN, 5, np.int32))
    with pytest.raises(ConfigError, match=r"data\.scored_words"):
        list(evaluator.run({"bias": jnp.int32(11)}, {}))


def test_m3ae_is_such_a_method(placement):
    method = m3ae.make(
        size="small",
        image_size=(16, 16),
        patch_size=8,
        channels=1,
        embed_dim=8,
        depth=1,
        num_heads=2,
        vocabulary_size=13,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        text_length=LENGTH,
    )
    task = PretrainTask(method, (0.5,), (0.25,))
    batches = HostBatches(np.zeros((7, 16, 16, 1), np.uint8), SEVEN.astype(np.int32))
    batch, key = next(iter(batches)), jax.random.key(0)
    params = jax.eval_shape(task.init, key, batch)[0]
    evaluator = WordAccuracy(task, batches, placement, DIGITS)
    counted = jax.eval_shape(evaluator._count, params, batch, key)
    assert [found.shape for found in counted] == [(), (), (3,)]
