"""Small weights to convert, with every part random."""

from __future__ import annotations

from typing import Any

import numpy as np

from mae_jax.convert import reader, weights
from mae_jax.convert.families import FAMILIES
from mae_jax.convert.files import Stored
from mae_jax.convert.reader import Told
from mae_jax.convert.weights import Weights

ENCODER, FULL, HEAD = ("encoder",), reader.PRETRAINED, reader.CLASSIFIER
TINY: dict[str, Any] = {
    "size": "vit_s",
    "image_size": (12, 12),
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 4,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
TOLD = Told(norm_pix_loss=False, num_heads=4, decoder_num_heads=2)
"""What no file with the official names tells of `TINY`."""
FLAGS = ["--norm_pix_loss=false", "--num_heads=4", "--decoder_num_heads=2"]
"""The same on the command line."""


_DECODER: dict[str, Any] = {
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
# By a name of ours: method and fields. No two stages are alike, nor height and width where that
# can be.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "hivit": (
        "hivit",
        {"size": "tiny", "image_size": (24, 40), "stem_patch_size": 2, "stem_dim": 8}
        | {"depths": (1, 2, 3), "num_heads": 2, **_DECODER},
    ),
    "hivit_relative": (
        "hivit",
        {"size": "tiny", "image_size": (24, 40), "stem_patch_size": 2, "stem_dim": 8}
        | {"depths": (2, 1, 2), "num_heads": 2, "relative_positions": True, **_DECODER},
    ),
    "mixmim": (
        "mixmim",
        {"size": "base", "image_size": (32, 32), "stem_patch_size": 2, "stem_dim": 8}
        | {"depths": (1, 2, 3, 1), "num_heads": 2, **_DECODER},
    ),
    "mixmim_windows": (
        "mixmim",
        {"size": "base", "image_size": (32, 48), "stem_patch_size": 2, "stem_dim": 8, "channels": 1}
        | {"depths": (1, 1, 2, 1), "num_heads": 1, "window_sizes": (8, 4, 2, 1), **_DECODER},
    ),
    "swin": (
        "um_mae",
        {"size": "swin_t", "image_size": (64, 32), "stem_patch_size": 2, "embed_dim": 8}
        | {"depths": (2, 1, 3, 1), "num_heads": 2, "window_size": 8, **_DECODER},
    ),
    "pvt": (
        "um_mae",
        {"size": "pvt_s", "image_size": (64, 64), "stem_patch_size": 2, "embed_dim": 8}
        | {"depths": (1, 2, 1, 3), "num_heads": 2, "positions": "fixed", **_DECODER},
    ),
    "vit": (
        "um_mae",
        {"size": "vit_b", "image_size": (16, 24), "patch_size": 4, "embed_dim": 16}
        | {"depths": (2,), "num_heads": 4, "positions": "fixed", **_DECODER},
    ),
    "videomae": (
        "videomae",
        {"size": "vit_s", "image_size": (12, 16), "frames": 6, "tubelet_size": 3, "patch_size": 4}
        | {"embed_dim": 16, "depth": 2, "num_heads": 4, **_DECODER},
    ),
}


def make(
    parts: tuple[str, ...] = FULL, *, method: str = "mae", seed: int = 0, **fields: Any
) -> Weights:
    """Return random weights; fields are those of `config.model`, `TINY`'s if they name no size."""
    config = FAMILIES[method].recipe()
    config.model.update(fields if "size" in fields else TINY | fields)
    if config.model.channels != len(config.data.mean):
        config.data.mean = config.data.std = (0.5,) * config.model.channels
    if "head" in parts:
        config.task = "finetune"
        config.model.num_classes = fields.get("num_classes", 5)
        config.model.pooling = fields.get("pooling", "mean")
    rng = np.random.default_rng(seed)
    params = {
        path: rng.random(leaf.shape, np.float32) - 0.5
        for path, leaf in weights.shapes(config.lock(), parts).items()
    }
    return Weights(config, parts, params)


def make_tiny(name: str, parts: tuple[str, ...] = FULL, **fields: Any) -> Weights:
    """Return random weights of one of `METHODS`."""
    method, tiny = METHODS[name]
    return make(parts, method=method, **tiny | fields)


def told(weights: Weights, **more: Any) -> Told:
    """Return what the authors' files do not tell of tiny weights."""
    model = weights.config.model
    facts: dict[str, Any] = {"num_heads": model.num_heads, "image_size": model.image_size}
    for name in ("window_size", "frames"):
        if name in model:
            facts[name] = model[name]
    if "decoder" in weights.parts:
        facts |= {"norm_pix_loss": model.norm_pix_loss, "compat_decoder_order": False}
        facts["decoder_num_heads"] = model.decoder_num_heads
    return Told(**facts | more)


def stored(state: Any, name: str = "weights", **fields: Any) -> Stored:
    """Return a state as a file that was read."""
    return Stored(name, "file", dict(state), **fields)


def assert_same(one: Any, other: Any) -> None:
    """Assert that two sets of arrays have the same names, types, shapes and bits."""
    assert one.keys() == other.keys()
    assert len(one) > 20
    for name in one:
        expected = np.int64 if name.endswith("relative_position_index") else np.float32
        assert one[name].dtype == other[name].dtype == expected, name
        assert one[name].shape == other[name].shape, name
        assert np.array_equal(
            np.ascontiguousarray(one[name]).view(np.uint32),
            np.ascontiguousarray(other[name]).view(np.uint32),
        ), name
