"""Agreement with a literal PyTorch M3AE, and that what its chapter warns of breaks it."""

from __future__ import annotations

import functools
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
from mae_jax.models import m3ae as encoders
from mae_jax.models import m3ae_decoder as decoders
from mae_jax.models import vit
from mae_jax.models.transfer import make_classifier
from mae_jax.nn import blocks
from mae_jax.nn.patches import normalize_units
from mae_jax.nn.pos_embed import sincos_1d, sincos_2d
from mae_jax.pretrain import m3ae
from mae_jax.pretrain.m3ae import M3AE
from mae_jax.types import Prediction
from tests.oracle import agreement, mae_case
from tests.oracle.agreement import Result, Tree
from tests.weights import quick_jit, random_params

pytestmark = pytest.mark.oracle

CLASSES = 5
ROWS = 4
SMALL: dict[str, Any] = {
    "size": "small",
    "image_size": (12, 16),
    "patch_size": 4,
    "vocabulary_size": 13,
    "text_length": 10,
    "unpaired_text_length": 14,
    "mask_ratio": 0.5,
    "text_mask_ratio": 0.6,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 4,
    "decoder_embed_dim": 8,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "released": {},
    "a mask for each, deep heads, texts without images": {
        "mask_per": "sample",
        "output_head_depth": 2,
        "unpaired_loss_weight": 0.3,
    },
    "images alone, no kinds": {"vocabulary_size": 0, "use_type_vectors": False},
}


class Case(NamedTuple):
    """A model with weights and inputs, and what theirs makes of them."""

    model: M3AE
    params: Tree
    batch: dict[str, np.ndarray]
    noise: dict[str, np.ndarray]
    theirs: Result


# Names of the released tree.

NAMES = {
    "encoder/patch_embed/": "image_embedding/",
    "encoder/text_embed/": "text_embedding/",
    "encoder/cls_token": "cls_token",
    "encoder/norm/": "encoder/LayerNorm_0/",
    "decoder/norm/": "decoder/LayerNorm_0/",
    "decoder/embed/": "decoder_input_projection/",
    "head/norm/": "LayerNorm_0/",
    "head/linear/": "Dense_0/",
}
IN_BLOCK = {
    "norm1": "LayerNorm_0",
    "attn/qkv": "Attention_0/Dense_0",
    "attn/proj": "Attention_0/Dense_1",
    "norm2": "LayerNorm_1",
    "mlp/fc1": "TransformerMLP_0/fc1",
    "mlp/fc2": "TransformerMLP_0/fc2",
}


def their_name(path: str, head_depth: int) -> str:
    """Return the released name of the parameter at our path."""
    for ours, theirs in NAMES.items():
        if path.startswith(ours):
            return theirs + path[len(ours) :]
    if found := re.fullmatch(r"(encoder|decoder)/(image|text)_type", path):
        return f"{found[1]}_{found[2]}_type_embedding"
    if found := re.fullmatch(r"decoder/(image|text)_mask", path):
        return f"{found[1]}_mask_embedding"
    if found := re.fullmatch(r"(encoder|decoder)/block_(\d+)/(.*)/(\w+)", path):
        return f"{found[1]}/Block_{int(found[2])}/{IN_BLOCK[found[3]]}/{found[4]}"
    found = re.fullmatch(r"decoder/(image|text)_head/(pred|fc|norm)(?:_(\d))?/(\w+)", path)
    assert found, path
    number = {
        "pred": head_depth,
        "fc": int(found[3] or 0),
        "norm": int(found[3]) + 1 if found[3] else 0,
    }[found[2]]
    layer = "LayerNorm" if found[2] == "norm" else "Dense"
    return f"decoder_{found[1]}_output/{layer}_{number}/{found[4]}"


# Their side.


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """Return the other side. Imported here, so that the file can be collected without torch."""
    from tests.oracle import m3ae_reference

    return m3ae_reference


def leaves_of(params: Tree, head_depth: int = 0) -> dict[str, Any]:
    import torch

    return {
        their_name(path, head_depth): torch.tensor(array, requires_grad=True)
        for path, array in params.items()
    }


def gradients_of(leaves: Mapping[str, Any], params: Tree, head_depth: int = 0) -> Tree:
    """Return their gradients at our paths; of what has no part in the loss, zeros."""
    gradients = {}
    for path, array in params.items():
        gradient = leaves[their_name(path, head_depth)].grad
        gradients[path] = np.zeros_like(array) if gradient is None else gradient.numpy()
    return gradients


