"""Fine-tuning as a task: what the network is shown, its targets, and that parts change nothing."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.models.classifier import Classifier
from mae_jax.models.transfer import make_classifier
from mae_jax.nn.blocks import TransformerBlock
from mae_jax.tasks.erasing import RandomErasing
from mae_jax.tasks.finetune import FinetuneTask
from mae_jax.tasks.mixup import Mixup
from mae_jax.train import sharding
from mae_jax.train.state import TrainState
from mae_jax.train.step import train_step
from mae_jax.types import Batch, Params, Rng
from tests.weights import apply, normal, quick_jit, random_params

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
CLASSES, BATCH_SIZE, GROUP = 5, 16, 4
STEP = 0  # at which groups are mixed in both ways


def draw_batch(count: int = BATCH_SIZE, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (count, 32, 32, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, CLASSES, count), jnp.int32),
    }


def rng_at(step: int, seed: int = 5) -> Rng:
    return Rng(jax.random.key(seed), jnp.asarray(step, jnp.int32))


def make_task(tiny_mae: Any, *, depth: int = 1, **options: Any) -> FinetuneTask:
    """Return a task; `pooling`, `norm_group` and the two kinds of dropout are the classifier's."""
    names = ("pooling", "norm_group", "drop_path_rate", "head_dropout")
    head = {name: options.pop(name) for name in names if name in options}
    model = tiny_mae(depth=depth)
    return FinetuneTask(
        make_classifier(model.unit, model.encoder, CLASSES, **head), MEAN, STD, **options
    )


@pytest.fixture(scope="module")
def plain(tiny_mae) -> FinetuneTask:
    return make_task(tiny_mae)


@pytest.fixture(scope="module")
def mixing(tiny_mae) -> FinetuneTask:
    """All that is drawn for an example, half of the images erased."""
    return make_task(tiny_mae, mixup=Mixup(CLASSES, GROUP), erasing=RandomErasing(0.5))


@pytest.fixture(scope="module")
def params(plain) -> Params:
    return random_params(plain.module.init, jnp.zeros((1, 32, 32, 3)))


def normalised(images: jax.Array) -> np.ndarray:
    scaled = np.asarray(images, np.float64) / 255
    return (scaled - np.asarray(MEAN)) / np.asarray(STD)


def test_fresh_variables_are_parameters_and_batch_statistics(plain, tiny_mae):
    batch = draw_batch(1)
    fresh, extra = jax.eval_shape(plain.init, jax.random.key(0), batch)
    assert fresh.keys() == {"encoder", "head"}
    assert extra == {}
    probe = make_task(tiny_mae, pooling="cls", norm_group=4)
    fresh, extra = jax.eval_shape(probe.init, jax.random.key(0), batch)
    assert fresh["head"].keys() == {"linear"}
    assert fresh["encoder"].keys() >= {"norm"}
    shapes = [x.shape for x in jax.tree.leaves(extra["batch_stats"])]
    assert shapes == [(16,), (16,)]


def test_without_mixing_the_network_sees_normalised_images_and_one_hot_labels(plain):
    batch = draw_batch()
    prepared = plain.prepare(batch, rng_at(0))
    assert prepared.keys() == batch.keys()
    images, targets = plain.examples(prepared)
    np.testing.assert_allclose(images, normalised(batch["image"]), atol=1e-5)
    np.testing.assert_array_equal(targets, np.eye(CLASSES)[np.asarray(batch["label"])])


@pytest.fixture(scope="module")
def prepare(mixing) -> Any:
    return quick_jit(mixing.prepare)


def test_images_are_normalised_then_erased_then_mixed(mixing, prepare):
    batch = draw_batch()
    prepared = prepare(batch, rng_at(STEP))
    images, targets = quick_jit(mixing.examples)(prepared)
    erasure, mixture = prepared["erasure"], prepared["mixture"]

    shown = normalised(batch["image"])
    for row, (top, bottom, left, right) in enumerate(np.asarray(erasure.box)):
        noise = jax.random.normal(erasure.rng[row], shown.shape[1:])
        # Noise of deviation 1, not that of the images: erasing comes after normalising.
        shown[row, top:bottom, left:right] = np.asarray(noise)[top:bottom, left:right]
    erased = (np.asarray(erasure.box)[:, 1] > np.asarray(erasure.box)[:, 0]).sum()
    assert 0 < erased < BATCH_SIZE

    share, boxes = np.asarray(mixture.share), np.asarray(mixture.box)
    labels = np.asarray(batch["label"])
    cut = 0
    for row in range(BATCH_SIZE):
        group, place = divmod(row, GROUP)
        partner = group * GROUP + GROUP - 1 - place
        expected = share[row] * shown[row] + (1 - share[row]) * shown[partner]
        top, bottom, left, right = boxes[row]
        if bottom > top and right > left:  # CutMix
            cut += 1
            expected = shown[row].copy()
            expected[top:bottom, left:right] = shown[partner, top:bottom, left:right]
            outside = 1 - (bottom - top) * (right - left) / 32**2
            assert share[row] == pytest.approx(outside)
        np.testing.assert_allclose(images[row], expected, atol=1e-5)
        one_hot = np.eye(CLASSES)
        own, other = (one_hot[labels[r]] * 0.9 + 0.1 / CLASSES for r in (row, partner))
        np.testing.assert_allclose(
            targets[row], share[row] * own + (1 - share[row]) * other, atol=1e-6
        )
    assert 0 < cut < BATCH_SIZE, "both kinds of mixing are to be seen"
    np.testing.assert_allclose(np.asarray(targets).sum(axis=1), 1.0, rtol=1e-5)


