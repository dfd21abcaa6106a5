"""VideoMAE: published sizes, masks, what reaches what, targets, pictures, transfer, refusals."""

from __future__ import annotations

import functools
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
from mae_jax.models.transfer import make_classifier, transfer_encoder
from mae_jax.models.video_vit import cube_table
from mae_jax.nn.masking import mask_of, take
from mae_jax.nn.pos_embed import resize_table
from mae_jax.pretrain import videomae
from mae_jax.tasks.inputs import ImageModel
from tests.flops import products
from tests.weights import apply, normal, quick_jit, random_params

TINY: dict[str, Any] = {
    "size": "vit_s",
    "image_size": (12, 16),
    "frames": 6,
    "patch_size": 4,
    "mask_ratio": 0.75,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(**fields: Any) -> videomae.VideoMAE:
    """Return a model of 3 x 3 x 4 cubes, of 3 places in 12 kept."""
    return videomae.make(**TINY | fields)


def draw(model: videomae.VideoMAE, batch_size: int) -> Any:
    return quick_jit(model.plan, static_argnums=1)(jax.random.key(3), batch_size)


@functools.cache
def setup(**fields: Any) -> tuple[videomae.VideoMAE, Any, dict[str, Any], Any]:
    """Return a model, random parameters, a batch of two clips as networks get it, and a plan."""
    model = make(**fields)
    clips = np.random.default_rng(1).integers(0, 256, (2, *model.unit.shape), np.uint8)
    batch = ImageModel(model, MEAN, STD).inputs({"image": jnp.asarray(clips)})
    plan = draw(model, 2)
    return model, random_params(model.init, batch, plan, method="predict"), batch, plan


def hidden_pixels(model: videomae.VideoMAE, plan: Any) -> np.ndarray:
    """Return bool [B, F, H, W, C], true where a pixel is hidden."""
    slots, rows, columns = model.unit.grid_size
    mask = np.asarray(mask_of(plan)).reshape(-1, slots, rows, columns) > 0
    p = model.unit.patch_size
    pixels = mask.repeat(model.unit.tubelet_size, axis=1).repeat(p, axis=2).repeat(p, axis=3)
    return np.repeat(pixels[..., None], model.unit.channels, axis=4)


def shapes_of(model: videomae.VideoMAE) -> dict[str, tuple[int, ...]]:
    clips = jax.ShapeDtypeStruct((1, *model.unit.shape), jnp.float32)
    tree = jax.eval_shape(
        lambda clips: model.init(
            jax.random.key(0),
            {"image": clips, "pixels": clips},
            model.plan(jax.random.key(0), 1),
            method="predict",
        ),
        clips,
    )
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree["params"], sep="/").items()}


# Sizes


@pytest.mark.parametrize(
    ("size", "encoder", "total"),
    [
        ("vit_s", 21.9, 24.0),
        ("vit_b", 86.2, 94.2),
        pytest.param("vit_l", 303.9, 343.0, marks=pytest.mark.slow),
        pytest.param("vit_h", 631.6, 692.5, marks=pytest.mark.slow),
    ],
)
def test_parameters_are_as_many_as_published(size, encoder, total):
    counts: Counter[str] = Counter()
    for path, shape in shapes_of(videomae.make(size=size, image_size=(224, 224))).items():
        counts[path.split("/")[0]] += math.prod(shape)
    assert counts.keys() == {"encoder", "decoder"}
    assert round(counts["encoder"] / 1e6, 1) == encoder
    assert round(sum(counts.values()) / 1e6, 1) == total


