"""MixMIM's encoder: windows, groups that do not see each other, sizes, layers, refusals."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.models import mixmim as models
from mae_jax.models.mixmim import MixMIMEncoder
from mae_jax.models.transfer import make_classifier, transfer_encoder
from mae_jax.nn.patches import PatchUnit, from_grid
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.pretrain import mixmim
from mae_jax.train.optimizer import layer_factors
from mae_jax.types import MaskPlan
from tests.weights import apply, normal, quick_jit, random_params

GRID, STEM, CHANNELS = (2, 4), 1, 2
SIZE = (8 * STEM) ** 2 * CHANNELS
IDS = np.arange(8)[None]
PLAN = MaskPlan(
    ids_keep=jnp.asarray([[4, 0, 3, 7]], jnp.int32), ids_mask=jnp.asarray([[5, 2, 1, 6]], jnp.int32)
)


def make(**fields: Any) -> MixMIMEncoder:
    """Return an encoder of 2 x 4 cells, whose first two stages have windows of 2 x 2 cells."""
    given = {
        "grid_size": GRID,
        "stem_dim": 4,
        "stage_depths": (1, 1, 1, 1),
        "num_heads": 1,
        "channels": CHANNELS,
        # Of grids of 16 x 32, 8 x 16, 4 x 8 and 2 x 4: the last two are whole.
        "window_sizes": (16, 8, 8, 4),
    }
    return MixMIMEncoder(**{**given, **fields})


@pytest.fixture(scope="module")
def units() -> np.ndarray:
    return normal((2, 8, SIZE))


@pytest.fixture(scope="module")
def params(units: np.ndarray) -> Any:
    return random_params(make().init, units, IDS)


def shapes_of(module: MixMIMEncoder) -> dict[str, tuple[int, ...]]:
    shape = (1, math.prod(module.grid_size), SIZE)
    ids = jnp.arange(shape[1])[None]
    tree = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros(shape), ids)["params"],
    )
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def test_parameters_have_these_names_and_shapes():
    shapes = shapes_of(make(stage_depths=(1, 2, 1, 1)))
    outside = {k: v for k, v in shapes.items() if not k.startswith("block_")}
    assert outside == {
        "patch_embed/kernel": (2, 4),
        "patch_embed/bias": (4,),
        "patch_norm/scale": (4,),
        "patch_norm/bias": (4,),
        "downsample_1/norm/scale": (16,),
        "downsample_1/norm/bias": (16,),
        "downsample_1/reduction/kernel": (16, 8),
        "downsample_2/norm/scale": (32,),
        "downsample_2/norm/bias": (32,),
        "downsample_2/reduction/kernel": (32, 16),
        "downsample_3/norm/scale": (64,),
        "downsample_3/norm/bias": (64,),
        "downsample_3/reduction/kernel": (64, 32),
        "norm/scale": (32,),
        "norm/bias": (32,),
    }
    tables = [shapes[f"block_{i:02d}/attn/bias/table"] for i in range(5)]
    assert tables == [(31, 31, 1), (15, 15, 2), (15, 15, 2), (7, 15, 4), (3, 7, 8)]
    assert shapes["block_02/attn/qkv/kernel"] == (8, 24)
    assert shapes["block_03/mlp/fc1/kernel"] == (16, 64)
    assert shapes_of(make(positions="learned"))["pos_embed"] == (1, 16 * 32, 4)


@pytest.mark.parametrize(
    ("pixels", "windows"),
    [
        ((224, 224), [(14, 14), (14, 14), (14, 14), (7, 7)]),
        ((384, 384), [(16, 16), (16, 16), (24, 24), (12, 12)]),
        ((224, 320), [(14, 16), (14, 10), (14, 20), (7, 10)]),
        ((96, 192), [(24, 16), (12, 24), (6, 12), (3, 6)]),
    ],
)
def test_windows_by_rule_are_the_published_ones(pixels, windows):
    encoder = mixmim.make(size="base", image_size=pixels).encoder
    assert [stage.window for stage in encoder.stages()] == windows


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ((544, 544), "None: the grid of stage 1, 68 x 68, has windows of 4 x 4 at most"),
        ((224, 608), "None: the grid of stage 1, 28 x 76, has windows of 14 x 4 at most"),
        ((928, 928), "None: the grid of stage 1, 116 x 116, has windows of 4 x 4 at most"),
        ((800, 800), "None: the grid of stage 3, 25 x 25, has windows of 5 x 5 at most"),
    ],
)
def test_windows_by_rule_do_not_collapse(pixels, message):
    with pytest.raises(ConfigError) as error:
        mixmim.make(size="base", image_size=pixels)
    assert str(error.value).startswith(f"model.window_sizes {message}")
    sizes = (8, 4, 2, 1)  # whoever wants them may have them
    assert mixmim.make(size="base", image_size=pixels[:1] * 2, window_sizes=sizes)


def test_encoder_has_the_fixed_positions_of_the_small_patches(units, params):
    """Learned positions that are the fixed table in raster order change nothing."""
    table = sincos_2d(4, (16, 32))[None]
    out = apply(make(positions="learned"), {**params, "pos_embed": table}, units, IDS)
    expected = apply(make(), params, units, IDS)
    assert out.shape == (2, 8, 32)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_blocks_and_mergings_are_where_they_should_be(units, params):
    """Against plain numpy: identity attention, no MLP, so that norms and mergings are left."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in flat:
        if path.endswith(("proj/kernel", "proj/bias", "fc2/kernel", "fc2/bias")):
            flat[path] = jnp.zeros_like(flat[path])
    out = apply(make(), traverse_util.unflatten_dict(flat, sep="/"), units, IDS)
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * flat[f"{name}/scale"] + flat[f"{name}/bias"]

    image = PatchUnit((16, 32), 8, CHANNELS).join(jnp.asarray(units))  # a pixel a patch
    x = np.asarray(image) @ flat["patch_embed/kernel"] + flat["patch_embed/bias"]
    x = norm(x, "patch_norm") + sincos_2d(4, (16, 32)).reshape(1, 16, 32, 4)
    for i in (1, 2, 3):
        parts = [x[:, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
        x = norm(np.concatenate(parts, axis=-1), f"downsample_{i}/norm")
        x = x @ flat[f"downsample_{i}/reduction/kernel"]
    np.testing.assert_allclose(out, norm(x, "norm").reshape(2, 8, 32), atol=1e-4)


def test_no_token_depends_on_the_other_image(units, params):
    module = make()
    weight = normal((2, 8, 32), seed=3)

    @quick_jit
    def gradient(ids: jax.Array) -> jax.Array:
        def some(units: jax.Array) -> jax.Array:
            out = module.apply({"params": params}, units, IDS, groups=PLAN)
            return (out * weight)[:, ids].sum()

        return jax.grad(some)(units)

    for own, other in ((PLAN.ids_keep[0], PLAN.ids_mask[0]), (PLAN.ids_mask[0], PLAN.ids_keep[0])):
        by_cell = np.abs(gradient(own)).max(axis=-1)
        assert np.all(by_cell[:, other] == 0)
        assert np.all(by_cell[:, own] > 0)


def test_two_attentions_of_the_groups_are_one_with_a_mask(units, params, monkeypatch):
    out = apply(make(), params, units, IDS, groups=PLAN)
    monkeypatch.setattr(models, "_arrange", models._in_windows)  # a mask in all stages
    masked = quick_jit(lambda: make().apply({"params": params}, units, IDS, groups=PLAN))()
    np.testing.assert_allclose(masked, out, atol=3e-6)


def test_groups_make_a_difference_and_their_order_none(units, params):
    out = apply(make(), params, units, IDS, groups=PLAN)
    assert np.abs(out - apply(make(), params, units, IDS)).max() > 1e-2
    turned = MaskPlan(ids_keep=PLAN.ids_mask[:, ::-1], ids_mask=PLAN.ids_keep[:, ::-1])
    np.testing.assert_allclose(apply(make(), params, units, IDS, groups=turned), out, atol=2e-6)


def test_a_mask_of_windows_has_no_batch():
    cells = normal((5, 8, 8, 8, 4))
    context = models._arrange(cells, make().stages()[0], PLAN).context
    assert context["mask"].shape == (1, 2, 256, 256)
    assert context["relation"].shape == (1, 256)


def test_windows_are_undone():
    for i, stage in enumerate(make().stages()):
        cells = normal((2, 8, stage.side, stage.side, stage.width))
        for groups in (None, PLAN):
            tokens, _, undo = models._arrange(cells, stage, groups)
            np.testing.assert_array_equal(undo(tokens), cells, err_msg=str(i))


def test_relations_are_places_in_the_grid():
    stage = make().stages()[2]  # 4 x 8 tokens, all in one window, 2 x 2 in a cell
    row, column = np.divmod(np.arange(32), 8)
    grid = np.stack([row, column], axis=-1).reshape(1, 4, 8, 2).astype(np.float32)
    tokens, context, _ = models._arrange(from_grid(grid, 2), stage, PLAN)
    places = np.concatenate(context["relation"], axis=1)[0]
    np.testing.assert_array_equal(tokens[0], np.stack([row[places], column[places]], axis=-1))
    assert context["lengths"] == [16, 16]


def test_bfloat16_is_for_products_and_drop_path_needs_a_key():
    plain = make(stage_depths=(1, 1), window_sizes=None)  # cells of 2 x 2: quick to compile
    units = normal((2, 8, 8))
    params = random_params(plain.init, units, IDS)
    exact = apply(plain, params, units, IDS)
    out = apply(plain.clone(dtype=jnp.bfloat16), params, units, IDS)
    assert out.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(out.astype(jnp.float32) - exact).max() < 0.3
    module = plain.clone(drop_path_rate=0.9)
    np.testing.assert_array_equal(apply(module, params, units, IDS), exact)
    dropped = apply(module, params, units, IDS, drop_path_rng=jax.random.key(1))
    assert np.abs(dropped - exact).max() > 1e-3


def test_initialisation_is_that_of_the_authors():
    module = make(stem_dim=64, stage_depths=(1, 1), window_sizes=None)
    init = quick_jit(lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8)), IDS))
    params = init()["params"]
    for name in ("kernel", "bias"):  # a convolution's, of 2 values
        assert 0.6 < np.abs(params["patch_embed"][name]).max() < 1 / math.sqrt(2)
    table = params["block_01"]["attn"]["bias"]["table"]
    np.testing.assert_allclose(np.std(table), 0.02, rtol=0.3)
    bound = math.sqrt(6 / (256 + 128))
    largest = np.abs(params["downsample_1"]["reduction"]["kernel"]).max()
    assert 0.999 * bound < largest < bound * 1.0002


