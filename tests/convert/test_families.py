"""The authors' layouts of the family: against lists by hand, and there and back."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from mae_jax.convert import families, files, outgoing, weights
from mae_jax.convert.families import FAMILIES
from mae_jax.convert.families.hivit import OFFICIAL as HIVIT
from mae_jax.convert.families.mixmim import OFFICIAL as MIXMIM
from mae_jax.convert.families.um_mae import PVT, SWIN, VIT
from mae_jax.convert.families.videomae import CLASSIFIER, PRETRAINED, TRANSFORMERS, TRANSFORMERS_4
from mae_jax.convert.incoming import weights_of
from mae_jax.convert.layouts import Layout, of_clips, relative_index
from mae_jax.convert.weights import Weights
from mae_jax.errors import ConfigError
from mae_jax.nn.cubes import CubeUnit
from mae_jax.nn.patches import PatchUnit
from tests.convert import cases

LAYOUTS = {
    "hivit": HIVIT,
    "hivit_relative": HIVIT,
    "mixmim": MIXMIM,
    "mixmim_windows": MIXMIM,
    "swin": SWIN,
    "pvt": PVT,
    "vit": VIT,
    "videomae": PRETRAINED,
}


@functools.cache
def tiny(name: str, parts: tuple[str, ...] = cases.FULL) -> Weights:
    return cases.make_tiny(name, parts)


def layout_of(name: str, parts: tuple[str, ...]) -> Layout:
    """Return the layout of tiny weights: the authors of VideoMAE have two."""
    return CLASSIFIER if (name, parts) == ("videomae", cases.HEAD) else LAYOUTS[name]


def theirs_of(made: Weights) -> dict[str, np.ndarray]:
    return outgoing.state_of(made, outgoing.layout_of(made, "official"))


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("name", "parts"),
    [(name, parts) for name in cases.METHODS for parts in (cases.FULL, cases.HEAD)]
    + [(name, cases.ENCODER) for name in ("hivit", "mixmim", "swin", "videomae")],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_ours_theirs_and_back_are_the_same_bits_and_the_same_model(name, parts):
    made = tiny(name, parts)
    theirs = theirs_of(made)
    back, lines = weights_of(cases.stored(theirs), cases.told(made))
    cases.assert_same(back.params, made.params)
    cases.assert_same(theirs_of(back), theirs)
    assert back.parts == parts
    assert lines[-1] == f"  arrays     {len(theirs)} read, all mapped"
    if name == "vit" and parts == cases.HEAD:
        return  # as MAE's, whose names and whose classifier it has
    assert lines[0] == f"weights: file with the names of {layout_of(name, parts).name}"
    found, model = weights.model_of(back.config), weights.model_of(made.config)
    assert (found.unit, found.encoder) == (model.unit, model.encoder)
    assert parts == cases.ENCODER or found == model  # else of a decoder that is not there


@pytest.mark.parametrize("name", ["hivit", "mixmim", "swin", "pvt", "videomae"])
@pytest.mark.parametrize("parts", [cases.FULL, cases.HEAD], ids=["full", "classifier"])
def test_recognising_does_not_hang_on_one_array(name, parts):
    made = tiny(name, parts)
    state = theirs_of(made)
    clips, layout = of_clips(state), layout_of(name, parts)
    assert families.recognise(state, "here", clips=clips)[1] is layout
    for left_out in state:
        rest = state.keys() - {left_out}
        assert families.recognise(rest, "here", clips=clips)[1] is layout


@pytest.mark.parametrize("name", cases.METHODS)
def test_no_layout_gives_two_parameters_one_name(name):
    made = tiny(name)
    depths = weights.depths_of(made.config)
    names = [theirs for path in made.params for theirs in LAYOUTS[name].names(path, depths)]
    assert len(names) == len(set(names))


# ---------------------------------------------------------------- where a number goes


def test_a_convolution_has_its_neighbours_in_raster_order():
    kernel = np.arange(4 * 3 * 5, dtype=np.float32).reshape(12, 5)  # 2 x 2 neighbours of width 3
    state = SWIN.to_theirs(
        {"encoder/downsample_2/proj/kernel": kernel}, PatchUnit((8, 8), 8, 1), (2, 1, 3, 1)
    )
    (weight,) = state.values()
    assert state.keys() == {"blocks.3.downsample.proj.weight"}
    assert weight.shape == (5, 3, 2, 2)
    for row, column, channel in np.ndindex(2, 2, 3):
        np.testing.assert_array_equal(
            weight[:, channel, row, column], kernel[(2 * row + column) * 3 + channel]
        )


def test_the_stem_of_clips_is_a_convolution_in_time_too():
    kernel = np.arange(2 * 12 * 5, dtype=np.float32).reshape(24, 5)  # 2 frames of 2 x 2 pixels
    unit = CubeUnit((4, 4, 4), 2, 2)
    state = PRETRAINED.to_theirs({"encoder/patch_embed/kernel": kernel}, unit)
    weight = state["encoder.patch_embed.proj.weight"]
    assert weight.shape == (5, 3, 2, 2, 2)
    np.testing.assert_array_equal(weight[:, 2, 1, 0, 1], kernel[((1 * 2 + 0) * 2 + 1) * 3 + 2])


def test_the_stem_is_a_convolution_of_pixels():
    kernel = np.arange(12 * 5, dtype=np.float32).reshape(12, 5)  # 2 x 2 pixels of 3 channels
    state = MIXMIM.to_theirs({"encoder/patch_embed/kernel": kernel}, PatchUnit((16, 16), 16))
    weight = state["patch_embed.proj.weight"]
    assert weight.shape == (5, 3, 2, 2)
    np.testing.assert_array_equal(weight[:, 2, 1, 0], kernel[(1 * 2 + 0) * 3 + 2])


def test_a_table_is_flat_with_the_rows_slowest():
    table = np.arange(3 * 5 * 2, dtype=np.float32).reshape(3, 5, 2)  # a grid of 2 x 3, two heads
    state = HIVIT.to_theirs(
        {"encoder/block_05/attn/bias/table": table}, PatchUnit((8, 12), 4), (2, 2, 2)
    )
    name = "blocks.7.attn.relative_position_bias_table"
    assert state.keys() == {name, "relative_position_index"}
    np.testing.assert_array_equal(state[name][1 * 5 + 3], table[1, 3])
    # Query (0, 2) and key (1, 0): the difference (-1, 2), which is entry (0, 4).
    assert state["relative_position_index"][2, 3] == 0 * 5 + 4


def test_indices_are_those_of_a_window_of_two_by_hand():
    np.testing.assert_array_equal(
        relative_index((3, 3, 1)),
        [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]],
    )


# ---------------------------------------------------------------- the published models


def linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def conv(name: str, out: int, inputs: int, side: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs, side, side), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def mlp(start: str, width: int, ratio: int) -> dict[str, tuple[int, ...]]:
    return {
        **norm(f"{start}.norm2", width),
        **linear(f"{start}.mlp.fc1", ratio * width, width),
        **linear(f"{start}.mlp.fc2", width, ratio * width),
    }


def block(start: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        **norm(f"{start}.norm1", width),
        **linear(f"{start}.attn.qkv", 3 * width, width),
        **linear(f"{start}.attn.proj", width, width),
        **mlp(start, width, 4),
    }


def merge(start: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        **norm(f"{start}.norm", 4 * width),
        f"{start}.reduction.weight": (2 * width, 4 * width),
    }


def decoder(depth: int, embed: tuple[int, int], rows: int, pred: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, rows, 512),
        **linear("decoder_embed", *embed),
        **norm("decoder_norm", 512),
        **linear("decoder_pred", pred, 512),
    }
    for i in range(depth):
        shapes |= block(f"decoder_blocks.{i}", 512)
    return shapes


def hivit_base(parts: tuple[str, ...], *, relative: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        **conv("patch_embed.proj", 128, 3, 4),
        **norm("patch_embed.norm", 128),
        "absolute_pos_embed": (1, 196, 512),
        **merge("blocks.4", 128),
        **merge("blocks.9", 256),
    }
    for i in range(4):
        shapes |= mlp(f"blocks.{i}", 128, 3) | mlp(f"blocks.{i + 5}", 256, 3)
    for i in range(10, 30):
        shapes |= block(f"blocks.{i}", 512)
        if relative:
            shapes[f"blocks.{i}.attn.relative_position_bias_table"] = (729, 8)
    if relative:
        shapes["relative_position_index"] = (196, 196)
    if "head" in parts:
        return shapes | norm("fc_norm", 512) | linear("head", 1000, 512)
    return shapes | norm("norm", 3584) | decoder(6, (512, 3584), 196, 768)


def mixmim_base(parts: tuple[str, ...], *, pixels: int = 224) -> dict[str, tuple[int, ...]]:
    rows, windows = (56, (14, 14, 14, 7)) if pixels == 224 else (96, (16, 16, 24, 12))
    shapes: dict[str, tuple[int, ...]] = {
        **conv("patch_embed.proj", 128, 3, 4),
        **norm("patch_embed.norm", 128),
        "absolute_pos_embed": (1, rows**2, 128),
        **norm("norm", 1024),
    }
    for stage, (depth, window) in enumerate(zip((2, 2, 18, 2), windows, strict=True)):
        width, heads = 128 * 2**stage, 4 * 2**stage
        for i in range(depth):
            start = f"layers.{stage}.blocks.{i}"
            shapes |= block(start, width)
            shapes[f"{start}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            shapes[f"{start}.attn.relative_position_index"] = (window**2, window**2)
        if stage < 3:
            shapes |= merge(f"layers.{stage}.downsample", width)
    if "head" in parts:
        return shapes | linear("head", 1000, 1024)
    return shapes | decoder(8, (512, 1024), 49, 3072)


def pyramid(
    parts: tuple[str, ...],
    kind: str,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    decoder_depth: int = 2,
    inner: int = 32,
    first_heads: int = 3,
) -> dict[str, tuple[int, ...]]:
    swin = kind == "swin"
    shapes: dict[str, tuple[int, ...]] = conv("patch_embed.proj", widths[0], 3, 4)
    shapes |= norm("patch_embed.norm", widths[0]) if swin else {"pos_embed": (1, 4096, widths[0])}
    number = 0
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            start = f"blocks.{number}"
            if stage and not i:
                if swin:
                    shapes |= norm(f"{start}.downsample.norm", widths[stage - 1])
                shapes |= conv(f"{start}.downsample.proj", width, widths[stage - 1], 2)
            if swin:
                shapes |= block(start, width)
                shapes |= conv(f"{start}.attn.posmlp.0", inner, 2, 1)
                shapes |= conv(f"{start}.attn.posmlp.2", first_heads * 2**stage, inner, 1)
            else:
                shapes |= norm(f"{start}.norm1", width) | norm(f"{start}.attn.norm", width)
                shapes |= linear(f"{start}.attn.q", width, width)
                shapes |= linear(f"{start}.attn.kv", 2 * width, width)
                shapes |= conv(f"{start}.attn.sr", width, width, 1)
                shapes |= linear(f"{start}.attn.proj", width, width)
                shapes |= mlp(start, width, 8 if stage < 2 else 4)
            number += 1
    if "head" in parts:
        return shapes | norm("fc_norm", widths[-1]) | linear("head", 1000, widths[-1])
    shapes |= {"vis_mask_token": (1, 1, widths[0])} | norm("norm", widths[-1])
    return shapes | decoder(decoder_depth, (2048, widths[-1]), 256, 768)


def videomae_base(parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    def clip_block(start: str, width: int) -> dict[str, tuple[int, ...]]:
        shapes = block(start, width)
        del shapes[f"{start}.attn.qkv.bias"]
        return shapes | {f"{start}.attn.{name}_bias": (width,) for name in "qv"}

    prefix = "" if "head" in parts else "encoder."
    name = f"{prefix}patch_embed.proj"
    shapes = {f"{name}.weight": (768, 3, 2, 16, 16), f"{name}.bias": (768,)}
    for i in range(12):
        shapes |= clip_block(f"{prefix}blocks.{i}", 768)
    if "head" in parts:
        return shapes | norm("fc_norm", 768) | linear("head", 1000, 768)
    for i in range(4):
        shapes |= clip_block(f"decoder.blocks.{i}", 384)
    shapes |= {"mask_token": (1, 1, 384), "encoder_to_decoder.weight": (384, 768)}
    return (
        shapes
        | norm("encoder.norm", 768)
        | norm("decoder.norm", 384)
        | linear("decoder.head", 1536, 384)
    )


SWIN_T = ("swin", (96, 192, 384, 768), (2, 2, 6, 2))
SWIN_L = ("swin", (192, 384, 768, 1536), (2, 2, 18, 2), 8, 64, 6)
PVT_S = ("pvt", (64, 128, 320, 512), (3, 4, 6, 3))
SQUARE_256: dict[str, Any] = {"image_size": (256, 256)}
PUBLISHED: dict[str, tuple[str, dict[str, Any], tuple[str, ...], Any]] = {
    "hivit": ("hivit", {"size": "base"}, cases.FULL, hivit_base(cases.FULL, relative=False)),
    "hivit-classifier": (
        "hivit",
        {"size": "base", "relative_positions": True},
        cases.HEAD,
        hivit_base(cases.HEAD, relative=True),
    ),
    "mixmim": ("mixmim", {"size": "base"}, cases.FULL, mixmim_base(cases.FULL)),
    "mixmim-classifier": ("mixmim", {"size": "base"}, cases.HEAD, mixmim_base(cases.HEAD)),
    "mixmim-384": (
        "mixmim",
        {"size": "base", "image_size": (384, 384)},
        cases.HEAD,
        mixmim_base(cases.HEAD, pixels=384),
    ),
    "swin_t": (
        "um_mae",
        {"size": "swin_t", **SQUARE_256},
        cases.FULL,
        pyramid(cases.FULL, *SWIN_T),
    ),
    "swin_t-classifier": (
        "um_mae",
        {"size": "swin_t", **SQUARE_256},
        cases.HEAD,
        pyramid(cases.HEAD, *SWIN_T),
    ),
    "swin_l": (
        "um_mae",
        {"size": "swin_l", **SQUARE_256},
        cases.FULL,
        pyramid(cases.FULL, *SWIN_L),
    ),
    "pvt_s": (
        "um_mae",
        {"size": "pvt_s", "positions": "fixed", **SQUARE_256},
        cases.FULL,
        pyramid(cases.FULL, *PVT_S),
    ),
    "pvt_s-classifier": (
        "um_mae",
        {"size": "pvt_s", "positions": "learned", **SQUARE_256},
        cases.HEAD,
        pyramid(cases.HEAD, *PVT_S),
    ),
    "videomae": ("videomae", {"size": "vit_b"}, cases.FULL, videomae_base(cases.FULL)),
    "videomae-classifier": ("videomae", {"size": "vit_b"}, cases.HEAD, videomae_base(cases.HEAD)),
}
QUICK = ("hivit", "hivit-classifier", "mixmim-classifier", "swin_t", "pvt_s")


def blank(method: str, fields: dict[str, Any], parts: tuple[str, ...]) -> Weights:
    """Return weights of a published size that take no memory."""
    config = FAMILIES[method].recipe()
    config.model.update(fields)
    if "head" in parts:
        config.model.update({"num_classes": 1000, "pooling": "mean"})
    leaves = weights.shapes(config.lock(), parts)
    zero = np.float32(0)
    return Weights(
        config, parts, {path: np.broadcast_to(zero, leaf.shape) for path, leaf in leaves.items()}
    )


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in PUBLISHED],
)
def test_names_and_shapes_of_published_models_are_those_of_the_authors_files(case):
    method, fields, parts, expected = PUBLISHED[case]
    made = blank(method, fields, parts)
    found = {name: array.shape for name, array in theirs_of(made).items()}
    assert found == expected


@pytest.mark.parametrize(
    "case",
    [
        "swin_t-classifier",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("mixmim", "swin_t", "hivit-classifier", "videomae")
        ),
    ],
)
def test_a_published_model_is_read_by_its_name_with_nothing_told_but_what_is_in_no_shape(case):
    method, fields, parts, _ = PUBLISHED[case]
    made = blank(method, fields, parts)
    args = {"input_size": made.config.model.image_size[0], "norm_pix_loss": True}
    args |= {"num_frames": 16}
    back, _ = weights_of(cases.stored(theirs_of(made), args=args), families_told(made))
    assert back.config.model.size == fields["size"]
    overrides = {"stem_dim", "embed_dim", "depths", "num_heads", "window_sizes", "decoder_depth"}
    assert not overrides & set(back.config.model)
    assert weights.model_of(back.config) == weights.model_of(made.config)


def families_told(made: Weights):
    """Return the one thing of a published model that neither shapes nor their flags tell."""
    return cases.Told(compat_decoder_order=False if "decoder" in made.parts else None)


def test_published_numbers_of_parameters():
    """Fixed tables count, indices do not: sheets of the authors' models."""
    totals = {"mixmim": 114_665_784, "mixmim-classifier": 88_344_352}
    for case, total in totals.items():
        shapes = PUBLISHED[case][3]
        counted = [s for name, s in shapes.items() if not name.endswith("relative_position_index")]
        assert sum(map(math.prod, counted)) == total


