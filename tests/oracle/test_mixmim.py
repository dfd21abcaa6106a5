"""Agreement with a slow reference of MixMIM, and that the mistakes it invites break it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from mae_jax.losses.reconstruction import example_losses
from mae_jax.models import decoder
from mae_jax.models import mixmim as models
from mae_jax.models.classifier import Classifier
from mae_jax.models.transfer import make_classifier, transfer_encoder
from mae_jax.nn import attention, masking, merging
from mae_jax.nn.layers import layer_norm
from mae_jax.nn.pos_embed import resize_relative_table, sincos_2d
from mae_jax.pretrain import mixmim
from mae_jax.types import Params, Prediction
from tests.oracle import agreement, mae_case
from tests.oracle.agreement import SMALL, Result, Tree
from tests.oracle.mae_case import nested
from tests.weights import quick_jit, random_params

pytestmark = pytest.mark.oracle

BATCH_SIZE, CLASSES = 4, 5
FIELDS: dict[str, Any] = {
    "size": "base",
    "image_size": (48, 48),
    "stem_patch_size": 2,
    "stem_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": 2,
    # Of cells of 8 and 4 tokens a side: windows have cells of both images.
    "window_sizes": (12, 6, 6, 3),
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}

# Ours -> the authors' names, in the order in which they are tried.
NAMES = {
    r"encoder/patch_embed/kernel": "patch_embed.proj.weight",
    r"encoder/patch_embed/bias": "patch_embed.proj.bias",
    r"encoder/patch_norm/": "patch_embed.norm/",
    r"encoder/norm/": "norm/",
    r"decoder/embed/": "decoder_embed/",
    r"decoder/mask_token": "mask_token",
    r"decoder/norm/": "decoder_norm/",
    r"decoder/pred/": "decoder_pred/",
    r"decoder/block_(\d+)/": lambda m: f"decoder_blocks.{int(m[1])}/",
    r"encoder/downsample_(\d+)/": lambda m: f"layers.{int(m[1]) - 1}.downsample/",
    r"head/linear/": "head/",
    r"attn/bias/table": "attn/relative_position_bias_table",
    r"/kernel$|/scale$": ".weight",
    r"/": ".",
}


def their_name(path: str, depths: tuple[int, ...]) -> str:
    """Return the authors' name of the parameter at `path` of a model with these depths."""

    def block(match: re.Match[str]) -> str:
        number, stage = int(match[1]), 0
        while number >= depths[stage]:
            number, stage = number - depths[stage], stage + 1
        return f"layers.{stage}.blocks.{number}/"

    name = re.sub(r"encoder/block_(\d+)/", block, path)
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def to_theirs(path: str, array: np.ndarray, channels: int = 3) -> np.ndarray:
    """Return a parameter of ours in the authors' layout."""
    if path == "encoder/patch_embed/kernel":
        side = int((len(array) // channels) ** 0.5)
        return array.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
    if path.endswith("/table"):
        return array.reshape(-1, array.shape[-1])
    return array.T if path.endswith("kernel") else array


def to_ours(path: str, array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Undo `to_theirs`, for a parameter of the shape of `like`."""
    if path == "encoder/patch_embed/kernel":
        array = array.transpose(2, 3, 1, 0)
    elif path.endswith("kernel"):
        array = array.T
    return np.ascontiguousarray(array.reshape(like.shape))


def random_weights(init: Callable[..., Any], *args: Any, seed: int, **kwargs: Any) -> Tree:
    """Return weights by path, so small in the stem that the norm after it shows its epsilon."""
    tree = random_params(init, *args, seed=seed, **kwargs)
    flat = {k: np.asarray(v) for k, v in sorted(traverse_util.flatten_dict(tree, sep="/").items())}
    for name in ("kernel", "bias"):
        flat[f"encoder/patch_embed/{name}"] = 0.02 * flat[f"encoder/patch_embed/{name}"]
    return flat


class Case(NamedTuple):
    """A model with weights and inputs, and what the reference makes of them."""

    model: Any
    params: Tree
    inputs: tuple[np.ndarray, np.ndarray]
    theirs: Result


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """Return the other side. Imported here, so that the file can be collected without torch."""
    from tests.oracle import mixmim_reference

    return mixmim_reference


def shape_of(reference: ModuleType, model: mixmim.MixMIM | Classifier) -> Any:
    encoder = model.encoder
    stages = encoder.stages()
    decoding = getattr(model, "decoder", None)
    return reference.Shape(
        cells=encoder.grid_size,
        stem=model.unit.patch_size // 8,
        depths=encoder.depths,
        heads=tuple(stage.num_heads for stage in stages),
        windows=tuple(stage.window[0] for stage in stages),
        decoder_depth=decoding.depth if decoding else 0,
        decoder_heads=decoding.num_heads if decoding else 1,
    )


def state_of(params: Tree, depths: tuple[int, ...], dtype: str = "float32") -> dict[str, Any]:
    import torch

    return {
        their_name(path, depths): torch.tensor(
            to_theirs(path, array), dtype=getattr(torch, dtype), requires_grad=True
        )
        for path, array in params.items()
    }


def gradients_of(state: Mapping[str, Any], params: Tree, depths: tuple[int, ...]) -> Tree:
    return {
        path: to_ours(path, state[their_name(path, depths)].grad.numpy(), like)
        for path, like in params.items()
    }


def pixels(image: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(image).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=[True, False], ids=["norm_pix", "raw"])
def pretrained(request: pytest.FixtureRequest, reference: ModuleType) -> Case:
    import torch

    model = mixmim.make(**FIELDS, norm_pix_loss=request.param)
    rng = np.random.default_rng(1)
    image = rng.standard_normal((BATCH_SIZE, 48, 48, 3)).astype(np.float32)
    noise = rng.random((1, 9), np.float32)
    args = {"image": jnp.asarray(image)}, model.plan(jax.random.key(0), 1)
    params = random_weights(model.init, *args, method="predict", seed=0)
    shape, depths = shape_of(reference, model), model.encoder.depths
    state = state_of(params, depths)
    mask = reference.mask_of(torch.from_numpy(noise[0]), shape, model.mask_ratio)
    predicted = reference.reconstruct(state, shape, pixels(image), mask)
    target = reference.targets(shape, pixels(image), normalise=model.norm_pix_loss)
    loss = ((predicted - target) ** 2).mean()
    loss.backward()
    theirs = Result(loss.item(), predicted.detach().numpy(), gradients_of(state, params, depths))
    return Case(model, params, (image, noise), theirs)


def run(case: Case, *, gradients: bool = True) -> Result:
    """Return loss, predictions of all cells [B, N, U] in raster order, and gradients of ours."""
    image, noise = case.inputs
    model = case.model
    plan = model.plan(jax.random.key(0), len(image), jnp.asarray(noise))

    def loss(params: Params) -> tuple[jax.Array, dict[str, Prediction]]:
        predictions = model.apply({"params": params}, {"image": image}, plan, method="predict")
        return example_losses(predictions).sum(), predictions

    if gradients:
        step = quick_jit(jax.value_and_grad(loss, has_aux=True))
        (value, predictions), tree = step(nested(case.params))
    else:
        (value, predictions), tree = quick_jit(loss)(nested(case.params)), {}
    merged = np.full((len(image), model.unit.count, model.unit.size), np.nan, np.float32)
    for prediction in predictions.values():
        merged[:, np.asarray(prediction.ids)[0]] = prediction.output
    flat = traverse_util.flatten_dict(tree, sep="/")
    return Result(float(value), merged, {k: np.asarray(v) for k, v in flat.items()})


@pytest.fixture(scope="module")
def classified(reference: ModuleType) -> Case:
    import torch

    method = mixmim.make(**FIELDS)
    model = make_classifier(method.unit, method.encoder, CLASSES)
    rng = np.random.default_rng(3)
    image = rng.standard_normal((BATCH_SIZE, 48, 48, 3)).astype(np.float32)
    label = rng.integers(0, CLASSES, BATCH_SIZE)
    params = random_weights(model.init, jnp.asarray(image), seed=2)
    depths = method.encoder.depths
    state = state_of(params, depths)
    logits = reference.classify(state, shape_of(reference, model), pixels(image))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(label))
    loss.backward()
    theirs = Result(loss.item(), logits.detach().numpy(), gradients_of(state, params, depths))
    return Case(model, params, (image, label), theirs)


def run_classifier(case: Case) -> Result:
    image, label = case.inputs

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        logits = case.model.apply({"params": params}, image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), logits

    step = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradients = step(nested(case.params))
    flat = traverse_util.flatten_dict(gradients, sep="/")
    return Result(float(value), np.asarray(logits), {k: np.asarray(v) for k, v in flat.items()})


def check(ours: Result, theirs: Result) -> None:
    print(agreement.report(ours, theirs, SMALL))
    shares = agreement.shares(ours, theirs, SMALL)
    assert {name: share for name, share in shares.items() if not share <= 1} == {}


def test_pretraining_agrees(pretrained):
    check(run(pretrained), pretrained.theirs)


def test_classifier_agrees(classified):
    check(run_classifier(classified), classified.theirs)


def test_classifier_of_another_image_size_has_the_tables_resized_as_by_torch(reference):
    # Windows by rule: 24, 12, 6, 3 tokens a side at 48 pixels, 16, 16, 8, 4 at 64.
    method = mixmim.make(**FIELDS | {"window_sizes": None})
    model = make_classifier(method.unit, method.encoder, CLASSES, image_size=(64, 64))
    image = np.random.default_rng(5).standard_normal((2, 64, 64, 3)).astype(np.float32)
    trained = make_classifier(method.unit, method.encoder, CLASSES)
    small = random_weights(trained.init, jnp.zeros((1, 48, 48, 3)), seed=4)
    params = nested(random_weights(model.init, jnp.asarray(image), seed=5))
    params["encoder"] = transfer_encoder(
        nested(small)["encoder"], method.encoder, model.encoder, params["encoder"]
    )
    params["head"] = nested(small)["head"]
    state = state_of(small, method.encoder.depths)
    old, new = shape_of(reference, method), shape_of(reference, model)
    for stage, (before, after) in enumerate(zip(old.windows, new.windows, strict=True)):
        assert before != after
        name = f"layers.{stage}.blocks.0.attn.relative_position_bias_table"
        state[name] = reference.resize_table(state[name], before, after)
    expected = reference.classify(state, new, pixels(image)).detach().numpy()
    logits = quick_jit(model.apply)({"params": params}, image)
    np.testing.assert_allclose(logits, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("old", "new"), [(14, 16), (14, 24), (7, 12)])
def test_tables_of_the_published_windows_are_resized_as_by_torch(reference, old, new):
    import torch

    table = np.random.default_rng(0).standard_normal(((2 * old - 1) ** 2, 4)).astype(np.float32)
    theirs = reference.resize_table(torch.from_numpy(table), old, new).numpy()
    side = 2 * new - 1
    ours = resize_relative_table(table.reshape(2 * old - 1, 2 * old - 1, 4), (side, side))
    # Theirs is computed in float32, with weights from places in float32.
    np.testing.assert_allclose(ours.reshape(-1, 4), theirs, atol=1e-5)


# Mistakes


def _shift(patch: pytest.MonkeyPatch) -> None:
    cut, join = models.partition, models.unpartition

    def shifted(x: jax.Array, window: tuple[int, int]) -> jax.Array:
        return cut(jnp.roll(x, (-window[0] // 2, -window[1] // 2), (1, 2)), window)

    def back(x: jax.Array, grid: tuple[int, int], window: tuple[int, int]) -> jax.Array:
        return jnp.roll(join(x, grid, window), (window[0] // 2, window[1] // 2), (1, 2))

    patch.setattr(models, "partition", shifted)
    patch.setattr(models, "unpartition", back)


def _other_partner(patch: pytest.MonkeyPatch) -> None:
    def units(self: mixmim.MixMIM, batch: Any) -> tuple[jax.Array, jax.Array]:
        images = batch["image"]
        return self.unit.split(images), self.unit.split(jnp.roll(images, 1, axis=0))

    patch.setattr(mixmim.MixMIM, "_units", units)


def _predict(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what puts `change(predictions, self, batch)` behind `predict`."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        whole = mixmim.MixMIM.predict

        def predict(self: mixmim.MixMIM, batch: Any, plan: Any, **kwargs: Any) -> Any:
            return change(whole(self, batch, plan, **kwargs), self, batch)

        patch.setattr(mixmim.MixMIM, "predict", predict)

    return apply


def _half(predictions: dict[str, Prediction], *_: Any) -> dict[str, Prediction]:
    """Give hidden cells alone a weight: the partner's half is dropped."""
    other = predictions["partner"]
    return {**predictions, "partner": other.replace(weight=0 * other.weight)}


def _doubled(predictions: dict[str, Prediction], *_: Any) -> dict[str, Prediction]:
    """Average over the hidden cells of each mixture, as a masked loss does."""
    return {
        name: p.replace(weight=jnp.full_like(p.weight, 1 / p.weight.size))
        for name, p in predictions.items()
    }


def _not_reversed(
    predictions: dict[str, Prediction], self: Any, batch: Any
) -> dict[str, Prediction]:
    """Compare the partner's cells with those of the image."""
    other = predictions["partner"]
    return {**predictions, "partner": other.replace(target=other.target[::-1])}


def _epsilon(module: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def norm(dtype: Any, name: str | None, *, epsilon: float = 0.0) -> Any:
        return layer_norm(dtype, name, epsilon=1e-6)

    return lambda patch: patch.setattr(module, "layer_norm", norm)


def _open(patch: pytest.MonkeyPatch) -> None:
    arrange = models._in_windows
    patch.setattr(models, "_in_windows", lambda x, stage, groups: arrange(x, stage, None))


def _whole_open(patch: pytest.MonkeyPatch) -> None:
    arrange = models._arrange
    patch.setattr(
        models,
        "_arrange",
        lambda x, stage, groups: arrange(x, stage, None if stage.is_global else groups),
    )


def _places_not_permuted(patch: pytest.MonkeyPatch) -> None:
    """Number the tokens of a group 0, 1, 2 ..., as if they were the first of the grid."""
    call = attention.RelativeTable.__call__

    def counted(self: Any, ids: jax.Array) -> jax.Array:
        return call(self, jnp.arange(ids.shape[1])[None])

    patch.setattr(attention.RelativeTable, "__call__", counted)


def _key_minus_query(patch: pytest.MonkeyPatch) -> None:
    call = attention.RelativeTable.__call__
    patch.setattr(
        attention.RelativeTable, "__call__", lambda self, ids: call(self, ids).swapaxes(2, 3)
    )


def _row_major_merging(patch: pytest.MonkeyPatch) -> None:
    order = merging.neighbours
    patch.setattr(merging, "neighbours", lambda x, column_major: order(x))


def _row_first(module: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def table(width: int, grid_size: tuple[int, int]) -> np.ndarray:
        return np.roll(sincos_2d(width, grid_size), width // 2, axis=1)

    return lambda patch: patch.setattr(module, "sincos_2d", table)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "windows are shifted": _shift,
    "the partner is the neighbour": _other_partner,
    "the partner's half is dropped": _predict(_half),
    "the loss is that of a mask": _predict(_doubled),
    "the partner's predictions are not reversed": _predict(_not_reversed),
    "epsilon 1e-6 in the encoder": _epsilon(models),
    "epsilon 1e-6 in the decoder": _epsilon(decoder),
    "epsilon 1e-6 in the merging": _epsilon(merging),
    "the floor is taken of what is kept": lambda patch: patch.setattr(
        mixmim, "_keep_count", masking.keep_count
    ),
    "images see each other in windows": _open,
    "images see each other in whole grids": _whole_open,
    "places of a group are counted": _places_not_permuted,
    "relative positions of key minus query": _key_minus_query,
    "neighbours are merged in raster order": _row_major_merging,
    "row-first positions of the encoder": _row_first(models),
    "row-first positions of the decoder": _row_first(decoder),
    "tanh GELU": mae_case.MISTAKES["tanh GELU"],
    "biased variance": mae_case.MISTAKES["biased variance"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("pretrained", [True], indirect=True, ids=["norm_pix"])
def test_a_known_mistake_is_noticed(pretrained, mistake, monkeypatch):
    # In the loss or the predictions already: gradients would take three times as long.
    MISTAKES[mistake](monkeypatch)
    ours, theirs = run(pretrained, gradients=False), pretrained.theirs._replace(gradients={})
    shares = agreement.shares(ours, theirs, SMALL)
    print(shares)
    assert not all(share <= 1 for share in shares.values())
