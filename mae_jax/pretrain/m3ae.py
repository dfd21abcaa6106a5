"""M3AE: "Multimodal Masked Autoencoders" (Geng et al., arXiv 2205.14204)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.encoder import POSITIONS
from mae_jax.models.fields import check_choice, check_decoder, check_width, sized
from mae_jax.models.image_method import ImageMethod
from mae_jax.models.m3ae import M3AEEncoder, Words, take_words
from mae_jax.models.m3ae_decoder import MODALITIES, M3AEDecoder
from mae_jax.nn import masking
from mae_jax.nn.layers import Dtype
from mae_jax.nn.patches import PatchUnit
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


# young-geng/m3ae_public `get_transformer_by_config`; one decoder and patches of 16 pixels for all.
SIZES = {
    "small": Size(16, 384, 12, 6),
    "base": Size(16, 768, 12, 12),
    "large": Size(16, 1024, 24, 16),
    "huge": Size(16, 1280, 32, 16),
}
# Word pieces of BERT base, uncased, which the released weights are of.
BERT_WORDS = 30522

MASK_PER = ("batch", "sample")
UNPAIRED = "unpaired_text"
UNPAIRED_PADDING = "unpaired_padding"

Plan = Mapping[str, MaskPlan]
"""By modality: `image`, where there is text `text`, and where it is asked for `unpaired_text`."""


class M3AE(ImageMethod):
    """Hide patches of an image and words of its caption; predict both from what is left of both.

    Batches hold, beside `image`, `text` int32 [B, L], words of a vocabulary, and `padding` bool
    [B, L], True where there is no word. A row that is all padding is an image without a caption: it
    trains the image's part alone. `unpaired_text` and `unpaired_padding` [B, L'] are texts without
    an image, which run through the same network by themselves.

    With a vocabulary of 0 words it is the authors' MAE, the baseline: images alone.

    Attributes:
      unit: how an image is cut into units (pure, no parameters).
      encoder: sees kept patches and words.
      decoder: predicts hidden ones.
      text_length: L, places of words of a caption.
      unpaired_text_length: L'.
      mask_ratio: share of patches to hide.
      text_mask_ratio: share of places of words to hide, padding among them.
      mask_per: "batch", one mask of each modality for all, as the authors have it (for all that are
        on a device; ours does not depend on the devices), or "sample", one for each example.
      text_loss_weight: of the words' part of the loss; that of the pixels counts 1.
      unpaired_loss_weight: of texts without an image; 0: there are none in a batch.
    """

    unit: PatchUnit
    encoder: M3AEEncoder
    decoder: M3AEDecoder
    text_length: int = 0
    unpaired_text_length: int = 0
    mask_ratio: float = 0.75
    text_mask_ratio: float = 0.75
    mask_per: str = "batch"
    text_loss_weight: float = 0.5
    unpaired_loss_weight: float = 0.0

    # Pixels as they are in the network's input: the authors do not norm patches.
    norm_pix_loss = False

    @nn.nowrap
    def lengths(self) -> dict[str, int]:
        """Return how many places there are to hide of each modality that is trained."""
        lengths = {"image": self.unit.count}
        if self.encoder.vocabulary_size:
            lengths["text"] = self.text_length
            if self.unpaired_loss_weight:
                lengths[UNPAIRED] = self.unpaired_text_length
        return lengths

    @nn.nowrap
    def keep_counts(self) -> dict[str, int]:
        """Return K = int(L (1 - ratio)) of each modality that is trained."""
        ratio = self.mask_ratio, self.text_mask_ratio
        return {
            name: masking.keep_count(length, ratio[0 if name == "image" else 1])
            for name, length in self.lengths().items()
        }

    @nn.nowrap
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and dtypes of image and texts."""
        arrays = super().example()
        for name, padding in (("text", "padding"), (UNPAIRED, UNPAIRED_PADDING)):
            if name in self.lengths():
                shape = (self.lengths()[name],)
                arrays[name] = jax.ShapeDtypeStruct(shape, jnp.int32)
                arrays[padding] = jax.ShapeDtypeStruct(shape, jnp.bool_)
        return arrays

    @nn.nowrap
    def plan(  # type: ignore[override]
        self,
        rng: jax.Array,
        batch_size: int,
        noise: Mapping[str, jax.Array] | jax.Array | None = None,
    ) -> dict[str, MaskPlan]:
        """Draw the masks, for all or one per example, as `mask_per` says.

        Those of one modality do not depend on which others there are.

        Args:
          rng: key.
          batch_size: B.
          noise: float [R, N] of some modalities by name, or of the image, that decide instead of
            `rng`: R = 1 with masks per batch, else B; those with the smallest are kept.
        """
        if noise is None:
            noise = {}
        elif not isinstance(noise, Mapping):
            noise = {"image": noise}
        rows = batch_size if self.mask_per == "sample" else 1
        keep = self.keep_counts()
        return {
            name: masking.random_plan(
                jax.random.fold_in(rng, number), rows, length, keep[name], noise.get(name)
            )
            for number, (name, length) in enumerate(self.lengths().items())
        }

    @nn.nowrap
    def plan_of_mask(self, mask: np.ndarray) -> dict[str, MaskPlan]:  # type: ignore[override]
        """Return the plan of a caller's own mask of the image, with all words of a caption seen.

        Texts without an image have no part in it.

        Raises:
          ConfigError: if it is no mask; see `mae_jax.nn.masking.plan_of_mask`.
        """
        plan = {"image": masking.plan_of_mask(mask)}
        if self.encoder.vocabulary_size:
            plan["text"] = _nothing_hidden(self.text_length)
        return plan

    def predict(  # type: ignore[override]
        self, batch: Batch, plan: Plan, *, drop_path_rng: jax.Array | None = None
    ) -> dict[str, Prediction]:
        """Predict what `plan` hides.

        Args:
          batch: `image` normalised float32 [B, H, W, C], and texts as far as the plan has them.
          plan: of each modality.
          drop_path_rng: key of drop path; None: none.

        Returns:
          `image`: the squared error is a mean over hidden patches. `text` and `unpaired_text`: the
          cross entropy is a mean over the hidden words of a text, then over the batch; a text none
          of whose words is hidden counts as 0. A modality of which nothing is hidden is left out.
        """
        paired = {name: plan[name] for name in MODALITIES if name in plan}
        predictions = self._predict(batch, paired, drop_path_rng)
        weights = {"image": 1.0, "text": self.text_loss_weight, UNPAIRED: self.unpaired_loss_weight}
        if UNPAIRED in plan:
            alone = {"text": batch[UNPAIRED], "padding": batch[UNPAIRED_PADDING]}
            if drop_path_rng is not None:  # blocks fold in their number
                drop_path_rng = jax.random.fold_in(drop_path_rng, self.encoder.depth)
            unpaired = self._predict(alone, {"text": plan[UNPAIRED]}, drop_path_rng)
            predictions[UNPAIRED] = unpaired["text"]
        return {
            name: prediction.replace(weight=weights[name] * prediction.weight)
            for name, prediction in predictions.items()
        }

    def _predict(
        self, batch: Batch, plan: Plan, drop_path_rng: jax.Array | None
    ) -> dict[str, Prediction]:
        """Return predictions of `image` and `text`, or one of them, that both weigh 1."""
        predictions = {}
        for name, output in self._decoded(batch, plan, drop_path_rng=drop_path_rng).items():
            ids, rows, hidden = plan[name].ids_mask, *output.shape[:2]
            if name == "image":
                target = masking.take(self.unit.split(batch["image"]), ids)
                weight = jnp.full((rows, hidden), 1.0 / (rows * hidden))
                places, kind = self.unit.count, "mse"
            else:
                target = take_words(batch["text"], ids)
                is_word = (~take_words(batch["padding"], ids)).astype(jnp.float32)
                count = jnp.maximum(is_word.sum(axis=1, keepdims=True), 1e-5)
                weight = is_word / (rows * count)
                places, kind = batch["text"].shape[1], "cross_entropy"
            predictions[name] = Prediction(output, target, ids, weight, places, kind)
        return predictions

    def _encoded(
        self, batch: Batch, plan: Plan, drop_path_rng: jax.Array | None = None
    ) -> jax.Array:
        """Return the tokens of what the plan keeps: class token, patches, words."""
        units = ids = words = None
        if "image" in plan:
            units, ids = self.unit.split(batch["image"]), plan["image"].ids_keep
            masking.check_plan(plan["image"], units.shape[0], self.unit.count)
            units = masking.take(units, ids)
        if "text" in plan:
            text, places = batch["text"], plan["text"].ids_keep
            masking.check_plan(plan["text"], *text.shape)
            padding = take_words(batch["padding"], places)
            words = Words(take_words(text, places), places, padding)
        return self.encoder(units, ids, words=words, drop_path_rng=drop_path_rng)

    def _decoded(
        self,
        batch: Batch,
        plan: Plan,
        *,
        everything: Collection[str] = (),
        drop_path_rng: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Return what the decoder predicts; see `M3AEDecoder`."""
        latent = self._encoded(batch, plan, drop_path_rng)
        return self.decoder(latent, plan, batch.get("padding"), everything=everything)

    def _seen(self, batch: Batch, plan: Plan | None) -> dict[str, MaskPlan]:
        """Return the plan for image and caption, as far as the batch has them; None: of all."""
        whole = {"image": _nothing_hidden(self.unit.count)}
        if self.encoder.vocabulary_size:
            whole["text"] = _nothing_hidden(self.text_length)
        plan = whole if plan is None else plan
        return {name: plan[name] for name in MODALITIES if name in plan and name in batch}

    def reconstruct(self, batch: Batch, plan: Plan) -> jax.Array:  # type: ignore[override]
        """Return the predicted images [B, H, W, C], kept patches predicted as well, normalised.

        They are predicted from the visible patches and, if the batch has a caption, its visible
        words.
        """
        output = self._decoded(batch, self._seen(batch, plan), everything=("image",))["image"]
        return self.unit.join(masking.restore(output, plan["image"]))

    def words(self, batch: Batch, plan: Plan) -> jax.Array:
        """Return int32 [B, L]: the likeliest word at each hidden place, the true one elsewhere.

        Where there is padding it stays what it was.
        """
        text, seen = batch["text"], self._seen(batch, plan)
        output = self._decoded(batch, seen).get("text")
        if output is None:
            return text
        kept = take_words(text, seen["text"].ids_keep)
        predicted = jnp.argmax(output, axis=-1).astype(text.dtype)
        ordered = jnp.concatenate([kept, predicted], axis=1)
        words = masking.restore(ordered[..., None], seen["text"])[..., 0]
        return jnp.where(batch["padding"], text, words)

    def encode(self, batch: Batch, plan: Plan | None = None) -> jax.Array:  # type: ignore[override]
        """Return the tokens of what `plan` keeps of image and caption, of all without a plan.

        Returns:
          float32 [B, 1 + K + K', D] after the final norm: the class token, patches, and where the
          batch has `text`, words (padding among them), in the order of the plan, or as they stand.
        """
        return self._encoded(batch, self._seen(batch, plan)).astype(jnp.float32)

    def features(  # type: ignore[override]
        self, batch: Batch, plan: Plan | None = None
    ) -> jax.Array:
        """Return float32 [B, D]: the mean of the patch tokens of the image *alone*.

        Captions often name what is in an image: a read-out that saw them would measure the caption.
        """
        tokens = self.encode({"image": batch["image"]}, plan)
        return self.encoder.patch_tokens(tokens).mean(axis=1)

    def panels(self, batch: Batch, plan: Plan) -> dict[str, Panel]:  # type: ignore[override]
        """Return the four columns of MAE's figures; the caption's visible words are seen too."""
        return self._columns(batch["image"], plan["image"], self.reconstruct(batch, plan))

    @nn.nowrap
    def masked_caption(self) -> str:
        """Return what the first panel shows."""
        return f"masked {self.mask_ratio:.0%}"

    @nn.nowrap
    def step_flops(self) -> int:
        """Return FLOPs of a training step per example: products only, backward twice the forward.

        The embedding's backward pass is counted once, for pixels need no gradient.
        """
        keep, lengths = self.keep_counts(), self.lengths()

        def forward(*names: str) -> tuple[int, int]:
            """Return FLOPs of (embedding, the rest) for patches and words by these names."""
            kept, count = ([x.get(name, 0) for name in names] for x in (keep, lengths))
            embed, blocks = self.encoder.flops(kept[0], self.unit.size, kept[1])
            hidden = dict(zip(MODALITIES, np.subtract(count, kept).tolist(), strict=True))
            decoder = self.decoder.flops(
                1 + sum(kept), self.encoder.output_dim, 1 + sum(count), hidden
            )
            return embed, blocks + decoder

        embed, rest = forward("image", "text")
        if UNPAIRED in lengths:
            rest += forward("none", UNPAIRED)[1]
        return 3 * (embed + rest) - embed


def _nothing_hidden(count: int) -> MaskPlan:
    """Return the plan that keeps all, in order, of each example."""
    ids = jnp.arange(count, dtype=jnp.int32)[None]
    return MaskPlan(ids_keep=ids, ids_mask=ids[:, :0])


def make(
    *,
    size: str,
    image_size: tuple[int, int],
    channels: int = 3,
    vocabulary_size: int = BERT_WORDS,
    text_length: int = 64,
    unpaired_text_length: int = 256,
    mask_ratio: float = 0.75,
    text_mask_ratio: float = 0.75,
    mask_per: str = "batch",
    text_loss_weight: float = 0.5,
    unpaired_loss_weight: float = 0.0,
    use_type_vectors: bool = True,
    output_head_depth: int = 0,
    positions: str = "fixed",
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    decoder_embed_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_num_heads: int | None = None,
    dtype: Dtype = jnp.float32,
) -> M3AE:
    """Build an M3AE of a named size; a dimension given in addition replaces that of the size.

    Args:
      size: a name in `SIZES`.
      image_size: (height, width) in pixels, each a multiple of the patch size.
      channels: of the image.
      vocabulary_size: words, or pieces of words; 0: images alone, the authors' MAE.
      text_length: places of words of a caption.
      unpaired_text_length: of a text without an image; not used if those have no weight.
      mask_ratio: share of patches to hide, such that at least one is kept and one hidden.
      text_mask_ratio: share of places of words to hide, of captions and other texts alike.
      mask_per: "batch" or "sample".
      text_loss_weight: of the words' part of the loss: 0.5 in the authors' command, 0.1 in their
        code.
      unpaired_loss_weight: of texts without an image; 0: batches have none.
      use_type_vectors: tell patches from words by a learned vector.
      output_head_depth: layers of each head before the last.
      positions: of the encoder, of patches: "fixed" or "learned".
      patch_size: pixels; None: that of the size. The same for all the following.
      embed_dim: width of the encoder, a multiple of 4 and of `num_heads`.
      depth: blocks of the encoder.
      num_heads: heads of the encoder.
      decoder_embed_dim: width of the decoder, a multiple of 4 and of `decoder_num_heads`.
      decoder_depth: blocks of the decoder.
      decoder_num_heads: heads of the decoder.
      dtype: of the products; parameters, softmax and the loss are float32.

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
    check_choice("mask_per", mask_per, MASK_PER)
    check_width(dims, "embed_dim", "num_heads")
    check_decoder(dims)
    for name, number, least in (
        ("depth", dims.depth, 1),
        ("vocabulary_size", vocabulary_size, 0),
        ("text_loss_weight", text_loss_weight, 0),
        ("unpaired_loss_weight", unpaired_loss_weight, 0),
        ("output_head_depth", output_head_depth, 0),
    ):
        if number < least:
            raise ConfigError(f"model.{name} {number}: expected at least {least}")
    if unpaired_loss_weight and not vocabulary_size:
        raise ConfigError(
            f"model.unpaired_loss_weight {unpaired_loss_weight}: model.vocabulary_size is 0, there"
            " is no text; expected 0"
        )
    unit = PatchUnit((image_size[0], image_size[1]), dims.patch_size, channels)
    masking.keep_count(unit.count, mask_ratio)
    longest = 0
    if vocabulary_size:
        used = [text_length, *([unpaired_text_length] if unpaired_loss_weight else [])]
        for length in used:
            masking.keep_count(length, text_mask_ratio, "text_mask_ratio")
        longest = max(used)
    return M3AE(
        unit=unit,
        encoder=M3AEEncoder(
            grid_size=unit.grid_size,
            embed_dim=dims.embed_dim,
            depth=dims.depth,
            num_heads=dims.num_heads,
            positions=positions,
            dtype=dtype,
            vocabulary_size=vocabulary_size,
            text_length=longest,
            use_type_vectors=use_type_vectors,
        ),
        decoder=M3AEDecoder(
            grid_size=unit.grid_size,
            unit_size=unit.size,
            vocabulary_size=vocabulary_size,
            text_length=longest,
            embed_dim=dims.decoder_embed_dim,
            depth=dims.decoder_depth,
            num_heads=dims.decoder_num_heads,
            head_depth=output_head_depth,
            use_type_vectors=use_type_vectors,
            dtype=dtype,
        ),
        text_length=text_length,
        unpaired_text_length=unpaired_text_length,
        mask_ratio=mask_ratio,
        text_mask_ratio=text_mask_ratio,
        mask_per=mask_per,
        text_loss_weight=text_loss_weight,
        unpaired_loss_weight=unpaired_loss_weight,
    )
