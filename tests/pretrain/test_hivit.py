"""HiViT as a masked autoencoder: sizes, cost, what reaches what, configs, refusals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import build
from mae_jax import config as configs
from mae_jax.errors import ConfigError
from mae_jax.losses.reconstruction import example_losses
from mae_jax.models.transfer import make_classifier
from mae_jax.nn.masking import mask_of
from mae_jax.pretrain import hivit
from mae_jax.pretrain.mae import MaskedAutoencoder
from mae_jax.train.optimizer import decay_mask, path_name
from mae_jax.types import MaskPlan
from tests.flops import products
from tests.weights import normal, quick_jit, random_params

TINY: dict[str, Any] = {
    "size": "tiny",
    "image_size": (24, 32),
    "stem_patch_size": 2,
    "stem_dim": 4,
    "depths": (1, 1, 2),
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def make(**fields: Any) -> MaskedAutoencoder:
    return hivit.make(**TINY | fields)


def image_shape(model: Any, batch_size: int) -> tuple[int, ...]:
    return (batch_size, *model.unit.image_size, model.unit.channels)


def plan_of(model: MaskedAutoencoder, masks: int) -> MaskPlan:
    noise = np.random.default_rng(2).random((masks, model.unit.count))
    return model.plan(jax.random.key(0), masks, jnp.asarray(noise))


def shapes_of(model: MaskedAutoencoder) -> Any:
    batch = {"image": jax.ShapeDtypeStruct(image_shape(model, 1), jnp.float32)}

    def init(batch: Any) -> Any:
        key = jax.random.key(0)
        return model.init(key, batch, model.plan(key, 1), method="predict")

    return jax.eval_shape(init, batch)["params"]


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return make()


@pytest.fixture(scope="module")
def batch(model: MaskedAutoencoder) -> dict[str, np.ndarray]:
    return {"image": normal(image_shape(model, 2), seed=1)}


@pytest.fixture(scope="module")
def params(model: MaskedAutoencoder, batch: dict[str, np.ndarray]) -> Any:
    return random_params(model.init, batch, plan_of(model, 2), method="predict")


# Sizes. The published numbers are rounded; the exact ones are worked from the layers' shapes.


@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "classifier", "rounded"),
    [
        ("tiny", 18_757_536, 20_686_592, 19_181_668, 19.18),
        ("small", 37_058_592, 20_686_592, 37_526_464, 37.53),
        ("base", 65_795_456, 21_145_344, 66_418_952, 66.42),
    ],
)
def test_parameters_are_as_many_as_published(size, encoder, decoder, classifier, rounded):
    model = hivit.make(size=size, image_size=(224, 224))
    counts = {name: count(tree) for name, tree in shapes_of(model).items()}
    assert counts == {"encoder": encoder, "decoder": decoder}
    if size == "base":
        assert round(sum(counts.values()) / 1e6, 2) == 86.94
    model = hivit.make(size=size, image_size=(224, 224), relative_positions=True)
    whole = make_classifier(model.unit, model.encoder, 1000)
    images = jax.ShapeDtypeStruct(image_shape(model, 1), jnp.float32)
    assert count(jax.eval_shape(whole.init, jax.random.key(0), images)) == classifier
    assert round(classifier / 1e6, 2) == rounded


def test_parameters_of_the_base_encoder_are_worked_by_hand():
    widths = {"stem": (128, 256), "last": 512}

    def mlp(d: int, ratio: int) -> int:
        return 2 * d + (d * ratio * d + ratio * d) + (ratio * d * d + d)

    def attention(d: int) -> int:
        return 2 * d + (3 * d * d + 3 * d) + (d * d + d)

    def merge(d: int) -> int:
        return 2 * 4 * d + 4 * d * 2 * d

    stem = sum(4 * mlp(d, 3) + merge(d) for d in widths["stem"])
    last = 20 * (mlp(512, 4) + attention(512))
    embedding = 4 * 4 * 3 * 128 + 128 + 2 * 128 + 196 * 512
    norm = 2 * 7 * 512
    model = hivit.make(size="base", image_size=(224, 224))
    assert count(shapes_of(model)["encoder"]) == embedding + stem + last + norm


@pytest.mark.parametrize(("size", "gmac"), [("tiny", 4.59), ("small", 9.04), ("base", 15.81)])
def test_classifying_costs_as_much_as_published(size, gmac):
    model = hivit.make(size=size, image_size=(224, 224))
    whole = make_classifier(model.unit, model.encoder, 1000)
    embed = whole.encoder.flops(196, 768)[0]
    assert round((whole.step_flops() + embed) / 3 / 2e9, 2) == gmac


def test_pretraining_costs_as_much_as_published():
    model = hivit.make(size="base", image_size=(224, 224))
    embed, rest = model.encoder.flops(49, 768)
    # The released code embeds the hidden units too, before it leaves them out, and predicts the
    # kept ones; ours does neither.
    assert round((4 * embed + rest) / 2e9, 2) == 3.82
    assert round(model.decoder.flops(196, 49, 3584, 196) / 2e9, 2) == 4.10
    decoder = model.decoder.flops(196, 49, 3584, 147)
    assert model.step_flops() == 3 * (embed + rest + decoder) - embed
    assert round(model.step_flops() / 1e9, 2) == 47.32


def test_flops_are_those_of_the_products_in_the_traced_step(model, params):
    batch, plan = {"image": normal(image_shape(model, 1))}, plan_of(model, 1)

    def loss(params: Any) -> jax.Array:
        predictions = model.apply({"params": params}, batch, plan, method="predict")
        return example_losses(predictions).sum()

    assert products(jax.grad(loss), params) == model.step_flops()


def test_sizes_and_defaults_are_those_of_the_release():
    assert hivit.SIZES["base"] == (4, 128, (2, 2, 20), 8, 512, 6, 16)
    assert hivit.SIZES["small"] == (4, 96, (2, 2, 20), 6, 512, 6, 16)
    assert hivit.SIZES["tiny"] == (4, 96, (1, 1, 10), 6, 512, 6, 16)
    model = hivit.make(size="base", image_size=(224, 224))
    assert (model.unit.patch_size, model.unit.grid_size) == (16, (14, 14))
    assert model.encoder.depths == (4, 4, 20)
    assert model.encoder.output_dim == 3584
    assert model.encoder.positions == "learned"
    assert model.encoder.multi_scale
    assert not model.encoder.relative_positions
    assert not model.encoder.use_cls_token
    assert model.norm_pix_loss
    assert model.keep_count() == 49


def test_dimensions_given_take_the_place_of_those_of_the_size():
    model = make(channels=1, relative_positions=True, multi_scale=False, positions="fixed")
    encoder, decoder = model.encoder, model.decoder
    assert (model.unit.patch_size, model.unit.grid_size, model.unit.channels) == (8, (3, 4), 1)
    assert (encoder.stem_dim, encoder.stage_depths, encoder.num_heads) == (4, (1, 1, 2), 2)
    assert (encoder.channels, encoder.positions) == (1, "fixed")
    assert encoder.relative_positions
    assert not encoder.multi_scale
    assert (decoder.embed_dim, decoder.depth, decoder.num_heads) == (8, 1, 2)
    # A configuration that was read from a file has lists.
    assert make(depths=[1, 2, 3]).encoder.stage_depths == (1, 2, 3)


def test_weights_of_the_decoder_start_normal(batch):
    model = make(decoder_embed_dim=64, depths=(1, 1, 1))
    params = quick_jit(
        lambda: model.init(jax.random.key(0), batch, plan_of(model, 2), method="predict")
    )()
    decoder = params["params"]["decoder"]
    for kernel in (decoder["pred"]["kernel"], decoder["block_00"]["attn"]["qkv"]["kernel"]):
        np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.05)


# What reaches what


@pytest.fixture(scope="module")
def run(model: MaskedAutoencoder, params: Any) -> Callable[[np.ndarray], dict[str, Any]]:
    """Return what makes of images all that follows, as one compiled program."""
    plan = plan_of(model, 2)
    weight = normal((2, 9, model.unit.size), seed=3)

    @quick_jit
    def run(image: jax.Array) -> dict[str, Any]:
        def call(method: str, *args: Any) -> Any:
            return model.apply({"params": params}, *args, method=method)

        def weighted(image: jax.Array) -> tuple[jax.Array, Any]:
            predictions = call("predict", {"image": image}, plan)
            return jnp.vdot(predictions["image"].output, weight), predictions

        gradient, predictions = jax.grad(weighted, has_aux=True)(image)
        batch = {"image": image}
        return {
            "gradient": gradient,
            "prediction": predictions["image"],
            "loss": example_losses(predictions).sum(),
            "tokens": call("encode", batch),
            "features": call("features", batch),
        }

    return run


def test_values_of_hidden_pixels_do_not_reach_the_predictions(model, run, batch):
    plan, image = plan_of(model, 2), batch["image"]
    units = jnp.broadcast_to(mask_of(plan)[..., None], (2, 12, model.unit.size))
    hidden = np.asarray(model.unit.join(units)) == 1
    out, other = run(image), run(np.where(hidden, 3.0 - image, image))
    assert np.all(np.asarray(out["gradient"])[hidden] == 0)
    assert np.all(np.asarray(out["gradient"])[~hidden] != 0)
    np.testing.assert_array_equal(other["prediction"].output, out["prediction"].output)
    # But through the target they count.
    assert np.abs(other["prediction"].target - out["prediction"].target).max() > 0.1


def test_loss_is_the_mean_over_hidden_units(model, run, batch):
    out, hidden = run(batch["image"]), np.asarray(plan_of(model, 2).ids_mask)
    units = np.asarray(model.unit.split(jnp.asarray(batch["image"])), np.float64)
    target = np.take_along_axis(units, hidden[..., None], axis=1)
    target = target - target.mean(-1, keepdims=True)
    target = target / np.sqrt(target.var(-1, keepdims=True, ddof=1) + 1e-6)
    expected = np.square(np.asarray(out["prediction"].output) - target).mean()
    np.testing.assert_allclose(out["loss"], expected, rtol=1e-5)


def test_features_are_the_mean_of_all_scales(run, batch):
    out = run(batch["image"])
    assert out["tokens"].shape == (2, 12, 28 * 4)
    np.testing.assert_allclose(out["features"], np.asarray(out["tokens"]).mean(axis=1), atol=1e-5)


def test_masks_may_be_drawn_in_other_ways():
    model = make(mask_sampling="grid", image_size=(32, 32))
    mask = quick_jit(lambda: mask_of(model.plan(jax.random.key(0), 1)))()
    squares = np.asarray(mask).reshape(2, 2, 2, 2).sum(axis=(1, 3))
    np.testing.assert_array_equal(squares, 3)  # of 2 x 2 one is kept


# Configs


def test_pretraining_has_the_published_numbers():
    config = configs.load_config("hivit")
    assert (config.batch_size, config.epochs) == (4096, 1600)
    assert math.isclose(build.peak_learning_rate(config), 1.6e-3)
    optimizer = config.optimizer
    assert (optimizer.warmup_epochs, optimizer.weight_decay, optimizer.b2) == (40, 0.05, 0.95)
    assert config.model.size == "base"
    model = build.build_model(config)
    assert model == hivit.make(size="base", image_size=(224, 224), dtype=model.encoder.dtype)
    assert "no_decay" not in optimizer  # the table of positions is trained, and decays


def test_fine_tuning_has_the_published_numbers():
    config = configs.load_config("hivit_finetune")
    assert (config.batch_size, config.epochs) == (1024, 100)
    optimizer = config.optimizer
    assert math.isclose(build.peak_learning_rate(config), 2e-3)
    assert (optimizer.layer_decay, optimizer.weight_decay, optimizer.b2) == (0.85, 0.05, 0.999)
    assert (optimizer.warmup_epochs, optimizer.min_learning_rate) == (5, 1e-6)
    assert config.model.drop_path_rate == 0.2
    model = build.build_model(config)
    assert model.encoder.relative_positions
    assert model.encoder.drop_path_rate == 0.2
    images = jax.ShapeDtypeStruct(image_shape(model, 1), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert count(params) == 66_418_952
    decays = decay_mask(params, optimizer.no_decay)
    for path, leaf in jax.tree_util.tree_leaves_with_path(decays):
        assert leaf == path_name(path).endswith("kernel"), path_name(path)
    _, factors = build.build_trainable(config, model, params)
    by_factor = Counter(round(math.log(f, 0.85)) for f in jax.tree.leaves(factors))
    assert by_factor.keys() == set(range(30))
    encoder = factors["encoder"]
    assert factors["head"]["linear"]["kernel"] == 1
    assert math.isclose(encoder["downsample_2"]["norm"]["scale"], 0.85 ** (29 - 8))
    assert math.isclose(encoder["pos_embed"], 0.85**29)


@pytest.mark.parametrize("name", ["hivit", "hivit_finetune"])
def test_every_variant_builds(name):
    for variant, size in (("small", "small"), ("tiny", "tiny"), ("demo", "tiny")):
        config = configs.load_config(f"{name}:{variant}")
        assert config.model.size == size
        model = build.build_model(config)
        demo = variant == "demo"
        assert model.unit.grid_size == ((8, 8) if demo else (14, 14))
        assert model.unit.channels == (1 if demo else 3)
        build.build_normalization(config)
    with pytest.raises(ConfigError, match=f"^--config={name}:large: variant 'large' is not one of"):
        configs.load_config(f"{name}:large")


def test_digits_are_enlarged_for_the_demo():
    config = configs.load_config("hivit:demo")
    digit = normal((28, 28, 1)).astype(np.uint8)
    for read in build.build_readers(config):
        image = read({"image": digit}, np.random.default_rng(0))["image"]
        assert image.shape == (64, 64, 1)
        assert image.dtype == np.uint8


def test_fine_tuning_fits_what_pretraining_leaves():
    """The demos are for each other."""
    method = build.build_model(configs.load_config("hivit:demo"))
    config = configs.load_config("hivit_finetune:demo")
    assert config.init_from == "runs/hivit_demo"
    classifier = build.build_model(config)
    source = method.encoder.as_backbone(
        drop_path_rate=classifier.encoder.drop_path_rate, relative_positions=True
    )
    assert classifier.encoder == source


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "large"}, "model.size 'large' is not one of tiny, small, base"),
        ({"positions": "none"}, "model.positions 'none' is not one of fixed, learned"),
        ({"mask_sampling": "tube"}, "model.mask_sampling 'tube' is not one of random, block, grid"),
        ({"stem_patch_size": 3}, "image_size 24x32 is not a multiple of patch_size 12"),
        ({"stem_patch_size": 0}, "must all be at least 1"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 keeps 0 of 12 units"),
        ({"depths": (2, 20)}, "model.depths (2, 20): expected the depths of three stages"),
        ({"depths": (1, 0, 2)}, "model.depths (1, 0, 2): expected the depths of three stages"),
        (
            {"num_heads": 3},
            "model.stem_dim 4: expected at least 1, and 4 times it to be a multiple",
        ),
        ({"num_heads": 0}, "of model.num_heads, which is 0"),
        ({"stem_dim": 0}, "model.stem_dim 0: expected at least 1"),
        (
            {"decoder_num_heads": 3},
            "model.decoder_embed_dim 8 must be a positive multiple of 4 and",
        ),
        ({"decoder_embed_dim": 6}, "model.decoder_embed_dim 6 must be a positive multiple of 4"),
        ({"decoder_depth": 0}, "model.decoder_depth must be at least 1"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        make(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_depths_on_the_command_line():
    config = configs.load_config("hivit", {"model.depths": "1,1,2"})
    assert config.model.depths == (1, 1, 2)
    with pytest.raises(ConfigError, match=r"^--config.model.depths=deep: expected .* got 'deep'$"):
        configs.load_config("hivit", {"model.depths": "deep"})
    with pytest.raises(ConfigError, match=r"no such field; did you mean model.stem_patch_size\?"):
        configs.load_config("hivit", {"model.patch_size": "8"})
