"""HiViT: the authors' files."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from mae_jax.convert.families.family import (
    BLOCK,
    DECODER,
    DECODER_ARRAYS,
    HEAD,
    Family,
    nearest_size,
    need,
    prefixed,
    pretraining,
)
from mae_jax.convert.layouts import Layout
from mae_jax.convert.reader import Reader
from mae_jax.models.hivit import SIDE
from mae_jax.pretrain.hivit import SIZES

# zhangxiaosong18/hivit `self_supervised/models`. Blocks and merges are in one list; blocks of the
# stem have an MLP alone.
OFFICIAL = Layout(
    name="official HiViT",
    modules={
        **prefixed("encoder/block", "blocks.{place}", BLOCK),
        "encoder/downsample/norm": "blocks.{place}.norm",
        "encoder/downsample/reduction": "blocks.{place}.reduction",
        "encoder/patch_embed": "patch_embed.proj",
        "encoder/patch_norm": "patch_embed.norm",
        "encoder/norm": "norm",
        **DECODER,
        **HEAD,
    },
    arrays={"encoder/pos_embed": "absolute_pos_embed", **DECODER_ARRAYS},
    tables={
        "encoder/block/attn/bias/table": (
            "blocks.{place}.attn.relative_position_bias_table",
            "relative_position_index",
        )
    },
)


def fields(reader: Reader) -> dict[str, Any]:
    """Return the fields of `config.model` that a file decides."""
    width, channels, patch = reader.stem()
    first, second, last = depths = reader.stages(3)
    need(
        not (first % 2 or second % 2),
        f"{reader.stored.name}: expected pairs of blocks in the stem, got {first} and {second}",
    )
    usual = {size.stem_dim: size.num_heads for size in SIZES.values()}
    table = f"encoder/block_{sum(depths) - 1:02d}/attn/bias/table"
    relative = reader.layout.has("encoder/block/attn/bias/table", reader.state)
    dims = {
        "stem_patch_size": patch,
        "stem_dim": width,
        "depths": (first // 2, second // 2, last),
        "num_heads": reader.shape(table, 2, depths)[1]
        if relative
        else reader.heads("", width, usual),
        **reader.decoder(SIZES.values()),
    }
    size, others = nearest_size(dims, SIZES, "stem_dim")
    if "head" not in reader.parts:
        # Without `hifeat` the released class has a norm of the last stage, and does not use it.
        expected, found = SIDE * (SIDE + 3) * width, reader.shape("encoder/norm/scale", 1)[0]
        need(
            found == expected,
            f"{reader.stored.name}: norm.weight: expected shape [{expected}], of all three stages,"
            f" got [{found}]",
        )
    rows = reader.shape("encoder/pos_embed", 3)[1]
    return {
        "size": size,
        **others,
        "channels": channels,
        "image_size": reader.image_size(rows, SIDE * patch),
        "relative_positions": relative,
    }


def words(encoder: Any) -> str:
    """Describe an encoder."""
    blocks = " + ".join(map(str, encoder.depths))
    tables = ", relative positions" if encoder.relative_positions else ""
    last = f"the last of width {4 * encoder.stem_dim}, {encoder.num_heads} heads"
    return f"{blocks} blocks, {last}{tables}"


def check(config: ConfigDict) -> None:
    """Refuse a model that nobody else has."""
    need(
        config.model.get("multi_scale", True) or "num_classes" in config.model,
        "model.multi_scale False: the authors' model then uses no final norm; it cannot be"
        " converted",
    )


FAMILY = Family(
    method="hivit",
    targets={"official": (OFFICIAL,)},
    # The table of the encoder is trained in the authors' code, though it starts as the fixed one.
    recipe=lambda: pretraining(
        "hivit",
        size="base",
        mask_ratio=0.75,
        norm_pix_loss=True,
        positions="learned",
        relative_positions=False,
    ),
    fields=fields,
    words=words,
    check=check,
    positions="learned",
    always_normalised=True,
)
