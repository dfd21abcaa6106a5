"""Every config: built at its real size by shapes alone, and stepped once, shrunk by one helper."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import build
from mae_jax import config as configs
from mae_jax.data.readers.images import crop_fraction
from mae_jax.data.text import learn
from mae_jax.errors import ConfigError
from mae_jax.tools.step_times import synthetic
from mae_jax.train.optimizer import path_name
from tests.helpers import shrunk
from tests.weights import quick_jit

SIZES = ("vit_b", "vit_l", "vit_h")
VARIANTS = {
    "demo": ("64px",),
    "hivit": ("small", "tiny", "demo"),
    "hivit_finetune": ("small", "tiny", "demo"),
    "mixmim": ("large", "huge", "300ep", "large_300ep", "demo"),
    "mixmim_finetune": ("base_384", "large", "demo"),
    "um_mae": ("swin_l", "pvt_s", "vit_b", "demo", "demo_pvt", "demo_vit"),
    "um_mae_finetune": ("swin_l", "pvt_s", "vit_b", "demo"),
    "simmim": ("pvt_s", "demo"),
    "videomae": (
        *("vit_s_k400", "vit_l_k400", "vit_h_k400", "vit_s_ssv2", "vit_b_ssv2", "vit_l_ssv2"),
        *("vit_b_ucf101", "demo", "motion"),
    ),
    "videomae_finetune": (
        *("vit_s_k400", "vit_l_k400", "vit_h_k400", "vit_s_ssv2", "vit_b_ssv2", "vit_b_ucf101"),
        *("motion", "motion_scratch"),
    ),
    "m3ae_finetune": ("small", "base", "huge", "small_probe", "base_probe", "large_probe"),
    "m3ae": ("small", "base", "huge", "large_mae", "small_mae", "base_mae", "huge_mae", "demo"),
    **dict.fromkeys(SIZES, ("1600ep", "raw", "1600ep_raw")),
    "finetune": (*SIZES, *(f"{size}_paper" for size in SIZES), "vit_h_448", "demo"),
    "scratch": (*SIZES, "demo"),
    "linear_probe": (*SIZES, "demo"),
    "partial": (*SIZES, "demo"),
    "transfer": (
        "inat2017",
        "inat2018_vit_h",
        "inat2019_vit_l",
        "places205",
        "places365_vit_h_448",
    ),
}
# Without a variant, what is trained is of this size.
DEFAULT = {"finetune": "vit_b", "scratch": "vit_b", "linear_probe": "vit_b", "partial": "vit_l"}

PRETRAINED = {  # trainable parameters: with the fixed tables the published totals
    "vit_b": 111_907_840 - 151_296 - 100_864,
    "vit_l": 329_541_888 - 201_728 - 100_864,
    "vit_h": 657_074_508 - 328_960 - 131_584,
}
CLASSIFIERS = {"vit_b": 86_567_656, "vit_l": 304_326_632, "vit_h": 632_045_800}
CLASSES = {"inat2017": 5089, "inat2018": 8142, "inat2019": 1010, "places205": 205, "places365": 365}
WIDTHS = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}
PROBE_TABLES = {"vit_b": 197 * 768, "vit_l": 197 * 1024, "vit_h": 257 * 1280}


def is_trained(name):
    """Return whether a config trains something, and does not measure a checkpoint."""
    return configs.load_config(name).task in build.TASKS


CONFIGS = [name for name in configs.known_configs() if is_trained(name)]
ALL = [
    *CONFIGS,
    *(f"{name}:{variant}" for name in CONFIGS for variant in VARIANTS.get(name, ())),
]


def expected_size(name):
    """Return the parameters that a config's model has, None where nobody has published them."""
    config, _, variant = name.partition(":")
    if config in PRETRAINED or config == "folder":
        return PRETRAINED["vit_b" if config == "folder" else config]
    if config == "transfer":
        data, _, rest = (variant or "inat2018").partition("_")
        whole = expected_size(f"finetune:{rest}")
        return whole + (CLASSES[data] - 1000) * (WIDTHS[rest[:5] or "vit_b"] + 1)
    if config not in DEFAULT or variant == "demo":
        return None
    size = (variant or DEFAULT[config])[:5]
    if config == "linear_probe":  # positions are fixed
        return CLASSIFIERS[size] - PROBE_TABLES[size]
    # 448 pixels: 32 x 32 patches in place of 16 x 16.
    more = (32**2 - 16**2) * WIDTHS[size] if variant.endswith("448") else 0
    return CLASSIFIERS[size] + more