# ---------------------------------------------------------------- what a file does not tell


def test_a_decoder_of_a_pyramid_has_the_released_order_unless_told():
    for name, compat in (("swin", True), ("pvt", True), ("vit", None)):
        made = tiny(name)
        told = cases.told(made, compat_decoder_order=None)
        back, lines = weights_of(cases.stored(theirs_of(made)), told)
        assert back.config.model.get("compat_decoder_order") is compat
        said = [line for line in lines if "model.compat_decoder_order True" in line]
        assert len(said) == int(bool(compat))
    assert "as the authors' code trains it" in said[0] if said else True
    encoder = tiny("swin", cases.ENCODER)
    back, lines = weights_of(cases.stored(theirs_of(encoder)), cases.told(encoder))
    assert "compat_decoder_order" not in back.config.model


def test_without_a_token_there_is_no_secondary_masking():
    made = cases.make_tiny("swin", secondary_ratio=0.0)
    state = theirs_of(made)
    assert "vis_mask_token" not in state
    back, _ = weights_of(cases.stored(state), cases.told(made))
    assert back.config.model.secondary_ratio == 0.0
    cases.assert_same(back.params, made.params)


def refusal(state: Any, told: Any, **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        weights_of(cases.stored(state, **fields), told)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_swin_classifier_needs_its_image_size():
    made = tiny("swin", cases.HEAD)
    told = cases.told(made, image_size=None)
    assert refusal(theirs_of(made), told).startswith("--image_size: expected height,width of the")
    back, lines = weights_of(cases.stored(theirs_of(made), args={"input_size": 64}), told)
    assert back.config.model.image_size == (64, 64)
    assert "  window     8 on the full grid (--window_size)" in lines


def test_targets_are_asked_for_but_of_hivit():
    made = cases.make_tiny("hivit", norm_pix_loss=True)
    args = {"norm_pix_loss": False}  # a flag without effect there
    told = cases.told(made, norm_pix_loss=None)
    back, lines = weights_of(cases.stored(theirs_of(made), args=args), told)
    assert back.config.model.norm_pix_loss is True
    assert any("always, in the authors' code" in line for line in lines)
    made = tiny("mixmim")
    told = cases.told(made, norm_pix_loss=None)
    assert refusal(theirs_of(made), told).startswith("--norm_pix_loss: expected true or false")


def test_windows_of_mixmim_are_those_of_the_file_where_the_rule_has_none():
    made = cases.make_tiny("mixmim_windows", cases.ENCODER, image_size=(16, 400))
    back, _ = weights_of(cases.stored(theirs_of(made)), cases.told(made))
    assert back.config.model.window_sizes == (8, 4, 2, 1)


def test_a_resized_table_of_mixmim_is_kept_as_learned():
    made = tiny("mixmim", cases.HEAD)
    state = theirs_of(made)
    state["absolute_pos_embed"] = state["absolute_pos_embed"] * np.float32(0.9)
    back, _ = weights_of(cases.stored(state), cases.told(made))
    assert back.config.model.positions == "learned"
    cases.assert_same(theirs_of(back), state)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("hivit", "blocks.1.norm2.bias"),
        ("hivit", "blocks.7.reduction.weight"),
        ("hivit_relative", "blocks.9.attn.relative_position_bias_table"),
        ("hivit_relative", "blocks.8.attn.relative_position_bias_table"),
        ("mixmim", "layers.0.downsample.norm.weight"),
        ("mixmim", "layers.2.blocks.0.attn.relative_position_bias_table"),
        ("swin", "blocks.3.downsample.proj.bias"),
        ("swin", "blocks.6.attn.posmlp.2.weight"),
        ("pvt", "blocks.4.attn.sr.weight"),
        ("vit", "decoder_blocks.0.attn.qkv.weight"),
        ("videomae", "decoder.blocks.0.attn.v_bias"),
        ("videomae", "encoder.blocks.1.mlp.fc1.weight"),
    ],
)
def test_an_array_that_is_missing_is_named(name, missing):
    made = tiny(name)
    state = theirs_of(made)
    del state[missing]
    assert refusal(state, cases.told(made)) == f"weights: {missing} is missing"


