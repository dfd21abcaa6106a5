"""UM-MAE: published sizes, what the network may see, the order of the decoder, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.models.transfer import make_classifier
from mae_jax.nn import masking
from mae_jax.nn.patches import PatchUnit
from mae_jax.pretrain import um_mae
from tests.weights import apply, normal, quick_jit, random_params

TINY = {
    "size": "swin_t",
    "image_size": (32, 32),
    "channels": 1,
    "stem_patch_size": 2,
    "window_size": 8,
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def sizes(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("size", "side", "pretrained", "encoder", "classifier"),
    [
        # arXiv 2205.10063 gives no counts; these are those of the released models, trained
        # parameters alone: 35.77, 27.50, 28.27 M and so on.
        ("swin_t", 256, 35_774_346, 27_499_146, 28_268_050),
        ("swin_l", 256, 223_698_612, 194_936_244, 196_473_052),
        ("pvt_s", 256, 28_522_560, 20_771_648, 21_546_728),
        ("vit_b", 224, 92_742_144, 85_648_128, 86_567_656),
    ],
)
def test_published_sizes(size, side, pretrained, encoder, classifier):
    model = um_mae.make(size=size, image_size=(side, side))
    images = jnp.zeros((1, side, side, 3))
    batch = {"image": images}

    def init():
        plan = model.plan(jax.random.key(0), 1)
        return model.init(jax.random.key(0), batch, plan, method="predict")["params"]

    shapes = jax.eval_shape(init)
    assert sizes(shapes) == pretrained
    assert sizes(shapes["encoder"]) == encoder
    module = make_classifier(model.unit, model.encoder, 1000)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images)["params"])
    assert sizes(shapes) == classifier


@pytest.mark.parametrize(
    ("size", "compact", "decoder", "full"),
    [("swin_t", 1.53, 1.87, 7.25), ("swin_l", 11.55, 7.13, 51.0), ("pvt_s", 1.32, 1.86, 4.85)],
)
def test_gmac_of_the_published_sizes(size, compact, decoder, full):
    model = um_mae.make(size=size, image_size=(256, 256))
    encoder, values, width = model.encoder, model.unit.size, model.encoder.embed_dim
    # The published counts embed all units and predict all; ours drop what is not needed first.
    dropped = 2 * 192 * values * width
    ours = sum(encoder.flops(64, values)) + dropped
    np.testing.assert_allclose(ours / 2e9, compact, atol=0.006)
    predicted = model.decoder.flops(256, 16, encoder.output_dim, 256)
    np.testing.assert_allclose(predicted / 2e9, decoder, atol=0.006)
    # And the biases of places in fine-tuning, which are made once for all images.
    biases = 0
    if size.startswith("swin"):
        for stage, grid in enumerate(encoder.stage_grids(256)):
            pairs = grid[0] * grid[1] * np.prod(encoder.window(grid, full=True)[0])
            products = encoder.bias_dim * (2 + encoder.heads(stage))
            biases += 2 * encoder.depths[stage] * pairs * products
    np.testing.assert_allclose((sum(encoder.flops(256, values)) + biases) / 2e9, full, rtol=0.002)


def test_step_flops_count_what_is_seen_and_what_is_predicted():
    model = um_mae.make(size="pvt_s", image_size=(256, 256))
    embed, stages = model.encoder.flops(64, 768)
    decoder = model.decoder.flops(256, 16, 512, 192)
    assert model.step_flops() == 2 * embed + 3 * (stages + decoder)


@pytest.fixture(scope="module")
def model() -> um_mae.UniformMaskedAutoencoder:
    return um_mae.make(**TINY)


@pytest.fixture(scope="module")
def plan(model):
    return model.plan(jax.random.key(5), 2)


def test_hidden_and_replaced_pixels_have_no_gradient(model, plan):
    images = jnp.asarray(normal((2, 32, 32, 1)))
    params = random_params(model.init, {"image": images}, plan, method="predict")
    probe = jnp.asarray(normal((2, 12, 64), seed=1))

    @quick_jit
    def gradients(images):
        def output(images):
            predictions = model.apply({"params": params}, {"image": images}, plan, method="predict")
            image = predictions["image"]
            return (image.output * probe).sum(), image

        return jax.grad(output, has_aux=True)(images)

    gradient, prediction = gradients(images)
    per_unit = np.abs(model.unit.split(gradient)).sum(axis=2)  # [B, N]
    unseen = np.asarray(masking.mask_of(plan) + masking.replaced_of(plan)) == 1
    assert (per_unit[unseen] == 0).all()
    assert (per_unit[~unseen] > 0).all()
    assert unseen.sum(axis=1).tolist() == [13, 13]  # int(4 * 0.75) of 16 are seen
    assert prediction.ids.shape == (2, 12)
    assert prediction.kind == "mse"
    np.testing.assert_allclose(prediction.weight.sum(), 1.0, rtol=1e-6)


def stub(compat_decoder_order: bool) -> um_mae.UniformMaskedAutoencoder:
    """Return a method whose output tells which place was paired with the unit of which place."""
    return um_mae.UniformMaskedAutoencoder(
        unit=PatchUnit((4, 8), 1, 1),
        encoder=lambda seen, ids, **_: ids,
        decoder=lambda latent, plan, skip: (latent, plan.ids_keep, plan.ids_mask),
        compat_decoder_order=compat_decoder_order,
    )


def test_the_released_order_pairs_wrongly_when_asked_alone():
    plan = stub(False).plan(jax.random.key(0), 500)
    units = jnp.zeros((500, 32, 1))
    of, at, hidden = stub(False).apply({}, units, plan, 0, method="_outputs")
    np.testing.assert_array_equal(of, at)
    of, at, hidden_too = stub(True).apply({}, units, plan, 0, method="_outputs")
    np.testing.assert_array_equal(hidden, hidden_too)
    np.testing.assert_array_equal(np.sort(of, axis=1), at)
    np.testing.assert_array_equal(np.asarray(of) // 16, np.asarray(at) // 16)  # same row of blocks
    wrong = (np.asarray(of) != np.asarray(at)).mean()
    assert 0.5 < wrong < 0.8


def test_panels_paint_the_two_kinds_of_hiding_apart(plan):
    model = um_mae.make(**TINY)
    shade = masking.mask_of(plan) + 2 * masking.replaced_of(plan)
    assert np.unique(shade).tolist() == [0, 1, 2]
    images = jnp.asarray(normal((2, 32, 32, 1)))
    params = random_params(model.init, {"image": images}, plan, method="predict")
    panels = apply(model, params, {"image": images}, plan, method="panels")
    hidden = model.unit.split(panels["masked"].hidden)[..., 0]
    np.testing.assert_array_equal(hidden, shade)
    pasted, original = (model.unit.split(panels[n].images) for n in ("pasted", "original"))
    np.testing.assert_array_equal(pasted[shade != 1], original[shade != 1])
    assert set(panels) == set(model.panel_captions())


def test_a_callers_mask_replaces_nothing(model):
    mask = np.ones((1, 16), int)
    mask[0, [0, 3, 8, 15]] = 0
    plan = model.plan_of_mask(mask)
    assert plan.replaced is not None
    assert not plan.replaced.any()
    assert model.clone(secondary_ratio=0.0).plan_of_mask(mask).replaced is None
    with pytest.raises(ConfigError, match="expected one unit kept of each 2 x 2 block"):
        model.plan_of_mask(np.arange(16)[None] % 4 != 0)


PVT = {k: v for k, v in TINY.items() if k != "window_size"} | {"size": "pvt_s", "num_heads": 1}
VIT = {"size": "vit_b", "image_size": (32, 32), "patch_size": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (TINY | {"size": "swin_s"}, "'swin_s' is not one of swin_t, swin_l, pvt_s, vit_b"),
        ({"size": "swin_t", "image_size": (224, 224)}, "image_size: .* cannot be halved 3 times"),
        ({"size": "swin_t", "image_size": (192, 192)}, "cut into windows of 8 x 8"),
        (VIT | {"image_size": (24, 32)}, "even number of units down and across, .*, got 3 x 4"),
        ({"size": "swin_t", "image_size": (250, 256)}, "not a multiple of patch_size 16"),
        (TINY | {"patch_size": 8}, "patch_size 8: swin_t has none, set model.stem_patch_size"),
        (VIT | {"stem_patch_size": 4}, "stem_patch_size 4: vit_b has none, set model.patch_size"),
        (TINY | {"depths": (1, 1)}, r"depths \(1, 1\): expected the blocks of 4 stages"),
        (TINY | {"embed_dim": 6}, "embed_dim 6 must be a positive multiple of 4"),
        (TINY | {"decoder_depth": 0}, "decoder_depth must be at least 1"),
        (TINY | {"positions": "learned"}, "positions 'learned' is not one of none"),
        (PVT | {"positions": "none"}, "positions 'none' is not one of fixed, learned"),
        (PVT | {"window_size": 8}, "window_size 8: expected an even number, and of Swin alone"),
        (TINY | {"window_size": 7}, "window_size 7: expected an even number"),
        (VIT | {"compat_decoder_order": True}, "compat_decoder_order True: vit_b has no such"),
        (TINY | {"secondary_ratio": 1.0}, "secondary_ratio 1.0 leaves 0 of 4 kept units"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        um_mae.make(**fields)
    assert "\n" not in str(error.value)