def sizes_of(reference: ModuleType, model: M3AE) -> Any:
    encoder, decoder = model.encoder, model.decoder
    return reference.Sizes(
        encoder.grid_size,
        encoder.depth,
        encoder.num_heads,
        decoder.depth,
        decoder.num_heads,
        decoder.head_depth,
    )


def weights_of(model: M3AE) -> dict[str, float]:
    return {
        "image": 1.0,
        "text": model.text_loss_weight,
        "unpaired_text": model.unpaired_loss_weight,
    }


def their_result(reference: ModuleType, case: Case) -> Result:
    import torch

    model, depth = case.model, case.model.decoder.head_depth
    leaves = leaves_of(case.params, depth)
    batch = {name: torch.from_numpy(array) for name, array in case.batch.items()}
    losses, outputs = reference.losses(
        leaves, sizes_of(reference, model), batch, case.noise, model.keep_counts()
    )
    loss = sum(weights_of(model)[name] * value for name, value in losses.items())
    loss.backward()
    predictions = {name: output.detach().numpy() for name, output in outputs.items()}
    return Result(loss.item(), joined(predictions), gradients_of(leaves, case.params, depth))


def joined(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the predictions of all modalities as one array."""
    return np.concatenate([np.asarray(outputs[name]).reshape(-1) for name in sorted(outputs)])


# Our side.


def random_batch(model: M3AE, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Return pixels and words: texts end in padding, and one is nothing else."""
    rng = np.random.default_rng(seed)
    batch = {"image": rng.standard_normal((rows, *model.unit.shape)).astype(np.float32)}
    for text, padding in (("text", "padding"), ("unpaired_text", "unpaired_padding")):
        if text in model.lengths():
            length = model.lengths()[text]
            words = rng.integers(0, model.encoder.vocabulary_size, (rows, length))
            lengths = rng.integers(length // 2, length + 1, (rows, 1))
            lengths[-1] = 0
            batch[text] = words.astype(np.int32)
            batch[padding] = np.arange(length)[None] >= lengths
    return batch


def make_case(reference: ModuleType, model: M3AE, rows: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    batch = random_batch(model, rows, seed)
    masks = 1 if model.mask_per == "batch" else rows
    noise = {name: rng.random((masks, n), np.float32) for name, n in model.lengths().items()}
    plan = model.plan(jax.random.key(0), rows, {k: jnp.asarray(v) for k, v in noise.items()})
    tree = random_params(model.init, batch, plan, method="predict", seed=seed)
    flat = traverse_util.flatten_dict(tree, sep="/")
    params = {path: np.asarray(flat[path]) for path in sorted(flat)}
    case = Case(model, params, batch, noise, Result(0.0, np.zeros(()), {}))
    return case._replace(theirs=their_result(reference, case))


def plan_of(case: Case) -> Any:
    noise = {name: jnp.asarray(rows) for name, rows in case.noise.items()}
    return case.model.plan(jax.random.key(0), len(case.batch["image"]), noise)


Outcome = tuple[jax.Array, dict[str, Prediction]]


def loss_of(model: M3AE, params: Any, batch: Any, plan: Any) -> Outcome:
    predictions = model.apply({"params": params}, batch, plan, method="predict")
    return example_losses(predictions).sum(), predictions


@functools.cache
def step_of(model: M3AE) -> Callable[..., Any]:
    """Return what a step computes, compiled once for all weights, batches and masks."""
    step = jax.value_and_grad(functools.partial(loss_of, model), has_aux=True)
    return jax.jit(step)


def result_of(value: Any, predictions: Mapping[str, Prediction], gradients: Tree) -> Result:
    outputs = {name: np.asarray(prediction.output) for name, prediction in predictions.items()}
    return Result(float(value), joined(outputs), gradients)


def run(case: Case) -> tuple[Result, dict[str, Prediction]]:
    """Return loss, predictions and gradients of our model."""
    step = step_of(case.model)
    (value, predictions), gradients = step(mae_case.nested(case.params), case.batch, plan_of(case))
    flat = traverse_util.flatten_dict(gradients, sep="/")
    leaves = {path: np.asarray(leaf) for path, leaf in flat.items()}
    return result_of(value, predictions, leaves), predictions


@pytest.fixture(scope="module")
def cases(reference) -> dict[str, Case]:
    return {
        name: make_case(reference, m3ae.make(**SMALL | fields), ROWS, seed=7)
        for name, fields in CASES.items()
    }


def check(ours: Result, theirs: Result, tolerance: agreement.Tolerance) -> None:
    print(agreement.report(ours, theirs, tolerance))
    shares = agreement.shares(ours, theirs, tolerance)
    assert {name: share for name, share in shares.items() if not share <= 1} == {}


@pytest.mark.parametrize("name", CASES)
def test_small_model_agrees(cases, name):
    check(run(cases[name])[0], cases[name].theirs, agreement.SMALL)


def test_full_size_agrees(reference):
    model = m3ae.make(size="small", image_size=(256, 256))
    case = make_case(reference, model, rows=1, seed=0)
    check(run(case)[0], case.theirs, agreement.FULL_SIZE)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classifier_agrees(reference, pooling):
    import torch

    method = m3ae.make(**SMALL)
    model = make_classifier(method.unit, method.encoder, CLASSES, pooling=pooling)
    image, label = random_batch(method, ROWS, seed=3)["image"], np.arange(ROWS)
    tree = random_params(model.init, image)
    params = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
    leaves = leaves_of(params)
    sizes, mean = sizes_of(reference, method), pooling == "mean"
    logits = reference.classify(leaves, sizes, torch.from_numpy(image), mean=mean)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(label))
    loss.backward()
    theirs = Result(loss.item(), logits.detach().numpy(), gradients_of(leaves, params))

    def our_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), logits

    step = jax.jit(jax.value_and_grad(our_loss, has_aux=True))
    (value, found), gradients = step(mae_case.nested(params))
    flat = traverse_util.flatten_dict(gradients, sep="/")
    ours = Result(float(value), np.asarray(found), {k: np.asarray(v) for k, v in flat.items()})
    check(ours, theirs, agreement.SMALL)


# Mistakes, as patches of our code.


def _erf_gelu(patch: pytest.MonkeyPatch) -> None:
    gelu = blocks.nn.gelu
    patch.setattr(blocks.nn, "gelu", lambda x, approximate: gelu(x, approximate=False))


def _epsilon(value: float) -> Callable[[pytest.MonkeyPatch], None]:
    def put_in(patch: pytest.MonkeyPatch) -> None:
        for module in (vit, decoders, blocks):
            make = module.layer_norm

            def other(dtype: Any, name: str, *, make: Any = make, **_: Any) -> Any:
                return make(dtype, name, epsilon=value)

            patch.setattr(module, "layer_norm", other)

    return put_in


def _padding_is_looked_at(patch: pytest.MonkeyPatch) -> None:
    for module in (encoders, decoders):
        mask = lambda tokens, padding: jnp.ones((len(padding), 1, tokens), bool)  # noqa: E731
        patch.setattr(module, "key_mask", mask)


def _row_first_positions(patch: pytest.MonkeyPatch) -> None:
    def table(width: int, grid_size: tuple[int, int]) -> np.ndarray:
        return np.roll(sincos_2d(width, grid_size), width // 2, axis=1)

    for module in (vit, decoders):
        patch.setattr(module, "sincos_2d", table)


def _interleaved_positions(patch: pytest.MonkeyPatch) -> None:
    def table(width: int, count: int, *, interleaved: bool) -> np.ndarray:
        return sincos_1d(width, count, interleaved=True)

    for module in (encoders, decoders):
        patch.setattr(module, "sincos_1d", table)


def _class_token_with_a_position(patch: pytest.MonkeyPatch) -> None:
    def table(self: Any) -> np.ndarray:
        table = sincos_2d(self.embed_dim, self.grid_size)
        return np.concatenate([table[:1], table])[None]

    patch.setattr(vit.ViTEncoder, "fixed_table", table)


def _places_of_the_first_words(patch: pytest.MonkeyPatch) -> None:
    embedded = encoders.M3AEEncoder._embedded

    def first(self: Any, words: Any) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(words.places.shape[1]), words.places.shape)
        return embedded(self, words.replace(places=places))

    patch.setattr(encoders.M3AEEncoder, "_embedded", first)


PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "erf GELU": _erf_gelu,
    "LayerNorm epsilon 1e-5": _epsilon(1e-5),
    "LayerNorm epsilon 1e-12": _epsilon(1e-12),
    "padding in the attention": _padding_is_looked_at,
    "row-first positions": _row_first_positions,
    "interleaved positions of words": _interleaved_positions,
    "a class token with a position": _class_token_with_a_position,
    "places of the first words": _places_of_the_first_words,
}