@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "everything", "digits"),
    [
        ("vit_s", 4.56, 6.98, 56.9, 2),
        ("vit_b", 15.91, 19.53, 180.3, 2),
        ("vit_l", 52.0, 90.6, 596.8, 1),
        ("vit_h", 105.8, 131.8, 1191.0, 1),
    ],
)
def test_multiply_adds_are_those_of_the_authors_model(size, encoder, decoder, everything, digits):
    model = videomae.make(size=size, image_size=(224, 224))
    assert (model.unit.count, model.keep_count()) == (1568, 160)
    embed_all, blocks_all = model.encoder.flops(1568, model.unit.size)
    embed, blocks = model.encoder.flops(160, model.unit.size)
    decoding = model.decoder.flops(1568, 160, model.encoder.embed_dim, 1408)
    # The authors embed all cubes and then take the kept ones; ours embeds those alone.
    assert round((embed_all + blocks) / 2e9, digits) == encoder
    assert round(decoding / 2e9, digits) == decoder
    assert round((embed_all + blocks_all) / 2e9, 1) == everything
    assert model.step_flops() == 3 * (embed + blocks + decoding) - embed


@pytest.mark.parametrize("fields", [{}, {"mask_tokens_in_encoder": True}])
def test_flops_are_those_of_the_products_in_the_traced_step(fields):
    model, params, batch, plan = setup(**fields)
    batch = {name: clips[:1] for name, clips in batch.items()}
    plan = jax.tree.map(lambda ids: ids[:1], plan)

    def loss(params: Any) -> jax.Array:
        predictions = model.apply({"params": params}, batch, plan, method="predict")
        return example_losses(predictions).sum()

    assert products(jax.grad(loss), params) == model.step_flops()


def test_keys_have_no_bias_and_the_bridge_has_none():
    block = {
        "norm1/scale": (16,),
        "norm1/bias": (16,),
        "attn/qkv/kernel": (16, 48),
        "attn/q_bias": (16,),
        "attn/v_bias": (16,),
        "attn/proj/kernel": (16, 16),
        "attn/proj/bias": (16,),
        "norm2/scale": (16,),
        "norm2/bias": (16,),
        "mlp/fc1/kernel": (16, 64),
        "mlp/fc1/bias": (64,),
        "mlp/fc2/kernel": (64, 16),
        "mlp/fc2/bias": (16,),
    }
    assert shapes_of(make(depth=1, decoder_embed_dim=16)) == {
        "encoder/patch_embed/kernel": (96, 16),
        "encoder/patch_embed/bias": (16,),
        **{f"encoder/block_00/{name}": shape for name, shape in block.items()},
        "encoder/norm/scale": (16,),
        "encoder/norm/bias": (16,),
        "decoder/embed/kernel": (16, 16),
        "decoder/mask_token": (1, 1, 16),
        **{f"decoder/block_00/{name}": shape for name, shape in block.items()},
        "decoder/norm/scale": (16,),
        "decoder/norm/bias": (16,),
        "decoder/pred/kernel": (16, 96),
        "decoder/pred/bias": (96,),
    }


def test_sizes_and_defaults_are_those_of_the_authors():
    assert {name: size[:6] for name, size in videomae.SIZES.items()} == {
        "vit_s": (384, 12, 6, 192, 4, 3),
        "vit_b": (768, 12, 12, 384, 4, 6),
        "vit_l": (1024, 24, 16, 512, 12, 8),
        "vit_h": (1280, 32, 16, 640, 12, 8),
    }
    model = videomae.make(size="vit_h", image_size=(224, 224))
    assert (model.unit.clip_size, model.unit.tubelet_size) == ((16, 224, 224), 2)
    assert model.unit.patch_size == 16
    assert (model.mask_ratio, model.mask_sampling, model.norm_pix_loss) == (0.9, "tube", True)
    assert model.keep_count() == 160
    assert videomae.make(size="vit_b", image_size=(224, 224), mask_ratio=0.95).keep_count() == 80


