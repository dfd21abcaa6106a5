"""Agreement with a literal PyTorch HiViT, and that what users are warned of breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from mae_jax.models import hivit as encoders
from mae_jax.models.classifier import Classifier
from mae_jax.models.transfer import make_classifier
from mae_jax.nn import attention, blocks, merging
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.pretrain import hivit
from mae_jax.pretrain.mae import MaskedAutoencoder
from tests.oracle import agreement, mae_case
from tests.oracle.agreement import Result, Tree
from tests.weights import random_params

pytestmark = pytest.mark.oracle

CLASSES = 5
SMALL: dict[str, Any] = {
    "size": "base",
    "image_size": (24, 32),
    "stem_patch_size": 2,
    "stem_dim": 8,
    "depths": (1, 1, 2),
    "num_heads": 4,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "released": {},
    "raw pixels and relative positions": {"norm_pix_loss": False, "relative_positions": True},
    "one scale and fixed positions": {"multi_scale": False, "positions": "fixed"},
}


class Case(NamedTuple):
    """A model with weights and inputs, and what theirs makes of them."""

    model: MaskedAutoencoder
    params: Tree
    inputs: dict[str, np.ndarray]
    theirs: Result


# What begins with our path, as the released checkpoints call it; the first that fits counts.
NAMES = {
    "encoder/patch_embed": "patch_embed/proj",
    "encoder/patch_norm": "patch_embed/norm",
    "encoder/pos_embed": "absolute_pos_embed",
    "encoder/norm": "norm",
    "decoder/mask_token": "mask_token",
    "decoder/": "decoder_",
    "head/norm": "fc_norm",
    "head/linear": "head",
}


def their_name(path: str, depths: tuple[int, ...]) -> str:
    """Return the released name of the parameter at our path; `depths`: blocks of each stage."""
    first, second, _ = depths

    def block(match: re.Match[str]) -> str:
        i = int(match[1])
        return f"blocks/{i + (i >= first) + (i >= first + second)}"

    name = re.sub(r"^encoder/block_(\d+)", block, path)
    name = name.replace("encoder/downsample_1", f"blocks/{first}")
    name = name.replace("encoder/downsample_2", f"blocks/{first + second + 1}")
    name = re.sub(r"^decoder/block_0*(\d+)", r"decoder_blocks/\1", name)
    name = name.replace("attn/bias/table", "attn/relative_position_bias_table")
    for ours, theirs in NAMES.items():
        if name.startswith(ours):
            name = theirs + name[len(ours) :]
            break
    return re.sub(r"(kernel|scale)$", "weight", name).replace("/", ".")


def to_theirs(params: Tree, model: MaskedAutoencoder | Classifier) -> dict[str, np.ndarray]:
    """Return the arrays by their names."""
    channels, patch = model.unit.channels, model.unit.patch_size // 4

    def one(path: str, array: np.ndarray) -> np.ndarray:
        if path == "encoder/patch_embed/kernel":
            return array.T.reshape(-1, patch, patch, channels).transpose(0, 3, 1, 2)
        if path.endswith("/table"):
            return array.reshape(-1, array.shape[-1])
        return array.T if path.endswith("kernel") else array

    depths = model.encoder.depths
    return {their_name(path, depths): one(path, array) for path, array in params.items()}


def to_ours(
    theirs: dict[str, np.ndarray], params: Tree, model: MaskedAutoencoder | Classifier
) -> dict[str, np.ndarray]:
    """Return their arrays at the paths of `params`, in its shapes."""

    def one(path: str, like: np.ndarray) -> np.ndarray:
        array = theirs[their_name(path, model.encoder.depths)]
        if path == "encoder/patch_embed/kernel":
            array = array.transpose(2, 3, 1, 0)
        elif path.endswith("kernel"):
            array = array.T
        return array.reshape(like.shape)

    return {path: one(path, like) for path, like in params.items()}


# Their side.


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """Return the other side. Imported here, so that the file can be collected without torch."""
    from tests.oracle import hivit_reference

    return hivit_reference


def build(
    reference: ModuleType, params: Tree, model: MaskedAutoencoder | Classifier, **fields: Any
) -> Any:
    encoder = model.encoder
    theirs = reference.HiViT(
        grid_size=encoder.grid_size,
        channels=encoder.channels,
        patch=model.unit.patch_size // 4,
        width=encoder.stem_dim,
        depths=encoder.stage_depths,
        heads=encoder.num_heads,
        relative=encoder.relative_positions,
        multi_scale=encoder.multi_scale,
        **fields,
    )
    state = to_theirs(params, model)
    if encoder.positions == "fixed":
        state["absolute_pos_embed"] = reference.position_table(
            4 * encoder.stem_dim, encoder.grid_size
        ).numpy()
    return reference.with_state(theirs, state)


def gradients_of(theirs: Any, params: Tree, model: Any) -> dict[str, np.ndarray]:
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    return to_ours(gradients, params, model)


def their_result(
    reference: ModuleType, model: MaskedAutoencoder, params: Tree, inputs: dict[str, np.ndarray]
) -> Result:
    import torch

    decoder = model.decoder
    dims = decoder.embed_dim, decoder.depth, decoder.num_heads
    theirs = build(reference, params, model, norm_pix=model.norm_pix_loss, decoder=dims)
    image = torch.from_numpy(inputs["image"]).permute(0, 3, 1, 2)
    loss, predictions = theirs(image, torch.from_numpy(inputs["noise"]), model.keep_count())
    loss.backward()
    return Result(loss.item(), predictions.detach().numpy(), gradients_of(theirs, params, model))


# Pre-training.


def make(**fields: Any) -> MaskedAutoencoder:
    """Return a model; without all scales it has no norm, as the released one."""
    model = hivit.make(**SMALL | fields)
    encoder = model.encoder.clone(final_norm=model.encoder.multi_scale)
    return model.clone(encoder=encoder)


def weights(model: MaskedAutoencoder, seed: int) -> dict[str, np.ndarray]:
    """Return random weights by path.

    Patches are embedded small, so that the first norm shows a wrong epsilon.
    """
    params = mae_case.random_weights(model, seed)
    for name in ("kernel", "bias"):
        params[f"encoder/patch_embed/{name}"] = 0.02 * params[f"encoder/patch_embed/{name}"]
    return params


def make_case(reference: ModuleType, model: MaskedAutoencoder, batch_size: int, seed: int) -> Case:
    params = weights(model, seed)
    image, noise = mae_case.random_inputs(model, batch_size, seed + 1)
    inputs = {"image": image, "noise": noise}
    return Case(model, params, inputs, their_result(reference, model, params, inputs))


@pytest.fixture(scope="module")
def cases(reference) -> dict[str, Case]:
    return {
        name: make_case(reference, make(**fields), mae_case.BATCH_SIZE, seed=7)
        for name, fields in CASES.items()
    }


def check(ours: Result, theirs: Result, tolerance: agreement.Tolerance) -> None:
    print(agreement.report(ours, theirs, tolerance))
    shares = agreement.shares(ours, theirs, tolerance)
    assert {name: share for name, share in shares.items() if not share <= 1} == {}


@pytest.mark.parametrize("name", CASES)
def test_small_model_agrees(cases, name):
    case = cases[name]
    check(mae_case.run(case.model, case.params, **case.inputs), case.theirs, agreement.SMALL)


def test_full_size_agrees(reference):
    model = hivit.make(size="base", image_size=(224, 224))
    case = make_case(reference, model, batch_size=1, seed=0)
    check(mae_case.run(case.model, case.params, **case.inputs), case.theirs, agreement.FULL_SIZE)


# Fine-tuning.


def our_logits(model: Classifier, params: Tree, image: np.ndarray, label: np.ndarray) -> Result:
    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradients = step(mae_case.nested(params))
    flat = traverse_util.flatten_dict(gradients, sep="/")
    return Result(float(value), np.asarray(logits), {k: np.asarray(v) for k, v in flat.items()})


@pytest.mark.parametrize("relative_positions", [False, True])
def test_classifier_agrees(reference, relative_positions):
    import torch

    method = hivit.make(**SMALL, relative_positions=relative_positions)
    model = make_classifier(method.unit, method.encoder, CLASSES)
    image = mae_case.random_inputs(method, 4, seed=3)[0]
    label = np.arange(4)
    tree = random_params(model.init, image)
    params = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
    theirs = build(reference, params, model, num_classes=CLASSES)
    logits = theirs.classify(torch.from_numpy(image).permute(0, 3, 1, 2))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(label))
    loss.backward()
    expected = Result(loss.item(), logits.detach().numpy(), gradients_of(theirs, params, model))
    assert relative_positions == any("/table" in path for path in params)
    check(our_logits(model, params, image, label), expected, agreement.SMALL)


# Mistakes.


def _row_by_row_merging(patch: pytest.MonkeyPatch) -> None:
    neighbours = merging.neighbours
    patch.setattr(merging, "neighbours", lambda x, column_major: neighbours(x))


def _columns_first_in_a_unit(patch: pytest.MonkeyPatch) -> None:
    subdivide = encoders.subdivide
    patch.setattr(encoders, "subdivide", lambda *args: subdivide(*args).swapaxes(2, 3))


class _NormOfEachScale(nn.Module):
    """A norm of each scale alone, with the parameters of that of all together."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        stops = np.cumsum(self.widths)[:-1].tolist()
        plain = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, parent=None)
        parts = [plain.apply({}, part) for part in jnp.split(x, stops, axis=-1)]
        return jnp.concatenate(parts, axis=-1) * scale[None, None] + bias[None, None]


