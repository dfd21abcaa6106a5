"""UM-MAE: "Uniform Masking" for MAE with pyramids (Li et al., arXiv 2205.10063)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.decoder import Decoder
from mae_jax.models.encoder import POSITIONS, Encoder
from mae_jax.models.fields import check_choice, check_decoder, check_width, sized
from mae_jax.models.image_method import ImageMethod
from mae_jax.models.pvt import PVTEncoder
from mae_jax.models.pyramid import UNIT_SIDE, PyramidEncoder
from mae_jax.models.swin import SwinEncoder
from mae_jax.models.vit import ViTEncoder
from mae_jax.nn import masking
from mae_jax.nn.layers import Dtype
from mae_jax.nn.patches import PatchUnit
from mae_jax.types import MaskPlan

# Units down and across that the last stage of a pyramid sees as one token.
PYRAMID_UPSAMPLE = 2


class Size(NamedTuple):
    """The dimensions that a size name stands for.

    `family` is "swin", "pvt" or "vit"; `embed_dim` and `num_heads` are of the first stage;
    `patch_size` is the side of a patch of the stem, for "vit" that of a unit; `bias_dim` the width
    of Swin's `PositionMlp`.
    """

    family: str
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: int
    decoder_depth: int = 2
    bias_dim: int = 32
    patch_size: int = 4
    decoder_embed_dim: int = 512
    decoder_num_heads: int = 16


# arXiv 2205.10063, section 4.1; implus/UM-MAE `models_mae_swin.py`, `models_mae_pvt.py` and
# `models_mae.py`, the sizes of its pre-training commands.
SIZES = {
    "swin_t": Size("swin", 96, (2, 2, 6, 2), 3),
    "swin_l": Size("swin", 192, (2, 2, 18, 2), 6, decoder_depth=8, bias_dim=64),
    "pvt_s": Size("pvt", 64, (3, 4, 6, 3), 1),
    "vit_b": Size("vit", 768, (12,), 12, patch_size=16),
}
WINDOW_SIZE = 16


class UniformMaskedAutoencoder(ImageMethod):
    """Keep one unit of each 2 x 2, encode them as an image of half the side, predict the others.

    Attributes:
      unit: how an image is cut into units (pure, no parameters).
      encoder: sees kept units and their places, of some of them the place alone.
      decoder: predicts hidden units.
      secondary_ratio: share of the kept units of which the encoder sees the place alone, with a
        learned token. They are not predicted.
      norm_pix_loss: the target is each unit normalised with its own mean and deviation.
      compat_decoder_order: pair encoded units with the decoder's positions as the released code
        does for pyramids, by mistake: the units are in the order of the 2 x 2 blocks, the positions
        in that of the image, so that three of four are those of another unit of the same row of
        blocks. For decoders that were trained with it.
    """

    unit: PatchUnit
    encoder: Encoder
    decoder: Decoder
    secondary_ratio: float = 0.25
    norm_pix_loss: bool = True
    compat_decoder_order: bool = False

    @nn.nowrap
    def plan(self, rng: jax.Array, batch_size: int, noise: jax.Array | None = None) -> MaskPlan:
        """Draw one mask per image; see `mae_jax.nn.masking.uniform_plan`."""
        return masking.uniform_plan(
            rng, batch_size, self.unit.grid_size, self.secondary_ratio, noise
        )

    @nn.nowrap
    def plan_of_mask(self, mask: np.ndarray) -> MaskPlan:
        """Return the plan of a caller's own mask, with no unit replaced.

        Raises:
          ConfigError: if it does not keep exactly one unit of each 2 x 2 block.
        """
        plan = masking.uniform_plan_of_mask(mask, self.unit.grid_size)
        if not self.secondary_ratio:
            return plan
        return plan.replace(replaced=jnp.zeros(plan.ids_keep.shape, bool))

    def _outputs(
        self,
        units: jax.Array,
        plan: MaskPlan,
        skip: int,
        drop_path_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Return predictions in kept-then-hidden order."""
        masking.check_plan(plan, len(units), self.unit.count)
        seen = masking.take(units, plan.ids_keep)
        latent = self.encoder(
            seen, plan.ids_keep, replaced=plan.replaced, drop_path_rng=drop_path_rng
        )
        if self.compat_decoder_order:
            plan = plan.replace(ids_keep=jnp.sort(plan.ids_keep, axis=1))
        return self.decoder(latent, plan, skip=skip)

    @nn.nowrap
    def masked_caption(self) -> str:
        """Return what the first panel shows."""
        if not self.secondary_ratio:
            return "masked 75%"
        return f"masked 75%, of the rest {self.secondary_ratio:.0%} (dark)"

    @nn.nowrap
    def step_flops(self) -> int:
        """Return FLOPs of a training step per image: products only, backward twice the forward.

        The embedding's backward pass is counted once, for pixels need no gradient. Norms, GELU,
        softmax, gathers, the optimiser and recomputation are not counted.
        """
        count, prefix = self.unit.count, int(self.encoder.use_cls_token)
        keep = count // 4
        embed, encoder = self.encoder.flops(keep, self.unit.size)
        latent = prefix + keep // self.decoder.upsample**2
        decoder = self.decoder.flops(prefix + count, latent, self.encoder.output_dim, count - keep)
        return 3 * (embed + encoder + decoder) - embed


