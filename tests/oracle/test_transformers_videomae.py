"""Agreement with transformers' VideoMAE, small and full size, and that known mistakes break it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from mae_jax.convert import files, outgoing
from mae_jax.convert.incoming import weights_of
from mae_jax.losses.reconstruction import example_losses
from mae_jax.models import video_vit
from mae_jax.models.classifier import Classifier
from mae_jax.models.transfer import make_classifier
from mae_jax.nn import attention, cubes
from mae_jax.nn.masking import mask_of
from mae_jax.nn.pos_embed import sincos_1d, sincos_2d
from mae_jax.pretrain import videomae
from mae_jax.recipes import IMAGENET_MEAN, IMAGENET_STD
from mae_jax.tasks.inputs import normalize_images
from tests.convert import cases
from tests.oracle import agreement, mae_case
from tests.oracle.agreement import Result, Tree
from tests.weights import quick_jit, random_params

pytestmark = pytest.mark.oracle

CLASSES = 5
# Nearly flat cubes turn rounding into targets, whose gradients are so much further apart.
SMALL_TOLERANCE = agreement.SMALL._replace(gradient=2e-5)
SMALL: dict[str, Any] = {
    "size": "vit_s",
    "image_size": (12, 16),
    "frames": 6,
    "patch_size": 4,
    "mask_ratio": 0.75,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 4,
    "decoder_embed_dim": 8,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}


class Case(NamedTuple):
    """A model with weights, clips uint8, a mask, and what theirs makes of them."""

    model: videomae.VideoMAE
    params: Tree
    clips: np.ndarray
    plan: Any
    theirs: Result


@pytest.fixture(scope="module")
def transformers_videomae() -> ModuleType:
    """Return the other side. Imported here, so that the file can be collected without torch."""
    from tests.oracle import transformers_videomae

    return transformers_videomae


def make_clips(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return clips of little contrast here and much there, in which the epsilon shows."""
    rng = np.random.default_rng(seed)
    contrast = np.linspace(4, 90, shape[3]).reshape(1, 1, 1, -1, 1)
    return (128 + contrast * rng.uniform(-1, 1, shape)).round().astype(np.uint8)


def inputs(clips: np.ndarray) -> np.ndarray:
    return np.asarray(normalize_images(jnp.asarray(clips), IMAGENET_MEAN, IMAGENET_STD))


def random_weights(init: Any, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(random_params(init, *args, **kwargs), sep="/")
    return {path: np.asarray(flat[path]) for path in sorted(flat)}


def make_case(other: ModuleType, model: videomae.VideoMAE, batch_size: int, seed: int) -> Case:
    clips = make_clips((batch_size, *model.unit.shape), seed)
    plan = model.plan(jax.random.key(seed), batch_size)
    image = inputs(clips)
    batch = {"image": image, "pixels": clips}
    params = random_weights(model.init, batch, plan, method="predict", seed=seed)
    theirs = other.run(model, params, image, np.asarray(mask_of(plan)))
    return Case(model, params, clips, plan, theirs)


@pytest.fixture(scope="module")
def small(transformers_videomae: ModuleType) -> dict[str, Case]:
    def make(norm_pix_loss: bool) -> Case:
        model = videomae.make(**SMALL, norm_pix_loss=norm_pix_loss)
        return make_case(transformers_videomae, model, batch_size=4, seed=7)

    return {"normalised": make(True), "raw": make(False)}


def step(loss: Callable[[Any], tuple[jax.Array, jax.Array]], params: Tree, jit: Any) -> Result:
    (value, output), gradients = jit(jax.value_and_grad(loss, has_aux=True))(
        mae_case.nested(params)
    )
    flat = traverse_util.flatten_dict(gradients, sep="/")
    return Result(float(value), np.asarray(output), {k: np.asarray(v) for k, v in flat.items()})


def run(case: Case, jit: Any = jax.jit) -> Result:
    batch = {"image": inputs(case.clips), "pixels": case.clips}

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        predictions = case.model.apply({"params": params}, batch, case.plan, method="predict")
        return example_losses(predictions).sum(), predictions["image"].output

    return step(loss, case.params, jit)


def check(ours: Result, theirs: Result, tolerance: agreement.Tolerance) -> None:
    print(agreement.report(ours, theirs, tolerance))
    shares = agreement.shares(ours, theirs, tolerance)
    assert {name: share for name, share in shares.items() if not share <= 1} == {}


@pytest.mark.parametrize("target", ["normalised", "raw"])
def test_small_model_agrees(small, target):
    check(run(small[target], quick_jit), small[target].theirs, SMALL_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"size": "vit_s"},
        # Of the larger ones a pair of blocks, at their width and length.
        {"size": "vit_b", "depth": 2, "decoder_depth": 2},
        {"size": "vit_l", "depth": 2, "decoder_depth": 2},
    ],
    ids=["s", "b-pair", "l-pair"],
)
def test_full_size_agrees(transformers_videomae, fields):
    model = videomae.make(**fields, image_size=(224, 224))
    case = make_case(transformers_videomae, model, batch_size=1, seed=0)
    check(run(case), case.theirs, agreement.FULL_SIZE)