def _norm_of_each_scale(patch: pytest.MonkeyPatch) -> None:
    layer_norm = encoders.layer_norm
    widths = tuple(n * SMALL["stem_dim"] for n in (16, 8, 4))

    def make(dtype: Any, name: str) -> nn.Module:
        return _NormOfEachScale(widths, name=name) if name == "norm" else layer_norm(dtype, name)

    patch.setattr(encoders, "layer_norm", make)


def _last_scale_first(patch: pytest.MonkeyPatch) -> None:
    concatenate = jnp.concatenate

    def reverse(arrays: Any, axis: int) -> jax.Array:
        last_first = list(arrays)[::-1] if len(arrays) == 3 else arrays
        return concatenate(last_first, axis=axis)

    patch.setattr(encoders.jnp, "concatenate", reverse)


def _epsilon(value: float) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        for module in (encoders, blocks, merging):
            make = module.layer_norm

            def other(dtype: Any, name: str, *, make: Any = make, **_: Any) -> nn.LayerNorm:
                return make(dtype, name, epsilon=value)

            patch.setattr(module, "layer_norm", other)

    return apply


def _positions_of_the_first_units(patch: pytest.MonkeyPatch) -> None:
    take = jnp.take

    def unshuffled(table: jax.Array, ids: jax.Array, **options: Any) -> jax.Array:
        in_encoder = table.shape[-1] == 4 * SMALL["stem_dim"]
        first = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return take(table, first if in_encoder else ids, **options)

    patch.setattr(encoders.jnp, "take", unshuffled)


