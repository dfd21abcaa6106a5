"""Agreement with a literal reading of UM-MAE, of its parts and with its traps put in."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.losses.reconstruction import example_losses
from mae_jax.models import pvt, pyramid, swin
from mae_jax.models.classifier import Classifier
from mae_jax.models.transfer import make_classifier
from mae_jax.nn import blocks, masking, merging, patches
from mae_jax.pretrain import um_mae
from tests.oracle import agreement
from tests.oracle.agreement import Result, Tree
from tests.oracle.mae_case import nested
from tests.weights import quick_jit, random_params

if TYPE_CHECKING:
    from tests.oracle.um_mae_reference import Shape

pytestmark = pytest.mark.oracle

BATCH_SIZE = 2
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2}
PYRAMID = {"image_size": (32, 32), "stem_patch_size": 2, "embed_dim": 8, **DECODER}
# Stages of 8, 4, 2 and 1 tokens a side (compact) in windows of 4: the first is shifted.
FIELDS: dict[str, dict[str, Any]] = {
    "swin": {"size": "swin_t", "depths": (2, 1, 1, 1), "num_heads": 2, "window_size": 8, **PYRAMID},
    "pvt": {"size": "pvt_s", "depths": (1, 1, 1, 1), "num_heads": 1, **PYRAMID},
    "vit": {
        "size": "vit_b",
        "image_size": (32, 32),
        "patch_size": 8,
        "embed_dim": 16,
        "depths": (2,),
        "num_heads": 4,
        **DECODER,
    },
}


class Case(NamedTuple):
    """A model with weights and inputs, and what the reference makes of them."""

    model: um_mae.UniformMaskedAutoencoder
    params: Tree
    image: np.ndarray
    noise: np.ndarray
    theirs: Result


def their_state(params: Mapping[str, Any], depths: tuple[int, ...], channels: int) -> Any:
    """Return tensors by the authors' names of tensors by our paths, differentiably."""
    state = {}
    for path, x in params.items():
        name = their_name(path, depths)
        if re.search(r"patch_embed\.proj\.weight|downsample\.proj\.weight", name):
            inner = channels if name.startswith("patch_embed") else x.shape[0] // 4
            side = round((x.shape[0] // inner) ** 0.5)
            x = x.reshape(side, side, inner, -1).permute(3, 2, 0, 1)
        elif path.endswith("/kernel"):
            x = x.T
            if ".posmlp." in name or ".sr." in name:
                x = x[:, :, None, None]
        state[name] = x
    return state


def their_name(path: str, depths: tuple[int, ...]) -> str:
    """Return the authors' name of the parameter at our path."""
    part, _, rest = path.partition("/")
    if part == "head":
        rest = rest.replace("norm", "fc_norm").replace("linear", "head")
    if part == "decoder":
        rest = re.sub(r"^(embed|block|norm|pred)", r"decoder_\1", rest)
    elif rest == "mask_token":
        rest = "vis_mask_token"
    rest = re.sub(r"block_(\d+)", lambda found: f"blocks/{int(found[1])}", rest)
    rest = re.sub(
        r"^downsample_(\d)", lambda found: f"blocks/{sum(depths[: int(found[1])])}/downsample", rest
    )
    for ours, theirs in (
        ("patch_embed", "patch_embed/proj"),
        ("patch_norm", "patch_embed/norm"),
        ("attn/bias/fc1", "attn/posmlp/0"),
        ("attn/bias/fc2", "attn/posmlp/2"),
        ("attn/reduce", "attn/sr"),
        ("kernel", "weight"),
        ("scale", "weight"),
    ):
        rest = rest.replace(ours, theirs)
    return rest.replace("/", ".")


def shape_of(model: um_mae.UniformMaskedAutoencoder | Classifier) -> Shape:
    from tests.oracle.um_mae_reference import Shape

    encoder: Any = model.encoder
    fields: dict[str, Any] = {}
    if isinstance(encoder, pyramid.PyramidEncoder):
        family = "swin" if isinstance(encoder, swin.SwinEncoder) else "pvt"
        patch = model.unit.patch_size // 4
        heads = tuple(encoder.heads(stage) for stage in range(4))
        if isinstance(encoder, swin.SwinEncoder):
            fields["window"] = encoder.window_size
    else:
        family, patch, heads = "vit", model.unit.patch_size, (encoder.num_heads,)
    if isinstance(model, um_mae.UniformMaskedAutoencoder):
        fields |= {
            "norm_pix": model.norm_pix_loss,
            "released_order": model.compat_decoder_order,
            "decoder_depth": model.decoder.depth,
            "decoder_heads": model.decoder.num_heads,
        }
    return Shape(family, patch, encoder.depths, heads, **fields)


def reference(
    model: um_mae.UniformMaskedAutoencoder, params: Tree, image: np.ndarray, noise: np.ndarray
) -> Result:
    """Return loss, predictions and gradients, in our layout, of the literal model."""
    import torch

    from tests.oracle import um_mae_reference as theirs

    shape, pixels = shape_of(model), torch.from_numpy(image).double()
    mask, replaced = (torch.from_numpy(m) for m in masks(noise, model.secondary_ratio))
    leaves = theirs.leaves(params)
    state = their_state(leaves, model.encoder.depths, model.unit.channels)
    output = theirs.predictions(state, shape, pixels, mask, replaced)
    loss = ((output - theirs.target(shape, pixels, mask)) ** 2).mean()
    loss.backward()
    gradients = {k: v.grad.numpy() for k, v in leaves.items()}
    return Result(loss.item(), output.detach().numpy(), gradients)


def masks(noise: np.ndarray, secondary_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Return what is removed and what is replaced, bool [B, M, M], by loops over the noise."""
    side = round(noise.shape[1] ** 0.5)
    noise = noise.reshape(-1, side, side)
    mask, replaced = np.ones(noise.shape, bool), np.zeros(noise.shape, bool)
    for n, grid in enumerate(noise):
        kept = []
        for i in range(0, side, 2):
            for j in range(0, side, 2):
                block = [(grid[y, x], y, x) for y in (i, i + 1) for x in (j, j + 1)]
                kept.append(min(block))
        for _, y, x in kept:
            mask[n, y, x] = False
        for _, y, x in sorted(kept)[int(len(kept) * (1 - secondary_ratio)) :]:
            replaced[n, y, x] = True
    return mask, replaced


def random_weights(model: um_mae.UniformMaskedAutoencoder, seed: int) -> dict[str, np.ndarray]:
    image = jnp.zeros((1, *model.unit.image_size, model.unit.channels))
    plan = model.plan(jax.random.key(0), 1)
    tree = random_params(model.init, {"image": image}, plan, method="predict", seed=seed)
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


QUIET = re.compile(r"encoder/.*(patch_embed|downsample_./proj|attn/proj|attn/reduce|mlp/fc2)/")


def make_case(family: str, seed: int = 0, *, quiet: bool = False, **fields: Any) -> Case:
    """Return a case; `quiet`: with a stream of tokens so small that norms show their epsilon."""
    model = um_mae.make(**FIELDS[family] | fields)
    params = random_weights(model, seed)
    if quiet:
        params = {k: 0.03 * v if QUIET.match(k) else v for k, v in params.items()}
    rng = np.random.default_rng(seed + 1)
    image = rng.standard_normal((BATCH_SIZE, *model.unit.image_size, 3)).astype(np.float32)
    noise = rng.random((BATCH_SIZE, model.unit.count), np.float32)
    return Case(model, params, image, noise, reference(model, params, image, noise))


@pytest.fixture(scope="module")
def case() -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            family, _, quiet = name.partition(" ")
            made[name] = make_case(family, quiet=bool(quiet))
        return made[name]

    return get


def without_zeros(result: Result) -> Result:
    """Leave out the last bias of the biases: it is the same for all logits, and softmax blind."""
    gradients = {k: v for k, v in result.gradients.items() if not k.endswith("attn/bias/fc2/bias")}
    return result._replace(gradients=gradients)


def losses(case: Case) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """Return a function from parameters to loss and predictions."""
    plan = case.model.plan(jax.random.key(0), BATCH_SIZE, jnp.asarray(case.noise))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        batch = {"image": jnp.asarray(case.image)}
        predictions = case.model.apply({"params": params}, batch, plan, method="predict")
        return example_losses(predictions).sum(), predictions["image"].output

    return loss


def ours(case: Case) -> Result:
    step = quick_jit(jax.value_and_grad(losses(case), has_aux=True))
    (value, output), gradients = step(nested(case.params))
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(gradients, sep="/").items()}
    return without_zeros(Result(float(value), np.asarray(output), flat))


def forward(case: Case) -> Result:
    """Return what a mistake shows in already, without the gradients, which take long to compile."""
    value, output = quick_jit(losses(case))(nested(case.params))
    return Result(float(value), np.asarray(output), case.theirs.gradients)


def check(case: Case) -> None:
    mine, theirs = ours(case), without_zeros(case.theirs)
    print(agreement.report(mine, theirs, agreement.SMALL))
    shares = agreement.shares(mine, theirs, agreement.SMALL)
    assert {name: share for name, share in shares.items() if not share <= 1} == {}


@pytest.mark.parametrize("family", FIELDS)
def test_small_model_agrees(case, family):
    check(case(family))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("swin", {"norm_pix_loss": False}),
        ("pvt", {"norm_pix_loss": False}),
        ("vit", {"norm_pix_loss": False}),
        ("swin", {"compat_decoder_order": True}),
        ("pvt", {"compat_decoder_order": True}),
    ],
)
def test_variations_agree(family, fields):
    check(make_case(family, seed=3, **fields))


@pytest.mark.parametrize("family", ["swin", "pvt"])
def test_classifier_on_the_full_grid_agrees(family):
    import torch

    from tests.oracle import um_mae_reference as theirs

    method = um_mae.make(**FIELDS[family])
    model = make_classifier(method.unit, method.encoder, 5)
    tree = random_params(model.init, jnp.zeros((1, 32, 32, 3)), seed=5)
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
    rng = np.random.default_rng(6)
    image = rng.standard_normal((BATCH_SIZE, 32, 32, 3)).astype(np.float32)
    probe = rng.standard_normal((BATCH_SIZE, 5)).astype(np.float32)

    leaves = theirs.leaves(flat)
    state = their_state(leaves, model.encoder.depths, 3)
    output = theirs.logits(state, shape_of(model), torch.from_numpy(image).double())
    loss = (output * torch.from_numpy(probe)).sum()
    loss.backward()
    gradients = {k: v.grad.numpy() for k, v in leaves.items()}
    expected = Result(loss.item(), output.detach().numpy(), gradients)

    @quick_jit
    def step(params: Any) -> Any:
        def value(params: Any) -> Any:
            output = model.apply({"params": params}, image)
            return (output * probe).sum(), output

        return jax.value_and_grad(value, has_aux=True)(params)

    (value, output), gradients = step(nested(flat))
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(gradients, sep="/").items()}
    mine = without_zeros(Result(float(value), np.asarray(output), flat))
    expected = without_zeros(expected)
    print(agreement.report(mine, expected, agreement.SMALL))
    shares = agreement.shares(mine, expected, agreement.SMALL)
    assert {name: share for name, share in shares.items() if not share <= 1} == {}


@pytest.mark.parametrize("family", ["swin quiet", "pvt quiet"])
def test_small_tokens_agree(case, family):
    right = case(family)
    mine = forward(right)
    print(agreement.report(mine, right.theirs, agreement.SMALL))
    assert agreement.agrees(mine, right.theirs, agreement.SMALL)


def _epsilon_of(module: types.ModuleType) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        make = module.layer_norm

        def wrong(dtype: Any, name: Any, **_: Any) -> Any:
            return make(dtype, name, epsilon=1e-5)

        patch.setattr(module, "layer_norm", wrong)

    return apply


def _block_epsilon(patch: pytest.MonkeyPatch) -> None:
    for module in (pyramid, pvt):
        patch.setattr(module, "BLOCK_EPSILON", 1e-6)


def _places(change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        right = swin.SwinEncoder._places
        patch.setattr(swin.SwinEncoder, "_places", lambda *args: change(right(*args)))

    return apply


def _places_not_shifted(patch: pytest.MonkeyPatch) -> None:
    def roll(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x if x.shape[-1] == 2 else jnp.roll(x, *args, **kwargs)

    patch.setattr(swin, "jnp", types.SimpleNamespace(**vars(jnp) | {"roll": roll}))


def _same_reach(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pyramid.PyramidEncoder, "reach", lambda self, span, full: span)


def _no_regions(patch: pytest.MonkeyPatch) -> None:
    right = swin.region_mask
    patch.setattr(swin, "region_mask", lambda *args: np.ones_like(right(*args)))


def _column_major(patch: pytest.MonkeyPatch) -> None:
    right = merging.neighbours
    patch.setattr(merging, "neighbours", lambda x: right(x, column_major=True))


def _token_after_the_norm(patch: pytest.MonkeyPatch) -> None:
    right = swin.SwinEncoder._embed

    def embed(self: Any, units: Any, replaced: Any) -> Any:
        token = self.get_variable("params", "mask_token")[:, :, None, None]
        return jnp.where(replaced[..., None, None, None], token, right(self, units, None))

    patch.setattr(swin.SwinEncoder, "_embed", embed)


def _one_replaced_less(patch: pytest.MonkeyPatch) -> None:
    right = masking.uniform_counts
    patch.setattr(masking, "uniform_counts", lambda *a: (right(*a)[0], right(*a)[1] + 1))


def _tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(blocks, "gelu", lambda x: flax.linen.gelu(x, approximate=True))


def _biased_variance(patch: pytest.MonkeyPatch) -> None:
    def statistics(units: Any) -> Any:
        mean = units.mean(axis=-1, keepdims=True)
        return mean, jnp.sqrt(jnp.var(units, axis=-1, keepdims=True) + patches.NORM_PIX_EPS)

    patch.setattr(patches, "unit_statistics", statistics)


MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "1e-6 in the blocks": ("swin quiet", _block_epsilon),
    "1e-6 in the blocks and of keys and values": ("pvt quiet", _block_epsilon),
    "1e-5 in stem and final norm": ("swin quiet", _epsilon_of(pyramid)),
    "1e-5 in the downsampling": ("swin quiet", _epsilon_of(merging)),
    "query minus key": ("swin", _places(lambda places: -places)),
    "column before row": ("swin", _places(lambda places: places[..., ::-1])),
    "places not shifted": ("swin", _places_not_shifted),
    "places of the compact grid": ("swin", _places(lambda p: p % 8)),
    "window of the full grid": ("swin", _same_reach),
    "reductions of the full grid": ("pvt", _same_reach),
    "no regions": ("swin", _no_regions),
    "neighbours by columns": ("pvt", _column_major),
    "token after the norm": ("swin", _token_after_the_norm),
    "one replaced less": ("vit", _one_replaced_less),
    "tanh GELU": ("pvt", _tanh_gelu),
    "biased variance": ("pvt", _biased_variance),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_is_noticed(case, mistake, monkeypatch):
    family, put_in = MISTAKES[mistake]
    right = case(family)
    put_in(monkeypatch)
    wrong = forward(right)
    print(agreement.report(wrong, right.theirs, agreement.SMALL))
    assert not agreement.agrees(wrong, right.theirs, agreement.SMALL)


@pytest.mark.parametrize("family", ["swin", "pvt"])
def test_released_order_is_noticed(case, family):
    right = case(family)
    wrong = right._replace(model=right.model.clone(compat_decoder_order=True))
    assert not agreement.agrees(forward(wrong), right.theirs, agreement.SMALL)