def test_indices_may_be_missing():
    made = tiny("mixmim")
    state = {k: v for k, v in theirs_of(made).items() if not k.endswith("index")}
    back, _ = weights_of(cases.stored(state), cases.told(made))
    cases.assert_same(back.params, made.params)


def test_arrays_too_many_and_of_another_shape_are_named():
    made = tiny("mixmim")
    state, told = theirs_of(made), cases.told(made)
    extra = state | {"zeta": np.zeros(3, np.float32)}
    assert "zeta has no place in this model" in refusal(extra, told)
    name = "layers.1.downsample.reduction.weight"
    wrong = state | {name: np.zeros((3, 4), np.float32)}
    assert refusal(wrong, told) == f"weights: {name}: expected shape [32, 64], got [3, 4]"
    name = "layers.2.blocks.0.attn.relative_position_index"
    wrong = state | {name: state[name].T}
    assert refusal(wrong, told) == (
        f"weights: {name}: expected the places of a window in raster order, got others"
    )
    fewer = {key: array for key, array in state.items() if not key.startswith("layers.3.")}
    assert "expected blocks of 4 stages, got those of 3" in refusal(fewer, told)


def test_a_hivit_that_does_not_use_its_norm_is_refused():
    made = tiny("hivit")
    state = theirs_of(made)
    state |= {"norm.weight": np.ones(32, np.float32), "norm.bias": np.zeros(32, np.float32)}
    message = refusal(state, cases.told(made))
    assert message.startswith("weights: norm.weight: expected shape [224], of all three stages")
    with pytest.raises(ConfigError, match=r"model\.multi_scale False: the authors' model"):
        cases.make_tiny("hivit", multi_scale=False)
    cases.make_tiny("hivit", cases.HEAD, multi_scale=False)  # a classifier has one scale anyhow


