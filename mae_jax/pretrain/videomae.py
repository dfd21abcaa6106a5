"""VideoMAE: masked autoencoders of clips that hide tubes (Tong et al., arXiv 2203.12602)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.models.decoder import Decoder
from mae_jax.models.encoder import POSITIONS
from mae_jax.models.fields import check_choice, check_decoder, check_width, sized
from mae_jax.models.video_vit import VideoViTEncoder, cube_table
from mae_jax.nn import masking
from mae_jax.nn.cubes import CubeUnit, denormalize_channels, normalize_channels
from mae_jax.nn.layers import TORCH_DEFAULT, Dtype
from mae_jax.pretrain.mae import MaskedAutoencoder
from mae_jax.types import Batch, MaskPlan


class Size(NamedTuple):
    """The dimensions that a size name stands for."""

    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    patch_size: int = 16
    tubelet_size: int = 2


# MCG-NJU/VideoMAE `modeling_pretrain.py`; decoder depths of its `scripts`, which pass 4 or 12 in
# place of the 8 that is the default there. Patches of H have 16 pixels, too.
SIZES = {
    "vit_s": Size(384, 12, 6, 192, 4, 3),
    "vit_b": Size(768, 12, 12, 384, 4, 6),
    "vit_l": Size(1024, 24, 16, 512, 12, 8),
    "vit_h": Size(1280, 32, 16, 640, 12, 8),
}

MASK_SAMPLINGS = ("tube", "random", "frame")

# The authors' mask token is cut at one deviation.
_TOKEN_INIT = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)


class VideoMAE(MaskedAutoencoder):
    """A masked autoencoder of clips, of which it hides tubes.

    Attributes:
      unit: how a clip is cut into cubes (pure, no parameters).
      encoder: sees kept cubes and their positions.
      decoder: predicts hidden cubes.
      mask_ratio: share to hide: of places, of cubes or of time slots, as `mask_sampling` says.
      norm_pix_loss: the target is each channel of each cube, normalised with its own mean and
        deviation; else pixels in [0, 1].
      mask_sampling: "tube" (the same places in all time slots), "random" or "frame" (whole slots).
      mask_tokens_in_encoder: the encoder sees all cubes, hidden ones as a learned token. Slower.
    """

    unit: CubeUnit
    mask_ratio: float = 0.9
    mask_sampling: str = "tube"

    @nn.nowrap
    def keep_count(self) -> int:
        """Return K, the number of cubes kept."""
        count, keep = self._keep()
        return self.unit.count // count * keep

    @nn.nowrap
    def _keep(self) -> tuple[int, int]:
        """Return what is chosen from, and how many of it are kept: places, slots or cubes."""
        slots, rows, columns = self.unit.grid_size
        count, what = {
            "tube": (rows * columns, "places"),
            "frame": (slots, "time slots"),
            "random": (self.unit.count, "cubes"),
        }[self.mask_sampling]
        return count, count - masking.hidden_count(count, self.mask_ratio, what)

    @nn.nowrap
    def plan(self, rng: jax.Array, batch_size: int, noise: jax.Array | None = None) -> MaskPlan:
        """Draw one mask per clip, as `mask_sampling` says; see `mae_jax.nn.masking`.

        Args:
          rng: key.
          batch_size: B.
          noise: float [B, N] that decides instead of `rng`; with random sampling alone.
        """
        _, keep = self._keep()
        if self.mask_sampling == "random":
            return masking.random_plan(rng, batch_size, self.unit.count, keep, noise)
        if noise is not None:
            raise ValueError(f"noise decides random masks, mask_sampling is {self.mask_sampling}")
        draw = masking.tube_plan if self.mask_sampling == "tube" else masking.frame_plan
        return draw(rng, batch_size, self.unit.grid_size, keep)

    @nn.nowrap
    def _true_units(self, batch: Batch) -> jax.Array:
        """Return the cubes [B, N, U] of the clips' pixels before normalisation, uint8."""
        return self.unit.split(batch["pixels"])

    @nn.nowrap
    def _targets(self, units: jax.Array) -> jax.Array:
        """Return what is to be predicted of true cubes, uint8 [B, M, U]."""
        values = units.astype(jnp.float32) / 255.0
        return normalize_channels(values, self.unit.channels) if self.norm_pix_loss else values

    @nn.nowrap
    def _inputs_of(self, output: jax.Array, batch: Batch) -> jax.Array:
        """Return predictions [B, N, U] in raster order as what the network takes."""
        channels = self.unit.channels
        if self.norm_pix_loss:
            # The input is an affine function of the pixels, so that with the statistics of its own
            # cubes predictions come out in its space; the 1e-6 in the scale is all that differs.
            return denormalize_channels(output, self.unit.split(batch["image"]), channels)
        # Raw predictions are pixels. The function is the same for all pixels of a channel, and
        # grows: the darkest and the brightest of the batch are so on both sides, and two points
        # are a line. (Of a channel of one value the slope does not show; it is taken as 1.)
        pixels, image = batch["pixels"].astype(jnp.float32) / 255.0, batch["image"]
        axes = tuple(range(image.ndim - 1))
        (low, high), (start, stop) = ((x.min(axes), x.max(axes)) for x in (pixels, image))
        slope = jnp.where(high > low, (stop - start) / jnp.maximum(high - low, 1e-3), 1.0)
        repeats = self.unit.size // channels
        slope, offset = (jnp.tile(x, repeats)[None, None] for x in (slope, start - slope * low))
        return output * slope + offset


