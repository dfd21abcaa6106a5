"""What is to be known of a method to convert its weights, and what all the methods share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax import recipes
from mae_jax.convert.layouts import Layout
from mae_jax.convert.reader import Reader
from mae_jax.errors import ConfigError
from mae_jax.nn.layers import LAYER_NORM_EPS


def _nothing(_: ConfigDict) -> str:
    """Have nothing to say."""
    return ""


@dataclasses.dataclass(frozen=True)
class Family:
    """A method whose weights others have as well.

    Attributes:
      method: `model.name`.
      targets: layouts by the value of `--to` that writes them; of several, the first that has a
        place for all parameters.
      recipe: makes the configuration of a run of the method.
      fields: returns the fields of `config.model` that a file decides.
      words: describes an encoder.
      check: refuses, with a ConfigError, a configuration whose model nobody else has.
      caution: what is to be said of a configuration whose decoder is written for others.
      sources: layouts that are read and not written.
      positions: of the encoder of any file, where no table decides; "": none.
      always_normalised: the authors' code has no other targets than normalised ones.
      raw_pixels: targets are never normalised, and the model has no field for that.
      statistics: whose the mean and deviation of pixels are that `recipe` has.
      write: (path, state) writes the authors' kind of file; None: PyTorch's.
      model_types: what transformers' `config.json` may call the model.
      transformers: (weights, model) -> layout and `config.json` of a folder for transformers; it
        refuses, with a ConfigError, what transformers has not. None: it has no such model.
    """

    method: str
    targets: Mapping[str, tuple[Layout, ...]]
    recipe: Callable[[], ConfigDict]
    fields: Callable[[Reader], dict[str, Any]]
    words: Callable[[Any], str]
    check: Callable[[ConfigDict], object] = _nothing
    caution: Callable[[ConfigDict], str] = _nothing
    sources: tuple[Layout, ...] = ()
    positions: str = ""
    always_normalised: bool = False
    raw_pixels: bool = False
    statistics: str = "ImageNet's, as the official models have"
    write: Callable[[Path, Mapping[str, Any]], None] | None = None
    model_types: tuple[str, ...] = ("vit", "vit_mae")
    transformers: Callable[[Any, Any], tuple[Layout, dict[str, Any]]] | None = None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """All layouts, in the order in which they are to be recognised."""
        written = [layout for layouts in self.targets.values() for layout in layouts]
        return tuple(dict.fromkeys((*written, *self.sources)))


def pretraining(method: str, **fields: Any) -> ConfigDict:
    """Return a configuration of pre-training on ImageNet, with a model of its own.

    Args:
      method: `model.name`.
      fields: of the model, beside those that all have.
    """
    config = recipes.mae_pretrain()
    for name in set(config.model) - {"name", "image_size", "channels", "dtype"}:
        del config.model[name]
    config.model.update({"name": method} | fields)
    return config


def nearest_size(
    dims: Mapping[str, Any], sizes: Mapping[str, Any], width: str
) -> tuple[str, dict[str, Any]]:
    """Return the name of the nearest size, and the dimensions in which it differs from `dims`.

    Args:
      dims: by the names of fields of a size.
      sizes: by name.
      width: the field that decides between equally near ones.
    """

    def others(name: str) -> dict[str, Any]:
        return {
            field: value for field, value in dims.items() if getattr(sizes[name], field) != value
        }

    def distance(name: str) -> tuple[int, int]:
        return len(others(name)), abs(getattr(sizes[name], width) - dims[width])

    name = min(sizes, key=distance)
    return name, others(name)


def prefixed(start: str, prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return names for what lies in `start` with us and in `prefix` with them."""

    def theirs(names: Any) -> Any:
        return tuple(map(theirs, names)) if isinstance(names, tuple) else f"{prefix}.{names}"

    return {f"{start}/{ours}": theirs(name) for ours, name in names.items()}


# A block of timm's ViT.
BLOCK = {
    name.replace(".", "/"): name
    for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}

# What the authors of MAE and, after them, of all the others call what is not in the encoder.
DECODER = {
    **prefixed("decoder/block", "decoder_blocks.{i}", BLOCK),
    "decoder/embed": "decoder_embed",
    "decoder/norm": "decoder_norm",
    "decoder/pred": "decoder_pred",
}
DECODER_ARRAYS = {
    "decoder/mask_token": "mask_token",
    "decoder/pos_embed": "decoder_pos_embed",
}
HEAD = {"head/norm": "fc_norm", "head/linear": "head"}


def encoder_config(encoder: Any, unit: Any) -> dict[str, Any]:
    """Return what all ViTs have in transformers' `config.json`."""
    return {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": int(encoder.mlp_ratio * encoder.embed_dim),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "patch_size": unit.patch_size,
        "num_channels": unit.channels,
    }


def decoder_config(model: Any) -> dict[str, Any]:
    """Return what is there of a decoder and its target."""
    decoder = model.decoder
    return {
        "decoder_hidden_size": decoder.embed_dim,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": int(decoder.mlp_ratio * decoder.embed_dim),
        "norm_pix_loss": model.norm_pix_loss,
    }


def labels_config(num_classes: int) -> dict[str, Any]:
    """Return what is there of classes, which have no names with us."""
    labels = {str(i): f"LABEL_{i}" for i in range(num_classes)}
    return {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}


def need(condition: bool, message: str) -> None:
    """Raise a ConfigError with a message unless a condition holds."""
    if not condition:
        raise ConfigError(message)
