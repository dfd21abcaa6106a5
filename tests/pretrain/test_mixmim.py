"""MixMIM as a whole: pairing, one mask, both reconstructions, pictures, refusals."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.losses.reconstruction import example_losses
from mae_jax.nn.masking import mask_of, plan_of_mask
from mae_jax.nn.patches import normalize_units
from mae_jax.pretrain import mixmim
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train.step import split_batch
from mae_jax.types import MaskPlan, Rng
from tests.flops import products
from tests.weights import apply, normal, quick_jit, random_params

TINY: dict[str, Any] = {
    "size": "base",
    "image_size": (4, 6),
    "channels": 1,
    "stem_patch_size": 1,
    "stem_dim": 4,
    "depths": (1, 1),  # cells of 2 pixels: 2 x 3 of them
    "num_heads": 1,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
NOISE = np.asarray([[0.3, 0.9, 0.1, 0.7, 0.2, 0.8]])  # keeps 2, 4, 0, hides 3, 5, 1


def make(**fields: Any) -> mixmim.MixMIM:
    return mixmim.make(**{**TINY, **fields})


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    return {"image": normal((4, 4, 6, 1), seed=1)}


@pytest.fixture(scope="module")
def plan() -> MaskPlan:
    return make().plan(jax.random.key(0), 4, jnp.asarray(NOISE))


@pytest.fixture(scope="module")
def params(batch: dict[str, np.ndarray], plan: MaskPlan) -> Any:
    return random_params(make().init, batch, plan, method="predict")


def with_partner(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**batch, "partner_image": batch["image"][::-1]}


# Sizes


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("base", 114_665_784),
        pytest.param("large", 223_468_244, marks=pytest.mark.slow),
        pytest.param("huge", 684_709_594, marks=pytest.mark.slow),
    ],
)
def test_parameters_are_as_many_as_published(size, total):
    model = mixmim.make(size=size, image_size=(224, 224))
    images = {"image": jnp.zeros((2, 224, 224, 3))}

    def init() -> Any:
        rng = jax.random.key(0)
        return model.init(rng, images, model.plan(rng, 2), method="predict")["params"]

    tree = jax.eval_shape(init)
    assert sorted(tree) == ["decoder", "encoder"]
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    # The published numbers include the tables, which are not trained.
    assert count + 56 * 56 * model.encoder.stem_dim + 49 * 512 == total


@pytest.mark.parametrize(
    ("size", "encoder", "decoder"),
    [("base", 16.3, 2.69), ("large", 35.8, 2.70), ("huge", 117.6, 2.73)],
)
def test_products_are_as_many_as_published(size, encoder, decoder):
    """The published counts are of full attention, and of a head on all cells of both sequences."""
    model = mixmim.make(size=size, image_size=(224, 224))
    assert round(sum(model.encoder.flops(49, model.unit.size)) / 2e9, 1) == encoder
    both = sum(model.decoder.flops(49, seen, model.encoder.output_dim, 49) for seen in (25, 24))
    assert round(both / 2e9, 2) == decoder


@pytest.mark.parametrize(("size", "gflop"), [("base", 111.35), ("large", 227.25), ("huge", 715.27)])
def test_a_training_step_costs_this_many_flops(size, gflop):
    model = mixmim.make(size=size, image_size=(224, 224))
    assert round(model.step_flops() / 1e9, 2) == gflop


def test_flops_are_those_of_the_products_in_the_traced_step(plan):
    model = make(window_sizes=(2, 3))  # windows, and a grid that is whole
    batch = {"image": jnp.zeros((2, 4, 6, 1))}
    params = random_params(model.init, batch, plan, method="predict")

    def loss(params: Any) -> jax.Array:
        predictions = model.apply({"params": params}, batch, plan, method="predict")
        return example_losses(predictions).sum()

    of_two_images = products(jax.grad(loss), params)
    assert of_two_images == 2 * model.step_flops()


# Masks and pairs


@pytest.mark.parametrize(("ratio", "hidden"), [(0.5, 24), (0.25, 12), (0.75, 36)])
def test_the_number_hidden_is_truncated(ratio, hidden):
    model = mixmim.make(size="base", image_size=(224, 224), mask_ratio=ratio)
    plan = model.plan(jax.random.key(0), 4)
    assert plan.ids_mask.shape == (1, hidden)
    assert plan.ids_keep.shape == (1, 49 - hidden)


def test_noise_decides_the_one_mask(plan):
    np.testing.assert_array_equal(plan.ids_keep, [[2, 4, 0]])
    np.testing.assert_array_equal(plan.ids_mask, [[3, 5, 1]])
    with pytest.raises(ValueError, match=r"expected noise \[1, 6\], got \[4, 6\]"):
        make().plan(jax.random.key(0), 4, jnp.zeros((4, 6)))


def test_a_mask_of_the_caller_is_one_for_all():
    mask = np.asarray([[0, 1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(make().plan_of_mask(mask).ids_mask, [[1, 3, 5]])
    with pytest.raises(ConfigError, match="mask: expected one for all images, got 2"):
        make().plan_of_mask(np.repeat(mask, 2, axis=0))


@pytest.mark.parametrize(
    ("group", "partners"),
    [
        (0, [7, 6, 5, 4, 3, 2, 1, 0]),
        (4, [3, 2, 1, 0, 7, 6, 5, 4]),
        (2, [1, 0, 3, 2, 5, 4, 7, 6]),
    ],
)
def test_partners_are_found_within_a_group(group, partners):
    images = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
    prepared = make(pairing_group=group).prepare({"image": images, "label": images[:, 0, 0, 0]})
    assert prepared["partner_image"].ravel().tolist() == partners
    assert prepared["image"] is images
    given = {"image": images, "partner_image": images}
    assert make(pairing_group=group).prepare(given) is given  # the caller's own


@pytest.mark.parametrize(("group", "size"), [(0, 3), (4, 6), (4, 2)])
def test_a_batch_that_cannot_be_paired_is_refused(group, size):
    message = f"model.pairing_group {group}: expected an even number that divides .* of {size}$"
    with pytest.raises(ConfigError, match=message):
        make(pairing_group=group).prepare({"image": np.zeros((size, 4, 6, 1), np.uint8)})


def test_an_odd_batch_that_is_not_prepared_is_refused(batch, plan, params):
    odd = {"image": batch["image"][:3]}
    with pytest.raises(ConfigError, match="a batch of pairs: expected an even one, got 3"):
        make().apply({"params": params}, odd, plan, method="predict")


# What is predicted


def test_every_cell_of_every_image_is_predicted_once(batch, plan, params):
    model = make(norm_pix_loss=True)
    predictions = apply(model, params, batch, plan, method="predict")
    image, partner = predictions["image"], predictions["partner"]
    np.testing.assert_array_equal(image.ids, plan.ids_mask)
    np.testing.assert_array_equal(partner.ids, plan.ids_keep)
    ids = np.concatenate([image.ids, partner.ids], axis=1)[0]
    assert sorted(ids) == list(range(6))
    targets = np.concatenate([image.target, partner.target], axis=1)[:, np.argsort(ids)]
    units = model.unit.split(jnp.asarray(batch["image"]))
    np.testing.assert_allclose(targets, normalize_units(units), atol=1e-5)
    total = sum(float(p.weight.sum()) for p in predictions.values())
    assert total == pytest.approx(1)
    assert len({float(w) for p in predictions.values() for w in np.ravel(p.weight)}) == 1


def test_a_prepared_batch_has_the_same_loss_and_rows_of_partners(batch, plan, params):
    plain = apply(make(), params, batch, plan, method="predict")
    prepared = apply(make(), params, with_partner(batch), plan, method="predict")
    for name, rows in (("image", slice(None)), ("partner", slice(None, None, -1))):
        np.testing.assert_allclose(prepared[name].output[rows], plain[name].output, atol=1e-6)
        np.testing.assert_allclose(prepared[name].target[rows], plain[name].target, atol=1e-6)
    losses = [float(example_losses(p).sum()) for p in (plain, prepared)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_prediction_sees_its_own_image_and_only_the_cells_that_are_shown(batch, plan, params):
    model = make()
    given = with_partner(batch)
    weights = {name: normal((4, 3, 4), seed) for seed, name in enumerate(("image", "partner"))}
    hidden = np.asarray(mask_of(plan))[0] == 1

    @quick_jit
    def gradients(given: Any) -> Any:
        def output(name: str, given: Any) -> jax.Array:
            out = model.apply({"params": params}, given, plan, method="predict")[name].output
            return (out * weights[name]).sum()

        return {name: jax.grad(functools.partial(output, name))(given) for name in weights}

    for name, by_pixel in gradients(given).items():
        own, other = ("image", "partner_image")[:: 1 if name == "image" else -1]
        cells = np.abs(model.unit.split(by_pixel[own])).max(axis=(0, 2))
        shown = ~hidden if name == "image" else hidden
        assert np.all(cells[shown] > 0)
        assert np.all(cells[~shown] == 0)
        assert not np.any(by_pixel[other])


def test_parts_of_a_batch_and_eight_devices_have_its_loss(params):
    model = make(pairing_group=8)
    task = PretrainTask(model, (0.5,), (0.25,))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 4, 6, 1), dtype=np.uint8)
    batch = {"image": images, "noise": jnp.asarray(NOISE, jnp.float32)}
    key = Rng(jax.random.key(0), 0)

    @quick_jit
    def whole(batch: Any) -> jax.Array:
        return task.loss(params, {}, task.prepare(batch, key), key)[0]

    @quick_jit
    def in_parts(batch: Any) -> jax.Array:
        parts = split_batch(task.prepare(batch, key), 2)
        return jax.lax.map(lambda part: task.loss(params, {}, part, key)[0], parts).mean()

    alone = float(whole(batch))
    assert float(in_parts(batch)) == pytest.approx(alone, rel=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    on_eight = {**batch, "image": jax.device_put(images, spread)}
    assert float(whole(on_eight)) == pytest.approx(alone, rel=1e-6)
    # And it is a loss of pairs: with other groups it is another.
    other = PretrainTask(make(pairing_group=2), (0.5,), (0.25,))
    swapped = other.prepare(batch, key)["partner_image"]
    assert not np.array_equal(swapped, task.prepare(batch, key)["partner_image"])


# Elsewhere


def test_features_of_a_mixture_are_the_images_own(batch, plan, params):
    model = make()
    tokens = apply(model, params, batch, plan, method="encode")
    assert tokens.shape == (4, 3, 8)
    others = {**batch, "partner_image": np.zeros_like(batch["image"])}
    same = apply(model, params, others, plan, method="encode")
    np.testing.assert_allclose(same, tokens, atol=1e-6)
    features = apply(model, params, batch, plan, method="features")
    np.testing.assert_allclose(features, np.asarray(tokens).mean(axis=1), atol=1e-6)
    assert apply(model, params, batch, method="encode").shape == (4, 6, 8)


def test_panels_show_the_mixture_and_both_reconstructions(plan, params):
    model = make(norm_pix_loss=False)
    images = normal((3, 4, 6, 1), seed=2)  # odd: a picture need not be of pairs
    panels = apply(model, params, {"image": images}, plan, method="panels")
    assert panels.keys() == model.panel_captions().keys()
    panels = {name: np.asarray(panel.images) for name, panel in panels.items()}
    mask = np.asarray(mask_of(plan)).reshape(2, 3).repeat(2, axis=0).repeat(2, axis=1) == 1
    hidden, partner = mask[None, ..., None], images[::-1]
    np.testing.assert_array_equal(panels["original"], images)
    np.testing.assert_array_equal(panels["partner"], partner)
    np.testing.assert_array_equal(panels["masked"], np.where(hidden, partner, images))
    reconstruction = apply(model, params, {"image": images}, plan, method="reconstruct")
    np.testing.assert_allclose(panels["reconstruction"], reconstruction, atol=1e-6)
    expected = np.where(hidden, reconstruction, images)
    np.testing.assert_allclose(panels["pasted"], expected, atol=1e-6)
    other = panels["partner_pasted"]
    np.testing.assert_array_equal(np.where(hidden, other, 0), np.where(hidden, partner, 0))
    # The rows 0 and 2 are a pair in the batch of three as in one of two.
    both = apply(model, params, {"image": images[[0, 2]]}, plan, method="predict")
    cells = model.unit.split(jnp.asarray(other[[0, 2]]))[:, np.asarray(plan.ids_keep)[0]]
    np.testing.assert_allclose(cells, both["partner"].output[::-1], atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "vit_b"}, "model.size 'vit_b' is not one of base, large, huge"),
        ({"positions": "none"}, "model.positions 'none' is not one of fixed, learned"),
        ({"image_size": (4, 5)}, "image_size 4x5 is not a multiple of patch_size 2"),
        ({"mask_ratio": 0.1}, "mask_ratio 0.1 hides 0 of 6 cells"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 hides 6 of 6 cells"),
        ({"depths": (1, 0, 1)}, "model.depths (1, 0, 1): expected at least 1 for each stage"),
        ({"num_heads": 3}, "model.stem_dim 4 must be a positive multiple of 4 and of"),
        ({"decoder_num_heads": 3}, "model.decoder_num_heads, which is 3"),
        ({"decoder_depth": 0}, "model.decoder_depth must be at least 1"),
        ({"pairing_group": 5}, "model.pairing_group 5: expected an even number"),
        ({"window_sizes": (3, 2)}, "model.window_sizes (3, 2): expected divisors"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        make(**fields)
    assert message in str(error.value)


def test_masks_for_each_image_are_refused(batch, params):
    each = plan_of_mask(np.tile([[0, 1, 0, 1, 0, 1]], (4, 1)))
    with pytest.raises(ConfigError, match="mask: expected one for all images, got 4"):
        make().apply({"params": params}, batch, each, method="predict")


def test_predictions_are_float32_in_bfloat16(batch, plan, params):
    model = make(dtype=jnp.bfloat16)
    out = jax.eval_shape(
        lambda: model.apply({"params": params}, batch, plan, method="predict"),
    )
    for prediction in out.values():
        assert prediction.output.dtype == prediction.target.dtype == jnp.float32
