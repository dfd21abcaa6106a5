"""Every method by parameter: it resumes after a stop and a kill, refuses, and goes elsewhere."""

import re

import numpy as np
import pytest
from PIL import Image

from mae_jax import api
from mae_jax.tools import comparison
from mae_jax.tools.family_table import COMPARED
from tests.e2e.cases import (
    Case,
    assert_changes_are_refused,
    assert_parts_equal_the_whole,
)
from tests.helpers import run_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

SHORT = {"run__save_every": "4", "run__log_every": "1", "eval__every": "0"}
# 12 steps: 192 of 4,000 digits, or of what a config has.
EXAMPLES = {"m3ae:demo": 20_000}
# Not MAE, whose runs are in test_program.py, nor what has its encoder or is there to be compared.
METHODS = [
    # Minutes each; of the pyramids HiViT's is left, the others are drills.
    pytest.param(config, marks=pytest.mark.drill)
    if config.startswith(("um_mae", "mixmim"))
    else config
    for config in COMPARED.values()
    if config not in ("demo:64px", "um_mae:demo_vit", "simmim:demo")
]
METHODS += ["videomae:motion", "m3ae:demo"]
# What fine-tunes the encoder of a method, where there is a config for it.
FINETUNED = {"videomae:motion": "videomae_finetune:motion"} | {
    f"{name}:demo": f"{name}_finetune:demo" for name in ("hivit", "mixmim", "um_mae")
}


@pytest.fixture(scope="module", params=METHODS)
def run_in_one(request, compiled_once, tmp_path_factory):
    """A method, and an uninterrupted run of it."""
    changes = ({"model__decoder_depth": "2"}, {"optimizer__b2": "0.9"})
    epochs = {"epochs": str(192 / EXAMPLES.get(request.param, 4000))}
    epochs |= {"optimizer__warmup_epochs": str(float(epochs["epochs"]) / 4)}
    case = Case(request.param, SHORT | epochs, 12, 3, 4, changes)
    workdir = tmp_path_factory.mktemp("method") / "run"
    status, output = run_here(case.flags(workdir))
    assert status == 0, output
    clips = request.param.startswith("videomae")
    assert f"{'clips' if clips else 'images'} to train on" in output
    assert re.search(rf"10 classes; (\d+ x ){{{3 if clips else 2}}}1; ", output)
    return case, workdir


# Minutes for each, and what stops and goes on knows no methods: CI kills runs of MAE alone.
@pytest.mark.drill
def test_a_run_in_parts_with_a_kill_equals_one_in_one(run_in_one, tmp_path):
    assert_parts_equal_the_whole(*run_in_one, tmp_path / "parts")


def test_another_experiment_is_refused(run_in_one):
    assert_changes_are_refused(*run_in_one)


def test_a_run_loads_draws_and_becomes_a_classifier(run_in_one):
    _, workdir = run_in_one
    model = api.load(workdir)
    shape = model.module.example()["image"].shape
    images = np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    (variant,) = comparison.variants(model, None, None, [0])  # nothing asked for
    plan = model.plan(4, **variant.fields)
    panels = model.panels(images, plan)
    assert panels.keys() == model.module.panel_captions().keys()
    assert {panel.shape for panel in panels.values()} == {(4, *shape[:-1], 3)}
    np.testing.assert_array_equal(panels["original"], np.repeat(images, 3, axis=-1))
    assert model.reconstruct(images, plan).shape == images.shape
    drawn = comparison.compare(model, images, [variant])
    assert [picture.ndim for picture in drawn] == ([3] if len(shape) == 3 else [3, 4])
    features = model.features(images)
    assert features.shape[0] == 4
    assert np.isfinite(features).all()
    np.testing.assert_allclose(model.features(images[:1]), features[:1], atol=1e-4)
    classifier, params = model.classifier(num_classes=7)
    logits = classifier.apply({"params": params}, np.zeros((2, *shape), np.float32))
    assert logits.shape == (2, 7)
    shown = np.asarray(Image.open(workdir / "pictures" / "step_12.png"))
    assert shown.std() > 10


def test_fine_tuning_starts_from_the_encoder_of_a_run(run_in_one, tmp_path):
    case, workdir = run_in_one
    if case.config not in FINETUNED:
        pytest.skip("has no config of its own for fine-tuning")
    fields = {"init_from": str(workdir), "model__drop_path_rate": "0.2"}
    tuned = Case(FINETUNED[case.config], fields, 12, 3, 4, ({"optimizer__layer_decay": "0.5"},))
    whole = tmp_path / "whole"
    status, output = run_here(tuned.flags(whole))
    assert status == 0, output
    assert f"started from {workdir}" in output
    assert f"finished at step {tuned.steps}" in output
    assert_changes_are_refused(tuned, whole)