def test_initial_values_are_those_of_the_authors():
    model = make(embed_dim=64, depth=1, decoder_embed_dim=256)
    batch = {"image": jnp.zeros((1, *model.unit.shape))}
    batch["pixels"] = batch["image"]
    init = functools.partial(model.init, method="predict")
    plan = model.plan(jax.random.key(0), 1)
    params = quick_jit(init)(jax.random.key(0), batch, plan)["params"]
    embed, attn = params["encoder"]["patch_embed"], params["encoder"]["block_00"]["attn"]
    for values, bound, slack in (
        (embed["kernel"], 96**-0.5, 1e-3),  # as PyTorch
        (embed["bias"], 96**-0.5, 0.1),
        (params["decoder"]["embed"]["kernel"], 64**-0.5, 1e-3),  # as PyTorch
        (attn["qkv"]["kernel"], math.sqrt(6 / (64 + 192)), 1e-3),  # Xavier, fused
        (params["decoder"]["mask_token"], 0.02, 0.05),  # cut at one deviation
    ):
        assert bound * (1 - slack) < np.abs(values).max() <= bound * (1 + 1e-6)
    assert not np.any(attn["q_bias"])
    assert not np.any(attn["v_bias"])


# Masks


@pytest.mark.parametrize(
    ("fields", "keep"),
    [
        ({"mask_sampling": "tube"}, 160),
        ({"mask_sampling": "random"}, 157),
        ({"mask_sampling": "frame", "mask_ratio": 0.875}, 196),
    ],
)
def test_masks_of_full_size_keep_as_many_as_the_authors(fields, keep):
    model = videomae.make(size="vit_s", image_size=(224, 224), **fields)
    assert model.keep_count() == keep
    plan = jax.eval_shape(lambda: model.plan(jax.random.key(0), 2))
    assert (plan.ids_keep.shape, plan.ids_mask.shape) == ((2, keep), (2, 1568 - keep))


def test_masks_are_tubes_frames_or_neither():
    def masks(sampling: str) -> np.ndarray:
        model = make(mask_sampling=sampling, mask_ratio=0.67)
        return np.asarray(mask_of(draw(model, 4))).reshape(4, 3, 12)

    tube, frame, random = map(masks, ("tube", "frame", "random"))
    assert np.all(tube == tube[:, :1])
    assert np.all(frame == frame[..., :1])
    assert not np.all(random == random[:, :1])
    assert [m[0].sum() for m in (tube, frame, random)] == [24, 24, 24]


def test_noise_decides_random_masks_alone():
    with pytest.raises(ValueError, match="noise decides random masks, mask_sampling is tube"):
        make().plan(jax.random.key(0), 1, jnp.zeros((1, 36)))
    noise = np.random.default_rng(0).random((2, 36))
    plan = make(mask_sampling="random").plan(jax.random.key(0), 2, jnp.asarray(noise))
    np.testing.assert_array_equal(plan.ids_keep, np.argsort(noise, axis=1)[:, :9])


# What is predicted


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_targets_are_the_hidden_cubes_of_the_pixels(norm_pix_loss):
    model, params, batch, plan = setup(norm_pix_loss=norm_pix_loss)
    prediction = apply(model, params, batch, plan, method="predict")["image"]
    pixels = np.asarray(batch["pixels"], np.float64) / 255
    units = np.asarray(take(model.unit.split(jnp.asarray(pixels)), plan.ids_mask), np.float64)
    if norm_pix_loss:
        by_channel = units.reshape(2, 27, 32, 3)
        by_channel = by_channel - by_channel.mean(2, keepdims=True)
        by_channel = by_channel / (by_channel.std(2, ddof=1, keepdims=True) + 1e-6)
        units = by_channel.reshape(units.shape)
    assert prediction.output.shape == prediction.target.shape == (2, 27, 96)
    assert prediction.target.dtype == jnp.float32
    np.testing.assert_allclose(prediction.target, units, atol=5e-6)
    np.testing.assert_array_equal(prediction.ids, plan.ids_mask)
    assert (prediction.kind, prediction.places) == ("mse", 36)
    assert prediction.weight.sum() == pytest.approx(1)


