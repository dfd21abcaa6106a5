"""M3AE and its image-only baseline: the authors' pickles of linen trees."""

from __future__ import annotations

import math
from typing import Any

from ml_collections import ConfigDict

from mae_jax import recipes
from mae_jax.convert import linen
from mae_jax.convert.families.family import Family, nearest_size, need, prefixed, pretraining
from mae_jax.convert.layouts import Layout
from mae_jax.convert.reader import Reader
from mae_jax.pretrain.m3ae import SIZES

CHANNELS, IMAGE_SIZE, DEEPEST_HEAD = 3, (256, 256), 3

BLOCK = {
    "norm1": "LayerNorm_0",
    "attn/qkv": "Attention_0.Dense_0",
    "attn/proj": "Attention_0.Dense_1",
    "norm2": "LayerNorm_1",
    "mlp/fc1": "TransformerMLP_0.fc1",
    "mlp/fc2": "TransformerMLP_0.fc2",
}


def _layout(depth: int) -> Layout:
    """Return the names with heads of `depth` layers before the last.

    young-geng/m3ae_public `model.py`, as `mae_jax.convert.linen` spells them.
    """
    head = {"pred": f"Dense_{depth}"}
    if depth:
        head |= {"norm": "LayerNorm_0"}
        for i in range(depth):
            head |= {f"fc_{i}": f"Dense_{i}", f"norm_{i}": f"LayerNorm_{i + 1}"}
    modules: dict[str, Any] = {
        "encoder/patch_embed": "image_embedding",
        "encoder/norm": "encoder.LayerNorm_0",
        "decoder/embed": "decoder_input_projection",
        "decoder/norm": "decoder.LayerNorm_0",
    }
    arrays = {
        "encoder/cls_token": "cls_token",
        "encoder/text_embed/embedding": "text_embedding.embedding",
    }
    for half in ("encoder", "decoder"):
        modules |= prefixed(f"{half}/block", f"{half}.Block.{{i}}", BLOCK)
    for kind in ("image", "text"):
        modules |= prefixed(f"decoder/{kind}_head", f"decoder_{kind}_output", head)
        arrays[f"decoder/{kind}_mask"] = f"{kind}_mask_embedding"
        arrays |= {
            f"{half}/{kind}_type": f"{half}_{kind}_type_embedding"
            for half in ("encoder", "decoder")
        }
    words = f", heads of {depth + 1} layers" if depth else ""
    return Layout(name=f"official M3AE{words}", modules=modules, arrays=arrays, convolutions={})


LAYOUTS = tuple(map(_layout, range(DEEPEST_HEAD + 1)))


def recipe() -> ConfigDict:
    """Return the configuration of a run."""
    config = pretraining("m3ae", size="large", positions="fixed")
    config.data.mean, config.data.std = recipes.CC12M_MEAN, recipes.CC12M_STD
    return config


def fields(reader: Reader) -> dict[str, Any]:
    """Return the fields of `config.model` that a file decides."""
    width, values = reader.shape("encoder/patch_embed/kernel", 2)
    patch = math.isqrt(values // CHANNELS)
    need(
        patch**2 * CHANNELS == values,
        f"{reader.stored.name}: expected patches of square RGB images, got {values} values",
    )
    usual = {size.embed_dim: size.num_heads for size in SIZES.values()}
    dims = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": reader.layout.depth("encoder", reader.state),
        "num_heads": reader.heads("", width, usual),
        **reader.decoder(SIZES.values()),
    }
    size, others = nearest_size(dims, SIZES, "embed_dim")
    table = "encoder/text_embed/embedding"
    words = reader.shape(table, 2)[0] if reader.has(table) else 0
    if reader.told.image_size is None:
        reader.notes.append(
            f"note       images of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]}, as released: the file does"
            " not tell"
        )
    return {
        "size": size,
        **others,
        "channels": CHANNELS,
        "image_size": reader.told.image_size or IMAGE_SIZE,
        "vocabulary_size": words,
        "use_type_vectors": reader.has("encoder/image_type"),
        "output_head_depth": LAYOUTS.index(reader.layout),
    }


def words(encoder: Any) -> str:
    """Describe an encoder."""
    text = f", {encoder.vocabulary_size} words" if encoder.vocabulary_size else ""
    return f"{encoder.depth} blocks of width {encoder.embed_dim}, {encoder.num_heads} heads{text}"


def check(config: ConfigDict) -> None:
    """Refuse a model that nobody else has."""
    need(
        "num_classes" not in config.model,
        "model.num_classes: classifiers of model.name m3ae cannot be converted",
    )
    need(
        config.model.get("positions", "fixed") == "fixed",
        "model.positions 'learned': the authors' M3AE has fixed ones; it cannot be converted",
    )
    depth = config.model.get("output_head_depth", 0)
    need(
        depth <= DEEPEST_HEAD,
        f"model.output_head_depth {depth}: expected at most {DEEPEST_HEAD} to be converted",
    )


FAMILY = Family(
    method="m3ae",
    targets={"official": LAYOUTS},
    recipe=recipe,
    fields=fields,
    words=words,
    check=check,
    positions="fixed",
    raw_pixels=True,
    statistics="CC12M's, as the released models have",
    write=linen.write,
)
