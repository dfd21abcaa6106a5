"""MAE with HiViT: "HiViT: Hierarchical Vision Transformer Meets MIM" (arXiv 2205.14949)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.models.decoder import Decoder
from mae_jax.models.encoder import POSITIONS
from mae_jax.models.fields import check_choice, check_decoder, sized
from mae_jax.models.hivit import SIDE, HiViTEncoder
from mae_jax.nn import masking
from mae_jax.nn.layers import NORMAL_002, Dtype
from mae_jax.nn.patches import PatchUnit
from mae_jax.pretrain.mae import MASK_SAMPLINGS, MaskedAutoencoder


class Size(NamedTuple):
    """The dimensions that a size name stands for."""

    stem_patch_size: int
    stem_dim: int
    depths: tuple[int, int, int]
    num_heads: int
    decoder_embed_dim: int = 512
    decoder_depth: int = 6
    decoder_num_heads: int = 16


# arXiv 2205.14949, table 1; the decoder is that of the released model "dec512d6b". Base alone is
# published as a masked autoencoder; tiny and small are supervised models.
SIZES = {
    "tiny": Size(4, 96, (1, 1, 10), 6),
    "small": Size(4, 96, (2, 2, 20), 6),
    "base": Size(4, 128, (2, 2, 20), 8),
}


def make(
    *,
    size: str,
    image_size: tuple[int, int],
    channels: int = 3,
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = True,
    positions: str = "learned",
    relative_positions: bool = False,
    multi_scale: bool = True,
    mask_sampling: str = "random",
    stem_patch_size: int | None = None,
    stem_dim: int | None = None,
    depths: tuple[int, int, int] | None = None,
    num_heads: int | None = None,
    decoder_embed_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_num_heads: int | None = None,
    dtype: Dtype = jnp.float32,
) -> MaskedAutoencoder:
    """Build a HiViT autoencoder of a named size; a dimension given replaces that of the size.

    Args:
      size: a name in `SIZES`.
      image_size: (height, width) in pixels, each a multiple of 4 stem patches.
      channels: of the image.
      mask_ratio: share of units, 4 x 4 stem patches, to hide; at least one is kept and one hidden.
      norm_pix_loss: predict units normalised by their own statistics (always, in the release).
      positions: of the encoder, "learned" or "fixed".
      relative_positions: of the encoder too (in the release only when fine-tuning).
      multi_scale: the decoder sees the tokens of all three stages.
      mask_sampling: "random", "block" or "grid".
      stem_patch_size: pixels; None: that of the size. The same for all the following.
      stem_dim: width of the first stage; that of the last, 4 times it, is a multiple of
        `num_heads`.
      depths: of the three stages, as published: d stands for 2 d blocks in the first two.
      num_heads: heads of the encoder.
      decoder_embed_dim: width of the decoder, a multiple of 4 and of `decoder_num_heads`.
      decoder_depth: blocks of the decoder.
      decoder_num_heads: heads of the decoder.
      dtype: of the products; parameters, statistics and the loss are float32.

    Raises:
      ConfigError: if a name is unknown or the dimensions do not fit together.
    """
    dims = sized(
        SIZES,
        size,
        stem_patch_size=stem_patch_size,
        stem_dim=stem_dim,
        depths=depths,
        num_heads=num_heads,
        decoder_embed_dim=decoder_embed_dim,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_num_heads,
    )
    check_choice("positions", positions, POSITIONS)
    check_choice("mask_sampling", mask_sampling, MASK_SAMPLINGS)
    if len(dims.depths) != 3 or min(dims.depths) < 1:
        raise ConfigError(
            f"model.depths {dims.depths}: expected the depths of three stages, each at least 1"
        )
    if min(dims.stem_dim, dims.num_heads) < 1 or 4 * dims.stem_dim % dims.num_heads:
        raise ConfigError(
            f"model.stem_dim {dims.stem_dim}: expected at least 1, and 4 times it to be a multiple"
            f" of model.num_heads, which is {dims.num_heads}"
        )
    check_decoder(dims)
    unit = PatchUnit((image_size[0], image_size[1]), SIDE * dims.stem_patch_size, channels)
    masking.keep_count(unit.count, mask_ratio)
    return MaskedAutoencoder(
        unit=unit,
        encoder=HiViTEncoder(
            grid_size=unit.grid_size,
            channels=channels,
            stem_dim=dims.stem_dim,
            stage_depths=dims.depths,
            num_heads=dims.num_heads,
            positions=positions,
            relative_positions=relative_positions,
            multi_scale=multi_scale,
            dtype=dtype,
        ),
        decoder=Decoder(
            grid_size=unit.grid_size,
            unit_size=unit.size,
            embed_dim=dims.decoder_embed_dim,
            depth=dims.decoder_depth,
            num_heads=dims.decoder_num_heads,
            dtype=dtype,
            kernel_init=NORMAL_002,
        ),
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
        mask_sampling=mask_sampling,
    )