# Sizes


@pytest.mark.parametrize(
    ("size", "pixels", "millions"),
    [
        ("base", 224, 88.344352),
        pytest.param("large", 224, 197.40, marks=pytest.mark.slow),
        pytest.param("huge", 224, 659.3, marks=pytest.mark.slow),
        pytest.param("base", 384, 89.58, marks=pytest.mark.slow),
        pytest.param("large", 384, 199.25, marks=pytest.mark.slow),
    ],
)
def test_classifiers_have_as_many_parameters_as_published(size, pixels, millions):
    method = mixmim.make(size=size, image_size=(224, 224))
    model = make_classifier(
        method.unit, method.encoder, num_classes=1000, image_size=(pixels, pixels)
    )
    images = jnp.zeros((1, pixels, pixels, 3))
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), images)["params"])
    count = sum(leaf.size for leaf in jax.tree.leaves(tree)) + model.encoder.fixed_table().size
    digits = len(str(millions).partition(".")[2])
    assert round(count / 1e6, digits) == millions


@pytest.mark.parametrize(
    ("size", "pixels", "gmac"),
    [
        ("base", 224, 16.3),
        ("base", 384, 52.5),
        ("large", 224, 35.8),
        ("large", 384, 112.0),
        ("huge", 224, 117.6),
    ],
)
def test_products_of_the_encoder_are_as_many_as_published(size, pixels, gmac):
    """With full attention, as the authors count it."""
    method = mixmim.make(size=size, image_size=(pixels, pixels))
    flops = sum(method.encoder.flops(method.unit.count, method.unit.size))
    assert round(flops / 2e9, 1) == gmac