def _relation(change: Callable[[jax.Array], jax.Array]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        call = attention.RelativeTable.__call__
        changed = lambda self, ids: call(self, change(ids))  # noqa: E731
        patch.setattr(attention.RelativeTable, "__call__", changed)

    return apply


def _norm_of_one_scale(case: Case) -> tuple[MaskedAutoencoder, dict[str, np.ndarray]]:
    """Norm the last stage where the released class without all scales does not."""
    model = case.model.clone(encoder=case.model.encoder.clone(final_norm=True))
    width = case.model.encoder.output_dim
    norm = {"encoder/norm/scale": np.ones(width), "encoder/norm/bias": np.zeros(width)}
    return model, {**case.params, **norm}


def _row_first_positions(patch: pytest.MonkeyPatch) -> None:
    def table(width: int, grid_size: tuple[int, int]) -> np.ndarray:
        return np.roll(sincos_2d(width, grid_size), width // 2, axis=1)

    patch.setattr(encoders, "sincos_2d", table)


RELEASED, RELATIVE, FIXED = CASES
MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "merging row by row": (RELEASED, _row_by_row_merging),
    "columns first in a unit": (RELEASED, _columns_first_in_a_unit),
    "a norm of each scale": (RELEASED, _norm_of_each_scale),
    "the last scale first": (RELEASED, _last_scale_first),
    "LayerNorm epsilon 1e-5": (RELEASED, _epsilon(1e-5)),
    "LayerNorm epsilon 1e-12": (RELEASED, _epsilon(1e-12)),
    "positions of the first units": (RELEASED, _positions_of_the_first_units),
    "tanh GELU": (RELEASED, mae_case.MISTAKES["tanh GELU"]),
    "biased variance": (RELEASED, mae_case.MISTAKES["biased variance"]),
    "key minus query": (RELATIVE, _relation(lambda ids: 11 - ids)),
    "relations of the first units": (
        RELATIVE,
        _relation(lambda ids: jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)),
    ),
    "row-first positions": (FIXED, _row_first_positions),
}
"""What a port may get wrong, each as a patch of our code, and the case in which it shows."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(cases, mistake, monkeypatch):
    name, put_in = MISTAKES[mistake]
    put_in(monkeypatch)
    case = cases[name]
    ours = mae_case.run(case.model, case.params, **case.inputs, compiled=False)
    print(agreement.report(ours, case.theirs, agreement.SMALL))
    assert not agreement.agrees(ours, case.theirs, agreement.SMALL)


def test_a_norm_that_the_released_class_does_not_apply_is_noticed(cases):
    case = cases[FIXED]
    model, params = _norm_of_one_scale(case)
    ours = mae_case.run(model, params, **case.inputs, compiled=False)
    gradients = {k: v for k, v in ours.gradients.items() if not k.startswith("encoder/norm/")}
    ours = ours._replace(gradients=gradients)
    assert not agreement.agrees(ours, case.theirs, agreement.SMALL)


def test_fixed_positions_are_noticed(cases):
    """The released table is trained, though its authors meant to keep it: it has a gradient."""
    case = cases[RELEASED]
    assert np.abs(case.theirs.gradients["encoder/pos_embed"]).max() > 1e-4
    fixed = make(positions="fixed")
    params = {k: v for k, v in case.params.items() if k != "encoder/pos_embed"}
    assert weights(fixed, 0).keys() == params.keys()


def test_names_are_those_of_the_released_model():
    names = {
        "encoder/patch_embed/kernel": "patch_embed.proj.weight",
        "encoder/patch_norm/scale": "patch_embed.norm.weight",
        "encoder/block_03/mlp/fc2/bias": "blocks.3.mlp.fc2.bias",
        "encoder/downsample_1/reduction/kernel": "blocks.4.reduction.weight",
        "encoder/block_04/norm2/scale": "blocks.5.norm2.weight",
        "encoder/downsample_2/norm/bias": "blocks.9.norm.bias",
        "encoder/block_08/attn/bias/table": "blocks.10.attn.relative_position_bias_table",
        "encoder/block_27/attn/qkv/kernel": "blocks.29.attn.qkv.weight",
        "encoder/norm/scale": "norm.weight",
        "encoder/pos_embed": "absolute_pos_embed",
        "decoder/embed/kernel": "decoder_embed.weight",
        "decoder/mask_token": "mask_token",
        "decoder/block_05/norm1/bias": "decoder_blocks.5.norm1.bias",
        "decoder/norm/scale": "decoder_norm.weight",
        "decoder/pred/bias": "decoder_pred.bias",
        "head/norm/scale": "fc_norm.weight",
        "head/linear/kernel": "head.weight",
    }
    assert {path: their_name(path, (4, 4, 20)) for path in names} == names
