"""MAE: "Masked Autoencoders Are Scalable Vision Learners" (He et al., arXiv 2111.06377)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.models.decoder import Decoder
from mae_jax.models.vit import POSITIONS, ViTEncoder
from mae_jax.nn import masking
from mae_jax.nn.blocks import Dtype
from mae_jax.nn.patches import PatchUnit, denormalize_units, normalize_units
from mae_jax.types import Batch, MaskPlan, Panel, Prediction


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


class MaskedAutoencoder(nn.Module):
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

    unit: PatchUnit
    encoder: ViTEncoder
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
        return SAMPLERS[self.mask_sampling](rng, batch_size, self.unit.grid_size, keep)

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

    def predict(
        self, batch: Batch, plan: MaskPlan, *, drop_path_rng: jax.Array | None = None
    ) -> dict[str, Prediction]:
        """Predict the hidden units (or all) of `batch["image"]`, normalised float32 [B, H, W, C].

        Every unit predicted counts alike in the mean over the batch, as in the official
        `forward_loss`, which divides by the number of removed patches.
        """
        units = self.unit.split(batch["image"])
        latent, decoder_plan = self._encode(units, plan, drop_path_rng)
        skip = 0 if self.loss_on == "all" else plan.ids_keep.shape[1]
        output = self.decoder(latent, decoder_plan, skip=skip)
        ids = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)[:, skip:]
        target = masking.take(units, ids)
        if self.norm_pix_loss:
            target = normalize_units(target)
        weight = jnp.full(output.shape[:2], 1.0 / (output.shape[0] * output.shape[1]))
        return {"image": Prediction(output, target, ids, weight)}

    def reconstruct(self, batch: Batch, plan: MaskPlan) -> jax.Array:
        """Return the decoder's images [B, H, W, C], kept units predicted as well, normalised space.

        With `norm_pix_loss` each unit is un-normalised with the statistics of the *true* unit:
        the model predicts the pattern of a patch, not its brightness and contrast.
        """
        units = self.unit.split(batch["image"])
        output = masking.restore(self.decoder(*self._encode(units, plan), skip=0), plan)
        if self.norm_pix_loss:
            output = denormalize_units(output, units)
        return self.unit.join(output)

    def encode(self, batch: Batch, plan: MaskPlan | None = None) -> jax.Array:
        """Return the tokens of the units that `plan` keeps, of all without a plan.

        Returns:
          float32 [B, c + K, D] after the final norm, in the order of `plan.ids_keep`, or [B, c + N,
          D] in raster order; c = 1 with a class token, which comes first, else 0.
        """
        units = self.unit.split(batch["image"])
        if plan is None:
            tokens = self.encoder.encode_all(units)
        else:
            masking.check_plan(plan, len(units), self.unit.count)
            tokens = self.encoder(masking.take(units, plan.ids_keep), plan.ids_keep)
        return tokens.astype(jnp.float32)

    def features(self, batch: Batch) -> jax.Array:
        """Return float32 [B, D]: the mean of all patch tokens after the final norm."""
        return self.encoder.patch_tokens(self.encode(batch)).mean(axis=1)

    def panels(self, batch: Batch, plan: MaskPlan) -> dict[str, Panel]:
        """Return the four columns of MAE's figures."""
        images = batch["image"]
        mask = masking.mask_of(plan)[..., None]  # [R, N, 1]
        units = jnp.broadcast_to(mask, (images.shape[0], self.unit.count, self.unit.size))
        hidden = self.unit.join(units)[..., :1]
        reconstruction = self.reconstruct(batch, plan)
        return {
            "masked": Panel(images, hidden),
            "reconstruction": Panel(reconstruction),
            "pasted": Panel(jnp.where(hidden == 1, reconstruction, images)),
            "original": Panel(images),
        }

    @nn.nowrap
    def panel_captions(self) -> dict[str, str]:
        """Return the captions of `panels`, in order."""
        note = " (true patch mean and std)" if self.norm_pix_loss else ""
        return {
            "masked": f"masked {self.mask_ratio:.0%}",
            "reconstruction": f"reconstruction{note}",
            "pasted": "reconstruction + visible",
            "original": "original",
        }

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
            prefix + count, prefix + seen, self.encoder.embed_dim, predicted
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
    if size not in SIZES:
        raise ConfigError(f"model.size {size!r} is not one of {', '.join(SIZES)}")
    given = {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "decoder_embed_dim": decoder_embed_dim,
        "decoder_depth": decoder_depth,
        "decoder_num_heads": decoder_num_heads,
    }
    dims = SIZES[size]._replace(**{name: v for name, v in given.items() if v is not None})
    for name, value, known in (
        ("positions", positions, POSITIONS),
        ("mask_sampling", mask_sampling, MASK_SAMPLINGS),
        ("loss_on", loss_on, LOSS_ON),
    ):
        if value not in known:
            raise ConfigError(f"model.{name} {value!r} is not one of {', '.join(known)}")
    for prefix in ("", "decoder_"):
        width, heads = getattr(dims, f"{prefix}embed_dim"), getattr(dims, f"{prefix}num_heads")
        if min(width, heads) < 1 or width % 4 or width % heads:
            raise ConfigError(
                f"model.{prefix}embed_dim {width} must be a positive multiple of 4 and of"
                f" model.{prefix}num_heads, which is {heads}"
            )
        if getattr(dims, f"{prefix}depth") < 1:
            raise ConfigError(f"model.{prefix}depth must be at least 1")
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
