"""A pre-trained model for those who do not run our trainer: load, prepare images, mask, draw.

Example:
    model = mae_jax.api.load("runs/demo")
    images = model.prepare(["a.png", "b.jpg"])
    features = model.features(images)
    picture = model.reconstruct(images, model.plan(len(images), mask_ratio=0.9))
    classifier, params = model.classifier(num_classes=10)
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

import mae_jax
from mae_jax import build
from mae_jax.data.text import WordPieces, word_pieces
from mae_jax.data.transforms import BadExample
from mae_jax.errors import ConfigError
from mae_jax.files import is_local, words_of
from mae_jax.models.classifier import POOLINGS, Classifier
from mae_jax.models.transfer import make_classifier, transfer_encoder
from mae_jax.tasks import pictures
from mae_jax.tasks.inputs import ImageModel
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.types import Batch, MaskPlan, Params, Rng, Stream

EncodedImage: TypeAlias = epath.PathLike | bytes | np.ndarray
"""A path (a bucket's too), the bytes of an image file, or uint8 [H, W] or [H, W, C]; of a film
likewise, or uint8 [T, H, W, C]."""
Images: TypeAlias = np.ndarray | Mapping[str, np.ndarray]
"""What `prepare` returns; with captions `{"image": ..., **model.prepare_captions(...)}`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model out of a checkpoint. Its methods compile once for each shape they meet.

    Attributes:
      config: the configuration it was trained with, locked.
      step: the step of the checkpoint.
      module: the linen module: a method, `mae_jax.types.Method`, or a `Classifier`.
      params: float32 parameters on one device: `encoder`, and `decoder` or `head` where the
        checkpoint has them.
      task: the module with the normalisation of its input.
      averaged: whether `params` are the moving average of the run's parameters.
      extra: variables beside the parameters: the batch statistics of a linear probe.
    """

    config: ConfigDict = dataclasses.field(repr=False)
    step: int
    module: nn.Module = dataclasses.field(repr=False)
    params: Params = dataclasses.field(repr=False)
    task: ImageModel = dataclasses.field(repr=False)
    averaged: bool = False
    extra: Any = dataclasses.field(default_factory=dict, repr=False)

    def prepare(self, images: Sequence[EncodedImage] | np.ndarray) -> np.ndarray:
        """Decode, resize and crop images as the run's evaluation does; EXIF rotation is applied.

        Of films for a model of clips, the frames in the middle of each are taken.

        Args:
          images: of any sizes, or one array [B, H, W, C]; or films, or one array [B, T, H, W, C].

        Returns:
          uint8 [B, H, W, C] of the model's size, or [B, F, H, W, C].

        Raises:
          BadExample: if one cannot be read; names it.
          ConfigError: if encoded images cannot have the model's number of channels.
        """
        shape = self.module.example()["image"].shape
        if isinstance(images, (str, bytes, os.PathLike)) or (
            isinstance(images, np.ndarray) and images.ndim != 1 + len(shape)
        ):
            axes = "[B, H, W, C]" if len(shape) == 3 else "[B, T, H, W, C]"
            raise ConfigError(f"images: expected a list of images, or an array {axes}, got one")
        read = build.build_eval_reader(self.config.data, one_view=True)
        nothing_random = np.random.default_rng(0)
        prepared = []
        for number, image in enumerate(images):
            is_path = isinstance(image, (str, os.PathLike))
            try:
                encoded = epath.Path(image).expanduser().read_bytes() if is_path else image
                arrays = read({read.field: encoded}, nothing_random, exif=True)
                prepared.append(arrays["image"])
            except OSError as error:
                raise BadExample(f"{image!s}: {words_of(error)}") from error
            except BadExample as error:
                name = str(image) if is_path else f"image {number}"
                raise BadExample(f"{name}: {error}") from error
        return np.stack(prepared) if prepared else np.zeros((0, *shape), np.uint8)

    def prepare_captions(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Return captions as a model of images and captions takes them; "" for none.

        Returns:
          `text` int32 [B, L], word pieces of the vocabulary of the run, and `padding` bool [B, L].

        Raises:
          ConfigError: if the model sees images alone.
        """
        arrays = [self._words(caption) for caption in captions]
        return {
            "text": np.stack([text for text, _ in arrays]),
            "padding": np.stack([padding for _, padding in arrays]),
        }

    def words(self, images: Images, plan: Any) -> list[list[str]]:
        """Return the word pieces of each caption, those that `plan` hides as they are predicted.

        Args:
          images: with captions.
          plan: as `plan` returns it.

        Raises:
          ConfigError: if the model sees images alone, or the checkpoint has no decoder.
        """
        self._needs_decoder("words")
        pieces = self._words.pieces
        if not isinstance(images, Mapping) or "padding" not in images:
            raise ConfigError("words: expected images with captions, got images alone")
        rows = self._call("words", images, plan)
        lengths = (~np.asarray(images["padding"])).sum(axis=1)
        return [pieces(row[:length]) for row, length in zip(rows, lengths, strict=True)]

    @functools.cached_property
    def _words(self) -> WordPieces:
        """Return what makes ids of captions."""
        if "text" not in self.module.example():
            raise ConfigError("captions: expected none, the model sees images alone")
        if not self.config.data.get("vocabulary"):
            raise ConfigError(
                "data.vocabulary: expected the word pieces that the model was trained with, but its"
                " checkpoint has none"
            )
        return word_pieces(self.config.data)

    def plan(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        mask_ratio: float | None = None,
        sampling: str | None = None,
        noise: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> MaskPlan:
        """Choose the patches to hide.

        Args:
          batch_size: B.
          seed: of the draw. Row r does not depend on B.
          mask_ratio: share of patches to hide; None: that of training.
          sampling: `model.mask_sampling` to draw with; None: that of training.
          noise: float [B, N] in place of `seed`, with random sampling alone: the patches with the
            smallest noise are kept.
          mask: the caller's own, bool or 0/1, 1 = hidden, in place of all else: [N] or
            [rows, columns] for all images, or [B, N] or [B, rows, columns] with equally many
            ones for each image; of clips [time, rows, columns].

        Raises:
          ConfigError: if the ratio, the sampling or the mask does not fit the model.
        """
        self._needs_method("plan")
        if mask is not None:
            return self._plan_of(np.asarray(mask), batch_size)
        changes = {"mask_ratio": mask_ratio, "mask_sampling": sampling}
        changes = {name: value for name, value in changes.items() if value is not None}
        for name in changes:
            if name not in self.config.model:
                raise ConfigError(f"{name}: masks of {self.config.model.name} have no such choice")
        module = self.module
        if changes:  # built anew, so that what does not fit is refused as in training
            config = self.config.copy_and_resolve_references().unlock()
            config.model.update(changes)
            module = build.build_model(config)
        key = Rng(jax.random.key(seed), 0).key(Stream.EVAL_MASK)
        return _plan(module, key, batch_size, None if noise is None else jnp.asarray(noise))

    def _plan_of(self, mask: np.ndarray, batch_size: int) -> MaskPlan:
        grid = self.module.unit.grid_size
        count = self.module.unit.count
        axes = len(grid)
        flat = mask.reshape(*mask.shape[:-axes], count) if mask.shape[-axes:] == grid else mask
        if flat.ndim not in (1, 2) or flat.shape[-1] != count:
            raise ConfigError(
                f"mask: expected [{count}], {list(grid)} or one such for each image, got shape"
                f" {list(mask.shape)}"
            )
        rows = flat.reshape(-1, count)
        if len(rows) not in (1, batch_size):
            raise ConfigError(f"mask: expected 1 or {batch_size} masks, got {len(rows)}")
        return self.module.plan_of_mask(rows)

    def encode(self, images: Images, plan: MaskPlan | None = None) -> np.ndarray:
        """Return the encoder's tokens of the patches that are kept, of all without a plan.

        Args:
          images: uint8 [B, H, W, C], as `prepare` returns them.
          plan: as `plan` returns it; None: nothing is hidden.

        Returns:
          float32 [B, c + K, D] after the final norm, in the order of `plan.ids_keep`, or
          [B, c + N, D] in raster order; c = 1 with a class token, which comes first, else 0.

        Raises:
          ConfigError: of a classifier, whose tokens have no final norm.
        """
        self._needs_method("encode")
        return self._call("encode", images, plan)

    def features(
        self, images: Images, plan: MaskPlan | None = None, *, pool: str = "mean"
    ) -> np.ndarray:
        """Return one vector for each image, float32 [B, D].

        Args:
          images: uint8 [B, H, W, C], as `prepare` returns them.
          plan: as `plan` returns it; None: nothing is hidden.
          pool: "mean" of the patch tokens, or "cls", the class token. Of a classifier it is always
            what its linear layer sees.

        Raises:
          ConfigError: if `pool` is unknown, or there is no class token.
        """
        if isinstance(self.module, Classifier):
            return self._call("features", images)
        if pool not in POOLINGS:
            raise ConfigError(f"pool {pool!r} is not one of {', '.join(POOLINGS)}")
        if pool == "mean":  # pooled on the device: the tokens are hundreds of times as large
            return self._call("features", images, plan)
        if not self.module.encoder.use_cls_token:
            raise ConfigError("pool 'cls' needs a class token, model.use_cls_token is False")
        return self.encode(images, plan)[:, 0]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Return float32 [B, classes] of a fine-tuned classifier.

        Raises:
          ConfigError: if this is none.
        """
        if not isinstance(self.module, Classifier):
            raise ConfigError("logits: expected a fine-tuned classifier, got a pre-trained model")
        return self._call("logits", images)

    def classifier(
        self,
        num_classes: int,
        *,
        pooling: str = "mean",
        image_size: tuple[int, int] | None = None,
        frames: int | None = None,
        positions: str | None = None,
        drop_path_rate: float = 0.0,
        seed: int = 0,
    ) -> tuple[Classifier, Params]:
        """Return the encoder with a fresh linear head, to be trained by you.

        Args:
          num_classes: number of logits.
          pooling: "mean" of the patch tokens and a norm, or "cls", the class token.
          image_size: (height, width) if another one; positions are then resized.
          frames: of a clip, likewise; for a model of clips alone.
          positions: "learned", "fixed" or "none"; None: as the official fine-tuning has them.
          drop_path_rate: of the last block.
          seed: of the head.

        Returns:
          A module that maps normalised float32 images, or clips, to logits float32 [B, classes],
          and its parameters, `encoder` and `head`.

        Raises:
          ConfigError: if the fields do not fit the encoder.
        """
        module = make_classifier(
            self.module.unit,
            self.module.encoder,
            num_classes,
            pooling=pooling,
            image_size=image_size,
            frames=frames,
            positions=positions,
            drop_path_rate=drop_path_rate,
        )
        images = jnp.zeros((1, *module.example()["image"].shape))
        fresh = jax.jit(module.init)(jax.random.key(seed), images)["params"]
        encoder = transfer_encoder(
            self.params["encoder"], self.module.encoder, module.encoder, fresh["encoder"]
        )
        return module, {"encoder": encoder, "head": fresh["head"]}

    def _needs_method(self, what: str) -> None:
        if isinstance(self.module, Classifier):
            raise ConfigError(f"{what}: expected a pre-trained model, got a fine-tuned classifier")

    def _needs_decoder(self, what: str) -> None:
        self._needs_method(what)
        if "decoder" not in self.params:
            raise ConfigError(f"{what}: this checkpoint has an encoder and no decoder")

    def reconstruct(self, images: Images, plan: MaskPlan) -> np.ndarray:
        """Return what the decoder makes of the patches that are kept, for every patch.

        A model that was trained on normalised patches (`model.norm_pix_loss`) gives their pattern
        alone: each gets the true mean and deviation of its pixels.

        Args:
          images: uint8 [B, H, W, C], as `prepare` returns them.
          plan: as `plan` returns it.

        Returns:
          float32 [B, H, W, C], the pixels over 255; not cut to [0, 1].

        Raises:
          ConfigError: if the checkpoint has no decoder.
        """
        self._needs_decoder("reconstruct")
        mean, std = (np.asarray(x, np.float32) for x in (self.task.mean, self.task.std))
        return self._call("reconstruct", images, plan) * std + mean

    def panels(self, images: Images, plan: MaskPlan) -> dict[str, np.ndarray]:
        """Return the columns of a picture, as `pictures/step_N.png` has them.

        Args:
          images: uint8 [B, H, W, C], as `prepare` returns them.
          plan: as `plan` returns it.

        Returns:
          uint8 [B, H, W, 3] by name: `masked`, `reconstruction`, `pasted` (the reconstruction of
          hidden patches, the true pixels elsewhere) and `original`.

        Raises:
          ConfigError: if the checkpoint has no decoder.
        """
        self._needs_decoder("panels")
        return {
            name: pictures.to_uint8(panel.images, self.task.mean, self.task.std, panel.hidden)
            for name, panel in self._call("panels", images, plan).items()
        }

    def _call(self, name: str, images: Images, *args: Any) -> Any:
        """Return what the module's function `name` makes of images, on the host."""
        batch = images if isinstance(images, Mapping) else {"image": images}
        batch = {name: np.asarray(array) for name, array in batch.items()}
        if "image" not in batch or ("text" in batch) != ("padding" in batch):
            raise ConfigError(
                "images: expected an array, or `image`, with captions `text` and `padding` too, got"
                f" {', '.join(batch)}"
            )
        images, expected = batch["image"], self.module.example()["image"].shape
        if images.dtype != np.uint8 or images.shape[1:] != expected or not len(images):
            raise ConfigError(
                f"images: expected uint8 [B, {', '.join(map(str, expected))}], as prepare returns"
                f" them, got {images.dtype} {list(images.shape)}"
            )
        variables = self.params, self.extra
        return jax.device_get(_apply(self.task, name, *variables, batch, *args))


# Compiled as wholes: operation by operation takes longer, for each has to be compiled as well.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _plan(module: Any, key: jax.Array, batch_size: int, noise: jax.Array | None) -> MaskPlan:
    return module.plan(key, batch_size, noise)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(task: ImageModel, name: str, params: Params, extra: Any, batch: Any, *args: Any) -> Any:
    return task.call(name, params, batch, *args, extra=extra)


def load(checkpoint: epath.PathLike, *, averaged: bool | None = None) -> Pretrained:
    """Load the model of a run, without the optimiser's state and without its config file.

    Args:
      checkpoint: a work folder or its `checkpoints` (the newest step), its `best` (of a
        classifier), or the folder of one step, `.../checkpoints/1860`. A bucket works.
      averaged: take the moving average of the parameters; None: where the run has kept one.

    Raises:
      ConfigError: if there is no such folder, no checkpoint in it, no average, or what is stored
        does not fit this version of the library.
    """
    folder, step = _locate(epath.Path(checkpoint).expanduser())
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        step = checkpoints.latest_step() if step is None else step
        if step is None:
            raise ConfigError(f"{checkpoint}: expected a run or its checkpoints, got no checkpoint")
        where = checkpoints.path(step)
        meta = checkpoints.read_json(step, "meta")
        config = config_of(meta["config"])
        try:
            module = build.build_model(config)
            task = ImageModel(module, *build.build_normalization(config))
            target, extra_target = abstract_variables(module, config, meta.get("parts"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{where}: written by mae_jax {meta.get('mae_jax')}, it does not fit version"
                f" {mae_jax.__version__}: {reason}"
            ) from error
        both = checkpoints.has_average(step)
        alone = meta.get("averaged", False)  # all that a best checkpoint has
        if averaged and not (both or alone):
            raise ConfigError(f"{where}: holds no averaged parameters (optimizer.ema_decay)")
        averaged = both and averaged is not False
        params = checkpoints.restore_params(step, target, averaged=averaged)
        extra = checkpoints.restore_extra(step, extra_target)
    finally:
        checkpoints.close()
    return Pretrained(config, step, module, params, task, averaged or alone, extra)


def config_of(stored: Mapping[str, Any]) -> ConfigDict:
    """Return a configuration as it was before it became JSON: tuples for lists, locked."""

    def value_of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: value_of(child) for name, child in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ConfigDict(value_of(stored)).lock()


def _locate(path: epath.Path) -> tuple[epath.Path, int | None]:
    """Return the folder of the checkpoints and the step that was asked for, None: the newest."""
    if not path.is_dir():
        raise ConfigError(f"{path}: expected the folder of a run or a checkpoint, got none there")
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    absolute = epath.Path(os.path.abspath(path)) if is_local(path) else path
    if absolute.name.isdigit() and (path / "params").is_dir():
        return absolute.parent, int(absolute.name)
    return path, None


def abstract_variables(
    module: nn.Module, config: ConfigDict, parts: Sequence[str] | None
) -> tuple[Params, Any]:
    """Return the shapes of parameters and extra state, all on the first device of this process.

    Args:
      module: a method or a classifier.
      config: of the normalisation of its images.
      parts: of the parameters that the checkpoint has, `encoder` alone for example; None: all.
    """
    batch = build.batch_of(module, 2)  # some methods take pairs

    def init(key: jax.Array, batch: Batch) -> Any:
        inputs = ImageModel(module, *build.build_normalization(config)).inputs(batch)
        if isinstance(module, Classifier):
            return module.init(key, inputs["image"])
        return module.init(key, inputs, module.plan(key, 2), method="predict")

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(init, jax.random.key(0), batch),
    )
    params = shapes.pop("params")
    return {name: tree for name, tree in params.items() if parts is None or name in parts}, shapes
