"""What is measured and drawn on held-out images, against slow versions in numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn import masking
from mae_jax.nn.patches import PatchUnit
from mae_jax.tasks import readout
from mae_jax.tasks.evaluators import Features, MaskedError, Pictures, Placement, ReadOuts
from mae_jax.tasks.pictures import GAP
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train import sharding
from mae_jax.types import MaskPlan, Prediction, Rng, Stream

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
SEED = 11


class HostBatches:
    """Batches of a set, the last one filled up with repeated examples of weight 0."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int):
        self._images, self._labels, self._batch_size = images, labels, batch_size
        self.iterations = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.iterations += 1
        count, size = len(self._images), self._batch_size
        for start in range(0, count, size):
            position = np.arange(start, start + size)
            yield {
                "image": self._images[position % count],
                "label": self._labels[position % count],
                "index": position % count,
                "weight": (position < count).astype(np.float32),
            }


def draw_set(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (count, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    images = coarse + rng.integers(0, 56, (count, 32, 32, 3))
    return images.astype(np.uint8), rng.integers(0, 3, count)


def placement_on(mesh: jax.sharding.Mesh) -> Placement:
    by_row = sharding.batch_sharding(mesh)
    names = ("image", "label", "weight")
    return Placement(
        lambda batch: sharding.put_batch({name: batch[name] for name in names}, by_row),
        sharding.replicated(mesh),
        SEED,
    )


@pytest.fixture(scope="module")
def placement() -> Placement:
    return placement_on(sharding.make_mesh(1, 1, jax.devices()[:1]))


class KeptMean(nn.Module):
    """A method without a network: it predicts the mean of the kept patches, times a gain."""

    unit: PatchUnit = PatchUnit((32, 32), 8)

    @nn.nowrap
    def plan(self, rng: jax.Array, batch_size: int) -> MaskPlan:
        return masking.random_plan(rng, batch_size, self.unit.count, 4)

    @nn.compact
    def predict(self, batch: Any, plan: MaskPlan) -> dict[str, Prediction]:
        gain = self.param("gain", nn.initializers.ones, ())
        units = self.unit.split(batch["image"])
        target = masking.take(units, plan.ids_mask)
        kept = masking.take(units, plan.ids_keep).mean(axis=1, keepdims=True)
        output = jnp.broadcast_to(gain * kept, target.shape)
        weight = jnp.full(target.shape[:2], 1.0 / (target.shape[0] * target.shape[1]))
        return {"image": Prediction(output, target, plan.ids_mask, weight, self.unit.count)}


TASK = PretrainTask(KeptMean(), MEAN, STD)
PARAMS = {"gain": np.float32(0.7)}


TRAIN, HELD_OUT = draw_set(20, seed=1), draw_set(13, seed=2)


def mask_key(number: int) -> jax.Array:
    return Rng(jax.random.key(SEED), number).key(Stream.EVAL_MASK)


def slow_patches(images: np.ndarray) -> np.ndarray:
    """Return normalised patches float64 [B, 16, 192]."""
    pixels = (images.astype(np.float64) / 255 - MEAN) / STD
    return np.stack(
        [
            pixels[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].reshape(len(images), -1)
            for r in range(4)
            for c in range(4)
        ],
        axis=1,
    )


def hidden_places(task: PretrainTask, number: int, batch_size: int) -> np.ndarray:
    return np.asarray(task.method.plan(mask_key(number), batch_size).ids_mask)


def slow_mean_patches(task: PretrainTask, batch_size: int) -> np.ndarray:
    """Return the mean over training images of the patches that were hidden, place by place."""
    means = np.zeros((16, 192))
    for place in range(16):
        seen = []
        for start in range(0, len(TRAIN[0]), batch_size):
            images = TRAIN[0][start : start + batch_size]
            ids = hidden_places(task, start // batch_size, batch_size)
            seen += [
                patches[place] for b, patches in enumerate(slow_patches(images)) if place in ids[b]
            ]
        means[place] = np.mean(seen, axis=0)
    return means


def slow_errors(task: PretrainTask, params: Any, batch_size: int) -> tuple[float, float]:
    """Return the losses of the model and of the mean, image by image without any padding."""
    means = slow_mean_patches(task, batch_size)
    images, labels = HELD_OUT
    of_model, of_mean = [], []
    for number, batch in enumerate(HostBatches(images, labels, batch_size)):
        ids = hidden_places(task, number, batch_size)
        plan = task.method.plan(mask_key(number), batch_size)
        output = task.method.apply(
            {"params": params}, task.inputs({"image": batch["image"]}), plan, method="predict"
        )["image"].output
        patches = slow_patches(batch["image"])
        for b in range(min(batch_size, len(images) - number * batch_size)):
            target = patches[b][ids[b]]
            of_model.append(np.mean((np.asarray(output[b], np.float64) - target) ** 2))
            of_mean.append(np.mean((means[ids[b]] - target) ** 2))
    assert len(of_model) == len(images)
    return float(np.mean(of_model)), float(np.mean(of_mean))


def masked_error(
    placement: Placement, batch_size: int, train: tuple = TRAIN, held_out: tuple = HELD_OUT
) -> MaskedError:
    batches = (HostBatches(*examples, batch_size) for examples in (train, held_out))
    return MaskedError(TASK, *batches, placement)


@pytest.fixture(scope="module")
def by_eight(placement) -> MaskedError:
    return masked_error(placement, 8)


# 13 images in batches of 8 leave three of the last batch as padding, 20 leave four; 1 leaves none.
@pytest.mark.parametrize("batch_size", [1, 8])
def test_errors_are_means_over_images_whatever_the_padding(placement, batch_size):
    figures = dict(masked_error(placement, batch_size).run(PARAMS, {}))
    of_model, of_mean = slow_errors(TASK, PARAMS, batch_size)
    assert figures.keys() == {"loss", "mean_predictor_loss"}
    assert figures["loss"] == pytest.approx(of_model, rel=1e-5)
    assert figures["mean_predictor_loss"] == pytest.approx(of_mean, rel=1e-5)
    assert all(type(value) is float for value in figures.values())


def test_what_stands_in_the_padding_does_not_matter(placement, by_eight):
    class Spoiled(HostBatches):
        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            for batch in super().__iter__():
                padding = batch["weight"][:, None, None, None] == 0
                yield batch | {"image": np.where(padding, np.uint8(255), batch["image"])}

    evaluator = MaskedError(TASK, Spoiled(*TRAIN, 8), Spoiled(*HELD_OUT, 8), placement)
    plain = dict(by_eight.run(PARAMS, {}))
    assert dict(evaluator.run(PARAMS, {})) == pytest.approx(plain, rel=1e-6)


def test_errors_of_no_example_are_refused(placement):
    batch = next(iter(HostBatches(*HELD_OUT, 4)))
    none = [{**batch, "weight": np.zeros(4, np.float32)}]
    with pytest.raises(ConfigError, match="data: expected examples to evaluate on that can be"):
        dict(MaskedError(TASK, none, none, placement).run(PARAMS, {}))


def test_masks_of_an_evaluation_are_the_same_at_every_step(by_eight):
    first = dict(by_eight.run(PARAMS, {}))
    other = dict(by_eight.run({"gain": np.float32(0.1)}, {}))
    assert dict(by_eight.run(PARAMS, {})) == first
    assert other["loss"] != first["loss"]
    assert other["mean_predictor_loss"] == first["mean_predictor_loss"]


def test_masks_of_an_evaluation_depend_on_the_seed_of_the_run(placement, by_eight):
    one = dict(by_eight.run(PARAMS, {}))
    two = dict(masked_error(dataclasses.replace(placement, seed=SEED + 1), 8).run(PARAMS, {}))
    assert one["loss"] != two["loss"]


def test_training_images_are_read_once(placement):
    train = HostBatches(*TRAIN, 8)
    evaluator = MaskedError(TASK, train, HostBatches(*HELD_OUT, 8), placement)
    for _ in range(3):
        list(evaluator.run(PARAMS, {}))
    assert train.iterations == 1


@pytest.mark.parametrize("batch_size", [4, 40])
def test_mean_of_a_constant_set_is_never_wrong(placement, batch_size):
    constant = TRAIN[0][:1].repeat(32, axis=0), np.zeros(32, np.int64)
    figures = dict(masked_error(placement, batch_size, constant, constant).run(PARAMS, {}))
    assert figures["mean_predictor_loss"] == pytest.approx(0.0, abs=1e-10)
    assert figures["loss"] > 0.1


class Half:
    """The rows that one of two processes has of every batch."""

    def __init__(self, batches: HostBatches):
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self._batches:
            half = len(batch["weight"]) // 2
            yield {name: rows[:half] for name, rows in batch.items()} | {"whole": batch}


@pytest.fixture
def one_of_two(placement) -> Placement:
    """Return a placement that adds the rows of the other process."""
    return dataclasses.replace(placement, put=lambda batch: placement.put(batch["whole"]))


def test_errors_count_the_rows_of_all_processes(one_of_two, by_eight):
    halves = (Half(HostBatches(*examples, 8)) for examples in (TRAIN, HELD_OUT))
    figures = dict(MaskedError(TASK, *halves, one_of_two).run(PARAMS, {}))
    assert figures == dict(by_eight.run(PARAMS, {}))


def test_errors_are_the_same_on_eight_devices(by_eight):
    spread = placement_on(sharding.make_mesh(4, 2))
    one = dict(by_eight.run(PARAMS, {}))
    assert dict(masked_error(spread, 8).run(PARAMS, {})) == pytest.approx(one, rel=1e-5)


@pytest.fixture(scope="module")
def task(tiny_mae) -> PretrainTask:
    return PretrainTask(tiny_mae(depth=1, norm_pix_loss=False), MEAN, STD)


@pytest.fixture(scope="module")
def params(task) -> Any:
    batch = {"image": jnp.zeros((1, 32, 32, 3), jnp.uint8)}
    return jax.jit(lambda: task.init(jax.random.key(0), batch)[0])()


class Pixels(nn.Module):
    """A method whose features are the mean colours, times a gain that starts at zero."""

    @nn.compact
    def features(self, batch: Any) -> jax.Array:
        gain = self.param("gain", nn.initializers.zeros, ())
        return gain * batch["image"].mean(axis=(1, 2))


def red_green_blue(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images whose class is their brightest colour."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = 100 * np.eye(3, dtype=int)[labels][:, None, None] + rng.integers(
        0, 90, (count, 4, 4, 3)
    )
    return images.astype(np.uint8), labels


@pytest.fixture
def readouts(placement) -> tuple[ReadOuts, list[str]]:
    """Return the evaluator and a list that grows when initial parameters are made."""
    made: list[str] = []

    def init_params() -> Any:
        made.append("made")
        return {"gain": jnp.zeros(())}

    # 70 and 31: both leave padding in the last batch of 16.
    train, held_out = red_green_blue(70, seed=0), red_green_blue(31, seed=1)
    batches = (HostBatches(*train, 16), HostBatches(*held_out, 16))
    return ReadOuts(PretrainTask(Pixels(), MEAN, STD), *batches, placement, init_params), made


NAMES = ["linear_top1", "linear_top1_std", "knn_top1"]


def test_read_outs_are_named_with_those_of_the_untrained_encoder_behind(readouts):
    figures = list(readouts[0].run({"gain": jnp.ones(())}, {}))
    assert [name for name, _ in figures] == NAMES + [f"random_{name}" for name in NAMES]
    assert all(type(value) is float for _, value in figures)


def test_features_that_tell_classes_apart_beat_those_of_the_initial_parameters(readouts):
    figures = dict(readouts[0].run({"gain": jnp.ones(())}, {}))
    assert figures["linear_top1"] == figures["knn_top1"] == 100.0
    # Features that are all zero choose one class of three, which has 11 or 10 of 31 images.
    assert figures["random_linear_top1"] == pytest.approx(100 * 11 / 31)
    assert figures["random_knn_top1"] < 40.0


def test_without_labels_there_are_no_read_outs(placement):
    images, labels = red_green_blue(8, seed=0)
    sets = (HostBatches(images, labels, 8), HostBatches(images, np.full_like(labels, -1), 8))
    task = PretrainTask(Pixels(), MEAN, STD)
    evaluator = ReadOuts(task, *sets, placement, lambda: {"gain": jnp.zeros(())})
    assert dict(evaluator.run({"gain": jnp.ones(())}, {})) == {}


def test_read_outs_are_those_of_the_features_without_padding(placement, monkeypatch):
    given: dict[str, list[np.ndarray]] = {}

    def linear_top1(*arrays: np.ndarray) -> tuple[float, float]:
        given["linear"] = list(arrays)
        return 1.0, 2.0

    def knn_top1(*arrays: np.ndarray) -> float:
        given["knn"] = list(arrays)
        return 3.0

    monkeypatch.setattr(readout, "linear_top1", linear_top1)
    monkeypatch.setattr(readout, "knn_top1", knn_top1)
    train, held_out = draw_set(21, seed=3), draw_set(9, seed=4)
    evaluator = ReadOuts(
        PretrainTask(Pixels(), MEAN, STD),
        HostBatches(*train, 8),
        HostBatches(*held_out, 8),
        placement,
        lambda: {"gain": jnp.zeros(())},
    )
    figures = evaluator.run({"gain": jnp.asarray(2.0)}, {})
    assert [next(figures) for _ in range(3)] == list(zip(NAMES, (1.0, 2.0, 3.0), strict=True))
    for arrays in given.values():
        for (images, labels), features, of in (
            (train, arrays[0], arrays[1]),
            (held_out, arrays[2], arrays[3]),
        ):
            expected = 2.0 * (images.astype(np.float64) / 255 - MEAN).mean(axis=(1, 2)) / STD
            np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(of, labels)


def test_features_are_the_rows_of_all_processes(one_of_two):
    pixels = PretrainTask(Pixels(), MEAN, STD)
    features, labels = Features(pixels, one_of_two).extract(
        {"gain": jnp.ones(())}, {}, Half(HostBatches(*HELD_OUT, 8))
    )
    assert len(features) == 13
    np.testing.assert_array_equal(labels, HELD_OUT[1])


def test_untrained_encoder_is_made_and_measured_once(readouts):
    evaluator, made = readouts
    assert made == []
    first = dict(evaluator.run({"gain": jnp.ones(())}, {}))
    second = dict(evaluator.run({"gain": jnp.zeros(())}, {}))
    assert made == ["made"]
    assert {k: v for k, v in first.items() if k.startswith("random_")} == {
        k: v for k, v in second.items() if k.startswith("random_")
    }
    assert second["linear_top1"] == second["random_linear_top1"]


def test_features_are_the_mean_of_patch_tokens_with_nothing_hidden(task, params, placement):
    batches = HostBatches(*HELD_OUT, 8)
    features, labels = Features(task, placement).extract(params, {}, batches)
    units = task.method.unit.split(task.inputs({"image": HELD_OUT[0]})["image"])
    encode = jax.jit(task.method.encoder.apply)
    tokens = encode({"params": params["encoder"]}, units, jnp.arange(16)[None])
    np.testing.assert_allclose(features, tokens[:, 1:].mean(axis=1), atol=1e-5)
    np.testing.assert_array_equal(labels, HELD_OUT[1])


@pytest.fixture(scope="module")
def pictures(task, placement) -> Pictures:
    """Return pictures of three images in a batch of eight."""
    (batch, *_) = HostBatches(*HELD_OUT, 8)
    return Pictures(task, batch, placement, count=3)


def test_pictures_are_rows_of_held_out_images_with_hidden_patches_in_grey(pictures, task, params):
    ((name, picture),) = pictures.run(params, {})
    assert name == "pictures"
    assert picture.dtype == np.uint8
    side = 128  # 32 pixels, four times
    assert picture.shape[1:] == (GAP + 4 * (side + GAP), 3)
    top = picture.shape[0] - 3 * (side + GAP)
    assert 0 < top < 100

    mask = np.asarray(masking.mask_of(task.method.plan(mask_key(0), 8))).reshape(8, 4, 4)
    hidden = mask.repeat(8, axis=1).repeat(8, axis=2)[..., None] == 1
    assert hidden[0].mean() == 0.75
    for row in range(3):
        at = [
            picture[top + row * (side + GAP) :, GAP + column * (side + GAP) :][:side:4, :side:4]
            for column in range(4)
        ]
        original = HELD_OUT[0][row]
        np.testing.assert_array_equal(at[0], np.where(hidden[row], 128, original))
        np.testing.assert_array_equal(at[2], np.where(hidden[row], at[1], original))
        np.testing.assert_array_equal(at[3], original)
        assert (at[1] != original).mean() > 0.5


def test_pictures_show_the_same_masks_at_every_step(pictures, params):
    ((_, first),) = pictures.run(params, {})
    ((_, later),) = pictures.run(jax.tree.map(lambda x: 1.5 * x, params), {})
    left = slice(0, GAP + 128)
    np.testing.assert_array_equal(first[:, left], later[:, left])
    assert (first != later).any()


def test_spread_parameters_are_whole_where_they_are_used():
    mesh = sharding.make_mesh(2, 4)
    kernel = np.arange(128, dtype=np.float32).reshape(8, 16)
    where = sharding.state_sharding(kernel, mesh)
    images, _ = draw_set(8, 0)
    batch = {"image": images, "label": np.zeros(8, np.int32), "weight": np.ones(8, np.float32)}
    placement, seen = placement_on(mesh), []

    def total(params: Any, batch: Any) -> jax.Array:
        jax.debug.inspect_array_sharding(params["kernel"], callback=seen.append)
        return params["kernel"].sum() * batch["weight"].sum()

    params = {"kernel": jax.device_put(kernel, where)}
    assert not params["kernel"].sharding.is_fully_replicated
    assert placement.compiled(total)(params, placement.put(batch)) == 8 * kernel.sum()
    assert all(one.is_fully_replicated for one in seen)
    assert seen
