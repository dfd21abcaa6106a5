"""Loading a model out of a run, and what can be done with it without our trainer."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import jax
import jax.export
import numpy as np
import optax
import pytest
import safetensors.numpy
from PIL import Image

from mae_jax import api, build
from mae_jax import config as configs
from mae_jax import main as program
from mae_jax.data.sources import digits
from mae_jax.data.transforms import BadExample
from mae_jax.errors import ConfigError
from mae_jax.nn import masking
from mae_jax.tasks import pictures
from mae_jax.tools import extract_features, outputs, portable
from mae_jax.train.best import BestCheckpoint
from mae_jax.train.state import TrainState
from tests.checkpoints import tiny_config, write_checkpoint, write_params
from tests.helpers import saved_arrays, tiny_run
from tests.weights import normal, quick_jit, random_params

COLOUR = {"model__channels": "3", "data__mean": "0.5,0.4,0.3", "data__std": "0.2,0.25,0.5"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """Return the folder of a run with checkpoints of steps 10 and 20 and an average."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return write_checkpoint(folder, tiny_config(**COLOUR), steps=(10, 20), averaged=True)


@pytest.fixture(scope="module")
def model(workdir) -> api.Pretrained:
    return api.load(workdir)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)


def hidden(plan) -> np.ndarray:
    return np.asarray(masking.mask_of(plan)).reshape(-1, 7, 7)


def assert_params(params, arrays, item):
    leaves = {item + jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(params)}
    assert len(leaves) > 20
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, arrays[name], err_msg=name)


def test_every_spelling_of_a_run_loads_its_parameters(workdir, monkeypatch):
    newest, older = saved_arrays(workdir, 20), saved_arrays(workdir, 10)
    monkeypatch.chdir(workdir.parent)
    step = workdir / "checkpoints" / "20"
    for spelling in (workdir, f"{workdir}/", str(workdir / "checkpoints"), step, "tiny"):
        loaded = api.load(spelling, averaged=False)
        assert (loaded.step, loaded.averaged) == (20, False)
        assert_params(loaded.params, newest, "params")
    monkeypatch.chdir(workdir / "checkpoints" / "10")
    loaded = api.load(".", averaged=False)
    assert loaded.step == 10
    assert_params(loaded.params, older, "params")


def test_a_step_that_was_moved_elsewhere_loads(workdir, tmp_path):
    moved = shutil.copytree(workdir / "checkpoints" / "20", tmp_path / "elsewhere" / "7")
    loaded = api.load(moved, averaged=False)
    assert loaded.step == 7
    assert_params(loaded.params, saved_arrays(workdir, 20), "params")


