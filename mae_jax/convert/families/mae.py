"""MAE: the official files, timm's ViT, and transformers."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from mae_jax import recipes
from mae_jax.convert.families.family import (
    BLOCK,
    DECODER,
    DECODER_ARRAYS,
    HEAD,
    Family,
    decoder_config,
    encoder_config,
    labels_config,
    nearest_size,
    need,
    prefixed,
)
from mae_jax.convert.layouts import Layout
from mae_jax.convert.reader import Reader
from mae_jax.pretrain.mae import SIZES

# facebookresearch/mae `models_mae.py`, `models_vit.py`; timm's ViT has the same names.
OFFICIAL = Layout(
    name="official MAE and timm",
    modules={
        **prefixed("encoder/block", "blocks.{i}", BLOCK),
        "encoder/patch_embed": "patch_embed.proj",
        "encoder/norm": "norm",
        **DECODER,
        **HEAD,
    },
    arrays={
        "encoder/cls_token": "cls_token",
        "encoder/pos_embed": "pos_embed",
        **DECODER_ARRAYS,
    },
)


def _transformers(encoder: str, decoder: str, block: dict[str, Any]) -> Layout:
    """Return the names of transformers, whose versions differ in blocks."""
    return Layout(
        name="transformers",
        modules={
            **prefixed("encoder/block", encoder, block),
            **prefixed("decoder/block", decoder, block),
            "encoder/patch_embed": "vit.embeddings.patch_embeddings.projection",
            "encoder/norm": "vit.layernorm",
            "decoder/embed": "decoder.decoder_embed",
            "decoder/norm": "decoder.decoder_norm",
            "decoder/pred": "decoder.decoder_pred",
            "head/linear": "classifier",
        },
        arrays={
            "encoder/cls_token": "vit.embeddings.cls_token",
            "encoder/pos_embed": "vit.embeddings.position_embeddings",
            "decoder/mask_token": "decoder.mask_token",
            "decoder/pos_embed": "decoder.decoder_pos_embed",
        },
    )


_IN_FILES: dict[str, Any] = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn/qkv": (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ),
    "attn/proj": "attention.output.dense",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
_IN_MEMORY: dict[str, Any] = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn/qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn/proj": "attention.o_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}

# Files of transformers 4 and of the hub, which transformers 5 reads too.
TRANSFORMERS = _transformers("vit.encoder.layer.{i}", "decoder.decoder_layers.{i}", _IN_FILES)

# Files that transformers 5 writes: seen with 5.23.
TRANSFORMERS_5 = _transformers(
    "vit.encoder.layer.{i}", "decoder.decoder_encoder.layer.{i}", _IN_FILES
)

# The modules of transformers 5 in memory, as `state_dict()` names them: seen with 5.23.
TRANSFORMERS_5_MEMORY = _transformers("vit.layers.{i}", "decoder.decoder_layers.{i}", _IN_MEMORY)

# ViTModel and ViTMAEModel saved by themselves.
TRANSFORMERS_BASE = TRANSFORMERS.without_prefix("vit.")


def fields(reader: Reader) -> dict[str, Any]:
    """Return the fields of `config.model` that a file decides."""
    width, channels, patch = reader.stem()
    usual = {size.embed_dim: size.num_heads for size in SIZES.values()}
    dims = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": reader.layout.depth("encoder", reader.state),
        "num_heads": reader.heads("", width, usual),
        **reader.decoder(SIZES.values()),
    }
    size, others = nearest_size(dims, SIZES, "embed_dim")
    use_cls_token = reader.has("encoder/cls_token")
    rows = reader.shape("encoder/pos_embed", 3)[1] - int(use_cls_token)
    return {
        "size": size,
        **others,
        "channels": channels,
        "use_cls_token": use_cls_token,
        "image_size": reader.image_size(rows, patch),
    }


def words(encoder: Any) -> str:
    """Describe an encoder."""
    tokens = "" if encoder.use_cls_token else ", no class token"
    return f"{encoder.depth} blocks of width {encoder.embed_dim}, {encoder.num_heads} heads{tokens}"


def check(config: ConfigDict) -> None:
    """Refuse a model that nobody else has."""
    need(
        not config.model.mask_tokens_in_encoder,
        "model.mask_tokens_in_encoder: other libraries have no such model, it cannot be converted",
    )


def transformers(weights: Any, model: Any) -> tuple[Layout, dict[str, Any]]:
    """Return names and `config.json` of what transformers has: see `Family`.

    `ViTMAEForPreTraining` where there is a decoder; an encoder becomes a `ViTMAEModel`, a
    classifier a `ViTForImageClassification`.
    """
    need(
        model.encoder.use_cls_token,
        "model.use_cls_token False: a ViT of transformers has a class token",
    )
    encoder, unit, told = model.encoder, model.unit, weights.config.model
    height, width = unit.image_size
    need(
        "decoder" not in weights.parts or height == width,
        f"model.image_size {height}x{width}: the decoder of transformers takes square images",
    )
    need(
        "head" not in weights.parts or told.pooling == "cls",
        f"model.pooling {told.get('pooling')!r}: the classifier of transformers takes the class"
        " token, 'cls'",
    )
    described = {
        "architectures": ["ViTMAEModel"],
        "model_type": "vit_mae",
        "image_size": height if height == width else [height, width],
        "qkv_bias": True,
        **encoder_config(encoder, unit),
    }
    if "decoder" in weights.parts:
        described |= {
            "architectures": ["ViTMAEForPreTraining"],
            **decoder_config(model),
            "mask_ratio": told.mask_ratio,
        }
    if "head" in weights.parts:
        described |= {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            **labels_config(told.num_classes),
        }
    return TRANSFORMERS_BASE if weights.parts == ("encoder",) else TRANSFORMERS, described


FAMILY = Family(
    method="mae",
    targets={
        "official": (OFFICIAL,),
        "timm": (OFFICIAL,),
        "transformers": (TRANSFORMERS,),
    },
    sources=(
        TRANSFORMERS_5,
        TRANSFORMERS_5_MEMORY,
        TRANSFORMERS_BASE,
        TRANSFORMERS_5_MEMORY.without_prefix("vit."),
    ),
    recipe=recipes.mae_pretrain,
    fields=fields,
    words=words,
    check=check,
    transformers=transformers,
)