# Fine-tuning.


def run_classifier(model: Classifier, params: Tree, image: Any, label: Any, jit: Any) -> Result:
    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), logits

    return step(loss, params, jit)


def test_classifier_agrees(transformers_videomae):
    method = videomae.make(**SMALL)
    model = make_classifier(method.unit, method.encoder, CLASSES)
    image, label = inputs(make_clips((4, *model.unit.shape), seed=3)), np.arange(4)
    params = random_weights(model.init, image)
    theirs = transformers_videomae.classify(model, params, image, label)
    check(run_classifier(model, params, image, label, quick_jit), theirs, SMALL_TOLERANCE)


# Files.


@pytest.mark.parametrize("parts", [cases.FULL, cases.HEAD], ids=["full", "classifier"])
def test_transformers_reads_what_is_written_for_it_and_ours_what_it_writes(tmp_path, parts):
    import transformers

    made = cases.make_tiny("videomae", parts)
    outgoing.write_transformers(tmp_path / "theirs", made)
    config = files.read(tmp_path / "theirs").config
    kind = getattr(transformers, config["architectures"][0])
    theirs, loaded = kind.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "again")
    back, _ = weights_of(files.read(tmp_path / "again"), cases.Told())
    cases.assert_same(back.params, made.params)


# Mistakes.


def _positions(table: Callable[..., np.ndarray]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(video_vit, "sincos_1d", table)

    return apply


def _in_space_alone(embed_dim: int, count: int, *, interleaved: bool) -> np.ndarray:
    return np.tile(sincos_2d(embed_dim, (3, 4)), (count // 12, 1))


def _halves(embed_dim: int, count: int, *, interleaved: bool) -> np.ndarray:
    return sincos_1d(embed_dim, count, interleaved=False)


def _bias_of_keys_for_that_of_values(patch: pytest.MonkeyPatch) -> None:
    concatenate = jnp.concatenate

    def swapped(arrays: Any, *args: Any, **kwargs: Any) -> jax.Array:
        if arrays[0].ndim == 1:  # the biases
            query, zeros, value = arrays
            arrays = query, value, zeros
        return concatenate(arrays, *args, **kwargs)

    patch.setattr(attention.jnp, "concatenate", swapped)


def _statistics(
    axes: tuple[int, ...], ddof: int = 1, inside: bool = False
) -> Callable[[pytest.MonkeyPatch], None]:
    def statistics(units: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
        values = units.reshape(*units.shape[:-1], -1, channels)
        mean = values.mean(axes, keepdims=True)
        variance = values.var(axes, keepdims=True, ddof=ddof)
        scale = jnp.sqrt(variance + 1e-6) if inside else jnp.sqrt(variance) + 1e-6
        return mean, scale

    return lambda patch: patch.setattr(cubes, "channel_statistics", statistics)


def _columns_before_frames(patch: pytest.MonkeyPatch) -> None:
    def split(unit: cubes.CubeUnit, images: jax.Array) -> jax.Array:
        (slots, rows, columns), d, p = unit.grid_size, unit.tubelet_size, unit.patch_size
        x = images.reshape(-1, slots, d, rows, p, columns, p, unit.channels)
        return x.transpose(0, 1, 3, 5, 4, 6, 2, 7).reshape(-1, unit.count, unit.size)

    patch.setattr(cubes.CubeUnit, "split", split)


def _normalised_pixels(patch: pytest.MonkeyPatch) -> None:
    def true_units(model: videomae.VideoMAE, batch: Any) -> jax.Array:
        return 255 * model.unit.split(batch["image"])

    patch.setattr(videomae.VideoMAE, "_true_units", true_units)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "tanh GELU": mae_case.MISTAKES["tanh GELU"],
    "LayerNorm epsilon 1e-5": mae_case.MISTAKES["LayerNorm epsilon 1e-5"],
    "positions in space alone": _positions(_in_space_alone),
    "positions by halves": _positions(_halves),
    "a bias of keys for that of values": _bias_of_keys_for_that_of_values,
    "statistics of all channels": _statistics((-2, -1)),
    "biased variance": _statistics((-2,), ddof=0),
    "epsilon inside the root": _statistics((-2,), inside=True),
    "columns before frames in a cube": _columns_before_frames,
    "a target of normalised pixels": _normalised_pixels,
}
"""What users are warned of. A bias of keys added to all keys is none of softmax's business, and so
shows in the names of parameters alone: `tests/pretrain/test_videomae.py`."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_is_noticed(small, mistake, monkeypatch):
    case = small["raw" if mistake == "a target of normalised pixels" else "normalised"]
    MISTAKES[mistake](monkeypatch)
    ours = run(case, quick_jit)
    print(agreement.report(ours, case.theirs, SMALL_TOLERANCE))
    assert not agreement.agrees(ours, case.theirs, SMALL_TOLERANCE)


def test_another_mask_in_each_slot_is_noticed(small):
    case = small["normalised"]
    others = case.model.clone(mask_sampling="random").plan(jax.random.key(1), 4)
    ours = run(case._replace(plan=others), quick_jit)
    assert not agreement.agrees(ours, case.theirs, SMALL_TOLERANCE)
