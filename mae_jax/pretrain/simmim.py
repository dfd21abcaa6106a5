"""SimMIM: "A Simple Framework for Masked Image Modeling" (Xie et al., arXiv 2111.09886).

What UM-MAE is compared with: the same encoders on the full grid, where a learned token stands for
each hidden unit, and no decoder but one linear layer.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.decoder import pixel_shuffle
from mae_jax.models.fields import check_choice
from mae_jax.models.image_method import ImageMethod
from mae_jax.models.pyramid import PyramidEncoder
from mae_jax.nn import masking
from mae_jax.nn.layers import Dtype, linear
from mae_jax.nn.patches import PatchUnit
from mae_jax.pretrain.um_mae import PYRAMID_UPSAMPLE, dimensions, make_encoder
from mae_jax.types import Batch, MaskPlan

MASK_SAMPLINGS = ("random", "uniform")


class ShuffleHead(nn.Module):
    """Map each token to the values of a square of units. Parameters: `pred`.

    Attributes:
      grid_size: units (down, across).
      unit_size: U, values of a unit.
      upsample: side of the square of units that a token stands for.
    """

    grid_size: tuple[int, int]
    unit_size: int
    upsample: int = PYRAMID_UPSAMPLE
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        """Map [B, N / upsample^2, D] to float32 [B, N, U], both in raster order."""
        r = self.upsample
        x = linear(self.unit_size * r**2, self.dtype, "pred")(latent)
        return pixel_shuffle(x, self.grid_size, r).astype(jnp.float32)


class SimMIM(ImageMethod):
    """Encode all units, a token in place of each hidden one, and predict these: L1 of raw pixels.

    The learned token of Swin passes through the norm of the stem, as in UM-MAE; the comparator of
    implus/UM-MAE puts it in after that norm.

    Attributes:
      unit: how an image is cut into units (pure, no parameters).
      encoder: sees all units.
      decoder: the head.
      mask_ratio: share of units to hide.
      norm_pix_loss: the target is each unit normalised with its own mean and deviation.
      mask_sampling: "random", or "uniform", one kept of each 2 x 2 (whatever `mask_ratio`).
    """

    unit: PatchUnit
    encoder: PyramidEncoder
    decoder: ShuffleHead
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False
    mask_sampling: str = "random"

    error = "l1"

    @nn.nowrap
    def keep_count(self) -> int:
        """Return K, the number of units kept."""
        if self.mask_sampling == "uniform":
            return masking.uniform_counts(self.unit.grid_size, 0.0)[0]
        return masking.keep_count(self.unit.count, self.mask_ratio)

    @nn.nowrap
    def plan(self, rng: jax.Array, batch_size: int, noise: jax.Array | None = None) -> MaskPlan:
        """Draw one mask per image; see `mae_jax.nn.masking`."""
        if self.mask_sampling == "uniform":
            return masking.uniform_plan(rng, batch_size, self.unit.grid_size, noise=noise)
        return masking.random_plan(rng, batch_size, self.unit.count, self.keep_count(), noise)

    @nn.nowrap
    def plan_of_mask(self, mask: np.ndarray) -> MaskPlan:
        """Return the plan of a caller's own mask; see `mae_jax.nn.masking.plan_of_mask`."""
        return masking.plan_of_mask(mask)

    def _encode(
        self, units: jax.Array, plan: MaskPlan, drop_path_rng: jax.Array | None = None
    ) -> jax.Array:
        """Return the tokens of all units, hidden ones replaced."""
        masking.check_plan(plan, len(units), self.unit.count)
        return self.encoder(
            units,
            jnp.arange(self.unit.count)[None],
            replaced=masking.mask_of(plan) == 1,
            drop_path_rng=drop_path_rng,
        )

    def _outputs(
        self,
        units: jax.Array,
        plan: MaskPlan,
        skip: int,
        drop_path_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Return predictions in kept-then-hidden order."""
        output = self.decoder(self._encode(units, plan, drop_path_rng))
        ids = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)
        return masking.take(output, ids[:, skip:])

    def encode(self, batch: Batch, plan: MaskPlan | None = None) -> jax.Array:
        """Return float32 [B, T, D], tokens of the whole grid; what `plan` hides is not seen."""
        units = self.unit.split(batch["image"])
        tokens = self.encoder.encode_all(units) if plan is None else self._encode(units, plan)
        return tokens.astype(jnp.float32)

    @nn.nowrap
    def masked_caption(self) -> str:
        """Return what the first panel shows."""
        return f"masked {1 - self.keep_count() / self.unit.count:.0%}"

    @nn.nowrap
    def step_flops(self) -> int:
        """Return FLOPs of a training step per image: products only, backward twice the forward.

        As `UniformMaskedAutoencoder.step_flops`. The head predicts all units.
        """
        embed, encoder = self.encoder.flops(self.unit.count, self.unit.size)
        head = 2 * self.encoder.output_dim * self.unit.count * self.unit.size
        return 3 * (embed + encoder + head) - embed


def make(
    *,
    size: str,
    image_size: tuple[int, int],
    channels: int = 3,
    mask_ratio: float = 0.75,
    mask_sampling: str = "random",
    norm_pix_loss: bool = False,
    positions: str | None = None,
    stem_patch_size: int | None = None,
    window_size: int | None = None,
    embed_dim: int | None = None,
    depths: tuple[int, ...] | None = None,
    num_heads: int | None = None,
    dtype: Dtype = jnp.float32,
) -> SimMIM:
    """Build a SimMIM around a pyramid of a named size of `mae_jax.pretrain.um_mae`.

    Args:
      size: a name in `um_mae.SIZES` of a pyramid.
      image_size: (height, width) in pixels.
      channels: of the image.
      mask_ratio: share of units to hide, such that at least one is kept and one hidden.
      mask_sampling: "random" or "uniform".
      norm_pix_loss: predict units normalised by their own statistics.
      positions: as in `um_mae.make`, and so all the following.
      stem_patch_size: see there.
      window_size: see there.
      embed_dim: see there.
      depths: see there.
      num_heads: see there.
      dtype: of the products.

    Raises:
      ConfigError: if a name is unknown or the dimensions do not fit together.
    """
    dims = dimensions(
        size,
        stem_patch_size=stem_patch_size,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
    )
    check_choice("mask_sampling", mask_sampling, MASK_SAMPLINGS)
    unit, encoder = make_encoder(
        dims, image_size, channels, positions=positions, window_size=window_size, dtype=dtype
    )
    if not isinstance(encoder, PyramidEncoder):
        raise ConfigError(f"model.size {size!r}: expected a pyramid, Swin or PVT")
    encoder.check(unit.count)
    method = SimMIM(
        unit=unit,
        encoder=encoder,
        decoder=ShuffleHead(unit.grid_size, unit.size, dtype=dtype),
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
        mask_sampling=mask_sampling,
    )
    method.keep_count()
    return method
