"""What a layout is: the names that other libraries have for our parameters, and their shapes there.

The names themselves are data, in `mae_jax.convert.families`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.nn.cubes import CubeUnit
from mae_jax.nn.patches import Unit

Arrays = Mapping[str, np.ndarray]
"""Arrays by our path, such as `encoder/block_00/attn/qkv/kernel`, or by a name of theirs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The names of one kind of file.

    Ours are paths without numbers, `encoder/block/attn/qkv` for that of any block. Theirs are
    templates, in which stand, for a block or for the downsampling between two stages,

      {i}: the number of the block, through all stages; of the first block after a downsampling;
      {stage}: the stage of the block; the stage that is downsampled;
      {within}: the number of the block in its stage;
      {place}: the number in one list of blocks and downsamplings.

    Their linear weights are [out, in] and called `weight`, ours [in, out] and `kernel`. Fixed
    tables of positions are stored there, with a row of the class token where there is one.

    Attributes:
      name: for messages.
      modules: ours -> theirs, or theirs for query, key and value, where ours is one array.
      arrays: tokens and tables of positions, ours -> theirs.
      convolutions: modules whose weight is a convolution [D, C, p, p] there, [p p C, D] here, with
        its side p; 0: the stem, whose side follows from the channels of the image. The stem of
        clips is one of [D, C, d, p, p], here [d p p C, D].
      tables: of relative positions, ours [2 h - 1, 2 w - 1, heads] -> theirs
        [(2 h - 1) (2 w - 1), heads], and the name of their constant index [h w, h w] into it.
      unbiased: modules with a weight alone.
      clips: the models take clips: which files are of them shows in the axes of the stem alone.
    """

    name: str
    modules: Mapping[str, str | tuple[str, str, str]]
    arrays: Mapping[str, str] = dataclasses.field(default_factory=dict)
    convolutions: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"encoder/patch_embed": 0}
    )
    tables: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    unbiased: tuple[str, ...] = ()
    clips: bool = False

    def names(self, path: str, depths: Sequence[int] = ()) -> tuple[str, ...]:
        """Return their names of our parameter: three where query, key and value are apart.

        Args:
          path: ours.
          depths: blocks of each stage of the encoder; needed where its names count by stages.

        Raises:
          ConfigError: if they have no such parameter.
        """
        key = _key(path)
        templates: tuple[str, ...]
        if key in self.arrays:
            templates = (self.arrays[key],)
        elif key in self.tables:
            templates = self.tables[key][:1]
        else:
            module, _, kind = key.rpartition("/")
            if module not in self.modules:
                raise ConfigError(f"{path}: the layout of {self.name} has no place for it")
            suffix = "bias" if kind == "bias" else "weight"
            templates = tuple(f"{name}.{suffix}" for name in _several(self.modules[module]))
        return tuple(template.format(**_numbers(path, depths)) for template in templates)

    def to_theirs(
        self, params: Arrays, unit: Unit, depths: Sequence[int] = ()
    ) -> dict[str, np.ndarray]:
        """Return arrays by their names, constant indices among them; views where possible."""
        state: dict[str, np.ndarray] = {}
        for path, array in params.items():
            names = self.names(path, depths)
            parts = np.split(array, len(names), axis=-1) if len(names) > 1 else [array]
            key = _key(path)
            side = self.convolutions.get(key.removesuffix("/kernel"))
            for name, part in zip(names, parts, strict=True):
                if key in self.tables:
                    index = self.tables[key][1].format(**_numbers(path, depths))
                    state[index] = relative_index(part.shape)
                    state[name] = part.reshape(-1, part.shape[-1])
                elif side is not None and path.endswith("/kernel"):
                    if isinstance(unit, CubeUnit):
                        sides: tuple[int, ...] = (
                            unit.tubelet_size,
                            unit.patch_size,
                            unit.patch_size,
                        )
                    else:
                        sides = (side or math.isqrt(len(part) // unit.channels),) * 2
                    kernel, axes = part.reshape(*sides, -1, part.shape[-1]), len(sides)
                    state[name] = kernel.transpose(axes + 1, axes, *range(axes))
                else:
                    state[name] = part.T if path.endswith("/kernel") else part
        return state

    def to_ours(
        self, state: Arrays, leaves: Mapping[str, Any], depths: Sequence[int] = ()
    ) -> dict[str, np.ndarray]:
        """Return the arrays at our paths, contiguous: undoes `to_theirs`.

        Args:
          state: by their names.
          leaves: what has a shape, by our path.
          depths: as for `names`.
        """
        params: dict[str, np.ndarray] = {}
        for path, leaf in leaves.items():
            parts = [state[name] for name in self.names(path, depths)]
            key = _key(path)
            if key in self.tables:
                parts = [part.reshape(leaf.shape) for part in parts]
            elif path.endswith("/kernel") and key.removesuffix("/kernel") in self.convolutions:
                axes = range(2, parts[0].ndim)
                parts = [part.transpose(*axes, 1, 0).reshape(-1, len(part)) for part in parts]
            elif path.endswith("/kernel"):
                parts = [part.T for part in parts]
            joined = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
            params[path] = np.ascontiguousarray(joined)
        return params

    def holds(self, paths: Iterable[str]) -> bool:
        """Return whether there is a place for each of our parameters."""
        keys = self.arrays.keys() | self.tables.keys()
        return all(
            key in keys or key.rpartition("/")[0] in self.modules for key in map(_key, paths)
        )

    def has(self, module: str, names: Iterable[str]) -> bool:
        """Return whether one of `names` belongs to our module, or part of the model."""
        patterns = self._patterns(module)
        return any(_pattern(name) in patterns for name in names)

    def known(self, names: Iterable[str]) -> int:
        """Return how many of `names` are of this layout."""
        patterns = self._patterns("")
        return sum(_pattern(name) in patterns for name in names)

    def is_index(self, name: str) -> bool:
        """Return whether a name of theirs is that of a constant index."""
        return _pattern(name) in {_pattern(index) for _, index in self.tables.values()}

    def depth(self, half: str, names: Iterable[str]) -> int:
        """Return how many blocks of "encoder" or "decoder" there are among `names`."""
        return len(self._places(f"{half}/block/", names))

    def depths(self, names: Iterable[str]) -> tuple[int, ...]:
        """Return how many blocks each stage of the encoder has among `names`."""
        names = list(names)
        cuts = self._places("encoder/downsample/", names)
        stages: Counter[int] = Counter()
        for numbers in self._places("encoder/block/", names):
            # Either the stage and the block in it, or one number, as the downsamplings have.
            stages[numbers[0] if len(numbers) > 1 else sum(cut <= numbers for cut in cuts)] += 1
        return tuple(stages[stage] for stage in sorted(stages))

    def _places(self, start: str, names: Iterable[str]) -> set[tuple[int, ...]]:
        """Return the numbers that modules whose path starts with `start` have in `names`."""
        templates = [
            re.sub(r"\\{\w+\\}", r"(\\d{1,9})", re.escape(name))
            for module, several in self.modules.items()
            if module.startswith(start)
            for name in _several(several)
        ]
        searches = [re.compile(rf"{template}\.(?:weight|bias)") for template in templates]
        found = (search.fullmatch(name) for name in names for search in searches)
        return {tuple(map(int, match.groups())) for match in found if match}

    def _patterns(self, start: str) -> frozenset[str]:
        """Return the names whose path of ours starts with `start`, "#" for their numbers."""
        names = [name for path, name in self.arrays.items() if path.startswith(start)]
        names += [
            name for path, pair in self.tables.items() if path.startswith(start) for name in pair
        ]
        for path, several in self.modules.items():
            if path.startswith(start):
                kinds = ("weight",) if path in self.unbiased else ("weight", "bias")
                names += [f"{x}.{kind}" for x in _several(several) for kind in kinds]
        return frozenset(map(_pattern, names))

    def without_prefix(self, prefix: str) -> Layout:
        """Return the names of the inner model saved by itself."""

        def cut(names: Any) -> Any:
            if isinstance(names, tuple):
                return tuple(map(cut, names))
            return names.removeprefix(prefix)

        modules = {ours: cut(theirs) for ours, theirs in self.modules.items()}
        arrays = {ours: cut(theirs) for ours, theirs in self.arrays.items()}
        return dataclasses.replace(self, modules=modules, arrays=arrays)


def relative_index(table_shape: Sequence[int]) -> np.ndarray:
    """Return int64 [h w, h w], the row of a flat table for each pair of places (query, key).

    Args:
      table_shape: (2 h - 1, 2 w - 1, ...).

    Source: Swin Transformer, arXiv 2103.14030, as its authors' code stores it.
    """
    rows, columns = (table_shape[0] + 1) // 2, (table_shape[1] + 1) // 2
    row, column = np.divmod(np.arange(rows * columns), columns)
    down = row[:, None] - row[None, :] + rows - 1
    return down * (2 * columns - 1) + column[:, None] - column[None, :] + columns - 1


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _key(path: str) -> str:
    """Return our path without the numbers of blocks and downsamplings."""
    return re.sub(r"/(block|downsample)_\d+/", r"/\1/", path)


def _numbers(path: str, depths: Sequence[int]) -> dict[str, int]:
    """Return what templates take; nothing where our path has no number."""
    found = re.search(r"/(block|downsample)_(\d+)/", path)
    if found is None:
        return {}
    starts = [0, *itertools.accumulate(depths)]
    if found[1] == "block":
        i = int(found[2])
        stage = sum(i >= start for start in starts[1:-1])
    else:
        i, stage = starts[int(found[2])], int(found[2]) - 1
    return {"i": i, "stage": stage, "within": i - starts[stage], "place": i + stage}


def _pattern(name: str) -> str:
    """Return a name or a template with "#" in place of its numbers."""
    return re.sub(r"(?<=\.)(\d+|{\w+})(?=\.)", "#", f".{name}")[1:]


def of_clips(state: Arrays) -> bool:
    """Return whether a state is of a model of clips, whose stem's weight has five axes."""
    return any(array.ndim == 5 for array in state.values())


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
