"""UM-MAE: the authors' files of Swin, PVT and ViT."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mae_jax.convert.families import mae
from mae_jax.convert.families.family import (
    BLOCK,
    DECODER,
    DECODER_ARRAYS,
    HEAD,
    Family,
    nearest_size,
    prefixed,
    pretraining,
)
from mae_jax.convert.layouts import Layout
from mae_jax.convert.reader import Reader
from mae_jax.models.pyramid import UNIT_SIDE
from mae_jax.pretrain.um_mae import SIZES, WINDOW_SIZE

_TOKENS = {"encoder/mask_token": "vis_mask_token", **DECODER_ARRAYS}
_AROUND = {
    "encoder/patch_embed": "patch_embed.proj",
    "encoder/downsample/proj": "blocks.{i}.downsample.proj",
    "encoder/norm": "norm",
    **DECODER,
    **HEAD,
}

# implus/UM-MAE `models_mae_swin.py`, `models_swin.py`.
SWIN = Layout(
    name="official UM-MAE Swin",
    modules={
        **prefixed("encoder/block", "blocks.{i}", BLOCK),
        "encoder/block/attn/bias/fc1": "blocks.{i}.attn.posmlp.0",
        "encoder/block/attn/bias/fc2": "blocks.{i}.attn.posmlp.2",
        "encoder/patch_norm": "patch_embed.norm",
        "encoder/downsample/norm": "blocks.{i}.downsample.norm",
        **_AROUND,
    },
    arrays=_TOKENS,
    convolutions={
        "encoder/patch_embed": 0,
        "encoder/downsample/proj": 2,
        "encoder/block/attn/bias/fc1": 1,
        "encoder/block/attn/bias/fc2": 1,
    },
)

# implus/UM-MAE `models_mae_pvt.py`, `models_pvt.py`.
PVT = Layout(
    name="official UM-MAE PVT",
    modules={
        **prefixed(
            "encoder/block",
            "blocks.{i}",
            {name: theirs for name, theirs in BLOCK.items() if name != "attn/qkv"}
            | {"attn/q": "attn.q", "attn/kv": "attn.kv"}
            | {"attn/reduce": "attn.sr", "attn/norm": "attn.norm"},
        ),
        **_AROUND,
    },
    arrays={"encoder/pos_embed": "pos_embed", **_TOKENS},
    convolutions={
        "encoder/patch_embed": 0,
        "encoder/downsample/proj": 2,
        "encoder/block/attn/reduce": 1,
    },
)

# implus/UM-MAE `models_mae.py`; its classifiers are MAE's.
VIT = dataclasses.replace(
    mae.OFFICIAL,
    name="official UM-MAE ViT",
    arrays={**mae.OFFICIAL.arrays, "encoder/mask_token": "vis_mask_token"},
)


def _swin(reader: Reader) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dimensions of a Swin, and other fields that a file decides."""
    width, _, patch = reader.stem()
    depths = reader.stages(4)
    inner = "encoder/block_00/attn/bias/{}/kernel"
    dims = {
        "family": "swin",
        "bias_dim": reader.shape(inner.format("fc1"), 4, depths)[0],
        "patch_size": patch,
        "embed_dim": width,
        "depths": depths,
        "num_heads": reader.shape(inner.format("fc2"), 4, depths)[0],
    }
    if "decoder" in reader.parts:
        rows = reader.shape("decoder/pos_embed", 3)[1]
        size = reader.image_size(rows, UNIT_SIDE * patch)
    else:
        size = reader.image_size_told()
    window, who = reader.told.window_size, "--window_size"
    if window is None:
        window, who = WINDOW_SIZE, "as published, for the file does not tell"
    reader.notes.append(f"window     {window} on the full grid ({who})")
    return dims, {"image_size": size, "window_size": window}


def _pvt(reader: Reader) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dimensions of a PVT, and other fields that a file decides."""
    width, _, patch = reader.stem()
    usual = {size.embed_dim: size.num_heads for size in SIZES.values() if size.family == "pvt"}
    dims = {
        "family": "pvt",
        "patch_size": patch,
        "embed_dim": width,
        "depths": reader.stages(4),
        "num_heads": reader.heads("", width, usual),
    }
    return dims, {"image_size": reader.image_size(reader.shape("encoder/pos_embed", 3)[1], patch)}


def _vit(reader: Reader) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dimensions of a ViT, and other fields that a file decides."""
    width, _, patch = reader.stem()
    usual = {size.embed_dim: size.num_heads for size in mae.SIZES.values()}
    dims = {
        "family": "vit",
        "patch_size": patch,
        "embed_dim": width,
        "depths": (reader.layout.depth("encoder", reader.state),),
        "num_heads": reader.heads("", width, usual),
    }
    rows = reader.shape("encoder/pos_embed", 3)[1] - 1
    return dims, {"image_size": reader.image_size(rows, patch)}


# By layout.
READERS = {SWIN.name: _swin, PVT.name: _pvt, VIT.name: _vit}


def fields(reader: Reader) -> dict[str, Any]:
    """Return the fields of `config.model` that a file decides."""
    dims, others = READERS[reader.layout.name](reader)
    dims |= reader.decoder(SIZES.values())
    # What a size alone decides.
    fixed = {name: dims.pop(name) for name in ("family", "bias_dim") if name in dims}
    sizes = {
        name: size
        for name, size in SIZES.items()
        if all(getattr(size, field) == value for field, value in fixed.items())
    }
    sizes = sizes or {n: size for n, size in SIZES.items() if size.family == fixed["family"]}
    size, changed = nearest_size(dims, sizes, "embed_dim")
    if "patch_size" in changed and fixed["family"] != "vit":
        changed["stem_patch_size"] = changed.pop("patch_size")
    others |= {"size": size, **changed, "channels": reader.stem()[1]}
    if "decoder" in reader.parts:
        others["secondary_ratio"] = 0.25 if reader.has("encoder/mask_token") else 0.0
        if fixed["family"] != "vit":
            others["compat_decoder_order"] = _order(reader)
    return others


def _order(reader: Reader) -> bool:
    """Return whether the decoder of a pyramid has the released order, which no file tells."""
    told = reader.told.compat_decoder_order
    compat = told is None or told
    who = "as the authors' code trains it" if told is None else "--compat_decoder_order"
    order = "that of the image" if compat else "that of the blocks"
    reader.notes.append(
        f"order      the decoder's positions are in {order}:"
        f" model.compat_decoder_order {compat} ({who})"
    )
    return compat


def words(encoder: Any) -> str:
    """Describe an encoder."""
    kind = type(encoder).__name__.removesuffix("Encoder")
    blocks = " + ".join(map(str, encoder.depths))
    last = f" to {encoder.output_dim}" if len(encoder.depths) > 1 else ""
    return f"{kind}, {blocks} blocks of width {encoder.embed_dim}{last}"


def caution(config: ConfigDict) -> str:
    """Return what is to be said of a decoder that is written for the authors' code."""
    if config.model.get("compat_decoder_order") or SIZES[config.model.size].family == "vit":
        return ""
    return "model.compat_decoder_order False: the authors' code gives this decoder another order"


FAMILY = Family(
    method="um_mae",
    targets={"official": (SWIN, PVT, VIT)},
    recipe=lambda: pretraining(
        "um_mae", size="swin_t", positions="none", secondary_ratio=0.25, norm_pix_loss=True
    ),
    fields=fields,
    words=words,
    caution=caution,
)