# Mistakes in what the model sees of its parameters.


def _class_token_with_a_kind(params: dict[str, Any]) -> Tree:
    token = params["encoder/cls_token"] + params["encoder/image_type"]
    return params | {"encoder/cls_token": token}


def _exchanged(one: str, other: str) -> Callable[[dict[str, Any]], Tree]:
    return lambda params: params | {one: params[other], other: params[one]}


PARAMETERS: dict[str, Callable[[dict[str, Any]], Tree]] = {
    "a class token with a kind": _class_token_with_a_kind,
    "kinds exchanged": _exchanged("encoder/image_type", "encoder/text_type"),
    "the decoder's kinds exchanged": _exchanged("decoder/image_type", "decoder/text_type"),
    "mask tokens exchanged": _exchanged("decoder/image_mask", "decoder/text_mask"),
}


# Mistakes in the loss.


Change = Callable[[dict[str, Prediction]], dict[str, Prediction]]


def _of_text(change: Callable[[Prediction], jax.Array]) -> Change:
    def put_in(predictions: dict[str, Prediction]) -> dict[str, Prediction]:
        text = predictions["text"]
        return {**predictions, "text": text.replace(weight=change(text))}

    return put_in


def _norm_pix(predictions: dict[str, Prediction]) -> dict[str, Prediction]:
    image = predictions["image"]
    return {**predictions, "image": image.replace(target=normalize_units(image.target))}