def test_the_average_is_taken_where_it_is_kept(workdir):
    average, plain = api.load(workdir), api.load(workdir, averaged=False)
    assert (average.averaged, plain.averaged) == (True, False)
    for a, b in zip(jax.tree.leaves(average.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_array_equal(a, 2 * b)


def test_the_config_is_that_of_the_run_with_its_types(model):
    assert model.config.to_dict() == tiny_config(**COLOUR).to_dict()
    assert type(model.config.data.mean) is tuple
    with pytest.raises(AttributeError, match="locked"):
        model.config.model.no_such_field = 1


@pytest.mark.slow
def test_the_picture_that_a_run_has_drawn_can_be_drawn_again(tmp_path):
    workdir = tmp_path / "run"
    fields = {"optimizer__ema_decay": "0.5", "eval__readouts": "False", "seed": "5"}
    assert program.main([*tiny_run(workdir, **fields), "--stop_at_step=20"]) == 0
    drawn = np.asarray(Image.open(workdir / "pictures" / "step_20.png"))
    loaded = api.load(workdir)
    assert loaded.averaged
    source = digits.make("val", path="", held_out=0.2)
    # The first and the middle one of the held-out thousand: they are evenly spaced.
    images = loaded.prepare([source[i]["image"] for i in (0, 500)])
    panels = loaded.panels(images, loaded.plan(2, seed=5))
    captions = loaded.module.panel_captions()
    again = pictures.grid({caption: panels[name] for name, caption in captions.items()})
    assert again.shape == drawn.shape
    # Two programs round alike but for the last bit of a float, now and then of a pixel.
    assert np.abs(again.astype(int) - drawn).max() <= 1
    other = loaded.panels(images, loaded.plan(2, seed=6))
    assert (other["masked"] != panels["masked"]).any()


def test_paths_bytes_and_arrays_of_any_size_are_prepared_alike(model, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (50, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    encoded = (tmp_path / "a.png").read_bytes()
    four = model.prepare([tmp_path / "a.png", str(tmp_path / "a.png"), encoded, pixels])
    assert four.shape == (4, 28, 28, 3)
    assert four.dtype == np.uint8
    assert (four == four[:1]).all()
    fitting = np.random.default_rng(2).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model.prepare(fitting), fitting)
    assert model.prepare([]).shape == (0, 28, 28, 3)


def test_a_photograph_is_turned_as_its_exif_data_say(model):
    upright = Image.fromarray(np.random.default_rng(2).integers(0, 256, (60, 40), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = io.BytesIO(), io.BytesIO()
    upright.rotate(90, expand=True).save(turned, "PNG", exif=exif)
    upright.save(plain, "PNG")
    one, two = model.prepare([turned.getvalue(), plain.getvalue()])
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([b"nothing"], "image 0: not an image of a kind that Pillow knows"),
        (["/no/such/file.png"], "/no/such/file.png: No such file or directory"),
        ([np.zeros((4, 4), np.float32)], r"image 0: expected uint8 \[H, W, C\], got float32"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(model, bad, message):
    with pytest.raises(BadExample, match=message):
        model.prepare(bad)


@pytest.mark.parametrize("one", ["a.png", b"bytes", np.zeros((28, 28, 1), np.uint8)])
def test_one_image_in_place_of_several_is_refused(model, one):
    with pytest.raises(ConfigError, match="expected a list of images"):
        model.prepare(one)


def test_a_plan_is_drawn_as_in_training_unless_told_otherwise(model):
    assert model.plan(2).ids_keep.shape == (2, 12)
    assert model.plan(2, mask_ratio=0.5).ids_keep.shape == (2, 24)
    by_grid = 1 - hidden(model.plan(1, sampling="grid"))[0]
    assert by_grid.sum() == 12
    assert not (by_grid[1:] * by_grid[:-1]).any()  # no two kept ones touch
    assert not (by_grid[:, 1:] * by_grid[:, :-1]).any()


def test_an_image_keeps_its_mask_among_others_and_a_seed_changes_it(model):
    for sampling in ("random", "block"):
        alone = hidden(model.plan(1, seed=3, sampling=sampling))
        among = hidden(model.plan(5, seed=3, sampling=sampling))
        np.testing.assert_array_equal(alone[0], among[0])
        others = [hidden(model.plan(1, seed=seed, sampling=sampling)) for seed in range(4, 8)]
        assert any((alone != other).any() for other in others)


def test_ones_own_noise_decides(model):
    noise = np.arange(49.0)[None]
    assert model.plan(1, noise=noise).ids_keep.tolist() == [list(range(12))]
    with pytest.raises(ValueError, match="noise decides random masks"):
        model.plan(1, noise=noise, sampling="grid")


def test_ones_own_mask_is_the_mask(model, images):
    mask = np.ones((7, 7), int)
    mask[2:5, 1:5] = 0
    each = np.stack([mask, mask.T, mask[::-1]])
    for given, expected in (
        (mask, mask[None]),
        (mask.ravel(), mask[None]),
        (mask.astype(bool), mask[None]),
        (each, each),
        (each.reshape(3, 49), each),
    ):
        plan = model.plan(3, mask=given)
        np.testing.assert_array_equal(hidden(plan), expected)
    grey = (model.panels(images, plan)["masked"] == 128).all(axis=-1)
    np.testing.assert_array_equal(
        grey.reshape(3, 7, 4, 7, 4).all(axis=(2, 4)), each.astype(bool), strict=True
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 0.999}, "mask_ratio 0.999 keeps 0 of 49 units"),
        ({"sampling": "blok"}, "model.mask_sampling 'blok' is not one of random, block, grid"),
        ({"mask": np.ones((7, 7))}, "mask: keeps 0 of 49 units"),
        ({"mask": np.full((7, 7), 0.5)}, "of 0 and 1, got .* with 0.5"),
        ({"mask": np.eye(8)}, r"mask: expected \[49\], \[7, 7\] or one .* got shape \[8, 8\]"),
        ({"mask": np.ones((2, 49))}, "mask: expected 1 or 3 masks, got 2"),
        ({"mask": np.ones(())}, r"mask: expected .* got shape \[\]"),
    ],
)
def test_what_fits_no_mask_is_refused(model, fields, message):
    with pytest.raises(ConfigError, match=message):
        model.plan(3, **fields)


def test_a_reconstruction_depends_on_what_is_seen_alone(model, images):
    plan = model.plan(3, seed=1)
    out = model.reconstruct(images, plan)
    assert out.shape == (3, 28, 28, 3)
    assert out.dtype == np.float32
    unseen = hidden(plan).repeat(4, axis=1).repeat(4, axis=2)[..., None] == 1
    np.testing.assert_array_equal(
        model.reconstruct(np.where(unseen, np.uint8(7), images), plan), out
    )
    changed = model.reconstruct(np.where(unseen, images, np.uint8(7)), plan)
    assert np.abs(changed - out).max() > 0.01


def test_panels_are_the_reconstruction_in_colours(model, images):
    plan = model.plan(3, seed=1)
    panels = model.panels(images, plan)
    expected = np.clip(np.rint(model.reconstruct(images, plan) * 255), 0, 255)
    difference = np.abs(panels["reconstruction"].astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    unseen = hidden(plan).repeat(4, axis=1).repeat(4, axis=2)[..., None] == 1
    np.testing.assert_array_equal(panels["original"], images)
    np.testing.assert_array_equal(
        panels["pasted"], np.where(unseen, panels["reconstruction"], images)
    )


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 28, 28, 3), np.float32)]
)
def test_images_that_are_not_prepared_are_refused(model, wrong):
    with pytest.raises(ConfigError, match=r"expected uint8 \[B, 28, 28, 3\], as prepare returns"):
        model.reconstruct(wrong, model.plan(1))