def built(config):
    task = build.build_task(config, build.build_model(config))
    return task, build.build_training(config, task, build.build_optimizer(config))


def stepped(name):
    """All but two configs take their step in slow tests; each method has a file of its own too.

    Variants, which are shrunk to nearly what their default is, are drills; demos run elsewhere.
    """
    if name in ("demo", "finetune:demo"):
        return name
    return pytest.param(name, marks=pytest.mark.drill if ":" in name else pytest.mark.slow)


def sized(name):
    """Variants of a config are built in slow tests, but for those that run on a CPU."""
    is_slow = ":" in name and "demo" not in name
    return pytest.param(name, marks=pytest.mark.slow) if is_slow else name


def is_of_another_method(name):
    return configs.load_config(name).model.name != "mae"


# Larger sizes of other methods are shrunk to what their default is shrunk to.
STEPPED = [
    name
    for name in ALL
    if ":" not in name or ":demo" in name or ":pvt" in name or not is_of_another_method(name)
]


@pytest.mark.parametrize("name", [sized(name) for name in ALL])
def test_config_builds_at_its_real_size(name):
    config = configs.load_config(name)
    task, training = built(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(training.init, 0).params))
    assert count == (expected_size(name) or count)
    assert count > 50_000
    if "vocabulary" in config.data and not config.data.source.startswith("captioned"):
        config.data.vocabulary = learn(["there are no captions here to learn from"], 100)
    training_reader, _ = build.build_readers(config)
    build.check_prepares(config, task, build.rows_of(config, training_reader))
    build.build_schedule(config, num_examples=1_281_167)


@pytest.mark.parametrize("name", [stepped(name) for name in STEPPED])
def test_config_takes_a_step_when_shrunk(name):
    config = configs.load_config(name, shrunk(name))
    task, training = built(config)
    schedule, total = build.build_schedule(config, num_examples=160)
    assert total == 20
    step = functools.partial(training.step, schedule=schedule)
    batch = synthetic(build.batch_of(task.module, 2))
    state = quick_jit(training.init)(config.seed)
    before = state.params
    step_fn = quick_jit(step)
    for _ in range(2):  # the rate of the first step is 0
        state, metrics = step_fn(state, batch)
    assert np.isfinite(metrics["loss"])
    # That of words counts as often as its weight says.
    assert 0.3 < float(metrics["loss"]) < 10 * max(1, config.model.get("text_loss_weight", 1))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, state.params)
    trainable = training.trainable or jax.tree.map(lambda _: True, before)
    for (path, far), trained in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(trainable), strict=True
    ):
        assert (far > 0) == trained, path_name(path)


