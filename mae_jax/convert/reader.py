"""Reading a model off what the user, the settings, the shapes and the name of a file say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np

from mae_jax.convert.files import Stored
from mae_jax.convert.layouts import Arrays, Layout
from mae_jax.errors import ConfigError

PRETRAINED = ("encoder", "decoder")
CLASSIFIER = ("encoder", "head")

TABLE_TOLERANCE = 1e-6
"""A stored position table this near to ours is ours; other programs round it differently."""

# The flag of MAE's training scripts and those after it, and that of VideoMAE's.
NORM_PIX_FLAGS = ("norm_pix_loss", "normlize_target")

# What the names of the official files say of their targets.
TARGETS_BY_NAME = {"mae_pretrain": True, "mae_visualize": False}


@dataclasses.dataclass(frozen=True)
class Told:
    """What the user tells in place of the file; None: nothing.

    Attributes:
      norm_pix_loss: whether the decoder predicts normalised patches.
      image_size: (height, width).
      frames: of a clip.
      num_heads: of the encoder, of its first stage that has heads.
      decoder_num_heads: of the decoder.
      window_size: of UM-MAE's Swin, in tokens of the full grid.
      compat_decoder_order: whether a decoder of UM-MAE was trained with the released order.
    """

    norm_pix_loss: bool | None = None
    image_size: tuple[int, int] | None = None
    frames: int | None = None
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    window_size: int | None = None
    compat_decoder_order: bool | None = None


class Reader:
    """What a file with the names of `layout` says of its model.

    Attributes:
      stored: the file.
      state: its arrays.
      layout: whose names it has.
      told: what the user tells.
      parts: which parts of a model there are.
      notes: lines on what was taken for granted; families add to them.
    """

    def __init__(self, stored: Stored, state: Arrays, layout: Layout, told: Told):
        self.stored = stored
        self.state = state
        self.layout = layout
        self.told = told
        self.notes: list[str] = []
        self.parts: tuple[str, ...] = ("encoder",)
        if layout.has("decoder", state):
            self.parts = PRETRAINED
        elif self.has("head/linear/kernel"):
            self.parts = CLASSIFIER

    def has(self, path: str) -> bool:
        """Return whether there is an array for our path, which has no number."""
        return self.layout.holds([path]) and self.layout.names(path)[0] in self.state

    def shape(self, path: str, rank: int, depths: Iterable[int] = ()) -> tuple[int, ...]:
        """Return the shape that the array of our path has in their layout.

        Raises:
          ConfigError: if it is missing or has not `rank` dimensions.
        """
        name = self.layout.names(path, tuple(depths))[0]
        if name not in self.state:
            raise ConfigError(f"{self.stored.name}: {name} is missing")
        shape = self.state[name].shape
        if len(shape) != rank or min(shape) < 1:
            raise ConfigError(
                f"{self.stored.name}: {name}: expected {rank} dimensions, got shape {list(shape)}"
            )
        return shape

    def stem(self) -> tuple[int, int, int]:
        """Return width, channels and side of the first convolution, which is square."""
        width, channels, side, across = self.shape("encoder/patch_embed/kernel", 4)
        if side != across:
            raise ConfigError(f"{self.stored.name}: patches of {side} x {across}: not square")
        return width, channels, side

    def stages(self, count: int) -> tuple[int, ...]:
        """Return the blocks of each of `count` stages."""
        depths = self.layout.depths(self.state)
        if len(depths) != count:
            raise ConfigError(
                f"{self.stored.name}: expected blocks of {count} stages, got those of {len(depths)}"
            )
        return depths

    def decoder(self, sizes: Iterable[Any]) -> dict[str, int]:
        """Return the dimensions of the decoder, if there is one.

        Args:
          sizes: the published ones, which tell the heads that are usual for a width.
        """
        if "decoder" not in self.parts:
            return {}
        width = self.shape("decoder/norm/scale", 1)[0]
        usual = {size.decoder_embed_dim: size.decoder_num_heads for size in sizes}
        return {
            "decoder_embed_dim": width,
            "decoder_depth": self.layout.depth("decoder", self.state),
            "decoder_num_heads": self.heads("decoder_", width, usual),
        }

    def heads(self, prefix: str, width: int, usual: Mapping[int, int]) -> int:
        """Return the number of heads: told, stored, or usual for the width; no shape shows it.

        Args:
          prefix: of the names of the fields: "", or "decoder_".
          width: of the tokens.
          usual: by their width.
        """
        field = f"{prefix}num_heads"
        stored = self.stored.config.get(f"{prefix}num_attention_heads")
        heads = getattr(self.told, field) or stored or usual.get(width)
        if not isinstance(heads, int):
            raise ConfigError(
                f"--{field}: expected the number of heads, which {self.stored.name} does not tell;"
                f" its width {width} is none of {', '.join(map(str, usual))}"
            )
        return heads

    def image_size(self, rows: int, patch: int) -> tuple[int, int]:
        """Return (height, width) such that there are as many patches as rows of a table."""
        told = self.told.image_size or self._stored_size()
        if told is not None:
            height, width = told
        else:
            height = width = patch * round(rows**0.5)
        if height % patch or width % patch or (height // patch) * (width // patch) != rows:
            raise ConfigError(
                f"--image_size: expected height,width of {rows} patches of {patch} pixels, as"
                f" {self.stored.name} has positions, got {height},{width}"
            )
        return height, width

    def image_size_told(self) -> tuple[int, int]:
        """Return (height, width) where no array has a row for each place."""
        side = self.stored.args.get("input_size")
        told = self.told.image_size or self._stored_size()
        if told is not None:
            return told
        if isinstance(side, int):
            return side, side
        raise ConfigError(
            f"--image_size: expected height,width of the images, which {self.stored.name} does not"
            " tell"
        )

    def _stored_size(self) -> tuple[int, int] | None:
        """Return (height, width) of `config.json`, if it has them."""
        stored = self.stored.config.get("image_size")
        pair = [stored, stored] if isinstance(stored, int) else stored
        if isinstance(pair, list) and [type(side) for side in pair] == [int, int]:
            return pair[0], pair[1]
        return None

    def frames(self) -> int:
        """Return the frames of a clip: told or stored; no shape shows them."""
        kept = self.stored.config.get("num_frames", self.stored.args.get("num_frames"))
        frames = self.told.frames or kept
        if not isinstance(frames, int):
            raise ConfigError(
                f"--frames: expected the frames of a clip, which {self.stored.name} does not tell"
            )
        return frames

    def target(self, always_normalised: bool) -> tuple[bool, str] | None:
        """Return whether the decoder's target is normalised, and who says so; None: no decoder.

        Args:
          always_normalised: the authors' code leaves no choice, whatever their flags say.
        """
        if "decoder" not in self.parts:
            return None
        args, config = self.stored.args, self.stored.config
        if self.told.norm_pix_loss is not None:
            return self.told.norm_pix_loss, "--norm_pix_loss"
        if always_normalised:
            return True, "always, in the authors' code"
        for name in NORM_PIX_FLAGS:
            if isinstance(args.get(name), bool):
                return args[name], f"args.{name} in the file"
        if isinstance(config.get("norm_pix_loss"), bool):
            return config["norm_pix_loss"], "config.json"
        for start, normalised in TARGETS_BY_NAME.items():
            if self.stored.name.startswith(start):
                return normalised, "the name of the file"
        raise ConfigError(
            f"--norm_pix_loss: expected true or false, for {self.stored.name} does not say whether"
            " its decoder predicts normalised patches"
        )

    def set_statistics(self, config: Any, usual: str) -> str:
        """Set the mean and deviation of pixels; return what they are, in words.

        Args:
          config: has those of the method's models.
          usual: whose those are.
        """
        mean, std = (self.stored.preprocessor.get(f"image_{name}") for name in ("mean", "std"))
        channels = config.model.channels
        if _is_floats(mean, channels) and _is_floats(std, channels) and min(std) > 0:
            config.data.mean, config.data.std = tuple(map(float, mean)), tuple(map(float, std))
            source = "preprocessor_config.json"
        elif channels == len(config.data.mean):
            source = usual
        else:
            config.data.mean, config.data.std = (0.5,) * channels, (0.5,) * channels
            source = "a guess: the file does not tell"
        return f"mean {list(config.data.mean)}, std {list(config.data.std)} ({source})"

    def positions(self, fixed_table: np.ndarray) -> str:
        """Return "fixed" if the stored table of the encoder is ours, else "learned"."""
        stored = self.state[self.layout.arrays["encoder/pos_embed"]]
        return "fixed" if same_table(stored, fixed_table) else "learned"


def same_table(stored: np.ndarray, ours: np.ndarray) -> bool:
    """Return whether a stored table of positions is ours but for rounding."""
    return stored.shape == ours.shape and bool(np.abs(stored - ours).max() <= TABLE_TOLERANCE)


def _is_floats(values: Any, count: int) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) for value in values)
    )