def test_a_file_of_mmpretrain_is_refused():
    names = ["backbone.patch_embed.projection.weight", "backbone.layers.0.blocks.0.ln1.weight"]
    with pytest.raises(ConfigError, match="here: expected the names of the authors' code, got mmp"):
        families.recognise(names, "here")


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("name", ["hivit", "mixmim", "swin"])
def test_only_the_authors_have_these_methods(name, to):
    made = tiny(name)
    with pytest.raises(ConfigError, match=r"^--to: expected official, the only kind of file that"):
        outgoing.layout_of(made, to)


def test_a_method_of_nobody_else_is_refused():
    made = cases.make_tiny("swin")
    with made.config.unlocked():
        made.config.model.name = "simmim"
    with pytest.raises(ConfigError, match=r"model\.name simmim: other libraries have"):
        outgoing.layout_of(made, "official")


# ---------------------------------------------------------------- clips


@pytest.mark.parametrize("layout", [TRANSFORMERS_4, TRANSFORMERS], ids=["4", "5"])
@pytest.mark.parametrize(
    ("parts", "prefix"),
    [(cases.FULL, ""), (cases.HEAD, ""), (cases.ENCODER, ""), (cases.ENCODER, "videomae.")],
    ids=["full", "classifier", "encoder", "saved alone"],
)
def test_both_generations_of_transformers_names_of_biases_are_read(layout, parts, prefix):
    made = tiny("videomae", parts)
    theirs = outgoing.state_of(made, layout.without_prefix(prefix))
    back, lines = weights_of(cases.stored(theirs), cases.told(made))
    assert lines[0] == "weights: file with the names of transformers' VideoMAE"
    cases.assert_same(back.params, made.params)
    assert back.parts == parts
    assert back.config.model.positions == "fixed"


