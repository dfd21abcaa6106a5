"""The masked autoencoder as a whole: sizes, what reaches what, pictures, refusals."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.losses.reconstruction import example_losses
from mae_jax.nn.masking import mask_of
from mae_jax.nn.patches import normalize_units
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.pretrain import mae
from mae_jax.types import MaskPlan, Prediction
from tests.flops import products
from tests.weights import apply, normal, quick_jit, random_params


def images_of(model: mae.MaskedAutoencoder, batch_size: int = 2) -> np.ndarray:
    return normal((batch_size, *model.unit.image_size, model.unit.channels), seed=1)


def plan_of(model: mae.MaskedAutoencoder, masks: int = 2) -> MaskPlan:
    noise = np.random.default_rng(2).random((masks, model.unit.count))
    return model.plan(jax.random.key(0), masks, jnp.asarray(noise))


def setup(model: mae.MaskedAutoencoder) -> tuple[Any, dict[str, np.ndarray], MaskPlan]:
    """Return random parameters, a batch of two images and a plan for it."""
    batch, plan = {"image": images_of(model)}, plan_of(model)
    return random_params(model.init, batch, plan, method="predict"), batch, plan


def hidden_pixels(model: mae.MaskedAutoencoder, plan: MaskPlan) -> np.ndarray:
    """Return bool [B, H, W, C], true where a pixel is hidden."""
    (rows, columns), p = model.unit.grid_size, model.unit.patch_size
    mask = np.zeros((len(plan.ids_mask), rows * columns), bool)
    np.put_along_axis(mask, np.asarray(plan.ids_mask), True, axis=1)
    pixels = mask.reshape(-1, rows, columns).repeat(p, axis=1).repeat(p, axis=2)
    return np.repeat(pixels[..., None], model.unit.channels, axis=3)


def shapes_of(model: mae.MaskedAutoencoder) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0),
            {"image": jnp.zeros((1, *model.unit.image_size, model.unit.channels))},
            model.plan(jax.random.key(0), 1),
            method="predict",
        )
    )
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree["params"], sep="/").items()}


# Sizes


@pytest.mark.parametrize(
    ("size", "encoder", "encoder_table", "decoder", "decoder_table", "total"),
    [
        ("vit_b", 85_647_360, 151_296, 26_008_320, 100_864, 111_907_840),
        ("vit_l", 303_099_904, 201_728, 26_139_392, 100_864, 329_541_888),
        ("vit_h", 630_435_840, 328_960, 26_178_124, 131_584, 657_074_508),
    ],
)
def test_parameters_are_as_many_as_published(
    size, encoder, encoder_table, decoder, decoder_table, total
):
    model = mae.make(size=size, image_size=(224, 224))
    counts: Counter[str] = Counter()
    for path, shape in shapes_of(model).items():
        counts[path.split("/")[0]] += math.prod(shape)
    assert counts == {"encoder": encoder, "decoder": decoder}
    # The published numbers include the tables, with a row for the class token.
    tables = [
        sincos_2d(width, model.unit.grid_size).size + width
        for width in (model.encoder.embed_dim, model.decoder.embed_dim)
    ]
    assert tables == [encoder_table, decoder_table]
    assert sum(counts.values()) + sum(tables) == total


def test_parameters_of_the_tiny_model_have_these_names_and_shapes(tiny_mae):
    block = {
        "norm1/scale": (16,),
        "norm1/bias": (16,),
        "attn/qkv/kernel": (16, 48),
        "attn/qkv/bias": (48,),
        "attn/proj/kernel": (16, 16),
        "attn/proj/bias": (16,),
        "norm2/scale": (16,),
        "norm2/bias": (16,),
        "mlp/fc1/kernel": (16, 64),
        "mlp/fc1/bias": (64,),
        "mlp/fc2/kernel": (64, 16),
        "mlp/fc2/bias": (16,),
    }
    assert shapes_of(tiny_mae()) == {
        "encoder/patch_embed/kernel": (192, 16),
        "encoder/patch_embed/bias": (16,),
        "encoder/cls_token": (1, 1, 16),
        **{f"encoder/block_00/{name}": shape for name, shape in block.items()},
        **{f"encoder/block_01/{name}": shape for name, shape in block.items()},
        "encoder/norm/scale": (16,),
        "encoder/norm/bias": (16,),
        "decoder/embed/kernel": (16, 16),
        "decoder/embed/bias": (16,),
        "decoder/mask_token": (1, 1, 16),
        **{f"decoder/block_00/{name}": shape for name, shape in block.items()},
        "decoder/norm/scale": (16,),
        "decoder/norm/bias": (16,),
        "decoder/pred/kernel": (16, 192),
        "decoder/pred/bias": (192,),
    }


@pytest.mark.parametrize(
    ("size", "gflop"), [("vit_b", 57.99), ("vit_l", 123.65), ("vit_h", 290.29)]
)
def test_a_training_step_costs_this_many_flops(size, gflop):
    model = mae.make(size=size, image_size=(224, 224))
    assert round(model.step_flops() / 1e9, 2) == gflop


@pytest.mark.parametrize(
    "fields", [{}, {"use_cls_token": False, "image_size": (16, 40), "decoder_depth": 2}]
)
def test_flops_are_those_of_the_products_in_the_traced_step(tiny_mae, fields):
    model = tiny_mae(**fields)
    batch, plan = {"image": images_of(model, 1)}, plan_of(model, 1)
    params = random_params(model.init, batch, plan, method="predict")

    def loss(params: Any) -> jax.Array:
        predictions = model.apply({"params": params}, batch, plan, method="predict")
        return example_losses(predictions).sum()

    assert products(jax.grad(loss), params) == model.step_flops()


def test_dimensions_given_take_the_place_of_those_of_the_size():
    model = mae.make(
        size="vit_b",
        image_size=(64, 96),
        patch_size=32,
        embed_dim=24,
        depth=3,
        num_heads=6,
        decoder_embed_dim=20,
        decoder_depth=5,
        decoder_num_heads=4,
    )
    assert (model.unit.patch_size, model.unit.grid_size) == (32, (2, 3))
    assert model.encoder.grid_size == model.decoder.grid_size == (2, 3)
    assert (model.encoder.embed_dim, model.encoder.depth, model.encoder.num_heads) == (24, 3, 6)
    assert (model.decoder.embed_dim, model.decoder.depth, model.decoder.num_heads) == (20, 5, 4)
    assert model.decoder.unit_size == 32 * 32 * 3


def test_sizes_and_defaults_are_those_of_the_paper():
    assert mae.SIZES["vit_b"] == (16, 768, 12, 12, 512, 8, 16)
    assert mae.SIZES["vit_l"] == (16, 1024, 24, 16, 512, 8, 16)
    assert mae.SIZES["vit_h"] == (14, 1280, 32, 16, 512, 8, 16)
    model = mae.make(size="vit_b", image_size=(224, 224))
    assert model.mask_ratio == 0.75
    assert model.norm_pix_loss
    assert model.encoder.use_cls_token
    assert model.encoder.positions == "fixed"
    assert model.encoder.drop_path_rate == 0
    assert model.keep_count() == 49


# What is predicted


def test_plan_follows_the_noise_it_is_given(tiny_mae):
    model = tiny_mae()
    noise = np.random.default_rng(0).random((3, 16))
    plan = model.plan(jax.random.key(0), 3, jnp.asarray(noise))
    order = np.argsort(noise, axis=1)
    np.testing.assert_array_equal(plan.ids_keep, order[:, :4])
    np.testing.assert_array_equal(plan.ids_mask, order[:, 4:])


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_targets_are_the_hidden_patches(tiny_mae, norm_pix_loss):
    model = tiny_mae(norm_pix_loss=norm_pix_loss)
    params, batch, plan = setup(model)
    prediction = apply(model, params, batch, plan, method="predict")["image"]
    units = np.asarray(model.unit.split(jnp.asarray(batch["image"])))
    target = np.take_along_axis(units, np.asarray(plan.ids_mask)[..., None], axis=1)
    if norm_pix_loss:
        target = target - target.mean(-1, keepdims=True)
        target = target / np.sqrt(target.var(-1, keepdims=True, ddof=1) + 1e-6)
    assert prediction.output.shape == prediction.target.shape == (2, 12, 192)
    np.testing.assert_allclose(prediction.target, target, atol=2e-6)
    np.testing.assert_array_equal(prediction.ids, plan.ids_mask)
    assert prediction.kind == "mse"


def test_loss_is_the_mean_over_removed_patches_of_the_batch(tiny_mae):
    model = tiny_mae(norm_pix_loss=False)
    params, batch, plan = setup(model)
    predictions = apply(model, params, batch, plan, method="predict")
    reconstruction = apply(model, params, batch, plan, method="reconstruct")
    hidden = hidden_pixels(model, plan)
    error = np.square(np.asarray(reconstruction, np.float64) - batch["image"])
    expected = (error * hidden).sum() / hidden.sum()
    np.testing.assert_allclose(example_losses(predictions).sum(), expected, rtol=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_values_of_hidden_pixels_do_not_reach_the_predictions(tiny_mae, norm_pix_loss):
    model = tiny_mae(norm_pix_loss=norm_pix_loss, depth=1)
    params, batch, plan = setup(model)
    hidden = hidden_pixels(model, plan)
    output = apply(model, params, batch, plan, method="predict")["image"].output
    erased = {"image": np.where(hidden, np.nan, batch["image"])}
    other = apply(model, params, erased, plan, method="predict")["image"].output
    np.testing.assert_array_equal(other, output)
    weight = normal(output.shape, seed=3)

    @quick_jit
    @jax.grad
    def gradient(image: jax.Array) -> jax.Array:
        prediction = model.apply({"params": params}, {"image": image}, plan, method="predict")
        return jnp.vdot(prediction["image"].output, weight)

    by_pixel = np.asarray(gradient(batch["image"]))
    assert np.all(by_pixel[hidden] == 0)
    assert np.all(by_pixel[~hidden] != 0)


def test_one_mask_for_all_images_equals_the_same_mask_for_each(tiny_mae):
    model = tiny_mae()
    params, batch, _ = setup(model)
    one = plan_of(model, 1)
    each = jax.tree.map(lambda ids: jnp.tile(ids, (2, 1)), one)
    for method in ("predict", "panels"):
        shared = apply(model, params, batch, one, method=method)
        repeated = apply(model, params, batch, each, method=method)
        shared, repeated = (
            {name: jax.tree.leaves(value)[0] for name, value in out.items()}
            for out in (shared, repeated)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), shared, repeated)


def test_a_batch_spread_over_devices_has_the_same_masks_and_predictions(tiny_mae):
    model = tiny_mae()
    params, _, _ = setup(model)
    batch = {"image": images_of(model, 8)}

    @jax.jit
    def predict(batch: dict[str, jax.Array]) -> Prediction:
        plan = model.plan(jax.random.key(0), 8)
        return model.apply({"params": params}, batch, plan, method="predict")["image"]

    alone = predict(batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = predict(jax.device_put(batch, sharding))
    assert len(spread.output.sharding.device_set) == 8
    np.testing.assert_array_equal(spread.ids, alone.ids)
    np.testing.assert_allclose(spread.output, alone.output, atol=1e-6)


def test_learned_positions_start_as_the_fixed_ones(tiny_mae):
    fixed, learned = tiny_mae(), tiny_mae(positions="learned")
    params, batch, plan = setup(fixed)
    table = np.concatenate([np.zeros((1, 16)), sincos_2d(16, (4, 4))])[None].astype(np.float32)
    started = {**params, "encoder": {**params["encoder"], "pos_embed": table}}
    np.testing.assert_allclose(
        apply(learned, started, batch, plan, method="predict")["image"].output,
        apply(fixed, params, batch, plan, method="predict")["image"].output,
        atol=1e-6,
    )


def test_bfloat16_is_for_products_alone(tiny_mae):
    model = tiny_mae(dtype=jnp.bfloat16)
    params, batch, plan = setup(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    prediction = apply(model, params, batch, plan, method="predict")["image"]
    exact = apply(tiny_mae(), params, batch, plan, method="predict")["image"]
    for value in (prediction.output, prediction.target, prediction.weight):
        assert value.dtype == jnp.float32
        assert np.all(np.isfinite(value))
    np.testing.assert_array_equal(prediction.target, exact.target)
    assert 0 < np.abs(prediction.output - exact.output).max() < 0.1
    assert apply(model, params, batch, method="features").dtype == jnp.float32


def test_drop_path_of_the_encoder_needs_a_key(tiny_mae):
    plain = tiny_mae()
    params, batch, plan = setup(plain)
    model = plain.clone(encoder=plain.encoder.clone(drop_path_rate=0.9))
    expected = apply(plain, params, batch, plan, method="predict")["image"].output
    without = apply(model, params, batch, plan, method="predict")["image"].output
    np.testing.assert_array_equal(without, expected)
    # The last block of each of two images keeps both branches with probability 1e-4.
    key = jax.random.key(0)
    dropped = apply(model, params, batch, plan, method="predict", drop_path_rng=key)
    assert not np.array_equal(dropped["image"].output, expected)


@pytest.mark.parametrize("use_cls_token", [True, False])
def test_features_are_the_mean_of_the_patch_tokens(tiny_mae, use_cls_token):
    model = tiny_mae(use_cls_token=use_cls_token)
    params, batch, _ = setup(model)
    features = apply(model, params, batch, method="features")
    assert features.shape == (2, 16)
    units = model.unit.split(jnp.asarray(batch["image"]))
    ids = np.arange(16)[None]
    tokens = np.asarray(apply(model.encoder, params["encoder"], units, ids))
    expected = tokens[:, int(use_cls_token) :].mean(axis=1)
    np.testing.assert_allclose(features, expected, atol=1e-5)


# Pictures


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_holds_the_predictions_at_the_hidden_patches(tiny_mae, norm_pix_loss):
    model = tiny_mae(norm_pix_loss=norm_pix_loss)
    params, batch, plan = setup(model)
    output = np.asarray(apply(model, params, batch, plan, method="predict")["image"].output)
    images = apply(model, params, batch, plan, method="reconstruct")
    assert images.shape == batch["image"].shape
    ids = np.asarray(plan.ids_mask)[..., None]
    if norm_pix_loss:  # with the mean and deviation of the true patches
        true = np.asarray(model.unit.split(jnp.asarray(batch["image"])))
        true = np.take_along_axis(true, ids, axis=1)
        std = np.sqrt(true.var(-1, keepdims=True, ddof=1) + 1e-6)
        output = output * std + true.mean(-1, keepdims=True)
    units = np.take_along_axis(np.asarray(model.unit.split(images)), ids, axis=1)
    np.testing.assert_allclose(units, output, atol=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_decoder_gives_back_the_images(tiny_mae, norm_pix_loss, monkeypatch):
    model = tiny_mae(norm_pix_loss=norm_pix_loss)
    params, batch, plan = setup(model)
    units = model.unit.split(jnp.asarray(batch["image"]))
    ids = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)[..., None]
    values = normalize_units(units) if norm_pix_loss else units
    perfect = jnp.take_along_axis(values, ids, axis=1)
    monkeypatch.setattr(type(model.decoder), "__call__", lambda *args, **kwargs: perfect)
    images = model.apply({"params": params}, batch, plan, method="reconstruct")
    np.testing.assert_allclose(images, batch["image"], atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"image_size": (16, 40), "channels": 1, "mask_ratio": 0.6}])
def test_panels_are_the_four_columns_of_the_figures(tiny_mae, fields):
    model = tiny_mae(**fields)
    params, batch, plan = setup(model)
    panels = apply(model, params, batch, plan, method="panels")
    assert set(panels) == {"masked", "reconstruction", "pasted", "original"}
    images, hidden = batch["image"], hidden_pixels(model, plan)
    masked = np.asarray(panels["masked"].hidden)
    assert masked.shape == (*images.shape[:3], 1)
    np.testing.assert_array_equal(masked, hidden[..., :1])
    assert masked.mean() == pytest.approx(1 - model.keep_count() / model.unit.count)
    np.testing.assert_array_equal(panels["masked"].images, images)
    np.testing.assert_array_equal(panels["original"].images, images)
    pasted = np.asarray(panels["pasted"].images)
    np.testing.assert_array_equal(pasted[~hidden], images[~hidden])
    reconstruction = np.asarray(panels["reconstruction"].images)
    np.testing.assert_array_equal(pasted[hidden], reconstruction[hidden])
    assert not np.allclose(reconstruction[~hidden], images[~hidden])  # predicted as well
    np.testing.assert_array_equal(
        np.asarray(mask_of(plan)).sum(axis=1), [model.unit.count - model.keep_count()] * 2
    )


def test_every_panel_has_a_caption(tiny_mae):
    captions = tiny_mae(mask_ratio=0.6).panel_captions()
    assert list(captions) == ["masked", "reconstruction", "pasted", "original"]
    assert captions["masked"] == "masked 60%"
    assert "true patch mean and std" in captions["reconstruction"]
    raw = tiny_mae(norm_pix_loss=False).panel_captions()
    assert raw["reconstruction"] == "reconstruction"


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "vit_g"}, "model.size 'vit_g' is not one of vit_s, vit_b, vit_l, vit_h"),
        ({"positions": "none"}, "model.positions 'none' is not one of fixed, learned"),
        ({"patch_size": 5}, "image_size 32x32 is not a multiple of patch_size 5"),
        ({"patch_size": 0}, "must all be at least 1"),
        ({"channels": 0}, "channels 0 must all be at least 1"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0 keeps 16 of 16 units"),
        ({"mask_ratio": 0.99}, "mask_ratio 0.99 keeps 0 of 16 units"),
        ({"patch_size": 32}, "keeps 0 of 1 units; at least one must be kept and one hidden"),
        (
            {"num_heads": 3},
            "model.embed_dim 16 must be a positive multiple of 4 and of"
            " model.num_heads, which is 3",
        ),
        ({"embed_dim": 18, "num_heads": 2}, "model.embed_dim 18 must be a positive multiple of 4"),
        ({"embed_dim": 0}, "model.embed_dim 0 must be a positive multiple of 4"),
        ({"num_heads": 0}, "model.num_heads, which is 0"),
        (
            {"decoder_num_heads": 5},
            "model.decoder_embed_dim 16 must be a positive multiple of 4 and of"
            " model.decoder_num_heads, which is 5",
        ),
        ({"decoder_embed_dim": 6}, "model.decoder_embed_dim 6 must be a positive multiple of 4"),
        ({"depth": 0}, "model.depth must be at least 1"),
        ({"decoder_depth": -1}, "model.decoder_depth must be at least 1"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(tiny_mae, fields, message):
    with pytest.raises(ConfigError) as error:
        tiny_mae(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize("shape", [(2, 32, 24, 3), (2, 32, 32, 1), (32, 32, 3)])
def test_images_of_another_shape_are_refused(tiny_mae, shape):
    model = tiny_mae()
    batch = {"image": jnp.zeros(shape)}
    with pytest.raises(ValueError, match=r"expected images \[B, 32, 32, 3\], got"):
        model.init(jax.random.key(0), batch, plan_of(model), method="predict")


def test_noise_of_another_shape_is_refused(tiny_mae):
    with pytest.raises(ValueError, match=r"expected noise \[2, 16\], got \[2, 4\]"):
        tiny_mae().plan(jax.random.key(0), 2, jnp.zeros((2, 4)))


def test_mask_tokens_in_the_encoder_show_no_hidden_pixel(tiny_mae):
    model = tiny_mae(mask_tokens_in_encoder=True)
    params, batch, plan = setup(model)
    assert params["encoder"]["mask_token"].shape == (1, 1, 16)
    assert "mask_token" not in params["decoder"]
    weight = normal((2, 12, 192), seed=3)

    @quick_jit
    @jax.grad
    def gradient(image: jax.Array) -> jax.Array:
        prediction = model.apply({"params": params}, {"image": image}, plan, method="predict")
        return jnp.vdot(prediction["image"].output, weight)

    by_pixel, hidden = np.asarray(gradient(batch["image"])), hidden_pixels(model, plan)
    assert np.all(by_pixel[hidden] == 0)
    assert np.all(by_pixel[~hidden] != 0)
    # 16 tokens and the class token instead of 5 in the encoder: it costs more.
    assert model.step_flops() > tiny_mae().step_flops()


def test_loss_on_all_patches_is_the_mean_over_all(tiny_mae):
    model = tiny_mae(loss_on="all", norm_pix_loss=False)
    params, batch, plan = setup(model)
    everywhere = apply(model, params, batch, plan, method="predict")
    difference = apply(model, params, batch, plan, method="reconstruct") - batch["image"]
    expected = np.square(np.asarray(difference, np.float64)).mean()
    np.testing.assert_allclose(example_losses(everywhere).sum(), expected, rtol=1e-5)
    # The hidden ones are those of the model whose loss is on them alone.
    hidden = apply(tiny_mae(norm_pix_loss=False), params, batch, plan, method="predict")
    np.testing.assert_allclose(
        everywhere["image"].output[:, 4:], hidden["image"].output, rtol=1e-5, atol=1e-6
    )


def test_noise_decides_random_masks_alone(tiny_mae):
    with pytest.raises(ValueError, match="noise decides random masks, mask_sampling is grid"):
        tiny_mae(mask_sampling="grid").plan(jax.random.key(0), 1, jnp.zeros((1, 16)))


@pytest.mark.parametrize(
    ("field", "value"), [("mask_sampling", "tube"), ("loss_on", "seen"), ("positions", "rotary")]
)
def test_an_unknown_choice_is_refused(tiny_mae, field, value):
    with pytest.raises(ConfigError, match=f"model.{field} '{value}' is not one of"):
        tiny_mae(**{field: value})
