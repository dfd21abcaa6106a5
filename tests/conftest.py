"""What all tests share: eight fake CPU devices, no silent broadcasting, and one tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

# Before the first array is made. Not by an environment variable, which child processes would see.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Nothing of the tests goes into the user's cache; e2e has one of its own.
jax.config.update("jax_enable_compilation_cache", False)

from mae_jax.pretrain import mae

TINY: dict[str, Any] = {
    "size": "vit_s",
    "image_size": (32, 32),
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


@pytest.fixture(scope="session")
def tiny_mae() -> Callable[..., mae.MaskedAutoencoder]:
    """Return a maker of small MAEs: 16 patches of 8 pixels, width 16, 2 + 1 blocks, or as told."""

    def make(**fields: Any) -> mae.MaskedAutoencoder:
        return mae.make(**{**TINY, **fields})

    return make
