"""Agreement with transformers' ViTMAE, small and full size, and that known mistakes break it."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.nn.masking import mask_of
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.pretrain import mae
from tests.oracle import agreement, mae_case
from tests.oracle.agreement import Result, Tolerance, Tree
from tests.oracle.frozen import load
from tests.weights import apply

pytestmark = pytest.mark.oracle


class Case(NamedTuple):
    """A model with weights and inputs, and what theirs makes of them."""

    model: mae.MaskedAutoencoder
    params: Tree
    inputs: dict[str, np.ndarray]
    theirs: Result


@pytest.fixture(scope="module")
def transformers_mae() -> ModuleType:
    """Return the other side. Imported here, so that the file can be collected without torch."""
    from tests.oracle import transformers_mae

    return transformers_mae


@pytest.fixture(scope="module", params=[True, False], ids=["norm_pix", "raw"])
def small(request: pytest.FixtureRequest, transformers_mae: ModuleType) -> Case:
    model = mae.make(**mae_case.SMALL, norm_pix_loss=request.param)
    return make_case(transformers_mae, model, mae_case.BATCH_SIZE, seed=7)


def make_case(other: ModuleType, model: mae.MaskedAutoencoder, batch_size: int, seed: int) -> Case:
    params = mae_case.random_weights(model, seed)
    image, noise = mae_case.random_inputs(model, batch_size, seed + 1)
    inputs = {"image": image, "noise": noise}
    return Case(model, params, inputs, other.run(model, params, **inputs))


def check(case: Case, tolerance: Tolerance) -> None:
    ours = mae_case.run(case.model, case.params, **case.inputs)
    print(agreement.report(ours, case.theirs, tolerance))
    shares = agreement.shares(ours, case.theirs, tolerance)
    assert {name: share for name, share in shares.items() if not share <= 1} == {}


def test_small_model_agrees(small):
    check(small, agreement.SMALL)


@pytest.mark.parametrize(
    ("fields", "batch_size"),
    [
        ({"size": "vit_b"}, 2),
        ({"size": "vit_l"}, 1),
        ({"size": "vit_h", "depth": 2, "decoder_depth": 2}, 2),  # fewer blocks, for memory
    ],
    ids=["vit_b", "vit_l", "vit_h"],
)
def test_full_size_agrees(transformers_mae, fields, batch_size):
    model = mae.make(image_size=(224, 224), **fields)
    check(make_case(transformers_mae, model, batch_size, seed=0), agreement.FULL_SIZE)


@pytest.mark.parametrize("mistake", mae_case.MISTAKES)
def test_a_known_mistake_is_noticed(small, mistake, monkeypatch):
    if mistake == "biased variance" and not small.model.norm_pix_loss:
        pytest.skip("shows in the normalised target alone")
    mae_case.MISTAKES[mistake](monkeypatch)
    ours = mae_case.run(small.model, small.params, **small.inputs, compiled=False)
    print(agreement.report(ours, small.theirs, agreement.SMALL))
    assert not agreement.agrees(ours, small.theirs, agreement.SMALL)


def test_masks_and_predictions_of_kept_patches_agree(transformers_mae):
    import torch

    model = mae.make(**mae_case.SMALL, norm_pix_loss=False)
    params = mae_case.random_weights(model, seed=1)
    image, noise = mae_case.random_inputs(model, 3, seed=2)
    with torch.no_grad():
        theirs = transformers_mae.build(model, params)(
            pixel_values=torch.from_numpy(image).permute(0, 3, 1, 2), noise=torch.from_numpy(noise)
        )
    plan = model.plan(jax.random.key(0), 3, jnp.asarray(noise))
    np.testing.assert_array_equal(mask_of(plan), theirs.mask.numpy())
    tree = mae_case.nested(params)
    images = apply(model, tree, {"image": image}, plan, method="reconstruct")
    logits = theirs.logits.numpy()
    np.testing.assert_allclose(
        model.unit.split(images), logits, atol=3e-6 * float(np.abs(logits).max())
    )


@pytest.mark.parametrize(("width", "grid_size"), [(768, (14, 14)), (512, (14, 14)), (16, (3, 5))])
def test_position_tables_agree(transformers_mae, width, grid_size):
    theirs: Any = transformers_mae.position_table(width, grid_size)[0]
    assert not theirs[0].any()  # the class token has no position
    np.testing.assert_allclose(sincos_2d(width, grid_size), theirs[1:].numpy(), atol=1e-7)


def test_weights_come_back_from_torch_as_they_went(transformers_mae):
    model = mae.make(**mae_case.SMALL)
    params = mae_case.random_weights(model, seed=3)
    tensors = transformers_mae.build(model, params).state_dict()
    back = transformers_mae.in_our_layout(tensors, params)
    assert back.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(back[path], array)


def test_stored_file_is_what_transformers_computes():
    from tests.oracle import make_frozen_mae

    stored = load(make_frozen_mae.PATH)
    tight = Tolerance(loss=1e-12, predictions=1e-7, gradient=1e-7, floor=0)  # of float32 storage
    for variant, result in make_frozen_mae.compute().results.items():
        assert agreement.agrees(stored.results[variant], result, tight)
