"""Which model weights are of, as shapes, settings, flags and names say; and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mae_jax.convert import outgoing, reader
from mae_jax.convert.families.family import nearest_size
from mae_jax.convert.families.mae import OFFICIAL, TRANSFORMERS
from mae_jax.convert.incoming import weights_of
from mae_jax.convert.reader import Told
from mae_jax.errors import ConfigError
from mae_jax.pretrain.mae import SIZES
from tests.convert import cases

TOLD = cases.TOLD


def official(parts=cases.FULL, **fields):
    return outgoing.state_of(cases.make(parts, **fields), OFFICIAL)


def refusal(stored, told=TOLD) -> str:
    with pytest.raises(ConfigError) as caught:
        weights_of(stored, told)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        (cases.ENCODER, {}),
        (cases.ENCODER, {"positions": "learned", "use_cls_token": False}),
        (cases.FULL, {"channels": 1, "image_size": (8, 8)}),
        (cases.HEAD, {"pooling": "mean", "positions": "learned"}),
        (cases.HEAD, {"pooling": "cls", "num_classes": 3}),
    ],
    ids=["encoder", "no cls", "grey", "mean", "cls"],
)
def test_weights_come_back_with_their_model(parts, fields):
    weights = cases.make(parts, **fields)
    found, _ = weights_of(cases.stored(outgoing.state_of(weights, OFFICIAL)), TOLD)
    cases.assert_same(found.params, weights.params)
    assert found.parts == weights.parts
    assert found.config.task == weights.config.task
    ours, theirs = found.config.model.to_dict(), weights.config.model.to_dict()
    for model in (ours, theirs):
        if parts == cases.FULL:
            assert model.pop("norm_pix_loss") is (model is theirs)
        else:  # dimensions of a decoder that is not there
            model.pop("norm_pix_loss")
            model.update({k: None for k in model if k.startswith("decoder_")})
    assert ours == theirs


def test_a_named_size_needs_no_dimensions():
    def nearest(dims):
        return nearest_size(dims, SIZES, "embed_dim")

    dims = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    assert nearest(dims) == ("vit_l", {})
    assert nearest(dims | {"patch_size": 14}) == ("vit_l", {"patch_size": 14})
    assert nearest(dims | {"decoder_depth": 4}) == ("vit_l", {"decoder_depth": 4})
    tiny = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    assert nearest(tiny) == ("vit_s", {"embed_dim": 192, "num_heads": 3})


@pytest.mark.parametrize(
    ("name", "args", "config", "told", "expected"),
    [
        ("mae_pretrain_vit_base_full.pth", {}, {}, None, (True, "name")),
        ("mae_visualize_vit_large.pth", {}, {}, None, (False, "name")),
        ("mae_visualize_vit_large.pth", {"norm_pix_loss": True}, {}, None, (True, "args")),
        ("mine", {}, {"norm_pix_loss": False}, None, (False, "config.json")),
        ("mae_pretrain", {"norm_pix_loss": True}, {}, False, (False, "--norm_pix_loss")),
    ],
)
def test_the_target_is_known_from_user_file_or_name(name, args, config, told, expected):
    stored = cases.stored(official(), name, args=args, config=config)
    told = dataclasses.replace(TOLD, norm_pix_loss=told)
    weights, lines = weights_of(stored, told)
    assert weights.config.model.norm_pix_loss is expected[0]
    (line,) = (line for line in lines if line.startswith("  target"))
    assert expected[1] in line


def test_a_decoder_without_a_known_target_is_refused():
    told = dataclasses.replace(TOLD, norm_pix_loss=None)
    message = refusal(cases.stored(official(), "mine.pth"), told)
    assert message.startswith("--norm_pix_loss: expected true or false, for mine.pth does not say")
    weights_of(cases.stored(official(cases.ENCODER)), told)  # an encoder has no target


def test_heads_are_told_stored_or_usual_and_else_asked_for():
    state = official()
    assert "--num_heads: expected" in refusal(cases.stored(state), Told(norm_pix_loss=True))
    told = Told(norm_pix_loss=True, num_heads=2)
    assert refusal(cases.stored(state), told).startswith("--decoder_num_heads: expected the number")
    config = {"num_attention_heads": 8, "decoder_num_attention_heads": 1}
    model = weights_of(cases.stored(state, config=config), told)[0].config.model
    assert (model.num_heads, model.decoder_num_heads) == (2, 1)
    wide = official(cases.ENCODER, embed_dim=384, num_heads=6, depth=1)
    assert weights_of(cases.stored(wide), Told())[0].config.model.num_heads is None  # of vit_s


def test_image_size_is_square_told_or_stored():
    wide = cases.make(cases.ENCODER, image_size=(8, 20))
    state = outgoing.state_of(wide, OFFICIAL)
    assert refusal(cases.stored(state)).startswith("--image_size: expected height,width of 10 pat")
    told = dataclasses.replace(TOLD, image_size=(8, 20))
    for stored, known in (
        (cases.stored(state), told),
        (cases.stored(state, config={"image_size": [8, 20]}), TOLD),
    ):
        weights, _ = weights_of(stored, known)
        assert weights.config.model.image_size == (8, 20) == weights.config.data.image_size
        assert weights.config.model.positions == "fixed"
    turned = dataclasses.replace(TOLD, image_size=(20, 8))
    assert weights_of(cases.stored(state), turned)[0].config.model.positions == "learned"
    message = refusal(cases.stored(state), dataclasses.replace(TOLD, image_size=(8, 16)))
    assert message.endswith("got 8,16")


def test_a_table_is_ours_up_to_rounding():
    state = official()
    state["pos_embed"] = state["pos_embed"] + np.float32(5e-7)
    assert weights_of(cases.stored(state), TOLD)[0].config.model.positions == "fixed"
    state["pos_embed"] = state["pos_embed"] + np.float32(1e-5)
    weights, _ = weights_of(cases.stored(state), TOLD)
    assert weights.config.model.positions == "learned"
    np.testing.assert_array_equal(weights.params["encoder/pos_embed"], state["pos_embed"])


def test_statistics_of_pixels_are_those_of_the_preprocessor():
    weights, lines = weights_of(
        cases.stored(
            official(), preprocessor={"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 1]}
        ),
        TOLD,
    )
    assert weights.config.data.mean == (0.5, 0.5, 0.5)
    assert weights.config.data.std == (0.5, 0.5, 1.0)
    assert any("preprocessor_config.json" in line for line in lines)
    grey, lines = weights_of(cases.stored(official(channels=1)), TOLD)
    assert grey.config.data.std == (0.5,)
    assert any("a guess" in line for line in lines)


def test_another_epsilon_is_said():
    state = outgoing.state_of(cases.make(), TRANSFORMERS)
    _, lines = weights_of(cases.stored(state, config={"layer_norm_eps": 1e-12}), TOLD)
    assert any("layer_norm_eps is 1e-12" in line for line in lines)
    _, lines = weights_of(cases.stored(state, config={"layer_norm_eps": 1e-6}), TOLD)
    assert not any("layer_norm_eps" in line for line in lines)


@pytest.mark.parametrize("layout", [OFFICIAL, TRANSFORMERS], ids=["official", "transformers"])
def test_each_array_that_is_missing_is_named(layout):
    state = outgoing.state_of(cases.make(), layout)
    for path in ("encoder/patch_embed/kernel", "encoder/pos_embed", "decoder/embed/kernel"):
        (name,) = layout.names(path)
        rest = {key: array for key, array in state.items() if key != name}
        assert refusal(cases.stored(rest)) == f"weights: {name} is missing"
    for path in ("encoder/block_01/attn/qkv/bias", "decoder/mask_token", "encoder/norm/scale"):
        name = layout.names(path)[-1]
        rest = {key: array for key, array in state.items() if key != name}
        assert refusal(cases.stored(rest)) == f"weights: {name} is missing"


def test_an_array_too_many_is_named():
    state = official()
    state |= {"zeta": np.zeros(3, np.float32), "blocks.7.mlp.gate": np.zeros(3, np.float32)}
    message = refusal(cases.stored(state))
    assert message.startswith("weights: blocks.2.") or "blocks.7.mlp.gate" in message
    state = official() | {"zeta": np.zeros(3, np.float32), "eta": np.zeros(1, np.float32)}
    message = refusal(cases.stored(state))
    assert message.startswith("weights: eta and 1 more have no place in this model")
    assert message.endswith("--ignore=eta")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.1.mlp.fc1.weight", (48, 16), "expected shape [64, 16], got [48, 16]"),
        ("norm.weight", (16, 1), "expected shape [16], got [16, 1]"),
        ("patch_embed.proj.weight", (16, 3, 4), "expected 4 dimensions, got shape [16, 3, 4]"),
        ("decoder_pred.bias", (12,), "expected shape [48], got [12]"),
        ("pos_embed", (1, 0, 16), "expected 3 dimensions, got shape [1, 0, 16]"),
    ],
)
def test_another_shape_is_named(name, shape, expected):
    state = official() | {name: np.zeros(shape, np.float32)}
    assert refusal(cases.stored(state)) == f"weights: {name}: {expected}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t + 0.01, "decoder_pos_embed: expected the fixed sine-cosine table"),
        (lambda t: np.zeros_like(t), "decoder_pos_embed: expected the fixed sine-cosine table"),
        (lambda t: np.full_like(t, np.nan), "decoder_pos_embed: expected the fixed sine-cosine"),
    ],
    ids=["other", "zero", "nan"],
)
def test_a_decoder_with_another_table_is_refused(change, expected):
    state = official()
    state["decoder_pos_embed"] = change(state["decoder_pos_embed"])
    assert expected in refusal(cases.stored(state))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "clip"}, "model_type 'clip': expected vit or vit_mae"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new': expected gelu"),
    ],
)
def test_another_model_of_transformers_is_refused(config, expected):
    state = outgoing.state_of(cases.make(), TRANSFORMERS)
    assert expected in refusal(cases.stored(state, config=config))


def test_oblong_patches_are_refused():
    state = official() | {"patch_embed.proj.weight": np.zeros((16, 3, 4, 2), np.float32)}
    assert "patches of 4 x 2: not square" in refusal(cases.stored(state))


def test_split_biases_are_read_with_a_zero_for_keys():
    state = official(cases.ENCODER)
    for i in range(2):
        bias = state.pop(f"blocks.{i}.attn.qkv.bias")
        state[f"blocks.{i}.attn.q_bias"], _, state[f"blocks.{i}.attn.v_bias"] = np.split(bias, 3)
    weights, _ = weights_of(cases.stored(state), TOLD)
    query, key, value = np.split(weights.params["encoder/block_01/attn/qkv/bias"], 3)
    np.testing.assert_array_equal(query, state["blocks.1.attn.q_bias"])
    np.testing.assert_array_equal(value, state["blocks.1.attn.v_bias"])
    assert not key.any()


def test_what_was_recognised_is_said():
    _, lines = weights_of(cases.stored(official(cases.HEAD, positions="learned")), TOLD)
    assert lines == [
        "weights: file with the names of official MAE and timm",
        "  model      vit_s: 2 blocks of width 16, 4 heads, patch 4, image 12 x 12 x 3",
        "  parts      encoder, head (5 classes, mean pooling)",
        "  positions  learned",
        "  pixels     mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]"
        " (ImageNet's, as the official models have)",
        f"  arrays     {len(official(cases.HEAD))} read, all mapped",
    ]


def test_a_nan_table_is_not_taken_for_ours():
    table = np.zeros((1, 2, 4), np.float32)
    assert reader.same_table(table, table)
    assert not reader.same_table(table + np.nan, table)
