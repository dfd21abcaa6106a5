"""VideoMAE: the authors' files, and transformers."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from mae_jax.convert.families.family import (
    BLOCK,
    HEAD,
    Family,
    decoder_config,
    encoder_config,
    labels_config,
    nearest_size,
    need,
    prefixed,
    pretraining,
)
from mae_jax.convert.layouts import Layout
from mae_jax.convert.reader import Reader
from mae_jax.pretrain.videomae import SIZES

_BIASES = {f"attn/{name}_bias": f"attn.{name}_bias" for name in "qv"}

_UNBIASED = ("encoder/block/attn/qkv", "decoder/block/attn/qkv", "decoder/embed")

# MCG-NJU/VideoMAE `modeling_pretrain.py`. Nothing of positions is stored.
PRETRAINED = Layout(
    name="official VideoMAE",
    modules={
        **prefixed("encoder/block", "encoder.blocks.{i}", BLOCK),
        "encoder/patch_embed": "encoder.patch_embed.proj",
        "encoder/norm": "encoder.norm",
        **prefixed("decoder/block", "decoder.blocks.{i}", BLOCK),
        "decoder/embed": "encoder_to_decoder",
        "decoder/norm": "decoder.norm",
        "decoder/pred": "decoder.head",
    },
    arrays={
        **prefixed("encoder/block", "encoder.blocks.{i}", _BIASES),
        **prefixed("decoder/block", "decoder.blocks.{i}", _BIASES),
        "decoder/mask_token": "mask_token",
    },
    unbiased=_UNBIASED,
    clips=True,
)

# `modeling_finetune.py`.
CLASSIFIER = Layout(
    name="official VideoMAE, fine-tuned",
    modules={
        **prefixed("encoder/block", "blocks.{i}", BLOCK),
        "encoder/patch_embed": "patch_embed.proj",
        **HEAD,
    },
    arrays=prefixed("encoder/block", "blocks.{i}", _BIASES),
    unbiased=_UNBIASED,
    clips=True,
)

_HUB_BLOCK: dict[str, Any] = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn/qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attn/proj": "attention.output.dense",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}


def _transformers(query_bias: str, value_bias: str) -> Layout:
    """Return the names of transformers, whose versions differ in those of the biases."""
    biases = {
        "attn/q_bias": f"attention.attention.{query_bias}",
        "attn/v_bias": f"attention.attention.{value_bias}",
    }
    encoder, decoder = "videomae.encoder.layer.{i}", "decoder.decoder_layers.{i}"
    return Layout(
        name="transformers' VideoMAE",
        modules={
            **prefixed("encoder/block", encoder, _HUB_BLOCK),
            **prefixed("decoder/block", decoder, _HUB_BLOCK),
            "encoder/patch_embed": "videomae.embeddings.patch_embeddings.projection",
            "encoder/norm": "videomae.layernorm",
            "decoder/embed": "encoder_to_decoder",
            "decoder/norm": "decoder.norm",
            "decoder/pred": "decoder.head",
            "head/norm": "fc_norm",
            "head/linear": "classifier",
        },
        arrays={
            **prefixed("encoder/block", encoder, biases),
            **prefixed("decoder/block", decoder, biases),
            "decoder/mask_token": "mask_token",
        },
        unbiased=_UNBIASED,
        clips=True,
    )


# Files of transformers 4 and of the hub, which transformers 5 reads too.
TRANSFORMERS_4 = _transformers("q_bias", "v_bias")

# The modules of transformers 5, and what it writes.
TRANSFORMERS = _transformers("query.bias", "value.bias")


def fields(reader: Reader) -> dict[str, Any]:
    """Return the fields of `config.model` that a file decides."""
    path = "encoder/patch_embed/kernel"
    width, channels, tubelet, side, across = reader.shape(path, 5)
    need(side == across, f"{reader.stored.name}: cubes of {side} x {across} pixels: not square")
    usual = {size.embed_dim: size.num_heads for size in SIZES.values()}
    dims = {
        "tubelet_size": tubelet,
        "patch_size": side,
        "embed_dim": width,
        "depth": reader.layout.depth("encoder", reader.state),
        "num_heads": reader.heads("", width, usual),
        **reader.decoder(SIZES.values()),
    }
    size, others = nearest_size(dims, SIZES, "embed_dim")
    return {
        "size": size,
        **others,
        "channels": channels,
        "image_size": reader.image_size_told(),
        "frames": reader.frames(),
    }


def words(encoder: Any) -> str:
    """Describe an encoder."""
    slots = encoder.grid_size[0]
    return (
        f"{encoder.depth} blocks of width {encoder.embed_dim}, {encoder.num_heads} heads, {slots}"
        " time slots"
    )


def check(config: ConfigDict) -> None:
    """Refuse a model that nobody else has."""
    need(
        not config.model.get("mask_tokens_in_encoder", False),
        "model.mask_tokens_in_encoder: other libraries have no such model, it cannot be converted",
    )


def transformers(weights: Any, model: Any) -> tuple[Layout, dict[str, Any]]:
    """Return names and `config.json` of what transformers has: see `Family`.

    `VideoMAEForPreTraining` where there is a decoder; an encoder becomes a `VideoMAEModel`, a
    classifier a `VideoMAEForVideoClassification`.
    """
    encoder, unit = model.encoder, model.unit
    height, width = unit.image_size
    described = {
        "architectures": ["VideoMAEModel"],
        "model_type": "videomae",
        "image_size": height if height == width else [height, width],
        "num_frames": unit.frames,
        "tubelet_size": unit.tubelet_size,
        "use_mean_pooling": "head" in weights.parts,
        "qkv_bias": True,  # as version 4 calls those of query and value
        **encoder_config(encoder, unit),
    }
    if "decoder" in weights.parts:
        described |= {"architectures": ["VideoMAEForPreTraining"], **decoder_config(model)}
    if "head" in weights.parts:
        described["architectures"] = ["VideoMAEForVideoClassification"]
        described |= labels_config(weights.config.model.num_classes)
    if weights.parts == ("encoder",):
        return TRANSFORMERS_4.without_prefix("videomae."), described
    return TRANSFORMERS_4, described


def recipe() -> ConfigDict:
    """Return a configuration of pre-training."""
    return pretraining(
        "videomae",
        size="vit_b",
        frames=16,
        mask_ratio=0.9,
        mask_sampling="tube",
        norm_pix_loss=True,
        positions="fixed",
    )


FAMILY = Family(
    method="videomae",
    targets={
        "official": (PRETRAINED, CLASSIFIER),
        "transformers": (TRANSFORMERS_4,),
    },
    sources=(
        TRANSFORMERS,
        TRANSFORMERS_4.without_prefix("videomae."),
        TRANSFORMERS.without_prefix("videomae."),
    ),
    recipe=recipe,
    fields=fields,
    words=words,
    check=check,
    positions="fixed",
    model_types=("videomae",),
    transformers=transformers,
)