def test_flops_of_groups_are_less_by_the_attention_between_them():
    encoder = make()
    whole, grouped = (encoder.flops(8, SIZE, groups)[1] for groups in ((), (4, 4)))
    # Stages of 32 and 8 tokens, 16 and 32 wide, are whole.
    between = 4 * 16 * (32**2 - 2 * 16**2) + 4 * 32 * (8**2 - 2 * 4**2)
    assert whole - grouped == between


# Classifiers


def test_layers_are_counted_as_the_authors_count_them():
    encoder = mixmim.make(size="base", image_size=(224, 224)).encoder
    names = {
        "patch_embed/kernel": 0,
        "patch_norm/scale": 0,
        "pos_embed": 0,
        "block_00/norm1/scale": 1,
        "block_01/attn/bias/table": 2,
        "downsample_1/reduction/kernel": 3,
        "block_02/mlp/fc1/kernel": 3,
        "downsample_2/norm/scale": 5,
        "block_04/norm1/scale": 5,
        "downsample_3/norm/scale": 23,
        "block_22/norm1/scale": 23,
        "block_23/norm1/scale": 24,
        "norm/scale": 24,
        "": 24,
    }
    assert {name: encoder.layer_id(name) for name in names} == names
    assert encoder.top_layer == 25


def test_no_parameter_of_a_classifier_has_the_full_rate(params):
    model = make_classifier(PatchUnit((16, 32), 8, CHANNELS), make(), num_classes=3)
    tree = {"encoder": params, "head": {"linear": {"kernel": np.zeros((32, 3))}}}
    factors = layer_factors(tree, 0.7, model.layer_id, model.encoder.top_layer)
    last = factors["encoder"]["block_03"]["mlp"]["fc1"]["kernel"]
    of_norm, of_head = factors["encoder"]["norm"]["scale"], factors["head"]["linear"]["kernel"]
    assert (last, of_norm, of_head) == pytest.approx((0.7, 0.7, 0.7))
    assert factors["encoder"]["patch_embed"]["bias"] == pytest.approx(0.7**5)


