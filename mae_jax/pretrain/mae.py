"""MAE: "Masked Autoencoders Are Scalable Vision Learners" (He et al., arXiv 2111.06377)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.decoder import Decoder
from mae_jax.models.encoder import POSITIONS, Encoder
from mae_jax.models.fields import check_choice, check_decoder, check_width, sized
from mae_jax.models.image_method import ImageMethod
from mae_jax.models.vit import ViTEncoder
from mae_jax.nn import masking
from mae_jax.nn.layers import Dtype
from mae_jax.nn.patches import PatchUnit, Unit
from mae_jax.types import MaskPlan


class Size(NamedTuple):
    """The dimensions that a size name stands for."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16


# B, L, H: arXiv 2111.06377, appendix A.1 and facebookresearch/mae `models_mae.py`; one decoder for
# all three. S is not in the paper: DeiT-S with the small decoder commonly used beside it.
SIZES = {
    "vit_s": Size(16, 384, 12, 6, 256, 4, 8),
    "vit_b": Size(16, 768, 12, 12),
    "vit_l": Size(16, 1024, 24, 16),
    "vit_h": Size(14, 1280, 32, 16),
}


SAMPLERS = {"block": masking.block_plan, "grid": masking.grid_plan}
MASK_SAMPLINGS = ("random", *SAMPLERS)
LOSS_ON = ("hidden", "all")


class MaskedAutoencoder(ImageMethod):
    """Encode the units that are kept, predict the ones that are hidden.

    Attributes:
      unit: how an image is cut into units (pure, no parameters).
      encoder: sees kept units and their positions.
      decoder: predicts hidden units.
      mask_ratio: share of units to hide.
      norm_pix_loss: the target is each unit normalised with its own mean and deviation.
      mask_sampling: how units to hide are chosen, a name in `SAMPLERS` (table 1f).
      mask_tokens_in_encoder: the encoder sees all units, hidden ones as a learned token (table 1c),
        and the decoder adds none. Slower, and worse in the paper.
      loss_on: "hidden", or "all" units (about 0.5 % worse in the paper, section 3).
    """

    unit: Unit
    encoder: Encoder
    decoder: Decoder
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    mask_sampling: str = "random"
    mask_tokens_in_encoder: bool = False
    loss_on: str = "hidden"

    @nn.nowrap
    def keep_count(self) -> int:
        """Return K, the number of units kept."""
        return masking.keep_count(self.unit.count, self.mask_ratio)

    @nn.nowrap
    def plan(self, rng: jax.Array, batch_size: int, noise: jax.Array | None = None) -> MaskPlan:
        """Draw one mask per image, as `mask_sampling` says; see `mae_jax.nn.masking`.

        Args:
          rng: key.
          batch_size: B.
          noise: float [B, N] that decides instead of `rng`; with random sampling alone.
        """
        keep = self.keep_count()
        if self.mask_sampling == "random":
            return masking.random_plan(rng, batch_size, self.unit.count, keep, noise)
        if noise is not None:
            raise ValueError(f"noise decides random masks, mask_sampling is {self.mask_sampling}")
        rows, columns = self.unit.grid_size
        return SAMPLERS[self.mask_sampling](rng, batch_size, (rows, columns), keep)

    @nn.nowrap
    def plan_of_mask(self, mask: np.ndarray) -> MaskPlan:
        """Return the plan of a caller's own mask; see `mae_jax.nn.masking.plan_of_mask`."""
        return masking.plan_of_mask(mask)

    def _encode(
        self, units: jax.Array, plan: MaskPlan, drop_path_rng: jax.Array | None = None
    ) -> tuple[jax.Array, MaskPlan]:
        """Return the encoder's output and the plan by which the decoder is to complete it."""
        masking.check_plan(plan, len(units), self.unit.count)
        if not self.mask_tokens_in_encoder:
            seen = masking.take(units, plan.ids_keep)
            return self.encoder(seen, plan.ids_keep, drop_path_rng=drop_path_rng), plan
        ids = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)
        replaced = (jnp.arange(ids.shape[1]) >= plan.ids_keep.shape[1])[None]
        latent = self.encoder(
            masking.take(units, ids), ids, replaced=replaced, drop_path_rng=drop_path_rng
        )
        return latent, MaskPlan(ids_keep=ids, ids_mask=ids[:, :0])

    def _outputs(
        self,
        units: jax.Array,
        plan: MaskPlan,
        skip: int,
        drop_path_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Return predictions in kept-then-hidden order."""
        latent, decoder_plan = self._encode(units, plan, drop_path_rng)
        return self.decoder(latent, decoder_plan, skip=skip)

    @nn.nowrap
    def masked_caption(self) -> str:
        """Return what the first panel shows."""
        return f"masked {self.mask_ratio:.0%}"

    @nn.nowrap
    def step_flops(self) -> int:
        """Return FLOPs of a training step per image: products only, backward twice the forward.

        The embedding's backward pass is counted once, for pixels need no gradient. Norms, GELU,
        softmax, gathers, the optimiser and recomputation are not counted.
        """
        count, prefix = self.unit.count, int(self.encoder.use_cls_token)
        seen = count if self.mask_tokens_in_encoder else self.keep_count()
        predicted = count if self.loss_on == "all" else count - self.keep_count()
        embed, encoder = self.encoder.flops(seen, self.unit.size)
        decoder = self.decoder.flops(
            prefix + count, prefix + seen, self.encoder.output_dim, predicted
        )
        return 3 * (embed + encoder + decoder) - embed


def make(
    *,
    size: str,
    image_size: tuple[int, int],
    channels: int = 3,
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = True,
    use_cls_token: bool = True,
    positions: str = "fixed",
    mask_sampling: str = "random",
    mask_tokens_in_encoder: bool = False,
    loss_on: str = "hidden",
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    decoder_embed_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_num_heads: int | None = None,
    dtype: Dtype = jnp.float32,
) -> MaskedAutoencoder:
    """Build an MAE of a named size; a dimension given in addition replaces that of the size.

    Args:
      size: a name in `SIZES`.
      image_size: (height, width) in pixels, each a multiple of the patch size.
      channels: of the image.
      mask_ratio: share of patches to hide, such that at least one is kept and one hidden.
      norm_pix_loss: predict patches normalised by their own statistics.
      use_cls_token: have a class token.
      positions: of the encoder, "fixed" or "learned".
      mask_sampling: "random", "block" or "grid".
      mask_tokens_in_encoder: let the encoder see a token for each hidden patch.
      loss_on: "hidden" or "all" patches.
      patch_size: pixels; None: that of the size. The same for all the following.
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
    check_choice("loss_on", loss_on, LOSS_ON)
    check_width(dims, "embed_dim", "num_heads")
    if dims.depth < 1:
        raise ConfigError("model.depth must be at least 1")
    check_decoder(dims)
    unit = PatchUnit((image_size[0], image_size[1]), dims.patch_size, channels)
    masking.keep_count(unit.count, mask_ratio)
    return MaskedAutoencoder(
        unit=unit,
        encoder=ViTEncoder(
            grid_size=unit.grid_size,
            embed_dim=dims.embed_dim,
            depth=dims.depth,
            num_heads=dims.num_heads,
            use_cls_token=use_cls_token,
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
        ),
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
        mask_sampling=mask_sampling,
        mask_tokens_in_encoder=mask_tokens_in_encoder,
        loss_on=loss_on,
    )