def refusal(checkpoint, **fields):
    with pytest.raises(ConfigError) as caught:
        api.load(checkpoint, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_without_a_checkpoint_is_refused_and_left_alone(tmp_path):
    assert f"{tmp_path}: expected a run or its checkpoints, got no checkpoint" in refusal(tmp_path)
    assert "got none there" in refusal(tmp_path / "nothing")
    (tmp_path / "checkpoints").mkdir()
    assert "got no checkpoint" in refusal(tmp_path)
    (tmp_path / "checkpoints" / "5" / "params").mkdir(parents=True)
    assert "it has no item 'meta'" in refusal(tmp_path / "checkpoints" / "5")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["5", "checkpoints", "params"]


def test_damaged_parameters_are_refused_and_an_older_step_can_be_named(tmp_path):
    workdir = write_checkpoint(tmp_path, tiny_config(), steps=(3, 5))
    for pattern in ("d/*", "ocdbt.process_*/d/*"):
        for path in (tmp_path / "checkpoints" / "5" / "params").glob(pattern):
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
    assert f"cannot restore {tmp_path}/checkpoints/5: params" in refusal(workdir)
    assert api.load(tmp_path / "checkpoints" / "3").step == 3


def test_an_average_that_was_lost_is_refused_and_not_replaced(tmp_path):
    workdir = write_checkpoint(tmp_path, tiny_config(), averaged=True)
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "ema")
    assert refusal(workdir).endswith("checkpoints/3: it has no item 'ema'")


def test_a_run_without_an_average_has_none_to_give(tmp_path):
    workdir = write_checkpoint(tmp_path, tiny_config())
    assert "holds no averaged parameters" in refusal(workdir, averaged=True)
    assert not api.load(workdir).averaged


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("model", "windows", 4, "model.windows: a field that model.name 'mae' has not"),
        ("data", "mean", None, "mean"),
        ("model", "size", "vit_g", "model.size 'vit_g' is not one of"),
    ],
)
def test_a_checkpoint_of_another_version_is_named_as_such(tmp_path, group, field, value, message):
    stored = json.loads(configs.to_json(tiny_config()))
    stored[group][field] = value
    if value is None:
        del stored[group][field]
    refused = refusal(write_checkpoint(tmp_path, tiny_config(), stored=stored))
    assert "checkpoints/3: written by mae_jax 0.0.7, it does not fit version" in refused
    assert message in refused


def test_parameters_of_another_model_are_refused(tmp_path):
    stored = json.loads(configs.to_json(tiny_config(model__depth="3")))
    workdir = write_checkpoint(tmp_path, tiny_config(), stored=stored)
    assert "cannot restore" in refusal(workdir)