@pytest.mark.parametrize("fields", [{}, {"mask_tokens_in_encoder": True}])
def test_hidden_pixels_reach_nothing_but_the_target(fields):
    model, params, batch, plan = setup(**fields)
    hidden, weight = hidden_pixels(model, plan), normal((2, 27, 96), seed=3)

    def output(image: jax.Array, pixels: jax.Array) -> jax.Array:
        inputs = {"image": image, "pixels": pixels}
        prediction = model.apply({"params": params}, inputs, plan, method="predict")["image"]
        return jnp.vdot(prediction.output, weight)

    pixels = batch["pixels"].astype(jnp.float32)
    by_input, by_pixel = quick_jit(jax.grad(output, (0, 1)))(batch["image"], pixels)
    assert np.all(np.asarray(by_input)[hidden] == 0)
    assert np.all(np.asarray(by_input)[~hidden] != 0)
    assert not np.any(by_pixel)
    assert ("mask_token" in params["encoder"]) == bool(fields)
    assert ("mask_token" in params["decoder"]) != bool(fields)


def test_every_place_has_a_position_of_its_own_and_the_order_given_is_of_no_account():
    model, params, batch, plan = setup()
    table = cube_table(16, (3, 3, 4))
    np.testing.assert_array_equal(model.encoder.fixed_table()[0], table)
    np.testing.assert_array_equal(table[7, :2], np.float32([np.sin(7.0), np.cos(7.0)]))
    assert len({row.tobytes() for row in table}) == 36
    order = np.random.default_rng(0).permutation(9)
    shuffled = plan.replace(ids_keep=plan.ids_keep[:, order])
    np.testing.assert_allclose(
        apply(model, params, batch, shuffled, method="predict")["image"].output,
        apply(model, params, batch, plan, method="predict")["image"].output,
        atol=2e-5,
    )


def test_bfloat16_is_for_products_alone():
    exact, params, batch, plan = setup()
    model = make(dtype=jnp.bfloat16)
    prediction = apply(model, params, batch, plan, method="predict")["image"]
    expected = apply(exact, params, batch, plan, method="predict")["image"]
    np.testing.assert_array_equal(prediction.target, expected.target)
    assert prediction.output.dtype == jnp.float32
    assert 0 < np.abs(prediction.output - expected.output).max() < 0.1


# Pictures


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_decoder_gives_back_the_clips(norm_pix_loss, monkeypatch):
    model, params, batch, plan = setup(norm_pix_loss=norm_pix_loss)
    units = model._targets(model.unit.split(batch["pixels"]))
    ids = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)
    perfect = take(units, ids)
    monkeypatch.setattr(type(model.decoder), "__call__", lambda *args, **kwargs: perfect)
    reconstruct = functools.partial(model.apply, method="reconstruct")
    clips = quick_jit(reconstruct)({"params": params}, batch, plan)
    np.testing.assert_allclose(clips, batch["image"], atol=2e-5)


def test_raw_predictions_of_clips_of_one_colour_are_finite():
    model, params, batch, plan = setup(norm_pix_loss=False)
    flat = {name: jnp.full_like(clips, 1) for name, clips in batch.items()}
    assert np.all(np.isfinite(apply(model, params, flat, plan, method="reconstruct")))


def test_panels_show_clips():
    model, params, batch, plan = setup()
    panels = apply(model, params, batch, plan, method="panels")
    assert set(model.panel_captions()) == set(panels)
    assert model.panel_captions()["masked"] == "masked 75%"
    hidden = hidden_pixels(model, plan)
    np.testing.assert_array_equal(panels["masked"].hidden, hidden[..., :1])
    np.testing.assert_array_equal(panels["original"].images, batch["image"])
    pasted = np.asarray(panels["pasted"].images)
    np.testing.assert_array_equal(pasted[~hidden], np.asarray(batch["image"])[~hidden])
    assert {panel.images.shape for panel in panels.values()} == {(2, 6, 12, 16, 3)}


# Transfer


def encoder_params(encoder: Any) -> Any:
    return random_params(encoder.init, jnp.zeros((1, 4, 96)), jnp.arange(4)[None])