# What the official commands and the paper's tables 9, 10 and 11 have in common, by config.
FINETUNED = {
    "batch_size": 1024,
    "model.pooling": "mean",
    "model.positions": "learned",
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.05,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.no_decay": ("cls_token", "pos_embed"),
    "optimizer.warmup_epochs": 5.0,
    "optimizer.min_learning_rate": 1e-6,
    "optimizer.clip_norm": 0.0,
    "optimizer.ema_decay": 0.0,
    "optimizer.trainable_blocks": -1.0,
    "data.crop_scale": (0.08, 1.0),
    "data.crop_ratio": (3 / 4, 4 / 3),
    "data.flip": True,
    "data.augment": "random_resized_crop",
    "data.rand_augment": "rand-m9-mstd0.5-inc1",
    "data.label_smoothing": 0.1,
    "data.mixup_alpha": 0.8,
    "data.cutmix_alpha": 1.0,
    "data.mixup_probability": 1.0,
    "data.mixup_switch_probability": 0.5,
    "data.erasing_probability": 0.25,
}
TABLE_9 = FINETUNED | {"data.erasing_probability": 0.0}  # erasing is the official code's alone
PARTIAL = TABLE_9 | {"optimizer.trainable_blocks": 1.0}
SCRATCH = FINETUNED | {
    "batch_size": 4096,
    "optimizer.weight_decay": 0.3,
    "optimizer.b2": 0.95,
    "optimizer.warmup_epochs": 20.0,
    "optimizer.min_learning_rate": 0.0,
    "optimizer.ema_decay": 0.9999,
    "data.erasing_probability": 0.0,
}
PROBED = {
    "batch_size": 16384,
    "model.pooling": "cls",
    "model.positions": "fixed",
    "model.norm_group": 512,
    "optimizer.name": "lars",
    "optimizer.weight_decay": 0.0,
    "optimizer.momentum": 0.9,
    "optimizer.trust_coefficient": 0.001,
    "optimizer.warmup_epochs": 10.0,
    "optimizer.min_learning_rate": 0.0,
    "optimizer.trainable_blocks": 0.0,
    "data.crop_scale": (0.08, 1.0),
    "data.crop_ratio": (3 / 4, 4 / 3),
    "data.flip": True,
    "data.augment": "random_resized_crop_clamped",
    "data.rand_augment": "",
    "data.label_smoothing": 0.0,
    "data.mixup_alpha": 0.0,
    "data.cutmix_alpha": 0.0,
    "data.erasing_probability": 0.0,
}
OFFICIAL = {
    # Name: what all sizes have, base rate, layer decay, drop path, epochs.
    "finetune:vit_b": (FINETUNED, 5e-4, 0.65, 0.1, 100),
    "finetune:vit_l": (FINETUNED, 1e-3, 0.75, 0.2, 50),
    "finetune:vit_h": (FINETUNED, 1e-3, 0.75, 0.3, 50),
    "finetune:vit_h_448": (FINETUNED, 1e-3, 0.75, 0.3, 50),
    "finetune:vit_b_paper": (TABLE_9, 1e-3, 0.75, 0.1, 100),
    "finetune:vit_l_paper": (TABLE_9, 1e-3, 0.75, 0.1, 50),
    "finetune:vit_h_paper": (TABLE_9, 1e-3, 0.75, 0.2, 50),
    "partial:vit_b": (PARTIAL, 1e-3, 0.75, 0.1, 100),
    "partial:vit_l": (PARTIAL, 1e-3, 0.75, 0.1, 50),
    "partial:vit_h": (PARTIAL, 1e-3, 0.75, 0.2, 50),
    "scratch:vit_b": (SCRATCH, 1e-4, 1.0, 0.1, 300),
    "scratch:vit_l": (SCRATCH, 1e-4, 1.0, 0.2, 200),
    "scratch:vit_h": (SCRATCH, 1e-4, 1.0, 0.2, 200),
    "linear_probe:vit_b": (PROBED, 0.1, 1.0, 0.0, 90),
    "linear_probe:vit_l": (PROBED, 0.1, 1.0, 0.0, 90),
    "linear_probe:vit_h": (PROBED, 0.1, 1.0, 0.0, 90),
}


def field(config, name):
    return functools.reduce(lambda node, part: node[part], name.split("."), config)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_numbers(name):
    common, base_rate, layer_decay, drop_path, epochs = OFFICIAL[name]
    config = configs.load_config(name)
    numbers = common | {
        "optimizer.base_learning_rate": base_rate,
        "optimizer.layer_decay": layer_decay,
        "model.drop_path_rate": drop_path,
        "epochs": epochs,
        "model.image_size": (448, 448) if name.endswith("448") else (224, 224),
        "model.num_classes": 1000,
        "data.mean": (0.485, 0.456, 0.406),
        "data.std": (0.229, 0.224, 0.225),
    }
    assert {key: field(config, key) for key in numbers} == numbers
    assert config.model.size == name.partition(":")[2][:5]