def test_an_array_of_a_key_bias_has_no_place():
    made = tiny("videomae")
    state = theirs_of(made)
    name = "encoder.blocks.0.attn.qkv.bias"
    state[name] = np.zeros(48, np.float32)
    assert f"{name} has no place in this model" in refusal(state, cases.told(made))


def test_frames_and_size_of_clips_are_told_or_stored():
    made = tiny("videomae")
    state = theirs_of(made)
    message = refusal(state, cases.told(made, frames=None))
    assert message == "--frames: expected the frames of a clip, which weights does not tell"
    assert "--image_size: expected height" in refusal(state, cases.told(made, image_size=None))
    config = {"num_frames": 6, "image_size": [12, 16], "model_type": "videomae"}
    told = cases.told(made, frames=None, image_size=None)
    back, _ = weights_of(cases.stored(state, config=config), told)
    assert (back.config.model.frames, back.config.model.image_size) == (6, (12, 16))
    assert "model_type 'vit'" in refusal(state, told, config=config | {"model_type": "vit"})


def test_the_folder_for_transformers_says_what_the_model_is(tmp_path):
    made = tiny("videomae")
    outgoing.write_transformers(tmp_path / "folder", made)
    back, lines = weights_of(files.read(tmp_path / "folder"), cases.Told())
    assert "  target     raw pixels (config.json)" not in lines
    cases.assert_same(back.params, made.params)
    found, model = weights.model_of(back.config), weights.model_of(made.config)
    assert (found.unit, found.encoder, found.decoder) == (model.unit, model.encoder, model.decoder)


def test_learned_positions_of_clips_are_nobody_elses():
    made = cases.make_tiny("videomae", positions="learned")
    with pytest.raises(ConfigError, match=r"encoder/pos_embed: the layout of .* has no place"):
        theirs_of(made)
