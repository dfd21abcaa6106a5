"""Loading, overriding and comparing configurations."""

import json

import pytest

from mae_jax import config as configs
from mae_jax import recipes
from mae_jax.errors import ConfigError


def test_a_name_a_file_name_and_a_path_find_the_same_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = configs.find_config("demo")
    assert configs.find_config("demo.py") == path
    assert configs.find_config("configs/demo.py") == path
    assert configs.find_config(str(path)) == path


def test_a_file_of_the_user_comes_before_a_name_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.py").write_text(
        "from mae_jax import recipes\n\ndef get_config():\n    c = recipes.mae_pretrain()\n"
        "    c.seed = 77\n    return c\n"
    )
    assert configs.load_config("demo.py").seed == 77
    assert configs.load_config("demo").seed == 0


def test_a_missing_config_names_the_nearest():
    with pytest.raises(ConfigError, match=r"--config=dmo: no such file.*did you mean demo\?"):
        configs.load_config("dmo")


def test_a_file_without_get_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no function get_config"):
        configs.load_config(str(tmp_path / "empty.py"))


def test_variants_reach_get_config():
    plain, long_raw = configs.load_config("vit_l"), configs.load_config("vit_l:1600ep_raw")
    assert (plain.epochs, plain.model.norm_pix_loss) == (800.0, True)
    assert (long_raw.epochs, long_raw.model.norm_pix_loss) == (1600.0, False)
    with pytest.raises(ConfigError, match="variant '900ep' is not one of 800ep, 1600ep"):
        configs.load_config("vit_l:900ep")
    with pytest.raises(ConfigError, match="folder has no variants, got 'big'"):
        configs.load_config("folder:big")


def test_overrides_take_the_type_of_the_field():
    config = configs.load_config(
        "demo",
        {
            "batch_size": "64",
            "epochs": "3",
            "data.flip": "true",
            "model.size": "vit_b",
            "model.depth": "7",
            "data.crop_scale": "(0.5,1)",
            "run.mesh.fsdp": "2",
        },
    )
    assert config.batch_size == 64
    assert config.epochs == 3.0
    assert isinstance(config.epochs, float)
    assert config.data.flip is True
    assert (config.model.size, config.model.depth) == ("vit_b", 7)
    assert config.data.crop_scale == (0.5, 1.0)
    assert config.run.mesh.fsdp == 2


def test_one_value_stands_for_all_of_a_tuple():
    config = configs.load_config("folder", {"model.image_size": "96", "data.mean": "0.5"})
    assert config.model.image_size == (96, 96)
    assert config.data.mean == (0.5, 0.5, 0.5)


def test_size_and_channels_are_one_value_in_model_and_data():
    config = configs.load_config("demo", {"data.image_size": "56,28", "model.channels": "3"})
    assert config.model.image_size == config.data.image_size == (56, 28)
    assert config.model.channels == config.data.channels == 3


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("batch_size", "many", r"--config.batch_size=many: expected int, got 'many'"),
        ("batch_size", "3.5", "expected int"),
        ("batch_size", "True", "expected int"),
        ("epochs", "long", "expected float"),
        ("data.flip", "1", "expected bool"),
        ("data.mean", "(0.5,'x')", "expected 1 x float"),
        ("model.image_size", "big", "expected 2 x int"),
        ("model.depth", "2.5", "expected int"),
        ("model", "3", "a group of fields"),
        ("batchsize", "3", r"no such field; did you mean batch_size\?"),
        ("model.mask_ration", "0.5", r"did you mean model.mask_ratio\?"),
        ("mask_ratio", "0.5", r"did you mean model.mask_ratio\?"),
        ("seed.deep", "1", "no such field"),
    ],
)
def test_a_wrong_override_is_refused_by_name(field, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        configs.load_config("demo", {field: text})
    assert "\n" not in str(error.value)


def test_a_loaded_config_takes_no_new_fields():
    with pytest.raises((AttributeError, KeyError)):
        configs.load_config("demo").new_field = 1


def test_json_holds_every_field():
    config = configs.load_config("vit_h")
    stored = json.loads(configs.to_json(config))
    assert configs.flatten(stored) == configs.flatten(config)
    configs.refuse_changes(stored, config, [], "here")


def test_a_changed_field_is_refused_by_name_and_allowed_by_name():
    stored = json.loads(configs.to_json(configs.load_config("demo")))
    changed = configs.load_config("demo", {"optimizer.weight_decay": "0.1", "run.log_every": "7"})
    message = r"optimizer.weight_decay is 0.1, but here was made with 0.05.*--allow_change="
    with pytest.raises(ConfigError, match=message):
        configs.refuse_changes(stored, changed, [], "here")
    configs.refuse_changes(stored, changed, ["optimizer.weight_decay"], "here")
    configs.refuse_changes(stored, changed, ["optimizer"], "here")
    with pytest.raises(ConfigError, match=r"--allow_change=optimiser.*did you mean optimizer"):
        configs.refuse_changes(stored, changed, ["optimiser"], "here")


def test_a_config_of_another_model_is_refused():
    stored = json.loads(configs.to_json(configs.load_config("vit_b")))
    with pytest.raises(ConfigError, match=r"model.size is 'vit_l', but here was made with 'vit_b'"):
        configs.refuse_changes(stored, configs.load_config("vit_l"), [], "here")


def test_a_long_value_that_has_changed_is_shown_in_part():
    config = configs.load_config("m3ae:demo")
    stored = json.loads(configs.to_json(config))
    stored["data"]["vocabulary"] = "{" + 10_000 * "x"
    with pytest.raises(
        ConfigError, match=r"^data.vocabulary is '', but here was made with"
    ) as error:
        configs.refuse_changes(stored, config, [], "here")
    assert len(str(error.value)) < 250


def test_recipe_numbers_are_the_papers():
    config = recipes.mae_pretrain()
    assert (config.batch_size, config.epochs) == (4096, 800.0)
    optimizer = config.optimizer
    assert optimizer.base_learning_rate * config.batch_size / 256 == pytest.approx(2.4e-3)
    assert (optimizer.warmup_epochs, optimizer.weight_decay) == (40.0, 0.05)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (config.model.mask_ratio, config.model.norm_pix_loss) == (0.75, True)
    assert config.data.crop_scale == (0.2, 1.0)
    assert config.data.flip
    assert config.data.crop_ratio == pytest.approx((0.75, 4 / 3))