M3AE_FINETUNED = {  # young-geng/m3ae_public: its README's command, `data.py`, `finetune_main.py`
    "batch_size": 1024,
    "epochs": 100.0,
    "optimizer.min_learning_rate": 0.0,
    "optimizer.no_decay": ("cls_token", "image_type"),
    "optimizer.layer_decay": 0.6,
    "model.drop_path_rate": 0.1,
    "data.crop_scale": (0.08, 1.0),
    "data.erasing_probability": 0.0,
}
M3AE_PROBED = {  # the same, and `linear_main.py`
    "batch_size": 2048,
    "epochs": 90.0,
    "optimizer.base_learning_rate": 0.1,
    "data.augment": "random_resized_crop",
    "data.crop_scale": (0.08, 1.0),
    "data.erasing_probability": 0.0,
}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("finetune:vit_l", 32),
        ("finetune:vit_h", 16),
        ("hivit_finetune", 64),
        ("um_mae_finetune:swin_t", 64),
        ("um_mae_finetune:swin_l", 32),
        ("um_mae_finetune:pvt_s", 64),
        ("um_mae_finetune:vit_b", 64),
        ("mixmim_finetune", 128),
    ],
)
def test_images_are_mixed_by_the_batch_of_an_official_gpu(name, group):
    config = configs.load_config(name)
    assert config.data.mixup_group == group
    assert config.batch_size % group == 0


def test_the_baseline_of_m3ae_has_no_type_vectors_as_its_authors_command():
    model = build.build_model(configs.load_config("m3ae:small_mae"))
    assert not model.encoder.use_type_vectors
    assert not model.decoder.use_type_vectors
    fields = {"model.output_head_depth": "2"}
    model = build.build_model(configs.load_config("m3ae:small", fields))
    assert model.encoder.use_type_vectors
    assert model.decoder.head_depth == 2


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("m3ae_finetune:large", M3AE_FINETUNED), ("m3ae_finetune:large_probe", M3AE_PROBED)],
)
def test_m3ae_is_probed_and_fine_tuned_with_its_authors_numbers(name, numbers):
    config = configs.load_config(name)
    assert {key: field(config, key) for key in numbers} == numbers


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("finetune:vit_b", 2e-3),
        ("finetune:vit_l", 4e-3),
        ("finetune:vit_h_paper", 4e-3),
        ("linear_probe", 6.4),
        ("scratch", 1.6e-3),
    ],
)
def test_rate_at_the_official_batch_is_the_official_one(name, peak):
    config = configs.load_config(name)
    assert math.isclose(build.peak_learning_rate(config), peak, rel_tol=1e-9)


def test_probe_follows_the_official_rates():
    schedule, total = build.build_schedule(configs.load_config("linear_probe"), 1_281_167)
    assert total == 90 * 78
    for epoch, rate in ((5, 3.2), (10, 6.4), (50, 3.2), (89, 0.00246708)):
        np.testing.assert_allclose(schedule(jnp.asarray(78 * epoch)), rate, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "fraction"), [("finetune:vit_h", 224 / 256), ("finetune:vit_h_448", 1.0)]
)
def test_images_above_224_pixels_are_measured_as_a_whole(name, fraction):
    data = configs.load_config(name).data
    assert crop_fraction(data.crop_fraction, data.image_size) == fraction


@pytest.mark.parametrize("config", [*DEFAULT, "transfer", "vit_b"])
@pytest.mark.parametrize("variant", ["vit_x", "vit_bb", "nothing", "vit_l_224"])
def test_unknown_variant_is_refused(config, variant):
    with pytest.raises(ConfigError, match=f"^--config={config}:{variant}: variant '.*' "):
        configs.load_config(f"{config}:{variant}")


@pytest.mark.parametrize("config", ["scratch", "linear_probe", "partial"])
def test_variant_of_another_config_is_refused(config):
    with pytest.raises(ConfigError, match=r"variant .* is not one of"):
        configs.load_config(f"{config}:vit_l_table9")


def test_every_config_says_how_to_run_it():
    for name in configs.known_configs():
        text = configs.find_config(name).read_text()
        assert "python -m mae_jax.main --config=" in text, name
        assert "Source" in text, name
