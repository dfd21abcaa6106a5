"""Names and layouts: against a list written by hand, and back as they went."""

from __future__ import annotations

import numpy as np
import pytest

from mae_jax.convert import families, layouts, outgoing
from mae_jax.convert.families.mae import (
    FAMILY,
    OFFICIAL,
    TRANSFORMERS,
    TRANSFORMERS_5_MEMORY,
    TRANSFORMERS_BASE,
)
from mae_jax.errors import ConfigError
from mae_jax.nn.patches import PatchUnit
from tests.convert import cases

# Width 16, 1 block of each half, decoder of width 8, patches of 4 x 4 x 3, 9 of them.
BLOCK = {
    "norm1.weight": (16,),
    "norm1.bias": (16,),
    "attn.qkv.weight": (48, 16),
    "attn.qkv.bias": (48,),
    "attn.proj.weight": (16, 16),
    "attn.proj.bias": (16,),
    "norm2.weight": (16,),
    "norm2.bias": (16,),
    "mlp.fc1.weight": (64, 16),
    "mlp.fc1.bias": (64,),
    "mlp.fc2.weight": (16, 64),
    "mlp.fc2.bias": (16,),
}
ENCODER = {
    "cls_token": (1, 1, 16),
    "pos_embed": (1, 10, 16),
    "patch_embed.proj.weight": (16, 3, 4, 4),
    "patch_embed.proj.bias": (16,),
    **{f"blocks.0.{name}": shape for name, shape in BLOCK.items()},
}
NORM = {"norm.weight": (16,), "norm.bias": (16,)}
DECODER = {
    "mask_token": (1, 1, 8),
    "decoder_pos_embed": (1, 10, 8),
    "decoder_embed.weight": (8, 16),
    "decoder_embed.bias": (8,),
    **{
        f"decoder_blocks.0.{name}": tuple(side // 2 for side in shape)
        for name, shape in BLOCK.items()
    },
    "decoder_norm.weight": (8,),
    "decoder_norm.bias": (8,),
    "decoder_pred.weight": (48, 8),
    "decoder_pred.bias": (48,),
}
HEAD = {"head.weight": (5, 16), "head.bias": (5,)}
FC_NORM = {"fc_norm.weight": (16,), "fc_norm.bias": (16,)}


@pytest.mark.parametrize(
    ("parts", "fields", "expected"),
    [
        (cases.ENCODER, {}, ENCODER | NORM),
        (cases.FULL, {}, ENCODER | NORM | DECODER),
        (cases.HEAD, {"pooling": "mean"}, ENCODER | FC_NORM | HEAD),
        (cases.HEAD, {"pooling": "cls", "positions": "learned"}, ENCODER | NORM | HEAD),
    ],
    ids=["encoder", "full", "mean", "cls"],
)
def test_official_names_and_shapes_are_those_of_the_official_files(parts, fields, expected):
    state = outgoing.state_of(cases.make(parts, depth=1, **fields), OFFICIAL)
    assert {name: array.shape for name, array in state.items()} == expected


def test_arrays_are_laid_out_as_in_torch():
    unit = PatchUnit((4, 6), 2, 3)
    rng = np.random.default_rng(0)
    params = {
        "encoder/patch_embed/kernel": rng.random((12, 4), np.float32),
        "decoder/block_11/attn/qkv/kernel": rng.random((4, 12), np.float32),
        "decoder/block_11/attn/qkv/bias": np.arange(12, dtype=np.float32),
    }
    official = OFFICIAL.to_theirs(params, unit)
    weight = official["patch_embed.proj.weight"]
    # A patch's pixel (row 1, column 0, channel 2) is value (1 * 2 + 0) * 3 + 2 of 12.
    np.testing.assert_array_equal(weight[:, 2, 1, 0], params["encoder/patch_embed/kernel"][8])
    fused = official["decoder_blocks.11.attn.qkv.weight"]
    np.testing.assert_array_equal(fused, params["decoder/block_11/attn/qkv/kernel"].T)
    apart = TRANSFORMERS.to_theirs(params, unit)
    start = "decoder.decoder_layers.11.attention.attention"
    np.testing.assert_array_equal(apart[f"{start}.key.weight"], fused[4:8])
    np.testing.assert_array_equal(apart[f"{start}.value.bias"], [8, 9, 10, 11])


@pytest.mark.parametrize("number", range(len(FAMILY.layouts)))
@pytest.mark.parametrize(
    ("parts", "fields"),
    [(cases.ENCODER, {}), (cases.FULL, {}), (cases.HEAD, {"pooling": "cls"})],
    ids=["encoder", "full", "classifier"],
)
def test_a_layout_is_recognised_and_undone(number, parts, fields):
    layout = FAMILY.layouts[number]
    weights = cases.make(parts, positions="learned", **fields)
    state = outgoing.state_of(weights, layout)
    family, found = families.recognise(state, "here")
    assert family is FAMILY
    cases.assert_same(found.to_ours(state, weights.params), weights.params)
    if parts == cases.FULL:  # else two of them have the same names
        assert found == layout


def test_recognising_does_not_hang_on_one_array():
    state = outgoing.state_of(cases.make(), TRANSFORMERS)
    for name in list(state):
        rest = state.keys() - {name}
        assert families.recognise(rest, "here") == (FAMILY, TRANSFORMERS)


@pytest.mark.parametrize("names", [[], ["conv1.weight", "fc.bias"], ["head.weight", "head.bias"]])
def test_names_of_no_layout_are_refused(names):
    with pytest.raises(ConfigError, match="here: expected weights of a ViT with the names of"):
        families.recognise(names, "here")


def test_what_a_layout_has_no_place_for_is_refused_by_name():
    with pytest.raises(ConfigError, match="head/norm/bias: the layout of transformers has no"):
        outgoing.state_of(cases.make(cases.HEAD, pooling="mean"), TRANSFORMERS)


def test_blocks_are_counted_and_not_confused():
    names = ["blocks.0.norm1.bias", "blocks.10.norm1.bias", "decoder_blocks.3.norm1.bias"]
    assert OFFICIAL.depth("encoder", names) == 2
    assert OFFICIAL.depth("decoder", names) == 1
    assert TRANSFORMERS_5_MEMORY.depth("encoder", names) == 0


def test_a_bias_without_that_of_keys_becomes_whole():
    bias = np.arange(6, dtype=np.float32)
    split = {
        "blocks.0.attn.q_bias": bias[:2],
        "blocks.0.attn.v_bias": bias[4:],
        "blocks.0.norm1.bias": bias,
    }
    whole = layouts.fuse_split_biases(split)
    assert whole.keys() == {"blocks.0.attn.qkv.bias", "blocks.0.norm1.bias"}
    np.testing.assert_array_equal(whole["blocks.0.attn.qkv.bias"], [0, 1, 0, 0, 4, 5])
    lone = {"blocks.0.attn.q_bias": bias}
    assert layouts.fuse_split_biases(lone).keys() == lone.keys()


def test_no_layout_gives_two_parameters_one_name():
    weights = cases.make(cases.FULL)
    for layout in (OFFICIAL, TRANSFORMERS, TRANSFORMERS_5_MEMORY, TRANSFORMERS_BASE):
        names = [name for path in weights.params for name in layout.names(path)]
        assert len(names) == len(set(names))