def test_classifier_pools_after_the_encoders_norm(units, params):
    unit = PatchUnit((16, 32), 8, CHANNELS)
    model = make_classifier(unit, make(), num_classes=3)
    assert model.encoder.positions == "fixed"
    tokens = np.asarray(apply(make(), params, units, IDS))
    head = {"kernel": normal((32, 3)), "bias": normal((3,))}
    logits = apply(model, {"encoder": params, "head": {"linear": head}}, unit.join(units))
    expected = tokens.mean(axis=1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_other_windows_have_their_tables_resized(units, params):
    source = make(window_sizes=None)
    target = source.as_backbone(grid_size=(3, 3))
    shapes = [
        jax.eval_shape(
            lambda m=m, n=n: m.init(
                jax.random.key(0), jnp.zeros((1, n, SIZE)), jnp.arange(n)[None]
            )["params"]
        )
        for m, n in ((source, 8), (target, 9))
    ]
    given = jax.tree.map(lambda x: jnp.ones(x.shape), shapes[0])
    moved = transfer_encoder(given, source, target, shapes[1])
    table = moved["block_00"]["attn"]["bias"]["table"]
    assert given["block_00"]["attn"]["bias"]["table"].shape == (31, 31, 1)
    assert table.shape == (47, 47, 1)
    np.testing.assert_allclose(table, 1, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_sizes": (8, 5, 8, 4)}, "window_sizes (8, 5, 8, 4): expected divisors"),
        ({"window_sizes": (8, 4, 8)}, "window_sizes (8, 4, 8): expected one for each of 4 stages"),
        ({"window_sizes": (0, 4, 8, 4)}, "expected divisors"),
        ({"positions": "none"}, "positions 'none' is not one of fixed, learned"),
    ],
)
def test_what_does_not_fit_is_refused(units, fields, message):
    with pytest.raises(ConfigError) as error:
        make(**fields).init(jax.random.key(0), units, IDS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("keep", "replaced"), [(7, None), (8, np.zeros((1, 8), bool))], ids=["missing", "replaced"]
)
def test_cells_that_are_missing_or_replaced_are_refused(units, keep, replaced):
    with pytest.raises(ConfigError, match="expected all 8 cells in raster order, none replaced"):
        make().init(jax.random.key(0), units[:, :keep], IDS[:, :keep], replaced=replaced)