def make(
    *,
    size: str,
    image_size: tuple[int, int],
    frames: int = 16,
    channels: int = 3,
    mask_ratio: float = 0.9,
    mask_sampling: str = "tube",
    norm_pix_loss: bool = True,
    positions: str = "fixed",
    mask_tokens_in_encoder: bool = False,
    tubelet_size: int | None = None,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    decoder_embed_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_num_heads: int | None = None,
    dtype: Dtype = jnp.float32,
) -> VideoMAE:
    """Build a VideoMAE of a named size; a dimension given in addition replaces that of the size.

    Args:
      size: a name in `SIZES`.
      image_size: (height, width) in pixels, each a multiple of the patch size.
      frames: of a clip, a multiple of `tubelet_size`.
      channels: of a frame.
      mask_ratio: share to hide, such that at least one place, slot or cube is kept and one hidden.
      mask_sampling: "tube", "random" or "frame".
      norm_pix_loss: predict cubes normalised by their own statistics, channel by channel.
      positions: of the encoder, "fixed" or "learned".
      mask_tokens_in_encoder: let the encoder see a token for each hidden cube.
      tubelet_size: frames of a cube; None: that of the size. The same for all the following.
      patch_size: side of a cube in pixels.
      embed_dim: width of the encoder, a multiple of 4 and of `num_heads`.
      depth: blocks of the encoder.
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
        tubelet_size=tubelet_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        decoder_embed_dim=decoder_embed_dim,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_num_heads,
    )
    check_choice("positions", positions, POSITIONS)
    check_choice("mask_sampling", mask_sampling, MASK_SAMPLINGS)
    check_width(dims, "embed_dim", "num_heads")
    if dims.depth < 1:
        raise ConfigError("model.depth must be at least 1")
    check_decoder(dims)
    clip_size = (frames, image_size[0], image_size[1])
    unit = CubeUnit(clip_size, dims.tubelet_size, dims.patch_size, channels)
    method = VideoMAE(
        unit=unit,
        encoder=VideoViTEncoder(
            grid_size=unit.grid_size,
            embed_dim=dims.embed_dim,
            depth=dims.depth,
            num_heads=dims.num_heads,
            positions=positions,
            dtype=dtype,
        ),
        decoder=Decoder(
            grid_size=unit.grid_size,
            unit_size=unit.size,
            embed_dim=dims.decoder_embed_dim,
            depth=dims.decoder_depth,
            num_heads=dims.decoder_num_heads,
            dtype=dtype,
            qkv_bias="query_value",
            embed_bias=False,
            embed_init=TORCH_DEFAULT,
            token_init=_TOKEN_INIT,
            make_table=cube_table,
        ),
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
        mask_sampling=mask_sampling,
        mask_tokens_in_encoder=mask_tokens_in_encoder,
    )
    method.keep_count()  # refuses a ratio that keeps or hides nothing
    return method
