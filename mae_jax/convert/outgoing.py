"""Our weights as other libraries' files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.convert import files
from mae_jax.convert.layouts import OFFICIAL, TRANSFORMERS, TRANSFORMERS_BASE, Layout
from mae_jax.convert.weights import Weights, fixed_tables, model_of
from mae_jax.errors import ConfigError
from mae_jax.nn.blocks import LAYER_NORM_EPS


def state_of(weights: Weights, layout: Layout) -> dict[str, np.ndarray]:
    """Return the arrays by the names of `layout`, position tables among them.

    Raises:
      ConfigError: if the layout has no place for one.
    """
    params = weights.params | fixed_tables(weights.config, weights.parts)
    return layout.to_theirs(params, model_of(weights.config).unit)


def write_official(path: Path, weights: Weights) -> None:
    """Write a `.pth` file as the official code does: encoder, encoder and decoder, or classifier.

    Raises:
      ConfigError: if the model has no class token.
    """
    _need_cls_token(weights, "the official MAE")
    files.write_torch(path, state_of(weights, OFFICIAL))


def write_timm(path: Path, weights: Weights) -> None:
    """Write a safetensors file for timm's ViT, which has no decoder."""
    parts = tuple(part for part in weights.parts if part != "decoder")
    params = {k: v for k, v in weights.params.items() if k.split("/")[0] in parts}
    encoder = dataclasses.replace(weights, parts=parts, params=params)
    files.write_safetensors(path, state_of(encoder, OFFICIAL))


def write_transformers(path: Path, weights: Weights) -> None:
    """Write a folder for transformers, 4 and 5: `ViTMAEForPreTraining` where there is a decoder.

    An encoder becomes a `ViTMAEModel`, a classifier a `ViTForImageClassification`.

    Raises:
      ConfigError: if they have no such model.
    """
    _need_cls_token(weights, "transformers")
    height, width = model_of(weights.config).unit.image_size
    if "decoder" in weights.parts and height != width:
        raise ConfigError(
            f"model.image_size {height}x{width}: the decoder of transformers takes square images"
        )
    if "head" in weights.parts and weights.config.model.pooling != "cls":
        raise ConfigError(
            f"model.pooling {weights.config.model.pooling!r}: the classifier of transformers takes"
            " the class token, 'cls'"
        )
    layout = TRANSFORMERS_BASE if weights.parts == ("encoder",) else TRANSFORMERS
    files.write_folder(path, state_of(weights, layout), transformers_config(weights))


def _need_cls_token(weights: Weights, whose: str) -> None:
    if not model_of(weights.config).encoder.use_cls_token:
        raise ConfigError(f"model.use_cls_token False: a ViT of {whose} has a class token")


def transformers_config(weights: Weights) -> dict[str, Any]:
    """Return the fields of `config.json`."""
    model = model_of(weights.config)
    encoder, unit = model.encoder, model.unit
    height, width = unit.image_size
    fields: dict[str, Any] = {
        "architectures": ["ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": int(encoder.mlp_ratio * encoder.embed_dim),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": unit.patch_size,
        "num_channels": unit.channels,
        "qkv_bias": True,
    }
    if "decoder" in weights.parts:
        decoder = model.decoder
        fields |= {
            "architectures": ["ViTMAEForPreTraining"],
            "decoder_hidden_size": decoder.embed_dim,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.num_heads,
            "decoder_intermediate_size": int(decoder.mlp_ratio * decoder.embed_dim),
            "mask_ratio": weights.config.model.mask_ratio,
            "norm_pix_loss": weights.config.model.norm_pix_loss,
        }
    if "head" in weights.parts:
        labels = {str(i): f"LABEL_{i}" for i in range(weights.config.model.num_classes)}
        fields |= {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            "id2label": labels,
            "label2id": {label: int(i) for i, label in labels.items()},
        }
    return fields


WRITERS = {
    "official": write_official,
    "transformers": write_transformers,
    "timm": write_timm,
}
"""By the name that `--to` takes; each writes to a path where there is nothing yet."""