def test_draws_differ_between_steps_and_are_those_of_their_step(mixing):
    batch = draw_batch()
    prepare = jax.jit(mixing.prepare)
    boxes = [np.asarray(prepare(batch, rng_at(step))["erasure"].box).tolist() for step in (1, 1, 2)]
    shares = [
        np.asarray(prepare(batch, rng_at(step))["mixture"].share).tolist() for step in (1, 1, 2)
    ]
    for drawn in (boxes, shares):
        assert drawn[0] == drawn[1]
        assert drawn[1] != drawn[2]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_loss_is_the_cross_entropy_with_smoothed_labels_in_closed_form(
    plain, params, tiny_mae, smoothing
):
    task = make_task(tiny_mae, label_smoothing=smoothing)
    batch = draw_batch()
    images = normalised(batch["image"]).astype(np.float32)
    logits = np.asarray(apply(plain.module, params, images), np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    own = logp[np.arange(BATCH_SIZE), np.asarray(batch["label"])]
    expected = -((1 - smoothing) * own + smoothing * logp.mean(axis=1)).mean()
    loss, (metrics, extra) = quick_jit(lambda p, b: task.loss(p, {}, b, rng_at(0)))(params, batch)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert (metrics, extra) == ({}, {})


def test_logits_of_the_task_are_those_of_normalised_images(plain, params):
    batch = draw_batch(3)
    logits = quick_jit(lambda p, b: plain.call("logits", p, b, extra={}))(params, batch)
    images = normalised(batch["image"]).astype(np.float32)
    np.testing.assert_allclose(logits, apply(plain.module, params, images), atol=1e-4)
    assert logits.dtype == jnp.float32


def probe_variables(probe: FinetuneTask) -> tuple[Params, Any]:
    """Return random parameters, and batch statistics as they start."""
    extra = {"mean": jnp.zeros(16), "var": jnp.ones(16)}
    params = random_params(probe.module.init, jnp.zeros((1, 32, 32, 3)))
    return params, {"batch_stats": {"head": {"batch_norm": extra}}}


def test_probe_trains_on_the_batch_and_is_measured_with_running_statistics(tiny_mae):
    probe = make_task(tiny_mae, pooling="cls", norm_group=BATCH_SIZE)
    batch = draw_batch()
    params, extra = probe_variables(probe)
    _, (_, after) = quick_jit(lambda p, e, b: probe.loss(p, e, b, rng_at(0)))(params, extra, batch)
    assert jax.tree.structure(after) == jax.tree.structure(extra)
    assert float(jnp.abs(after["batch_stats"]["head"]["batch_norm"]["mean"]).max()) > 0

    @quick_jit
    def measure(extra: Any, batch: Batch) -> jax.Array:
        return probe.call("logits", params, batch, extra=extra)

    before, now = (np.asarray(measure(e, batch)) for e in (extra, after))
    assert np.abs(before - now).max() > 1e-3
    one = {name: value[:1] for name, value in batch.items()}
    # Whoever else is in the batch.
    np.testing.assert_allclose(measure(after, one), now[:1], atol=1e-5)


GRADIENTS = optax.trace(decay=0.0)  # its state is the gradient of the last step


def gradients(
    task: FinetuneTask,
    params: Params,
    *,
    extra: Any = None,
    accumulation: int = 1,
    mesh: Any = None,
) -> tuple[float, Params, Any]:
    """Return loss, gradients and extra state of one step, on one device or a mesh."""
    state = TrainState.create(params, extra or {}, GRADIENTS)
    step_fn = functools.partial(
        train_step,
        task=task,
        optimizer=GRADIENTS,
        schedule=lambda step: 0.1 + 0.0 * step,
        seed=7,
        accumulation=accumulation,
    )
    mesh = mesh or sharding.make_mesh(1, 1, jax.devices()[:1])
    shardings, by_row = sharding.state_sharding(state, mesh), sharding.batch_sharding(mesh)
    state, metrics = jax.jit(
        step_fn,
        in_shardings=(shardings, by_row),
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options={"xla_backend_optimization_level": 0},
    )(jax.device_put(state, shardings), sharding.put_batch(draw_batch(), by_row))
    return float(metrics["loss"]), jax.device_get(state.opt_state.trace), state.extra


def assert_close(tree: Any, expected: Any) -> None:
    """Assert that trees of arrays agree, leaf by leaf, to rounding of sums in another order."""
    whole = float(optax.tree.norm(expected))
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-6 * whole


@pytest.fixture(scope="module")
def whole(mixing, params) -> tuple[float, Params, Any]:
    """Of the whole batch on one device."""
    return gradients(mixing, params)


def test_loss_and_gradients_of_a_batch_in_parts_are_those_of_the_whole(mixing, params, whole):
    loss, in_parts, _ = gradients(mixing, params, accumulation=4)
    assert loss == pytest.approx(whole[0], rel=1e-6)
    assert_close(in_parts, whole[1])


def test_a_step_is_the_same_on_one_device_and_on_eight(mixing, params, whole):
    # Two rows a device: groups of four are spread over two.
    loss, spread, _ = gradients(mixing, params, mesh=sharding.make_mesh(8, 1))
    assert loss == pytest.approx(whole[0], rel=1e-6)
    assert_close(spread, whole[1])


def test_running_statistics_and_loss_of_a_probe_in_parts_are_those_of_the_whole(tiny_mae):
    probe = make_task(tiny_mae, pooling="cls", norm_group=4)  # four groups
    params, extra = probe_variables(probe)
    loss, whole, after = gradients(probe, params, extra=extra)
    other, in_parts, parts_after = gradients(probe, params, extra=extra, accumulation=2)
    assert other == pytest.approx(loss, rel=1e-6)
    assert_close(in_parts, whole)
    assert_close(jax.device_get(parts_after), jax.device_get(after))
    assert jax.tree.leaves(after)[0].any()


@pytest.mark.parametrize("kind", ["drop_path_rate", "head_dropout"])
def test_dropout_is_drawn_anew_each_step_and_off_in_evaluation(tiny_mae, kind):
    task = make_task(tiny_mae, depth=2, **{kind: 0.5})
    params = random_params(task.module.init, jnp.zeros((1, 32, 32, 3)))
    batch = draw_batch()
    loss_fn = quick_jit(lambda params, rng: task.loss(params, {}, batch, rng)[0])
    losses = [float(loss_fn(params, rng_at(step))) for step in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    without = make_task(tiny_mae, depth=2)
    of_both = [
        quick_jit(lambda p, t=t: t.call("logits", p, batch))(params) for t in (task, without)
    ]
    np.testing.assert_array_equal(*of_both)


@pytest.mark.parametrize(("depth", "rate"), [(4, 0.3), (12, 0.1), (1, 0.2)])
def test_rate_of_drop_path_grows_from_nothing_to_that_of_the_last_block(tiny_mae, depth, rate):
    classifier = make_task(tiny_mae, depth=depth, drop_path_rate=rate).module
    rates = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, TransformerBlock):
            rates[context.module.name] = context.module.drop_path_rate
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    names = [f"block_{number:02d}" for number in range(depth)]
    linear = [rate * number / (depth - 1) if depth > 1 else 0.0 for number in range(depth)]
    np.testing.assert_allclose([rates[name] for name in names], linear, rtol=1e-9)


def test_share_of_samples_that_a_block_leaves_alone_is_the_square_of_its_rate(tiny_mae):
    rate, count = 0.4, 4000
    classifier: Classifier = make_task(tiny_mae, depth=2, drop_path_rate=rate).module
    encoder = classifier.encoder.clone(grid_size=(1, 1))
    units, ids = normal((count, 1, 192)), jnp.zeros((1, 1), jnp.int32)
    params = random_params(encoder.init, units[:1], ids)
    first = {name: value for name, value in params.items() if name != "block_01"}
    # The first block drops nothing, the second each of its two branches by the rate.
    before = apply(encoder.clone(depth=1), first, units, ids)
    after = apply(encoder, params, units, ids, drop_path_rng=jax.random.key(0))
    same = np.asarray((before == after).all(axis=(1, 2)))
    deviation = np.sqrt(rate**2 * (1 - rate**2) / count)
    assert abs(same.mean() - rate**2) < 4 * deviation
    assert not np.asarray((before == apply(encoder, params, units, ids)).all(axis=(1, 2))).any()


def test_flops_grow_with_what_is_trained(tiny_mae):
    task = make_task(tiny_mae, depth=2)
    classifier = task.module
    # 17 tokens of width 16; MLP of 64.
    block = 2 * 17 * 12 * 16**2 + 4 * 17**2 * 16
    embed, head = 2 * 16 * 192 * 16, 2 * 16 * CLASSES
    forward = embed + 2 * block + head
    assert task.step_flops() == 3 * forward - embed
    assert classifier.step_flops(0) == forward + head
    assert classifier.step_flops(0.5) == forward + 2 * head + block
    assert classifier.step_flops(1) == forward + 2 * head + 2 * block
    assert make_task(tiny_mae, depth=2, trainable_blocks=1).step_flops() == classifier.step_flops(1)