def dimensions(size: str, **given: Any) -> Size:
    """Return the dimensions of a size, with those in place of them that are not None.

    Args:
      size: a name in `SIZES`.
      **given: fields of `Size`, or `stem_patch_size`, as `make` has them.

    Raises:
      ConfigError: if a name is unknown or the dimensions do not fit together.
    """
    check_choice("size", size, tuple(SIZES))
    family = SIZES[size].family
    right, wrong = "patch_size", "stem_patch_size"
    if family != "vit":
        right, wrong = wrong, right
    if given.get(wrong) is not None:
        raise ConfigError(f"model.{wrong} {given[wrong]}: {size} has none, set model.{right}")
    given["patch_size"] = given.pop("stem_patch_size", None) or given.get("patch_size")
    dims = sized(SIZES, size, **given)
    stages = len(SIZES[size].depths)
    if len(dims.depths) != stages or min(dims.depths) < 1:
        raise ConfigError(
            f"model.depths {dims.depths}: expected the blocks of {stages} stages, each at least 1"
        )
    check_width(dims, "embed_dim", "num_heads")
    check_decoder(dims)
    return dims


def make_encoder(
    dims: Size,
    image_size: tuple[int, int],
    channels: int,
    *,
    positions: str | None = None,
    window_size: int | None = None,
    dtype: Dtype = jnp.float32,
) -> tuple[PatchUnit, Encoder]:
    """Return the unit and the encoder of units; see `make`.

    Raises:
      ConfigError: if the fields do not fit together.
    """
    pyramid = dims.family != "vit"
    side = UNIT_SIDE * dims.patch_size if pyramid else dims.patch_size
    unit = PatchUnit((image_size[0], image_size[1]), side, channels)
    if window_size is not None and (dims.family != "swin" or window_size < 2 or window_size % 2):
        raise ConfigError(
            f"model.window_size {window_size}: expected an even number, and of Swin alone"
        )
    known = ("none",) if dims.family == "swin" else POSITIONS
    positions = known[0] if positions is None else positions
    check_choice("positions", positions, known)
    shared: dict[str, Any] = {
        "grid_size": unit.grid_size,
        "embed_dim": dims.embed_dim,
        "num_heads": dims.num_heads,
        "positions": positions,
        "dtype": dtype,
    }
    if dims.family == "vit":
        return unit, ViTEncoder(depth=dims.depths[0], **shared)
    shared |= {"channels": channels, "stage_depths": dims.depths}
    if dims.family == "pvt":
        return unit, PVTEncoder(**shared)
    window_size = WINDOW_SIZE if window_size is None else window_size
    return unit, SwinEncoder(window_size=window_size, bias_dim=dims.bias_dim, **shared)


def make(
    *,
    size: str,
    image_size: tuple[int, int],
    channels: int = 3,
    secondary_ratio: float = 0.25,
    norm_pix_loss: bool = True,
    compat_decoder_order: bool = False,
    positions: str | None = None,
    stem_patch_size: int | None = None,
    patch_size: int | None = None,
    window_size: int | None = None,
    embed_dim: int | None = None,
    depths: tuple[int, ...] | None = None,
    num_heads: int | None = None,
    decoder_embed_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_num_heads: int | None = None,
    dtype: Dtype = jnp.float32,
) -> UniformMaskedAutoencoder:
    """Build a UM-MAE of a named size; a dimension given in addition replaces that of the size.

    Args:
      size: a name in `SIZES`.
      image_size: (height, width) in pixels; for a pyramid multiples of 16 stem patches, with
        windows that divide each stage's grid; else of two patches.
      channels: of the image.
      secondary_ratio: share of the kept units to replace by a token.
      norm_pix_loss: predict units normalised by their own statistics.
      compat_decoder_order: see `UniformMaskedAutoencoder`; for pyramids.
      positions: of the encoder, "fixed" or "learned", "none" for Swin; None: not learned.
      stem_patch_size: of a pyramid, pixels of a patch of the stem, four of which are a unit's side.
      patch_size: of a ViT, pixels of a unit's side.
      window_size: of Swin, tokens of the full grid; None: 16.
      embed_dim: width of the first stage, a multiple of 4 and of `num_heads`; None: that of the
        size. The same for all the following.
      depths: blocks of each stage.
      num_heads: heads of the first stage.
      decoder_embed_dim: width of the decoder, a multiple of 4 and of `decoder_num_heads`.
      decoder_depth: blocks of the decoder.
      decoder_num_heads: heads of the decoder.
      dtype: of the products; parameters, statistics and the loss are float32.

    Raises:
      ConfigError: if a name is unknown or the dimensions do not fit together.
    """
    dims = dimensions(
        size,
        stem_patch_size=stem_patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        decoder_embed_dim=decoder_embed_dim,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_num_heads,
    )
    pyramid = dims.family != "vit"
    if compat_decoder_order and not pyramid:
        raise ConfigError(
            f"model.compat_decoder_order True: {size} has no such order; expected False"
        )
    unit, encoder = make_encoder(
        dims, image_size, channels, positions=positions, window_size=window_size, dtype=dtype
    )
    keep, _ = masking.uniform_counts(unit.grid_size, secondary_ratio)
    if isinstance(encoder, PyramidEncoder):
        encoder.check(keep)
    return UniformMaskedAutoencoder(
        unit=unit,
        encoder=encoder,
        decoder=Decoder(
            grid_size=unit.grid_size,
            unit_size=unit.size,
            embed_dim=dims.decoder_embed_dim,
            depth=dims.decoder_depth,
            num_heads=dims.decoder_num_heads,
            upsample=PYRAMID_UPSAMPLE if pyramid else 1,
            kept_grid=(unit.grid_size[0] // 2, unit.grid_size[1] // 2),
            dtype=dtype,
        ),
        secondary_ratio=secondary_ratio,
        norm_pix_loss=norm_pix_loss,
        compat_decoder_order=compat_decoder_order,
    )
