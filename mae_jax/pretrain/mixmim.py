"""MixMIM, also MixMAE: "Mixed and Masked AutoEncoder" (Liu et al., arXiv 2205.13137)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.decoder import Decoder
from mae_jax.models.encoder import POSITIONS
from mae_jax.models.fields import check_choice, check_decoder, check_width, sized
from mae_jax.models.mixmim import EPSILON, MixMIMEncoder
from mae_jax.nn import masking
from mae_jax.nn.layers import Dtype
from mae_jax.nn.patches import PatchUnit, denormalize_units, normalize_units
from mae_jax.types import Batch, MaskPlan, Panel, Prediction


class Size(NamedTuple):
    """The dimensions that a size name stands for."""

    stem_patch_size: int
    stem_dim: int
    depths: tuple[int, ...]
    num_heads: int
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16


# arXiv 2205.13137, section 4.1, and Sense-X/MixMIM `models_mixmim.py`; one decoder for all three.
SIZES = {
    "base": Size(4, 128, (2, 2, 18, 2), 4),
    "large": Size(4, 192, (2, 2, 18, 2), 6),
    "huge": Size(4, 352, (2, 2, 18, 2), 11),
}


class MixMIM(nn.Module):
    """Hide cells of an image behind those of another, and predict the hidden cells of both.

    One mask serves the whole batch. Where it is 1 an image's cells give way to its partner's; the
    encoder sees the mixture, each image's tokens among themselves, and the decoder completes both.
    So every cell of every image is predicted once, from the other cells of the same image.

    Attributes:
      unit: how an image is cut into cells (pure, no parameters).
      encoder: sees all cells of a mixture.
      decoder: completes the cells of one image.
      mask_ratio: share of cells that are the partner's.
      norm_pix_loss: the target is each cell normalised with its own mean and deviation.
      pairing_group: consecutive examples among which images are paired, the first with the last;
        0: the whole batch. The official one is the batch of a GPU.
    """

    unit: PatchUnit
    encoder: MixMIMEncoder
    decoder: Decoder
    mask_ratio: float = 0.5
    norm_pix_loss: bool = True
    pairing_group: int = 0

    @nn.nowrap
    def keep_count(self) -> int:
        """Return K, the cells that stay: N - int(N r), for the authors truncate what is hidden."""
        return _keep_count(self.unit.count, self.mask_ratio)

    @nn.nowrap
    def plan(self, rng: jax.Array, batch_size: int, noise: jax.Array | None = None) -> MaskPlan:
        """Draw one mask for all images.

        Args:
          rng: key.
          batch_size: not used.
          noise: float [1, N] that decides instead of `rng`: the smallest are kept.
        """
        return masking.random_plan(rng, 1, self.unit.count, self.keep_count(), noise)

    @nn.nowrap
    def plan_of_mask(self, mask: np.ndarray) -> MaskPlan:
        """Return the plan of a caller's own mask [1, N]; see `mae_jax.nn.masking.plan_of_mask`.

        Raises:
          ConfigError: if it is no mask, or there are several.
        """
        plan = masking.plan_of_mask(mask)
        if len(mask) != 1:
            raise ConfigError(f"mask: expected one for all images, got {len(mask)}")
        return plan

    @nn.nowrap
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and dtype of an image."""
        return {"image": jax.ShapeDtypeStruct(self.unit.shape, jnp.uint8)}

    @nn.nowrap
    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with `partner_image`, unless the caller has chosen partners.

        Raises:
          ConfigError: if the batch is no multiple of the group, or the group is odd: its middle
            image would be mixed with itself.
        """
        if "partner_image" in batch:
            return batch
        images = batch["image"]
        group = self.pairing_group or len(images)
        if len(images) % group or group % 2:
            raise ConfigError(
                f"model.pairing_group {self.pairing_group}: expected an even number that divides"
                f" the batch (0: all of it, which must be even), got a batch of {len(images)}"
            )
        groups = images.reshape(-1, group, *images.shape[1:])
        return {**batch, "partner_image": groups[:, ::-1].reshape(images.shape)}

    def _encode(
        self,
        units: jax.Array,
        partner: jax.Array,
        plan: MaskPlan,
        drop_path_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Return the tokens [B, N, D] of the mixture, in raster order."""
        return self.encoder(
            self._mixture(units, partner, plan),
            jnp.arange(self.unit.count)[None],
            drop_path_rng=drop_path_rng,
            groups=plan,
        )

    def _mixture(self, units: jax.Array, partner: jax.Array, plan: MaskPlan) -> jax.Array:
        """Return units [B, N, U], the image's own where the mask is 0, the partner's where 1."""
        masking.check_plan(plan, len(units), self.unit.count)
        if plan.ids_keep.shape[0] != 1:
            raise ConfigError(f"mask: expected one for all images, got {plan.ids_keep.shape[0]}")
        # Of pixels: the same as mixing what they are embedded as, for no patch is of two cells.
        return jnp.where(masking.mask_of(plan)[..., None] == 1, partner, units)

    def predict(
        self, batch: Batch, plan: MaskPlan, *, drop_path_rng: jax.Array | None = None
    ) -> dict[str, Prediction]:
        """Predict the cells of `batch["image"]` and of its partner that the mixture has not.

        Args:
          batch: `image` normalised float32 [B, H, W, C], and where the batch was prepared
            `partner_image`; else the batch reversed.
          plan: one for all images.
          drop_path_rng: key of drop path; None: none.

        Returns:
          `image`, at `plan.ids_mask`, and `partner`, at `plan.ids_keep`. All cells count alike.
          A row is about the image of that row; of a prepared batch, `partner` is about its partner.

        Raises:
          ConfigError: if the batch is not prepared, and odd.
        """
        is_prepared = "partner_image" in batch
        if len(batch["image"]) % 2 and not is_prepared:
            raise ConfigError(f"a batch of pairs: expected an even one, got {len(batch['image'])}")
        units, partner = self._units(batch)
        latent = self._encode(units, partner, plan, drop_path_rng)
        image = self._predict(latent, plan, units)
        other = self._predict(latent, _swapped(plan), partner)
        if not is_prepared:
            # To the rows of the images it is about: held-out batches are weighed row by row.
            other = other.replace(output=other.output[::-1], target=other.target[::-1])
        return {"image": image, "partner": other}

    def _units(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the units of the images and of their partners, both [B, N, U]."""
        images = batch["image"]
        partner = batch.get("partner_image", images[::-1])
        return self.unit.split(images), self.unit.split(partner)

    def _predict(self, latent: jax.Array, plan: MaskPlan, units: jax.Array) -> Prediction:
        """Predict what `plan` hides of the image whose units are [B, N, U], from what it keeps."""
        output = self.decoder(masking.take(latent, plan.ids_keep), plan)
        target = masking.take(units, plan.ids_mask)
        if self.norm_pix_loss:
            target = normalize_units(target)
        # Hidden to one or the other, N cells of each pair's mixture are predicted.
        weight = jnp.full(output.shape[:2], 1.0 / (output.shape[0] * self.unit.count))
        return Prediction(output, target, plan.ids_mask, weight, self.unit.count)

    def reconstruct(self, batch: Batch, plan: MaskPlan) -> jax.Array:
        """Return the decoder's images [B, H, W, C], kept cells predicted as well, normalised space.

        With `norm_pix_loss` each cell is un-normalised with the statistics of the *true* cell.
        What the partner is makes no difference, so a batch may be odd.
        """
        units, partner = self._units(batch)
        return self._reconstruct(self._encode(units, partner, plan), plan, units)

    def _reconstruct(self, latent: jax.Array, plan: MaskPlan, units: jax.Array) -> jax.Array:
        """Return images [B, H, W, C] from the tokens of a mixture, of the image `plan` keeps."""
        output = self.decoder(masking.take(latent, plan.ids_keep), plan, skip=0)
        output = masking.restore(output, plan)
        return self.unit.join(denormalize_units(output, units) if self.norm_pix_loss else output)

    def encode(self, batch: Batch, plan: MaskPlan | None = None) -> jax.Array:
        """Return the image's own tokens in a mixture by `plan`, or all of the image itself.

        Returns:
          float32 [B, K, D] after the final norm, in the order of `plan.ids_keep`, or [B, N, D] in
          raster order.
        """
        if plan is None:
            return self.encoder.encode_all(self.unit.split(batch["image"])).astype(jnp.float32)
        tokens = self._encode(*self._units(batch), plan)
        return masking.take(tokens, plan.ids_keep).astype(jnp.float32)

    def features(self, batch: Batch, plan: MaskPlan | None = None) -> jax.Array:
        """Return float32 [B, D]: the mean of the tokens of `encode`."""
        return self.encode(batch, plan).mean(axis=1)

    def panels(self, batch: Batch, plan: MaskPlan) -> dict[str, Panel]:
        """Return image, partner, their mixture, and what is made of both; a batch may be odd."""
        units, partner = self._units(batch)
        latent = self._encode(units, partner, plan)
        hidden = masking.mask_of(plan)[..., None] == 1  # [1, N, 1]
        reconstruction = self._reconstruct(latent, plan, units)
        of_partner = self._reconstruct(latent, _swapped(plan), partner)
        predicted = self.unit.split(reconstruction), self.unit.split(of_partner)
        columns = {
            "original": units,
            "partner": partner,
            "masked": self._mixture(units, partner, plan),
            "reconstruction": predicted[0],
            "pasted": jnp.where(hidden, predicted[0], units),
            "partner_pasted": jnp.where(hidden, partner, predicted[1]),
        }
        return {name: Panel(self.unit.join(x)) for name, x in columns.items()}

    @nn.nowrap
    def panel_captions(self) -> dict[str, str]:
        """Return the captions of `panels`, in order."""
        note = " (true cell mean and std)" if self.norm_pix_loss else ""
        return {
            "original": "original",
            "partner": "partner",
            "masked": f"mixed, {self.mask_ratio:.0%} of the partner",
            "reconstruction": f"reconstruction{note}",
            "pasted": "reconstruction + visible",
            "partner_pasted": "of the partner + visible",
        }

    @nn.nowrap
    def step_flops(self) -> int:
        """Return FLOPs of a training step per image: products only, backward twice the forward.

        Counted as computed: where attention is global, that of each image's tokens alone. The
        embedding's backward pass is counted once, for pixels need no gradient.
        """
        count, keep = self.unit.count, self.keep_count()
        groups = keep, count - keep
        embed, encoder = self.encoder.flops(count, self.unit.size, groups)
        decoder = sum(
            self.decoder.flops(count, seen, self.encoder.output_dim, count - seen)
            for seen in groups
        )
        return 3 * (embed + encoder + decoder) - embed


def _keep_count(count: int, mask_ratio: float) -> int:
    """Return N - int(N r).

    Raises:
      ConfigError: if nothing would be kept or nothing hidden.
    """
    hide = int(count * mask_ratio)
    if not 0 < hide < count:
        raise ConfigError(
            f"mask_ratio {mask_ratio} hides {hide} of {count} cells; at least one must be hidden"
            " and one kept"
        )
    return count - hide


def _swapped(plan: MaskPlan) -> MaskPlan:
    """Return the mask of the other image of a mixture."""
    return MaskPlan(ids_keep=plan.ids_mask, ids_mask=plan.ids_keep)


def make(
    *,
    size: str,
    image_size: tuple[int, int],
    channels: int = 3,
    mask_ratio: float = 0.5,
    norm_pix_loss: bool = True,
    pairing_group: int = 0,
    positions: str = "fixed",
    stem_patch_size: int | None = None,
    stem_dim: int | None = None,
    depths: tuple[int, ...] | None = None,
    num_heads: int | None = None,
    window_sizes: tuple[int, ...] | None = None,
    decoder_embed_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_num_heads: int | None = None,
    dtype: Dtype = jnp.float32,
) -> MixMIM:
    """Build a MixMIM of a named size; a dimension given in addition replaces that of the size.

    Args:
      size: a name in `SIZES`.
      image_size: (height, width) in pixels, each a multiple of a cell, 8 stem patches.
      channels: of the image.
      mask_ratio: share of cells that are the partner's; at least one is, and one is not.
      norm_pix_loss: predict cells normalised by their own statistics.
      pairing_group: consecutive images among which partners are found; even; 0: the batch.
      positions: of the encoder, "fixed" or "learned".
      stem_patch_size: pixels; None: that of the size. The same for all the following.
      stem_dim: width of the first stage, a multiple of 4 and of `num_heads`; doubled by each stage.
      depths: blocks of each stage. With other than four a cell is 2^(stages - 1) stem patches.
      num_heads: heads of the first stage; doubled by each stage.
      window_sizes: see `MixMIMEncoder`; None: by its rule.
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
    if not dims.depths or min(dims.depths) < 1:
        raise ConfigError(f"model.depths {dims.depths}: expected at least 1 for each stage")
    check_width(dims, "stem_dim", "num_heads")
    check_decoder(dims)
    if pairing_group < 0 or pairing_group % 2:
        raise ConfigError(
            f"model.pairing_group {pairing_group}: expected an even number, or 0 for the batch"
        )
    cell = dims.stem_patch_size * 2 ** (len(dims.depths) - 1)
    unit = PatchUnit((image_size[0], image_size[1]), cell, channels)
    _keep_count(unit.count, mask_ratio)
    encoder = MixMIMEncoder(
        grid_size=unit.grid_size,
        stem_dim=dims.stem_dim,
        stage_depths=dims.depths,
        num_heads=dims.num_heads,
        channels=channels,
        window_sizes=None if window_sizes is None else tuple(window_sizes),
        positions=positions,
        dtype=dtype,
    )
    encoder.stages()  # refuses windows that do not fit
    return MixMIM(
        unit=unit,
        encoder=encoder,
        decoder=Decoder(
            grid_size=unit.grid_size,
            unit_size=unit.size,
            embed_dim=dims.decoder_embed_dim,
            depth=dims.decoder_depth,
            num_heads=dims.decoder_num_heads,
            dtype=dtype,
            epsilon=EPSILON,
        ),
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
        pairing_group=pairing_group,
    )