def test_a_classifier_has_fixed_positions_and_a_norm_of_its_own():
    model, params, batch, _ = setup()
    classifier = make_classifier(model.unit, model.encoder, 5, drop_path_rate=0.2)
    assert classifier.encoder.positions == "fixed"
    assert classifier.example()["image"].shape == (6, 12, 16, 3)
    fresh = random_params(classifier.init, batch["image"])
    assert fresh["head"].keys() == {"norm", "linear"}
    moved = transfer_encoder(params["encoder"], model.encoder, classifier.encoder, fresh["encoder"])
    assert moved.keys() == {"block_00", "patch_embed"}
    params = {"encoder": moved, "head": fresh["head"]}
    logits = apply(classifier, params, batch["image"])
    # The same by hand: the encoder without its norm, the mean, the norm, the linear layer.
    bare = model.encoder.clone(final_norm=False)
    tokens = apply(bare, moved, model.unit.split(batch["image"]), jnp.arange(36)[None])
    pooled = np.asarray(tokens).mean(axis=1)
    pooled = pooled - pooled.mean(-1, keepdims=True)
    pooled = pooled / np.sqrt(pooled.var(-1, keepdims=True) + 1e-6)
    head = jax.tree.map(np.asarray, fresh["head"])
    pooled = pooled * head["norm"]["scale"] + head["norm"]["bias"]
    expected = pooled @ head["linear"]["kernel"] + head["linear"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    ids = [classifier.layer_id(f"encoder/{name}") for name in ("patch_embed/kernel", "norm/bias")]
    assert ids == [0, 2]
    assert classifier.layer_id("encoder/block_00/attn/q_bias") == 1
    assert classifier.layer_id("head/linear/kernel") == 2


def test_clips_of_other_frames_and_sizes_have_the_positions_of_their_own_grid():
    model, params, _, _ = setup()
    classifier = make_classifier(model.unit, model.encoder, 5, image_size=(16, 20), frames=4)
    assert classifier.unit.shape == (4, 16, 20, 3)
    assert classifier.encoder.grid_size == (2, 4, 5)
    fresh = jax.eval_shape(
        classifier.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4, 16, 20, 3), jnp.float32)
    )["params"]["encoder"]
    moved = transfer_encoder(params["encoder"], model.encoder, classifier.encoder, fresh)
    assert "pos_embed" not in moved
    np.testing.assert_array_equal(classifier.encoder.fixed_table()[0], cube_table(16, (2, 4, 5)))


def test_learned_positions_are_resized_in_each_time_slot_and_not_in_time():
    source = make(positions="learned").encoder
    params = encoder_params(source)
    target = source.clone(grid_size=(3, 4, 5))
    moved = transfer_encoder(params, source, target, encoder_params(target))
    slots = np.asarray(params["pos_embed"]).reshape(3, 1, 12, 16)
    expected = np.concatenate([resize_table(s, (3, 4), (4, 5), 0) for s in slots], axis=1)
    np.testing.assert_allclose(moved["pos_embed"], expected, atol=1e-6)
    longer = source.clone(grid_size=(4, 3, 4))
    with pytest.raises(ConfigError, match=r"pos_embed: expected 3 time slots.* got 4; take"):
        transfer_encoder(params, source, longer, encoder_params(longer))


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "vit_g"}, "model.size 'vit_g' is not one of vit_s, vit_b, vit_l, vit_h"),
        ({"mask_sampling": "block"}, "model.mask_sampling 'block' is not one of tube, random"),
        ({"positions": "none"}, "model.positions 'none' is not one of fixed, learned"),
        ({"frames": 5}, "frames 5 is not a multiple of tubelet_size 2"),
        ({"patch_size": 5}, "image_size 12x16 is not a multiple of patch_size 5"),
        ({"mask_ratio": 0.05}, "mask_ratio 0.05 hides 0 of 12 places; at least one must be kept"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 hides 12 of 12 places"),
        (
            {"mask_sampling": "frame", "mask_ratio": 0.3},
            "mask_ratio 0.3 hides 0 of 3 time slots; at least one must be kept and one hidden",
        ),
        ({"num_heads": 3}, "model.embed_dim 16 must be a positive multiple of 4 and of model.num"),
        ({"decoder_embed_dim": 6}, "model.decoder_embed_dim 6 must be a positive multiple of 4"),
        ({"depth": 0}, "model.depth must be at least 1"),
        ({"decoder_depth": 0}, "model.decoder_depth must be at least 1"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        make(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
