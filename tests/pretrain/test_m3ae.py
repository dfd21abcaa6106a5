"""M3AE: sizes, cost, masks, what reaches what, padding, the classifier, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax import build
from mae_jax.errors import ConfigError
from mae_jax.losses.reconstruction import example_losses
from mae_jax.models.transfer import make_classifier, transfer_encoder
from mae_jax.nn.blocks import Mlp
from mae_jax.pretrain import m3ae
from mae_jax.pretrain.m3ae import M3AE
from mae_jax.types import MaskPlan
from tests.flops import products
from tests.weights import apply, normal, quick_jit, random_params

TINY: dict[str, Any] = {
    "size": "small",
    "image_size": (12, 8),
    "patch_size": 4,
    "vocabulary_size": 11,
    "text_length": 5,
    "unpaired_text_length": 7,
    "unpaired_loss_weight": 0.25,
    "mask_ratio": 0.5,
    "text_mask_ratio": 0.6,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 12,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def make(**fields: Any) -> M3AE:
    return m3ae.make(**TINY | fields)


def batch_of(model: M3AE, rows: int, seed: int = 0) -> dict[str, Any]:
    """Return pixels and words, the last places of each text padding."""
    rng = np.random.default_rng(seed)
    batch: dict[str, Any] = {"image": normal((rows, *model.unit.shape), seed=seed)}
    for text, padding in (("text", "padding"), ("unpaired_text", "unpaired_padding")):
        if text in model.lengths():
            length = model.lengths()[text]
            batch[text] = rng.integers(0, 11, (rows, length)).astype(np.int32)
            lengths = rng.integers(length - 2, length + 1, (rows, 1))
            batch[padding] = np.arange(length)[None] >= lengths
    return batch


def plan_of(model: M3AE, rows: int, seed: int = 2) -> dict[str, MaskPlan]:
    """Return masks made with numpy: nothing to compile."""
    rng, keep = np.random.default_rng(seed), model.keep_counts()
    plan = {}
    for name, length in model.lengths().items():
        ids = np.argsort(rng.random((rows, length)), axis=1).astype(np.int32)
        plan[name] = MaskPlan(ids[:, : keep[name]], ids[:, keep[name] :])
    return plan


def hidden_of(plan: MaskPlan) -> np.ndarray:
    """Return bool [R, N], in the order of places."""
    hidden = np.zeros((len(plan.ids_keep), plan.ids_keep.shape[1] + plan.ids_mask.shape[1]), bool)
    np.put_along_axis(hidden, np.asarray(plan.ids_mask), True, axis=1)
    return hidden


def shapes_of(model: M3AE) -> Any:
    arrays = build.batch_of(model, 2)
    arrays["image"] = jax.ShapeDtypeStruct(arrays["image"].shape, jnp.float32)

    def init(batch: Any) -> Any:
        key = jax.random.key(0)
        return model.init(key, batch, model.plan(key, 2), method="predict")

    return jax.eval_shape(init, arrays)["params"]


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def model() -> M3AE:
    return make(mask_per="sample")


@pytest.fixture(scope="module")
def batch(model: M3AE) -> dict[str, Any]:
    return batch_of(model, 2)


@pytest.fixture(scope="module")
def plan(model: M3AE) -> dict[str, MaskPlan]:
    return plan_of(model, 2)


@pytest.fixture(scope="module")
def params(model: M3AE, batch: dict[str, Any], plan: dict[str, MaskPlan]) -> Any:
    return jax.device_get(random_params(model.init, batch, plan, method="predict"))


# Sizes


@pytest.mark.parametrize(
    ("size", "encoder", "table", "decoder", "gmac"),
    [
        ("small", 21.6, 11.7, 41.5, (1.86, 10.04)),
        ("base", 85.6, 23.4, 41.7, (7.15, 10.06)),
        pytest.param("large", 303.1, 31.3, 41.8, (24.98, 10.07), marks=pytest.mark.slow),
        pytest.param("huge", 630.7, 39.1, 41.9, (51.75, 10.08), marks=pytest.mark.slow),
    ],
)
def test_parameters_and_products_are_those_of_the_release(size, encoder, table, decoder, gmac):
    model = m3ae.make(size=size, image_size=(256, 256))
    shapes = shapes_of(model)
    assert shapes.keys() == {"encoder", "decoder"}
    words = count(shapes["encoder"].pop("text_embed"))
    found = count(shapes["encoder"]), words, count(shapes["decoder"])
    assert tuple(round(n / 1e6, 1) for n in found) == (encoder, table, decoder)
    # The released code embeds hidden patches too, before it leaves them out, and has predictions of
    # the kept places; ours has neither.
    embed = model.encoder.flops(256, 768)[0]
    blocks = model.encoder.flops(64, 768, 16)[1]
    all_places = {"image": 256, "text": 64}
    decoding = model.decoder.flops(81, model.encoder.embed_dim, 321, all_places)
    assert (round((embed + blocks) / 2e9, 2), round(decoding / 2e9, 2)) == gmac


def test_parameters_of_the_base_are_worked_by_hand():
    def blocks(d: int) -> int:
        return 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d)

    shapes = shapes_of(m3ae.make(size="base", image_size=(256, 256)))
    d, e, vectors = 768, 512, 3  # the class token and two kinds; two kinds and two masks less one
    words = 30522 * d
    assert count(shapes["encoder"]) == words + 768 * d + d + 12 * blocks(d) + 2 * d + vectors * d
    heads = e * 768 + 768 + e * 30522 + 30522
    assert count(shapes["decoder"]) == d * e + e + 8 * blocks(e) + 2 * e + 4 * e + heads


def test_sizes_and_defaults_are_those_of_the_release():
    model = m3ae.make(size="large", image_size=(256, 256))
    assert model.keep_counts() == {"image": 64, "text": 16}
    assert (model.mask_per, model.text_loss_weight, model.unpaired_loss_weight) == ("batch", 0.5, 0)
    assert model.encoder.use_type_vectors
    assert model.encoder.positions == "fixed"
    assert m3ae.SIZES["huge"] == (16, 1280, 32, 16, 512, 8, 16)
    assert {size[4:] for size in m3ae.SIZES.values()} == {(512, 8, 16)}
    assert not model.norm_pix_loss


def test_shapes_of_an_example(model):
    example = model.example()
    assert {name: (array.shape, array.dtype.name) for name, array in example.items()} == {
        "image": ((12, 8, 3), "uint8"),
        "text": ((5,), "int32"),
        "padding": ((5,), "bool"),
        "unpaired_text": ((7,), "int32"),
        "unpaired_padding": ((7,), "bool"),
    }
    assert make(unpaired_loss_weight=0.0).example().keys() == {"image", "text", "padding"}
    images_alone = make(vocabulary_size=0, unpaired_loss_weight=0.0)
    assert images_alone.example().keys() == {"image"}
    assert jax.eval_shape(lambda: images_alone.plan(jax.random.key(0), 2)).keys() == {"image"}


def test_names_of_parameters(params):
    assert set(params["encoder"]) == {"patch_embed", "text_embed", "image_type", "text_type"} | {
        *("cls_token", "block_00", "norm")
    }
    assert set(params["decoder"]) == {"embed", "image_mask", "text_mask", "image_type"} | {
        *("text_type", "block_00", "norm", "image_head", "text_head")
    }
    assert params["encoder"]["text_embed"]["embedding"].shape == (11, 8)
    shapes = shapes_of(make(use_type_vectors=False, output_head_depth=2))
    assert not [name for half in shapes.values() for name in half if name.endswith("type")]
    head = {"norm", "fc_0", "norm_0", "fc_1", "norm_1", "pred"}
    assert set(shapes["decoder"]["text_head"]) == set(shapes["decoder"]["image_head"]) == head


def test_words_start_as_normal_numbers_and_all_else_as_the_release(batch, plan):
    wide = make(vocabulary_size=1000, embed_dim=64, decoder_embed_dim=64)
    init = quick_jit(lambda: wide.init(jax.random.key(0), batch, plan, method="predict"))
    tree = flat(init()["params"])
    assert abs(tree["encoder/text_embed/embedding"].std() - 1.0) < 0.02
    for name, leaf in tree.items():
        if name.endswith("bias"):
            assert not leaf.any(), name
        if name.endswith(("_mask", "_type", "_token")):
            assert 0.014 < leaf.std() < 0.026, name
        if name.endswith("kernel"):
            bound = math.sqrt(6 / sum(leaf.shape))
            assert 0.9 * bound < np.abs(leaf).max() <= 1.001 * bound, name


def test_the_tanh_gelu_is_an_approximation():
    x = np.linspace(-4, 4, 64, dtype=np.float32)[:, None]
    params = {
        f"fc{i}": {"kernel": np.eye(1, dtype=np.float32), "bias": np.zeros(1)} for i in (1, 2)
    }
    exact, tanh = (Mlp(1, tanh_gelu=tanh).apply({"params": params}, x) for tanh in (False, True))
    erf = [v / 2 * (1 + math.erf(v / 2**0.5)) for v in x[:, 0]]
    np.testing.assert_allclose(exact[:, 0], erf, atol=1e-6)
    assert 1e-4 < np.abs(exact - tanh).max() < 5e-4


# Masks


def test_one_mask_serves_the_batch_or_each_example_has_its_own():
    for mask_per, rows in (("batch", 1), ("sample", 3)):
        model = make(mask_per=mask_per)
        plan = quick_jit(lambda model=model: model.plan(jax.random.key(0), 3))()
        for name, length in {"image": 6, "text": 5, "unpaired_text": 7}.items():
            keep = {"image": 3, "text": 2, "unpaired_text": 2}[name]
            assert plan[name].ids_keep.shape == (rows, keep)
            assert plan[name].ids_mask.shape == (rows, length - keep)
            every = np.concatenate([plan[name].ids_keep, plan[name].ids_mask], axis=1)
            np.testing.assert_array_equal(np.sort(every), np.tile(np.arange(length), (rows, 1)))
    assert len({row.tobytes() for row in np.asarray(plan["image"].ids_keep)}) > 1


def test_masks_of_images_do_not_depend_on_texts():
    models = (
        make(vocabulary_size=0, unpaired_loss_weight=0.0),
        make(unpaired_loss_weight=0.0),
        make(),
    )
    plans = quick_jit(lambda: [model.plan(jax.random.key(3), 2) for model in models])()
    alone, paired, whole = plans
    for name in ("image", "text"):
        np.testing.assert_array_equal(paired[name].ids_keep, whole[name].ids_keep)
    np.testing.assert_array_equal(alone["image"].ids_keep, whole["image"].ids_keep)


def test_noise_decides():
    model = make()
    noise = jnp.asarray([[0.6, 0.1, 0.5, 0.2, 0.4, 0.3]])
    plans = quick_jit(
        lambda noise: [model.plan(jax.random.key(0), 2, x) for x in (noise, {"image": noise})]
    )
    for plan in plans(noise):
        np.testing.assert_array_equal(plan["image"].ids_keep, [[1, 3, 5]])
        np.testing.assert_array_equal(plan["image"].ids_mask, [[4, 2, 0]])
    with pytest.raises(ValueError, match=r"expected noise \[1, 5\], got \[2, 5\]"):
        model.plan(jax.random.key(0), 2, {"text": jnp.zeros((2, 5))})


def test_a_mask_of_ones_own_leaves_all_words_to_be_seen(model, params, batch):
    plan = model.plan_of_mask(np.array([[0, 1, 1, 1, 1, 1]]))
    np.testing.assert_array_equal(hidden_of(plan["image"]), [[0, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(plan["text"].ids_keep, [[0, 1, 2, 3, 4]])

    @quick_jit
    def look(batch: Any) -> Any:
        return [
            model.apply({"params": params}, batch, plan, method=method)
            for method in ("predict", "words")
        ]

    predictions, words = look(batch)
    assert predictions.keys() == {"image"}
    assert predictions["image"].output.shape == (2, 5, 48)
    np.testing.assert_array_equal(words, batch["text"])
    seen, _ = look({**batch, "text": (batch["text"] + 1) % 11})
    assert np.abs(seen["image"].output - predictions["image"].output).max() > 1e-4


# What reaches what


@pytest.fixture(scope="module")
def run(model: M3AE, params: Any, plan: Any) -> Callable[..., dict[str, Any]]:
    """Return what makes of a batch all that follows, as one compiled program.

    Gradients are those of the losses of image, text and unpaired text and of a function of all
    outputs, each times its share.
    """

    @quick_jit
    def compiled(batch: Any, shares: jax.Array) -> dict[str, Any]:
        def loss(params: Any, image: jax.Array) -> tuple[jax.Array, Any]:
            whole = {**batch, "image": image}
            predictions = model.apply({"params": params}, whole, plan, method="predict")
            losses = {k: example_losses({k: p}).sum() for k, p in predictions.items()}
            parts = [losses[name] for name in ("image", "text", "unpaired_text")]
            outputs = sum(jnp.sum(jnp.sin(p.output)) for p in predictions.values())
            return shares @ jnp.stack([*parts, outputs]), (predictions, losses)

        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (gradients, of_image), (predictions, losses) = grad(params, batch["image"])
        return {
            "gradients": gradients,
            "of_image": of_image,
            "predictions": predictions,
            "losses": losses,
        }

    def run(batch: Any, shares: Sequence[float] = (1, 1, 1, 0)) -> dict[str, Any]:
        return jax.device_get(compiled(batch, np.array(shares, np.float32)))

    return run


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def hidden_pixels(model: M3AE, plan: dict[str, MaskPlan]) -> np.ndarray:
    rows, columns = model.unit.grid_size
    hidden = hidden_of(plan["image"]).reshape(-1, rows, 1, columns, 1, 1)
    p = model.unit.patch_size
    whole = np.broadcast_to(hidden, (len(hidden), rows, p, columns, p, model.unit.channels))
    return whole.reshape(-1, *model.unit.shape)


def test_hidden_pixels_reach_the_target_alone(model, plan, run, batch):
    hidden = hidden_pixels(model, plan)
    out = run(batch, (0, 0, 0, 1))
    assert np.all(out["of_image"][hidden] == 0)
    assert np.all(out["of_image"][~hidden] != 0)
    other = run({**batch, "image": np.where(hidden, 3.0 - batch["image"], batch["image"])})
    for name, prediction in out["predictions"].items():
        assert_same(other["predictions"][name].output, prediction.output)
    change = other["predictions"]["image"].target - out["predictions"]["image"].target
    assert np.abs(change).max() > 0.1


def test_hidden_words_reach_the_target_alone(plan, run, batch):
    hidden = hidden_of(plan["text"])
    out = run(batch)
    other = run({**batch, "text": np.where(hidden, (batch["text"] + 1) % 11, batch["text"])})
    for name, prediction in out["predictions"].items():
        assert_same(other["predictions"][name].output, prediction.output)
    assert np.all(other["predictions"]["text"].target != out["predictions"]["text"].target)
    seen = run({**batch, "text": np.where(hidden, batch["text"], (batch["text"] + 1) % 11)})
    for name in ("image", "text"):
        change = seen["predictions"][name].output - out["predictions"][name].output
        assert np.abs(change).max() > 1e-4


def test_what_stands_at_padding_changes_nothing(run, batch):
    padding = batch["padding"]
    assert padding.any()
    out = run(batch)
    for filler in (0, 10, -1, 10**6):
        other = dict(batch)
        for name in ("text", "unpaired_text"):
            gaps = batch["padding" if name == "text" else "unpaired_padding"]
            other[name] = np.where(gaps, filler, batch[name]).astype(np.int32)
        found = run(other)
        assert_same(found["gradients"], out["gradients"])
        assert_same(found["losses"], out["losses"])
        for name, prediction in out["predictions"].items():
            assert_same(found["predictions"][name].output, prediction.output)


TEXT_PARTS = (
    "encoder/text_embed/embedding",
    "encoder/text_type",
    "decoder/text_mask",
    "decoder/text_type",
    "decoder/text_head/pred/kernel",
    "decoder/text_head/pred/bias",
)


def test_images_without_a_caption_train_the_image_part_alone(model, params, plan, run, batch):
    captionless = {**batch, "padding": np.ones_like(batch["padding"])}
    out = run(captionless, (1, 1, 0, 0))
    assert out["losses"]["text"] == 0
    found = flat(out["gradients"])
    for name in TEXT_PARTS:
        assert not found.pop(name).any(), name
    for name, leaf in found.items():
        assert leaf.any(), name
    images = {"image": batch["image"]}
    alone = apply(model, params, images, {"image": plan["image"]}, method="predict")
    output = out["predictions"]["image"].output
    np.testing.assert_allclose(alone["image"].output, output, atol=1e-5)


def test_texts_without_an_image_train_the_text_part_alone(run, batch):
    found = flat(run(batch, (0, 0, 1, 0))["gradients"])
    image_parts = [name for name in found if "image" in name or "patch_embed" in name]
    assert len(image_parts) == 7
    for name, leaf in found.items():
        assert leaf.any() == (name not in image_parts), name


def test_losses_are_means_over_patches_and_over_the_words_of_each_text(model, plan, run, batch):
    out = run(batch)
    prediction = out["predictions"]["image"]
    units = np.asarray(quick_jit(model.unit.split)(batch["image"]))
    target = np.take_along_axis(units, plan["image"].ids_mask[..., None], 1)
    expected = np.square(np.asarray(prediction.output) - target).mean()
    np.testing.assert_allclose(out["losses"]["image"], expected, rtol=1e-5)
    for name, weight in (("text", 0.5), ("unpaired_text", 0.25)):
        assert out["predictions"][name].kind == "cross_entropy"
        assert out["predictions"][name].places == model.lengths()[name]
        logits = np.asarray(out["predictions"][name].output, np.float64)
        padding = batch["padding" if name == "text" else "unpaired_padding"]
        total = 0.0
        for row, ids in enumerate(plan[name].ids_mask):
            errors = [
                math.log(np.exp(logits[row, m]).sum()) - logits[row, m, batch[name][row, place]]
                for m, place in enumerate(ids)
                if not padding[row, place]
            ]
            total += np.mean(errors) / 2 if errors else 0.0
        np.testing.assert_allclose(out["losses"][name], weight * total, rtol=1e-5)


def test_a_caption_without_words_counts_as_nothing(run, batch):
    out = run(batch)
    padding = batch["padding"].copy()
    padding[1] = True
    found = run({**batch, "padding": padding})
    losses = quick_jit(lambda prediction: example_losses({"text": prediction}))
    first, second = (losses(x["predictions"]["text"]) for x in (out, found))
    assert first[1] > 0
    np.testing.assert_array_equal(second, [first[0], 0.0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["gradients"]))


# Images alone


def test_the_baseline_is_the_same_network_without_words(model, params, plan, batch):
    alone = make(vocabulary_size=0, unpaired_loss_weight=0.0, mask_per="sample")
    images = {"image": batch["image"]}
    shapes = traverse_util.flatten_dict(shapes_of(alone), sep="/")
    subset = {name: leaf for name, leaf in flat(params).items() if name in shapes}
    assert shapes.keys() == {name for name in flat(params) if "text" not in name}
    nested, plan = traverse_util.unflatten_dict(subset, sep="/"), {"image": plan["image"]}
    found = apply(alone, nested, batch, plan, method="predict")  # texts are not looked at
    assert found.keys() == {"image"}
    same = apply(model, params, images, plan, method="predict")
    assert_same(found["image"].output, same["image"].output)


# Pictures, words and features


@pytest.fixture(scope="module")
def looks(model: M3AE, params: Any, plan: Any, batch: Any) -> dict[str, Any]:
    """Return what is made of a batch beside predictions, from one compiled program."""
    images = {"image": batch["image"]}

    @quick_jit
    def compiled() -> dict[str, Any]:
        def call(method: str, *args: Any) -> Any:
            return model.apply({"params": params}, *args, method=method)

        return {
            "words": call("words", batch, plan),
            "panels": call("panels", batch, plan),
            "without words": call("reconstruct", images, plan),
            "all": call("encode", batch),
            "kept": call("encode", batch, plan),
            "image": call("encode", images),
            "features": call("features", batch),
        }

    return jax.device_get(compiled())


def test_words_are_predicted_where_they_are_hidden(plan, run, looks, batch):
    output = run(batch)["predictions"]["text"].output
    expected = batch["text"].copy()
    for row, ids in enumerate(plan["text"].ids_mask):
        for number, place in enumerate(ids):
            if not batch["padding"][row, place]:
                expected[row, place] = np.argmax(output[row, number])
    np.testing.assert_array_equal(looks["words"], expected)
    assert looks["words"].dtype == np.int32
    assert (expected != batch["text"]).any()


def test_pictures_are_made_of_patches_and_visible_words(model, plan, run, looks, batch):
    panels = looks["panels"]
    assert panels.keys() == model.panel_captions().keys()
    units = np.asarray(quick_jit(model.unit.split)(panels["reconstruction"].images))
    hidden = np.take_along_axis(units, plan["image"].ids_mask[..., None], axis=1)
    np.testing.assert_allclose(hidden, run(batch)["predictions"]["image"].output, atol=1e-5)
    seen = ~hidden_pixels(model, plan)
    np.testing.assert_array_equal(panels["pasted"].images[seen], batch["image"][seen])
    assert np.abs(looks["without words"] - panels["reconstruction"].images).max() > 1e-4


def test_tokens_and_features(looks):
    assert looks["all"].shape == (2, 1 + 6 + 5, 8)
    assert looks["kept"].shape == (2, 1 + 3 + 2, 8)
    assert looks["image"].shape == (2, 1 + 6, 8)
    # Of the image alone, though the batch has captions.
    np.testing.assert_allclose(looks["features"], looks["image"][:, 1:].mean(axis=1), atol=1e-6)


# Cost


def test_flops_are_those_of_the_products_in_the_traced_step():
    model = make(output_head_depth=1)
    batch, plan = batch_of(model, 1), plan_of(model, 1)
    params = random_params(model.init, batch, plan, method="predict")

    def loss(params: Any) -> jax.Array:
        predictions = model.apply({"params": params}, batch, plan, method="predict")
        return example_losses(predictions).sum()

    assert products(jax.grad(loss), params) == model.step_flops()


# The classifier


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_classifier_sees_images_alone_and_norms_twice(model, params, looks, batch, pooling):
    whole = make_classifier(model.unit, model.encoder, 3, pooling=pooling, drop_path_rate=0.1)
    assert whole.encoder.positions == "fixed"
    fresh = jax.device_get(random_params(whole.init, batch["image"]))
    assert fresh["head"].keys() == {"norm", "linear"}
    encoder = transfer_encoder(params["encoder"], model.encoder, whole.encoder, fresh["encoder"])
    assert set(encoder) == {"patch_embed", "image_type", "cls_token", "block_00", "norm"}
    logits = apply(whole, {**fresh, "encoder": encoder}, batch["image"])
    tokens = looks["image"]
    pooled = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(axis=1)
    centred = pooled - pooled.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt(pooled.var(axis=1, keepdims=True) + 1e-6)
    head = fresh["head"]
    normed = normed * head["norm"]["scale"] + head["norm"]["bias"]
    expected = normed @ head["linear"]["kernel"] + head["linear"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_linear_probe_has_the_batch_norm_alone(model, batch):
    probe = make_classifier(model.unit, model.encoder, 3, pooling="cls", norm_group=2)
    shapes = jax.eval_shape(probe.init, jax.random.key(0), batch["image"])["params"]
    assert set(shapes["head"]) == {"linear"}
    assert "norm" in shapes["encoder"]


def test_every_block_has_the_same_drop_path(model):
    encoder = model.encoder.as_backbone(drop_path_rate=0.1, depth=2)
    assert [encoder.drop_path(i, None)[0] for i in range(2)] == [0.1, 0.1]
    assert (encoder.vocabulary_size, encoder.text_length) == (0, 0)


def test_layers_of_parameters(model):
    layer = model.encoder.layer_id
    for name in ("cls_token", "patch_embed/kernel", "image_type", "text_embed/embedding"):
        assert layer(name) == 0
    assert layer("block_00/norm1/scale") == 1
    assert layer("norm/scale") == layer("") == 2


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "giant"}, "model.size 'giant' is not one of small, base, large, huge"),
        ({"mask_per": "device"}, "model.mask_per 'device' is not one of batch, sample"),
        ({"positions": "none"}, "model.positions 'none' is not one of fixed, learned"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 keeps 0 of 6 units"),
        ({"text_mask_ratio": 0.9}, "text_mask_ratio 0.9 keeps 0 of 5 units"),
        ({"text_mask_ratio": 0.0}, "text_mask_ratio 0.0 keeps 5 of 5 units"),
        ({"text_length": 0}, "text_mask_ratio 0.6 keeps 0 of 0 units"),
        ({"vocabulary_size": -1}, "model.vocabulary_size -1: expected at least 0"),
        ({"vocabulary_size": 0}, "model.unpaired_loss_weight 0.25: model.vocabulary_size is 0"),
        ({"text_loss_weight": -0.5}, "model.text_loss_weight -0.5: expected at least 0"),
        ({"output_head_depth": -1}, "model.output_head_depth -1: expected at least 0"),
        ({"depth": 0}, "model.depth 0: expected at least 1"),
        ({"decoder_depth": 0}, "model.decoder_depth must be at least 1"),
        ({"patch_size": 5}, "image_size 12x8 is not a multiple of patch_size 5"),
        ({"num_heads": 3}, "model.embed_dim 8 must be a positive multiple of 4 and of"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        make(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_plans_and_words_that_do_not_fit_are_refused(model, params, plan, batch):
    shorter = {**batch, "text": batch["text"][:, 1:], "padding": batch["padding"][:, 1:]}
    with pytest.raises(ValueError, match="expected a plan of 4 units in 1 or 2 rows"):
        jax.eval_shape(lambda: model.apply({"params": params}, shorter, plan, method="predict"))
    encoder = make(vocabulary_size=0, unpaired_loss_weight=0.0).encoder
    words = m3ae.Words(*(jnp.zeros((1, 2), t) for t in (jnp.int32, jnp.int32, jnp.bool_)))
    with pytest.raises(ConfigError, match="takes images alone, got words"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), None, None, words=words))
    units, ids = jnp.zeros((1, 2, 48)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ConfigError, match="M3AE's encoder has no mask token"):
        encoder.init(jax.random.key(0), units, ids, replaced=ids == 0)


@pytest.mark.slow
def test_a_head_on_hidden_words_alone_needs_less_memory():
    """A step's head on 48 of 64 places in place of all: logits are most of what it needs."""
    model = m3ae.make(size="small", image_size=(64, 64), depth=1, decoder_depth=1)
    rows = 8
    batch = {name: np.zeros((rows, *a.shape), a.dtype) for name, a in model.example().items()}
    batch["image"] = batch["image"].astype(np.float32)
    plan = model.plan(jax.random.key(0), rows)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), batch, plan, method="predict")["params"]
    )

    def temporary(everything: tuple[str, ...]) -> int:
        def words_loss(module: M3AE) -> jax.Array:
            latent = module._encoded(batch, plan)
            output = module.decoder(latent, plan, batch["padding"], everything=everything)["text"]
            hidden = output[:, -48:]
            return (jax.nn.logsumexp(hidden, axis=-1) - hidden[..., 0]).sum()

        def loss(params: Any) -> jax.Array:
            return model.apply({"params": params}, method=words_loss)

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    hidden_alone, all_places = temporary(()), temporary(("text",))
    print(f"hidden places: {hidden_alone / 2**20:.0f} MiB, all: {all_places / 2**20:.0f} MiB")
    assert hidden_alone < 0.9 * all_places
