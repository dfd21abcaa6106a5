"""Other libraries' weights as ours: which model they are of is read from shapes and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from mae_jax import recipes
from mae_jax.convert import layouts
from mae_jax.convert.files import Stored
from mae_jax.convert.layouts import Layout
from mae_jax.convert.weights import CLASSIFIER, PRETRAINED, Weights, fixed_tables, model_of, shapes
from mae_jax.errors import ConfigError
from mae_jax.nn.blocks import LAYER_NORM_EPS
from mae_jax.pretrain.mae import SIZES, Size

TABLE_TOLERANCE = 1e-6
"""A stored position table this near to ours is ours; other programs round it differently."""

# What the names of the official files say of their targets.
TARGETS_BY_NAME = {"mae_pretrain": True, "mae_visualize": False}


@dataclasses.dataclass(frozen=True)
class Told:
    """What the user tells in place of the file; None: nothing.

    Attributes:
      norm_pix_loss: whether the decoder predicts normalised patches.
      image_size: (height, width).
      num_heads: of the encoder.
      decoder_num_heads: of the decoder.
    """

    norm_pix_loss: bool | None = None
    image_size: tuple[int, int] | None = None
    num_heads: int | None = None
    decoder_num_heads: int | None = None


def weights_of(stored: Stored, told: Told) -> tuple[Weights, list[str]]:
    """Return the weights in our layout, and what was recognised, a line each.

    Raises:
      ConfigError: if the names are of no known layout, an array is missing, left over or of another
        shape, the model is none of ours, or something must be told that the file does not say.
    """
    state = layouts.fuse_split_biases(stored.state)
    layout = layouts.recognise(state, stored.name)
    reader = _Reader(stored, state, layout, told)
    config = recipes.mae_pretrain()
    reader.check_settings()
    parts = reader.parts()
    reader.set_dimensions(config.model, parts)
    if "head" in parts:
        config.task = "finetune"
        config.model.num_classes = reader.shape("head/linear/bias", 1)[0]
        config.model.pooling = "mean" if layout.has("head/norm", state) else "cls"
    target = reader.target(parts)
    if target is not None:
        config.model.norm_pix_loss = target[0]
    statistics = reader.set_statistics(config)
    tables = fixed_tables(config, parts)
    config.model.positions = reader.positions(tables)
    leaves = shapes(config, parts)
    _check(stored.name, layout, state, config, leaves, tables)
    _check_decoder_table(stored.name, layout, state, tables)
    weights = Weights(config, parts, layout.to_ours(state, leaves))
    lines = [
        f"{stored.name}: {stored.kind} with the names of {layout.name}",
        *lines_of(weights),
        *([] if target is None else [f"  target     {_target_words(*target)}"]),
        f"  pixels     {statistics}",
        *reader.notes(),
        f"  arrays     {len(state)} read, all mapped",
    ]
    return weights, lines


class _Reader:
    """Reads the model off what the user, the settings and shapes in a file and its name say."""

    def __init__(self, stored: Stored, state: layouts.Arrays, layout: Layout, told: Told):
        self._stored = stored
        self._state = state
        self._layout = layout
        self._told = told

    def shape(self, path: str, rank: int) -> tuple[int, ...]:
        """Return the shape of the array that our `path` has in their layout."""
        name = self._layout.names(path)[0]
        if name not in self._state:
            raise ConfigError(f"{self._stored.name}: {name} is missing")
        shape = self._state[name].shape
        if len(shape) != rank or min(shape) < 1:
            raise ConfigError(
                f"{self._stored.name}: {name}: expected {rank} dimensions, got shape {list(shape)}"
            )
        return shape

    def check_settings(self) -> None:
        """Refuse a kind of transformers' model, or an activation, that is not ours."""
        for name, known in (("model_type", ("vit", "vit_mae")), ("hidden_act", ("gelu",))):
            value = self._stored.config.get(name, known[0])
            if value not in known:
                raise ConfigError(
                    f"{self._stored.name}/config.json: {name} {value!r}: expected"
                    f" {' or '.join(known)}"
                )

    def parts(self) -> tuple[str, ...]:
        """Return which parts of a model there are."""
        if self._layout.has("decoder", self._state):
            return PRETRAINED
        has_head = self._layout.names("head/linear/kernel")[0] in self._state
        return CLASSIFIER if has_head else ("encoder",)

    def set_dimensions(self, model: Any, parts: Sequence[str]) -> None:
        """Set the fields of `config.model` that shapes decide, by the name of a size if one fits.

        Args:
          model: changed in place.
          parts: as `parts` returns them.
        """
        width, channels, patch, across = self.shape("encoder/patch_embed/kernel", 4)
        if patch != across:
            raise ConfigError(f"{self._stored.name}: patches of {patch} x {across}: not square")
        dims = {
            "patch_size": patch,
            "embed_dim": width,
            "depth": self._layout.depth("encoder", self._state),
            "num_heads": self._heads("", width),
        }
        if "decoder" in parts:
            inner = self.shape("decoder/embed/kernel", 2)[0]
            dims["decoder_embed_dim"] = inner
            dims["decoder_depth"] = self._layout.depth("decoder", self._state)
            dims["decoder_num_heads"] = self._heads("decoder_", inner)
        model.size, others = nearest_size(dims)
        model.update(others)
        model.channels = channels
        model.use_cls_token = self._layout.arrays["encoder/cls_token"] in self._state
        rows = self.shape("encoder/pos_embed", 3)[1] - int(model.use_cls_token)
        model.image_size = self._image_size(rows, patch)

    def _heads(self, prefix: str, width: int) -> int:
        """Return the number of heads: told, stored, or usual for the width; no shape shows it."""
        field = f"{prefix}num_heads"
        stored = self._stored.config.get(f"{prefix}num_attention_heads")
        usual = {
            getattr(size, f"{prefix}embed_dim"): getattr(size, field) for size in SIZES.values()
        }
        heads = getattr(self._told, field) or stored or usual.get(width)
        if not isinstance(heads, int):
            raise ConfigError(
                f"--{field}: expected the number of heads, which {self._stored.name} does not tell;"
                f" its width {width} is none of {', '.join(map(str, usual))}"
            )
        return heads

    def _image_size(self, rows: int, patch: int) -> tuple[int, int]:
        """Return (height, width) such that there are as many patches as rows of the table."""
        stored = self._stored.config.get("image_size")
        pair = [stored, stored] if isinstance(stored, int) else stored
        if self._told.image_size is not None:
            height, width = self._told.image_size
        elif isinstance(pair, list) and [type(side) for side in pair] == [int, int]:
            height, width = pair
        else:
            height = width = patch * round(rows**0.5)
        if height % patch or width % patch or (height // patch) * (width // patch) != rows:
            raise ConfigError(
                f"--image_size: expected height,width of {rows} patches of {patch} pixels, as"
                f" {self._stored.name} has positions, got {height},{width}"
            )
        return height, width

    def target(self, parts: Sequence[str]) -> tuple[bool, str] | None:
        """Return whether the decoder's target is normalised, and who says so; None: no decoder."""
        if "decoder" not in parts:
            return None
        args, config = self._stored.args, self._stored.config
        if self._told.norm_pix_loss is not None:
            return self._told.norm_pix_loss, "--norm_pix_loss"
        if isinstance(args.get("norm_pix_loss"), bool):
            return args["norm_pix_loss"], "args.norm_pix_loss in the file"
        if isinstance(config.get("norm_pix_loss"), bool):
            return config["norm_pix_loss"], "config.json"
        for start, normalised in TARGETS_BY_NAME.items():
            if self._stored.name.startswith(start):
                return normalised, "the name of the file"
        raise ConfigError(
            f"--norm_pix_loss: expected true or false, for {self._stored.name} does not say whether"
            " its decoder predicts normalised patches"
        )

    def set_statistics(self, config: Any) -> str:
        """Set the mean and deviation of pixels; return what they are, in words."""
        mean, std = (self._stored.preprocessor.get(f"image_{name}") for name in ("mean", "std"))
        channels = config.model.channels
        if _is_floats(mean, channels) and _is_floats(std, channels) and min(std) > 0:
            config.data.mean, config.data.std = tuple(map(float, mean)), tuple(map(float, std))
            source = "preprocessor_config.json"
        elif channels == len(config.data.mean):
            source = "ImageNet's, as the official models have"
        else:
            config.data.mean, config.data.std = (0.5,) * channels, (0.5,) * channels
            source = "a guess: the file does not tell"
        return f"mean {list(config.data.mean)}, std {list(config.data.std)} ({source})"

    def positions(self, tables: Mapping[str, np.ndarray]) -> str:
        """Return "fixed" if the stored table is ours, else "learned"."""
        stored = self._state[self._layout.arrays["encoder/pos_embed"]]
        return "fixed" if _same_table(stored, tables["encoder/pos_embed"]) else "learned"

    def notes(self) -> list[str]:
        """Return what is to be said of settings that make results differ a little."""
        eps = self._stored.config.get("layer_norm_eps", LAYER_NORM_EPS)
        if eps == LAYER_NORM_EPS:
            return []
        return [f"  note       layer_norm_eps is {eps} in config.json, {LAYER_NORM_EPS} in ours"]


def nearest_size(dims: Mapping[str, int]) -> tuple[str, dict[str, int]]:
    """Return the name of the nearest size, and the dimensions in which it differs from `dims`."""

    def others(size: Size) -> dict[str, int]:
        return {name: value for name, value in dims.items() if getattr(size, name) != value}

    def distance(name: str) -> tuple[int, int]:
        size = SIZES[name]
        return len(others(size)), abs(size.embed_dim - dims["embed_dim"])

    name = min(SIZES, key=distance)
    return name, others(SIZES[name])


def _check(
    where: str,
    layout: Layout,
    state: layouts.Arrays,
    config: Any,
    leaves: Mapping[str, Any],
    tables: layouts.Arrays,
) -> None:
    """Refuse arrays that are missing, left over or of another shape, by their names."""
    paths = {path: leaf.shape for path, leaf in leaves.items()}
    paths |= {path: table.shape for path, table in tables.items()}
    blank = {path: np.broadcast_to(np.float32(0), shape) for path, shape in paths.items()}
    expected = layout.to_theirs(blank, model_of(config).unit)
    for name in sorted(expected.keys() - state.keys()):
        raise ConfigError(f"{where}: {name} is missing")
    for name, array in sorted(expected.items()):
        if state[name].shape != array.shape:
            raise ConfigError(
                f"{where}: {name}: expected shape {list(array.shape)}, got"
                f" {list(state[name].shape)}"
            )
    extra = sorted(state.keys() - expected.keys())
    if extra:
        more = f" and {len(extra) - 1} more have" if len(extra) > 1 else " has"
        raise ConfigError(
            f"{where}: {extra[0]}{more} no place in this model; leave out what is to be left out"
            f" with --ignore={extra[0]}"
        )


def _check_decoder_table(
    where: str, layout: Layout, state: layouts.Arrays, tables: layouts.Arrays
) -> None:
    path = "decoder/pos_embed"
    name = layout.arrays[path]
    if path in tables and not _same_table(state[name], tables[path]):
        raise ConfigError(
            f"{where}: {name}: expected the fixed sine-cosine table, which is all that our decoder"
            " has, got another"
        )


def _same_table(stored: np.ndarray, ours: np.ndarray) -> bool:
    return stored.shape == ours.shape and bool(np.abs(stored - ours).max() <= TABLE_TOLERANCE)


def _is_floats(values: Any, count: int) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) for value in values)
    )


def _target_words(normalised: bool, source: str) -> str:
    return f"{'normalised patches' if normalised else 'raw pixels'} ({source})"


def lines_of(weights: Weights) -> list[str]:
    """Return the model, its parts and its positions, in words."""
    config = weights.config
    model = model_of(config)
    encoder, unit = model.encoder, model.unit
    height, width = unit.image_size
    parts = ", ".join(weights.parts)
    if "head" in weights.parts:
        parts += f" ({config.model.num_classes} classes, {config.model.pooling} pooling)"
    return [
        f"  model      {config.model.size}: {encoder.depth} blocks of width {encoder.embed_dim},"
        f" {encoder.num_heads} heads, patch {unit.patch_size}, image {height} x {width} x"
        f" {unit.channels}{'' if encoder.use_cls_token else ', no class token'}",
        f"  parts      {parts}",
        f"  positions  {config.model.positions}",
    ]
