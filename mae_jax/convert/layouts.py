"""What other libraries call our parameters, and how they lay them out: names as data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.nn.patches import PatchUnit

Arrays = Mapping[str, np.ndarray]
"""Arrays by our path, such as `encoder/block_00/attn/qkv/kernel`, or by a name of theirs."""

HALVES = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one kind of file.

    Their linear weights are [out, in] and called `weight`, ours [in, out] and `kernel`; their patch
    embedding is a convolution [D, C, p, p], ours [p p C, D]; query, key and value are one array as
    ours, or three. Both position tables are stored, with a row of the class token.

    Attributes:
      name: for messages.
      blocks: a block of each half, "{i}" for its number.
      parts: within a block, our module -> theirs, or theirs for query, key and value.
      modules: outside of blocks, our module -> theirs.
      arrays: tokens and tables, our path -> their name.
    """

    name: str
    blocks: Mapping[str, str]
    parts: Mapping[str, str | tuple[str, str, str]]
    modules: Mapping[str, str]
    arrays: Mapping[str, str]

    def names(self, path: str) -> tuple[str, ...]:
        """Return their names of our parameter: three where query, key and value are apart.

        Raises:
          ConfigError: if they have no such parameter.
        """
        if path in self.arrays:
            return (self.arrays[path],)
        module, _, kind = path.rpartition("/")
        suffix = "bias" if kind == "bias" else "weight"
        if module in self.modules:
            return (f"{self.modules[module]}.{suffix}",)
        half, _, rest = module.partition("/")
        block, _, part = rest.partition("/")
        if not block.startswith("block_") or part not in self.parts:
            raise ConfigError(f"{path}: the layout of {self.name} has no place for it")
        prefix = self.blocks[half].format(i=int(block.removeprefix("block_")))
        return tuple(f"{prefix}.{name}.{suffix}" for name in _several(self.parts[part]))

    def to_theirs(self, params: Arrays, unit: PatchUnit) -> dict[str, np.ndarray]:
        """Return arrays by their names; views where that is possible."""
        state: dict[str, np.ndarray] = {}
        for path, array in params.items():
            names = self.names(path)
            parts = np.split(array, len(names), axis=-1) if len(names) > 1 else [array]
            for name, part in zip(names, parts, strict=True):
                if path == "encoder/patch_embed/kernel":
                    p = unit.patch_size
                    state[name] = part.reshape(p, p, unit.channels, -1).transpose(3, 2, 0, 1)
                else:
                    state[name] = part.T if path.endswith("/kernel") else part
        return state

    def to_ours(self, state: Arrays, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the arrays at our `paths`, contiguous: undoes `to_theirs`."""
        params: dict[str, np.ndarray] = {}
        for path in paths:
            parts = [state[name] for name in self.names(path)]
            if path == "encoder/patch_embed/kernel":
                parts = [part.transpose(2, 3, 1, 0).reshape(-1, len(part)) for part in parts]
            elif path.endswith("/kernel"):
                parts = [part.T for part in parts]
            joined = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
            params[path] = np.ascontiguousarray(joined)
        return params

    def has(self, module: str, names: Iterable[str]) -> bool:
        """Return whether one of `names` belongs to our module, or part of the model."""
        patterns = self._patterns(module)
        return any(_pattern(name) in patterns for name in names)

    def known(self, names: Iterable[str]) -> int:
        """Return how many of `names` are of this layout."""
        patterns = self._patterns("")
        return sum(_pattern(name) in patterns for name in names)

    def depth(self, half: str, names: Iterable[str]) -> int:
        """Return how many blocks of "encoder" or "decoder" there are among `names`."""
        start = re.escape(self.blocks[half]).replace(re.escape("{i}"), r"(\d+)")
        found = (re.match(rf"{start}\.", name) for name in names)
        return len({match[1] for match in found if match})

    def _patterns(self, start: str) -> frozenset[str]:
        """Return the names whose path of ours starts with `start`, "{i}" for a block's number."""
        patterns = {name for path, name in self.arrays.items() if path.startswith(start)}
        modules = [name for path, name in self.modules.items() if path.startswith(start)]
        for half, block in self.blocks.items():
            if half.startswith(start):
                modules += [f"{block}.{x}" for part in self.parts.values() for x in _several(part)]
        return frozenset(patterns | {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")})

    def without_prefix(self, prefix: str) -> Layout:
        """Return the names of the inner model saved by itself."""
        cut: dict[str, Any] = {
            field: {
                ours: theirs.removeprefix(prefix) for ours, theirs in getattr(self, field).items()
            }
            for field in ("blocks", "modules", "arrays")
        }
        return dataclasses.replace(self, **cut)


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{i}.", f".{name}")[1:]


# facebookresearch/mae `models_mae.py`, `models_vit.py`; timm's ViT has the same names.
OFFICIAL = Layout(
    name="official MAE and timm",
    blocks={"encoder": "blocks.{i}", "decoder": "decoder_blocks.{i}"},
    parts={
        "norm1": "norm1",
        "norm2": "norm2",
        "attn/qkv": "attn.qkv",
        "attn/proj": "attn.proj",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
    },
    modules={
        "encoder/patch_embed": "patch_embed.proj",
        "encoder/norm": "norm",
        "decoder/embed": "decoder_embed",
        "decoder/norm": "decoder_norm",
        "decoder/pred": "decoder_pred",
        "head/norm": "fc_norm",
        "head/linear": "head",
    },
    arrays={
        "encoder/cls_token": "cls_token",
        "encoder/pos_embed": "pos_embed",
        "decoder/mask_token": "mask_token",
        "decoder/pos_embed": "decoder_pos_embed",
    },
)

# Files of transformers 4 and of the hub, which transformers 5 reads too.
TRANSFORMERS = Layout(
    name="transformers",
    blocks={"encoder": "vit.encoder.layer.{i}", "decoder": "decoder.decoder_layers.{i}"},
    parts={
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn/qkv": (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
        ),
        "attn/proj": "attention.output.dense",
        "mlp/fc1": "intermediate.dense",
        "mlp/fc2": "output.dense",
    },
    modules={
        "encoder/patch_embed": "vit.embeddings.patch_embeddings.projection",
        "encoder/norm": "vit.layernorm",
        "decoder/embed": "decoder.decoder_embed",
        "decoder/norm": "decoder.decoder_norm",
        "decoder/pred": "decoder.decoder_pred",
        "head/linear": "classifier",
    },
    arrays={
        "encoder/cls_token": "vit.embeddings.cls_token",
        "encoder/pos_embed": "vit.embeddings.position_embeddings",
        "decoder/mask_token": "decoder.mask_token",
        "decoder/pos_embed": "decoder.decoder_pos_embed",
    },
)

# Files that transformers 5 writes: seen with 5.23.
TRANSFORMERS_5 = dataclasses.replace(
    TRANSFORMERS,
    blocks={**TRANSFORMERS.blocks, "decoder": "decoder.decoder_encoder.layer.{i}"},
)

# The modules of transformers 5 in memory, as `state_dict()` names them: seen with 5.23.
TRANSFORMERS_5_MEMORY = dataclasses.replace(
    TRANSFORMERS,
    blocks={"encoder": "vit.layers.{i}", "decoder": "decoder.decoder_layers.{i}"},
    parts={
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn/qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn/proj": "attention.o_proj",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
    },
)

# ViTModel and ViTMAEModel saved by themselves.
TRANSFORMERS_BASE = TRANSFORMERS.without_prefix("vit.")

LAYOUTS = (
    OFFICIAL,
    TRANSFORMERS,
    TRANSFORMERS_5,
    TRANSFORMERS_5_MEMORY,
    TRANSFORMERS_BASE,
    TRANSFORMERS_5_MEMORY.without_prefix("vit."),
)


def recognise(names: Iterable[str], where: str) -> Layout:
    """Return the layout that most of `names` belong to.

    Raises:
      ConfigError: if they are of none.
    """
    names = list(names)
    best = max(LAYOUTS, key=lambda layout: layout.known(names))
    if not best.has("encoder", names):
        example = f", such as {min(names)!r}" if names else ""
        raise ConfigError(
            f"{where}: expected weights of a ViT with the names of the official MAE, timm or"
            f" transformers, got {len(names)} other arrays{example}"
        )
    return best


def fuse_split_biases(state: Arrays) -> dict[str, np.ndarray]:
    """Return the state with `attn.qkv.bias` where it has `attn.q_bias` and `attn.v_bias`.

    The bias of keys, which softmax does not see, is zero there.

    Source: facebookresearch/long_seq_mae, after BEiT.
    """
    fused = dict(state)
    for name, query in state.items():
        prefix = name.removesuffix("q_bias")
        if name == prefix or f"{prefix}v_bias" not in state or f"{prefix}qkv.bias" in state:
            continue
        value = state[f"{prefix}v_bias"]
        fused[f"{prefix}qkv.bias"] = np.concatenate([query, np.zeros_like(query), value])
        del fused[name], fused[f"{prefix}v_bias"]
    return fused
