"""What `build` refuses, and which reader it takes, beyond what runs show."""

import json

import jax
import numpy as np
import pytest

from mae_jax import build
from mae_jax import config as configs
from mae_jax.data import text
from mae_jax.data.readers import find_reader
from mae_jax.data.text import learn, word_pieces
from mae_jax.errors import ConfigError
from mae_jax.models.transfer import transfer_encoder
from tests.helpers import shrunk

TINY_M3AE = {
    "model.embed_dim": "16",
    "model.depth": "1",
    "model.decoder_embed_dim": "16",
    "model.decoder_depth": "1",
}


def test_features_are_of_one_clip_whatever_a_classifier_is_evaluated_on():
    data = configs.load_config("videomae_finetune").data
    assert build.build_eval_reader(data).views == 15
    assert build.build_eval_reader(data, one_view=True).views == 1
    assert data.test_clips == 5  # as it was


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("m3ae:demo", {"data.reader": "images"}, "'images': model.name takes text"),
        (
            "demo",
            {"data.source": "moving_digits", "data.held_out": "0.2"},
            "'images': expected examples with image, which data.source does not give",
        ),
    ],
)
def test_a_reader_that_does_not_make_what_the_model_takes_is_refused(name, fields, message):
    with pytest.raises(ConfigError, match=f"^data.reader {message}"):
        check_reads(configs.load_config(name, fields))


def check_reads(config):
    read = build.build_readers(config)[0]
    source = build.build_sources(config)[0]
    build.check_reads(config.data.get("reader", "images"), source, read, build.build_model(config))


def test_a_rate_that_would_rise_after_the_warm_up_is_refused():
    config = configs.load_config("finetune", {"optimizer.min_learning_rate": "0.01"})
    with pytest.raises(ConfigError, match=r"min_learning_rate 0\.01: expected at most .* 0\.002"):
        build.build_schedule(config, 1000)


def test_the_least_rate_of_videomae_follows_the_batch():
    config = configs.load_config("videomae", {"batch_size": "256"})
    assert config.optimizer.min_learning_rate == pytest.approx(1e-5)
    assert configs.load_config("videomae").optimizer.min_learning_rate == pytest.approx(8e-5)
    # MCG-NJU/VideoMAE `scripts`: 1e-5 where `--min_lr` says so, else the program's default.
    for variant, per_256 in (("vit_h_k400", 1e-5), ("vit_b_ucf101", 1e-5), ("vit_b_k400", 1e-6)):
        config = configs.load_config(f"videomae_finetune:{variant}")
        least = per_256 * config.batch_size / 256
        assert config.optimizer.min_learning_rate == pytest.approx(least), variant


def test_an_encoder_of_another_method_is_refused_even_where_all_shapes_fit():
    m3ae = build.build_model(configs.load_config("m3ae:demo", TINY_M3AE)).encoder
    vit = build.build_model(configs.load_config("demo")).encoder
    with pytest.raises(ConfigError, match=r"^model.name: expected .* a M3AEEncoder, got one"):
        transfer_encoder({}, m3ae, vit, {})


def test_words_may_be_given_on_the_command_line():
    config = configs.load_config("m3ae", {"data.scored_words": "red, blue"})
    assert config.data.scored_words == ("red", "blue")
    assert configs.load_config("m3ae", {"data.scored_words": "red"}).data.scored_words == ("red",)


def test_the_vocabulary_of_a_run_is_taken_from_its_folder(tmp_path):
    learnt = learn(["red green blue", "green red"], 40)
    config = configs.load_config("m3ae:demo", {"data.vocabulary": str(tmp_path)})
    (tmp_path / "config.json").write_text(json.dumps({"data": {"vocabulary": learnt}}))
    words = word_pieces(config.data)
    assert words.serialized == learnt
    assert words.decode(words("green blue")[0][~words("green blue")[1]]) == "green blue"
    (tmp_path / "config.json").write_text(json.dumps({"data": {}}))
    with pytest.raises(ConfigError, match=r"^data.vocabulary: expected a run with word pieces"):
        word_pieces(config.data)


def test_groups_of_mixup_are_of_rows():
    fields = {"batch_size": "32", "data.crops_per_image": "2", "data.mixup_group": "64"}
    for name in ("finetune", "videomae_finetune"):
        config = configs.load_config(name, fields)
        rows = build.rows_of(config, find_reader(config.data).training(config))
        assert rows == 64
        task = build.build_task(config, build.build_model(config))
        assert task.mixup.group_size == 64
        build.check_prepares(config, task, rows)
        config.data.mixup_group = 48
        task = build.build_task(config, build.build_model(config))
        with pytest.raises(ConfigError, match=r"data.mixup_group 48"):
            build.check_prepares(config, task, rows)
    assert np.isfinite(config.optimizer.min_learning_rate)