@pytest.fixture(scope="module")
def encoder_alone(model, tmp_path_factory) -> api.Pretrained:
    """Return a model of which only the encoder was saved, as most released weights are."""
    folder = tmp_path_factory.mktemp("encoder")
    config = tiny_config(**COLOUR)
    write_params(folder, config, {"encoder": model.params["encoder"]})
    return api.load(folder)


@pytest.fixture(scope="module")
def fine_tuned(model, tmp_path_factory) -> tuple[api.Pretrained, dict]:
    """Return a classifier that was saved and loaded, and its parameters before."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    _, params = model.classifier(5)
    params["head"] = jax.tree.map(lambda x: x + 0.5, params["head"])
    config = tiny_config(**COLOUR, model__positions="learned").unlock()
    config.model.update({"num_classes": 5, "pooling": "mean"})
    write_params(folder, config, params)
    return api.load(folder), params


def test_tokens_are_those_of_the_kept_patches_or_of_all(model, images):
    everything = model.encode(images)
    assert everything.shape == (3, 1 + 49, 16)
    assert everything.dtype == np.float32
    plan = model.plan(3, mask_ratio=0.5)
    kept = model.encode(images, plan)
    assert kept.shape == (3, 1 + 24, 16)
    assert np.abs(kept[:, 0] - everything[:, 0]).max() > 1e-3  # they have seen less
    # All patches in another order are the same tokens in that order.
    order = np.random.default_rng(0).permutation(49)
    ids = np.broadcast_to(order, (3, 49)).astype(np.int32)
    shuffled = model.encode(images, masking.MaskPlan(ids_keep=ids, ids_mask=ids[:, :0]))
    np.testing.assert_allclose(shuffled[:, 1:], everything[:, 1:][:, order], atol=1e-5)


def test_features_are_pooled_tokens(model, images):
    tokens = model.encode(images)
    np.testing.assert_allclose(model.features(images), tokens[:, 1:].mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(model.features(images, pool="cls"), tokens[:, 0])
    plan = model.plan(3)
    seen = model.encode(images, plan)[:, 1:].mean(axis=1)
    np.testing.assert_allclose(model.features(images, plan), seen, atol=1e-6)
    with pytest.raises(ConfigError, match="pool 'max' is not one of mean, cls"):
        model.features(images, pool="max")


def test_an_encoder_alone_gives_features_and_no_pictures(encoder_alone, model, images):
    assert encoder_alone.params.keys() == {"encoder"}
    np.testing.assert_array_equal(encoder_alone.features(images), model.features(images))
    plan = encoder_alone.plan(3)
    for draw in (encoder_alone.reconstruct, encoder_alone.panels):
        with pytest.raises(ConfigError, match="this checkpoint has an encoder and no decoder"):
            draw(images, plan)
    with pytest.raises(ConfigError, match="logits: expected a fine-tuned classifier"):
        encoder_alone.logits(images)


@pytest.mark.slow
def test_a_classifier_has_the_encoder_of_the_model(model, images):
    module, params = model.classifier(5, pooling="cls")
    assert params.keys() == {"encoder", "head"}
    inputs = model.task.inputs({"image": images})["image"]
    logits = module.apply({"params": params}, inputs)
    assert logits.shape == (3, 5)
    params["head"]["linear"]["kernel"] = np.eye(16, 5, dtype=np.float32)
    # Learned positions start as the fixed ones, so the class token is what it was.
    np.testing.assert_allclose(
        module.apply({"params": params}, inputs),
        model.features(images, pool="cls")[:, :5],
        atol=1e-5,
    )
    larger, params = model.classifier(5, image_size=(40, 36))
    assert larger.apply({"params": params}, np.zeros((1, 40, 36, 3), np.float32)).shape == (1, 5)


def test_a_fine_tuned_classifier_is_loaded_with_its_head(fine_tuned, images):
    loaded, params = fine_tuned
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    inputs = loaded.task.inputs({"image": images})["image"]
    expected = loaded.module.apply({"params": params}, inputs)
    np.testing.assert_allclose(loaded.logits(images), expected, atol=1e-5)
    assert loaded.features(images).shape == (3, 16)
    for refused in (loaded.encode, lambda images: loaded.plan(len(images))):
        with pytest.raises(ConfigError, match="expected a pre-trained model, got a fine-tuned"):
            refused(images)


STATISTICS = {"mean": normal((16,), seed=8), "var": 0.5 + normal((16,), seed=9) ** 2}


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> tuple[api.Pretrained, Path]:
    """Return a linear probe of 5 classes that was saved with its running statistics, and where."""
    folder = tmp_path_factory.mktemp("probe")
    config = tiny_config("linear_probe:demo", **COLOUR, model__depth="1", model__num_classes="5")
    config = config.copy_and_resolve_references().unlock()
    config.data.crop_fraction = None  # as of ImageNet: the rule decides
    module = build.build_model(config)
    params = random_params(module.init, np.zeros((1, 28, 28, 3), np.float32))
    write_params(
        folder, config, params, extra={"batch_stats": {"head": {"batch_norm": STATISTICS}}}
    )
    return api.load(folder), folder


def test_a_linear_probe_normalises_with_its_running_statistics(probe, images):
    loaded, _ = probe
    inputs = loaded.task.inputs({"image": images})["image"]

    def encode_all(module, x):
        return module.encoder.encode_all(module.unit.split(x))

    variables = {"params": loaded.params}
    tokens = quick_jit(lambda x: loaded.module.apply(variables, x, method=encode_all))(inputs)
    features = (tokens[:, 0] - STATISTICS["mean"][None]) / np.sqrt(STATISTICS["var"][None] + 1e-6)
    np.testing.assert_allclose(loaded.features(images), features, atol=1e-5)
    linear = loaded.params["head"]["linear"]
    logits = features @ linear["kernel"] + linear["bias"][None]
    np.testing.assert_allclose(loaded.logits(images), logits, atol=1e-5)
    # An image's answer does not depend on the others of its batch.
    np.testing.assert_allclose(loaded.logits(images[:1]), logits[:1], atol=1e-5)


def test_a_linear_probe_without_its_statistics_is_refused(probe, tmp_path):
    loaded, _ = probe
    write_params(tmp_path, loaded.config, loaded.params)
    assert "it has no item 'extra'" in refusal(tmp_path)


def test_a_linear_probe_is_exported_with_its_statistics(probe, images):
    loaded, _ = probe
    program = portable.program(loaded, outputs.choose(loaded, "logits"))
    found = jax.export.deserialize(bytearray(program)).call(images)
    np.testing.assert_allclose(found, loaded.logits(images), atol=1e-5)
    arrays = safetensors.numpy.load(portable.parameters(loaded))
    for name, expected in STATISTICS.items():
        np.testing.assert_array_equal(arrays[f"batch_stats/head/batch_norm/{name}"], expected)
    assert arrays["head/linear/kernel"].shape == (16, 5)


def test_features_of_a_linear_probe_are_extracted_as_the_library_has_them(probe, tmp_path):
    loaded, folder = probe
    pixels = np.random.default_rng(3).integers(0, 256, (6, 40, 36, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    flags = [f"--checkpoint={folder}", f"--out={tmp_path / 'out'}", "--source=folder"]
    flags += [f"--path={tmp_path / 'images'}", "--split=all", "--batch_size=8", "--shard_size=8"]
    assert extract_features.main(flags) == 0
    (file,) = (tmp_path / "out").glob("*.npz")
    expected = loaded.features(loaded.prepare(list(pixels)))
    np.testing.assert_allclose(np.load(file)["features"], expected, atol=1e-5)


def test_the_best_checkpoint_of_a_run_is_its_average_where_one_is_kept(probe, tmp_path):
    loaded, _ = probe
    meta = {"config": loaded.config.to_dict()}
    best = BestCheckpoint(tmp_path / "best", "val/top1", meta)
    state = TrainState.create(loaded.params, loaded.extra, optax.identity(), averaged=True)
    average = jax.tree.map(lambda p: 2 * p, loaded.params)
    best.keep(state.replace(step=np.int32(7), ema=average), {"val/top1": 50.0})
    best.close()
    for place in (tmp_path / "best", tmp_path / "best" / "7"):
        for averaged in (None, True):
            again = api.load(place, averaged=averaged)
            assert (again.step, again.averaged) == (7, True)
            assert_same(again.params, average)
            assert_same(again.extra, loaded.extra)
    plain = BestCheckpoint(tmp_path / "plain", "val/top1", meta)
    plain.keep(state.replace(step=np.int32(7), ema=None), {"val/top1": 50.0})
    plain.close()
    assert not api.load(tmp_path / "plain").averaged
    assert "holds no averaged parameters" in refusal(tmp_path / "plain", averaged=True)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
