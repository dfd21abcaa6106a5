"""What methods that predict the pixels of an image's units have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.encoder import Encoder
from mae_jax.nn import masking
from mae_jax.nn.patches import Unit, denormalize_units, normalize_units
from mae_jax.types import Batch, MaskPlan, Panel, Prediction


class ImageMethod(nn.Module):
    """An encoder of the units that are kept, and something that predicts the others from that.

    Attributes:
      unit: how an image is cut into units (pure, no parameters).
      encoder: sees units and their places.
      norm_pix_loss: the target is each unit normalised with its own mean and deviation.
    """

    if TYPE_CHECKING:  # fields of every subclass

        @property
        def unit(self) -> Unit:
            """How an image is cut into units."""
            ...

        @property
        def encoder(self) -> Encoder:
            """What sees units."""
            ...

        @property
        def norm_pix_loss(self) -> bool:
            """Whether the target is normalised."""
            ...

    # "hidden" units are predicted in training, or "all"; a field where there is a choice.
    loss_on = "hidden"
    # The error, a kind of `Prediction`.
    error = "mse"

    @nn.nowrap
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and dtype of an image."""
        return {"image": jax.ShapeDtypeStruct(self.unit.shape, jnp.uint8)}

    @nn.nowrap
    def prepare(self, batch: Batch) -> Batch:
        """Return the batch as it is: examples have nothing to do with each other."""
        return batch

    def _outputs(
        self,
        units: jax.Array,
        plan: MaskPlan,
        skip: int,
        drop_path_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Return float32 [B, N - skip, U], predictions in kept-then-hidden order.

        Args:
          units: [B, N, U].
          plan: what is hidden.
          skip: how many units to make no prediction for: the K kept ones, or 0.
          drop_path_rng: key of drop path; None: none.
        """
        raise NotImplementedError

    @nn.nowrap
    def _true_units(self, batch: Batch) -> jax.Array:
        """Return the units [B, N, U] that are to be predicted: what the network takes."""
        return self.unit.split(batch["image"])

    @nn.nowrap
    def _targets(self, units: jax.Array) -> jax.Array:
        """Return what is to be predicted of true units [B, M, U]."""
        return normalize_units(units) if self.norm_pix_loss else units

    @nn.nowrap
    def _inputs_of(self, output: jax.Array, batch: Batch) -> jax.Array:
        """Return predictions [B, N, U] in raster order as what the network takes; see `_targets`.

        Normalised units get the statistics of the *true* ones.
        """
        if not self.norm_pix_loss:
            return output
        return denormalize_units(output, self.unit.split(batch["image"]))

    def predict(
        self, batch: Batch, plan: MaskPlan, *, drop_path_rng: jax.Array | None = None
    ) -> dict[str, Prediction]:
        """Predict the hidden units (or all) of `batch["image"]`, normalised float32 [B, H, W, C].

        Every unit predicted counts alike in the mean over the batch, as in the official
        `forward_loss`, which divides by the number of removed patches.
        """
        units = self.unit.split(batch["image"])
        skip = 0 if self.loss_on == "all" else plan.ids_keep.shape[1]
        output = self._outputs(units, plan, skip, drop_path_rng)
        ids = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)[:, skip:]
        target = self._targets(masking.take(self._true_units(batch), ids))
        weight = jnp.full(output.shape[:2], 1.0 / (output.shape[0] * output.shape[1]))
        return {"image": Prediction(output, target, ids, weight, self.unit.count, self.error)}

    def reconstruct(self, batch: Batch, plan: MaskPlan) -> jax.Array:
        """Return the predicted images [B, H, W, C], kept units predicted as well, normalised space.

        With `norm_pix_loss` each unit is un-normalised with the statistics of the *true* unit:
        the model predicts the pattern of a patch, not its brightness and contrast.
        """
        units = self.unit.split(batch["image"])
        output = masking.restore(self._outputs(units, plan, skip=0), plan)
        return self.unit.join(self._inputs_of(output, batch))

    def encode(self, batch: Batch, plan: MaskPlan | None = None) -> jax.Array:
        """Return the tokens of the units that `plan` keeps, of all without a plan.

        Returns:
          float32 [B, c + T, D] after the final norm; for an encoder with a token for each unit in
          the order of `plan.ids_keep`, or in raster order; c = 1 with a class token, which comes
          first, else 0.
        """
        units = self.unit.split(batch["image"])
        if plan is None:
            tokens = self.encoder.encode_all(units)
        else:
            masking.check_plan(plan, len(units), self.unit.count)
            seen = masking.take(units, plan.ids_keep)
            tokens = self.encoder(seen, plan.ids_keep, replaced=plan.replaced)
        return tokens.astype(jnp.float32)

    def features(self, batch: Batch, plan: MaskPlan | None = None) -> jax.Array:
        """Return float32 [B, D]: the mean of the patch tokens of `encode`."""
        return self.encoder.patch_tokens(self.encode(batch, plan)).mean(axis=1)

    def panels(self, batch: Batch, plan: MaskPlan) -> dict[str, Panel]:
        """Return the four columns of MAE's figures; dark is what the encoder sees a token for."""
        return self._columns(batch["image"], plan, self.reconstruct(batch, plan))

    def _columns(
        self, images: jax.Array, plan: MaskPlan, reconstruction: jax.Array
    ) -> dict[str, Panel]:
        """Return the columns of images [B, H, W, C] and what was made of them under a mask."""
        shade = (masking.mask_of(plan) + 2 * masking.replaced_of(plan))[..., None]  # [R, N, 1]
        units = jnp.broadcast_to(shade, (images.shape[0], self.unit.count, self.unit.size))
        hidden = self.unit.join(units)[..., :1]
        return {
            "masked": Panel(images, hidden),
            "reconstruction": Panel(reconstruction),
            "pasted": Panel(jnp.where(hidden == 1, reconstruction, images)),
            "original": Panel(images),
        }

    @nn.nowrap
    def masked_caption(self) -> str:
        """Return what the first panel shows."""
        raise NotImplementedError

    @nn.nowrap
    def panel_captions(self) -> dict[str, str]:
        """Return the captions of `panels`, in order."""
        note = " (true patch mean and std)" if self.norm_pix_loss else ""
        return {
            "masked": self.masked_caption(),
            "reconstruction": f"reconstruction{note}",
            "pasted": "reconstruction + visible",
            "original": "original",
        }