LOSSES: dict[str, Change] = {
    "normalised patches": _norm_pix,
    "a mean over the words of the batch": _of_text(
        lambda p: 0.5 * (p.weight > 0) / jnp.sum(p.weight > 0)
    ),
    "padding in the loss": _of_text(lambda p: jnp.full(p.weight.shape, 0.5 / p.weight.size)),
    "a mean over the texts that have words": _of_text(lambda p: p.weight / (2 * p.weight.sum())),
    "texts and images alike": _of_text(lambda p: 2 * p.weight),
}


def assert_noticed(ours: Result, case: Case) -> None:
    print(agreement.report(ours, case.theirs, agreement.SMALL))
    assert not agreement.agrees(ours, case.theirs, agreement.SMALL)


@pytest.mark.parametrize("mistake", PATCHES)
def test_a_mistake_in_the_network_is_noticed(cases, mistake, monkeypatch):
    """Loss and predictions show it: gradients are left at theirs."""
    PATCHES[mistake](monkeypatch)
    case = cases["released"]
    forward = quick_jit(functools.partial(loss_of, case.model))
    outcome = forward(mae_case.nested(case.params), case.batch, plan_of(case))
    assert_noticed(result_of(*outcome, case.theirs.gradients), case)


@pytest.mark.parametrize("mistake", PARAMETERS)
def test_a_mistake_in_where_a_vector_goes_is_noticed(cases, mistake):
    case = cases["released"]
    wrong = PARAMETERS[mistake](dict(case.params))
    assert_noticed(run(case._replace(params=wrong))[0], case)


@pytest.mark.parametrize("mistake", LOSSES)
def test_a_mistake_in_the_loss_is_noticed(cases, mistake):
    case = cases["released"]
    ours, predictions = run(case)
    check(ours, case.theirs, agreement.SMALL)
    loss = float(example_losses(LOSSES[mistake](predictions)).sum())
    assert_noticed(ours._replace(loss=loss), case)


def test_masks_of_other_rows_are_noticed(cases):
    case = cases["a mask for each, deep heads, texts without images"]
    noise = {name: np.roll(rows, 1, axis=0) for name, rows in case.noise.items()}
    assert_noticed(run(case._replace(noise=noise))[0], case)


def test_names_are_those_of_the_released_tree():
    names = {
        "encoder/patch_embed/kernel": "image_embedding/kernel",
        "encoder/text_embed/embedding": "text_embedding/embedding",
        "encoder/image_type": "encoder_image_type_embedding",
        "decoder/text_type": "decoder_text_type_embedding",
        "decoder/text_mask": "text_mask_embedding",
        "encoder/block_11/attn/qkv/kernel": "encoder/Block_11/Attention_0/Dense_0/kernel",
        "decoder/block_07/mlp/fc2/bias": "decoder/Block_7/TransformerMLP_0/fc2/bias",
        "decoder/norm/scale": "decoder/LayerNorm_0/scale",
        "decoder/image_head/pred/kernel": "decoder_image_output/Dense_0/kernel",
    }
    assert {path: their_name(path, 0) for path in names} == names
    assert their_name("decoder/text_head/norm_1/bias", 2) == "decoder_text_output/LayerNorm_2/bias"
    assert their_name("decoder/text_head/pred/bias", 2) == "decoder_text_output/Dense_2/bias"