@pytest.mark.parametrize(
    ("cores", "fields", "expected"),
    [
        (2, {}, (0, 2)),
        (96, {}, (24, 4)),
        (96, {"run.workers": "0"}, (0, 8)),
        (2, {"run.workers": "3"}, (3, 1)),
        (2, {"run.threads": "5"}, (0, 5)),
        (96, {"run.threads": "0"}, (24, 0)),
    ],
)
def test_threads_and_workers_are_chosen_by_the_cores_unless_given(
    monkeypatch, cores, fields, expected
):
    monkeypatch.setattr(build, "available_cores", lambda: cores)
    assert build.workers_and_threads(configs.load_config("demo", fields)) == expected


@pytest.mark.parametrize(
    "name",
    ["demo", "demo:64px", "photos", "finetune:demo", "m3ae:demo", "mixmim:demo", "um_mae:demo"],
)
def test_the_figures_of_demos_are_those_of_pillow(name):
    assert configs.load_config(name).data.resample == "pil"
    assert configs.load_config("vit_b").data.resample == "fast"


def test_word_pieces_are_learnt_once_for_both_readers(monkeypatch):
    calls = []
    monkeypatch.setattr(text, "learn", lambda *args: calls.append(args) or learn(*args))
    training, evaluation = build.build_readers(configs.load_config("m3ae:demo"))
    assert len(calls) == 1
    assert training.words == evaluation.words


@pytest.mark.parametrize("name", ["vit_b", "videomae:vit_s_k400", "um_mae:swin_t", "m3ae:base"])
def test_blocks_are_made_again_as_the_run_asks(name):
    config = configs.load_config(name, {"run.remat": "block"})
    model = build.build_model(config)
    assert (model.encoder.remat, model.decoder.remat) == ("block", "block")
    plain = build.build_model(configs.load_config(name))
    assert (plain.encoder.remat, plain.decoder.remat) == ("none", "none")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run.remat", "blocks", "run.remat 'blocks' is not one of none, products, block"),
        (
            "run.attention.decoder",
            "flash",
            "run.attention.decoder 'flash' is not one of xla, cudnn",
        ),
    ],
)
def test_a_way_to_run_that_there_is_not_is_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        build.build_model(configs.load_config("vit_b", {field: value}))


@pytest.mark.parametrize(
    ("name", "part", "found"),
    [
        ("m3ae:demo", "encoder", "mask"),
        ("m3ae:demo", "decoder", "mask"),
        ("mixmim:demo", "encoder", "bias"),
        ("um_mae:demo", "encoder", "bias"),
        ("hivit_finetune:demo", "encoder", "bias"),
        ("mixmim:demo", "decoder", None),
        ("m3ae:small_mae", "encoder", None),
        ("hivit:demo", "encoder", None),
        ("demo", "decoder", None),
    ],
)
def test_a_kernel_without_biases_and_masks_is_refused_where_there_are_some(
    name, part, found, monkeypatch
):
    kernels, xla = [], jax.nn.dot_product_attention

    def attend(*args, implementation=None, **extra):
        kernels.append(implementation)
        return xla(*args, **extra)

    monkeypatch.setattr(build, "_has_cudnn", lambda config: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    config = configs.load_config(name, shrunk(name) | {f"run.attention.{part}": "cudnn"})
    task = build.build_task(config, build.build_model(config))
    if found is None:
        build.build_training(config, task, build.build_optimizer(config))
        assert "cudnn" in kernels
        return
    message = f"^run.attention.{part} cudnn: expected attention without .* a {found}.*; take xla"
    with pytest.raises(ConfigError, match=message) as caught:
        build.build_training(config, task, build.build_optimizer(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("demo", {"model.image_size": "4,4", "model.norm_pix_loss": "True"}),
        ("videomae:motion", {"model.image_size": "4,4", "model.tubelet_size": "1"}),
    ],
)
def test_targets_of_one_value_are_not_normalised(name, fields):
    fields = shrunk(name) | {"model.patch_size": "1"} | fields
    config = configs.load_config(name, fields)
    task = build.build_task(config, build.build_model(config))
    message = "^model.norm_pix_loss True: expected at least 2 values to normalise together, got 1;"
    with pytest.raises(ConfigError, match=message) as caught:
        build.build_training(config, task, build.build_optimizer(config))
    assert "\n" not in str(caught.value)
    config = configs.load_config(name, fields | {"model.norm_pix_loss": "False"})
    task = build.build_task(config, build.build_model(config))
    build.build_training(config, task, build.build_optimizer(config))


def test_a_kernel_that_the_devices_lack_is_refused_in_training_and_left_out_in_loading():
    config = configs.load_config("vit_b", {"run.attention.encoder": "cudnn"})
    assert build.build_model(config) == build.build_model(configs.load_config("vit_b"))
    with pytest.raises(ConfigError, match="encoder cudnn: expected an NVIDIA GPU and"):
        build.check_attention(config)
