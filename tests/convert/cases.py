"""Small weights to convert, with every part random."""

from __future__ import annotations

from typing import Any

import numpy as np

from mae_jax import recipes
from mae_jax.convert import weights
from mae_jax.convert.files import Stored
from mae_jax.convert.incoming import Told
from mae_jax.convert.weights import Weights

ENCODER, FULL, HEAD = ("encoder",), weights.PRETRAINED, weights.CLASSIFIER
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


def make(parts: tuple[str, ...] = FULL, *, seed: int = 0, **fields: Any) -> Weights:
    """Return random weights; fields are those of `config.model`, `TINY`'s if they name no size."""
    config = recipes.mae_pretrain()
    config.model.update(fields if "size" in fields else TINY | fields)
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


def stored(state: Any, name: str = "weights", **fields: Any) -> Stored:
    """Return a state as a file that was read."""
    return Stored(name, "file", dict(state), **fields)


def assert_same(one: Any, other: Any) -> None:
    """Assert that two sets of arrays have the same names, shapes and bits."""
    assert one.keys() == other.keys()
    assert len(one) > 20
    for name in one:
        assert one[name].dtype == other[name].dtype == np.float32, name
        assert one[name].shape == other[name].shape, name
        assert np.array_equal(
            np.ascontiguousarray(one[name]).view(np.uint32),
            np.ascontiguousarray(other[name]).view(np.uint32),
        ), name
