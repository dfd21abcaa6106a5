"""MixMIM: the authors' files."""

from __future__ import annotations

import math
from typing import Any

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
from mae_jax.errors import ConfigError
from mae_jax.pretrain.mixmim import SIZES, make

# Sense-X/MixMIM `models_mixmim.py`, `models_mixmim_ft.py`.
OFFICIAL = Layout(
    name="official MixMIM",
    modules={
        **prefixed("encoder/block", "layers.{stage}.blocks.{within}", BLOCK),
        "encoder/downsample/norm": "layers.{stage}.downsample.norm",
        "encoder/downsample/reduction": "layers.{stage}.downsample.reduction",
        "encoder/patch_embed": "patch_embed.proj",
        "encoder/patch_norm": "patch_embed.norm",
        "encoder/norm": "norm",
        **DECODER,
        **HEAD,
    },
    arrays={"encoder/pos_embed": "absolute_pos_embed", **DECODER_ARRAYS},
    tables={
        "encoder/block/attn/bias/table": (
            "layers.{stage}.blocks.{within}.attn.relative_position_bias_table",
            "layers.{stage}.blocks.{within}.attn.relative_position_index",
        )
    },
)


def fields(reader: Reader) -> dict[str, Any]:
    """Return the fields of `config.model` that a file decides."""
    width, channels, patch = reader.stem()
    depths = reader.stages(4)
    firsts = [sum(depths[:stage]) for stage in range(len(depths))]
    tables = [reader.shape(f"encoder/block_{i:02d}/attn/bias/table", 2, depths) for i in firsts]
    dims = {
        "stem_patch_size": patch,
        "stem_dim": width,
        "depths": depths,
        "num_heads": tables[0][1],
        **reader.decoder(SIZES.values()),
    }
    size, others = nearest_size(dims, SIZES, "stem_dim")
    rows = reader.shape("encoder/pos_embed", 3)[1]
    found = {
        "size": size,
        **others,
        "channels": channels,
        "image_size": reader.image_size(rows, patch),
    }
    if _rows_by_rule(found) != [rows for rows, _ in tables]:
        found["window_sizes"] = tuple((math.isqrt(rows) + 1) // 2 for rows, _ in tables)
    return found


def _rows_by_rule(found: dict[str, Any]) -> list[int]:
    """Return the rows of each stage's tables if windows follow the rule; []: it has none."""
    try:
        windows = [stage.window for stage in make(**found).encoder.stages()]
    except ConfigError:
        return []
    return [(2 * down - 1) * (2 * across - 1) for down, across in windows]


def words(encoder: Any) -> str:
    """Describe an encoder."""
    blocks = " + ".join(map(str, encoder.depths))
    windows = ", ".join("{} x {}".format(*stage.window) for stage in encoder.stages())
    return f"{blocks} blocks, the last of width {encoder.output_dim}, windows {windows}"


FAMILY = Family(
    method="mixmim",
    targets={"official": (OFFICIAL,)},
    recipe=lambda: pretraining(
        "mixmim",
        size="base",
        mask_ratio=0.5,
        norm_pix_loss=True,
        positions="fixed",
        pairing_group=0,
    ),
    fields=fields,
    words=words,
)
