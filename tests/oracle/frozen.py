"""Results of another implementation in a small file, for tests that run without it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.oracle.agreement import Result, Tree


class Frozen(NamedTuple):
    """What a file holds.

    Attributes:
      inputs: arrays by name.
      params: weights by path.
      results: the other implementation's, by the name of the variant.
    """

    inputs: Mapping[str, np.ndarray]
    params: Tree
    results: Mapping[str, Result]


def save(path: Path, frozen: Frozen) -> None:
    """Write a compressed npz file in which a tree is one float32 vector, for it takes less room."""
    layout = {name: list(array.shape) for name, array in sorted(frozen.params.items())}
    arrays = {f"input/{name}": array for name, array in frozen.inputs.items()}
    for name, result in frozen.results.items():
        arrays[f"{name}/loss"] = np.float64(result.loss)
        arrays[f"{name}/predictions"] = result.predictions.astype(np.float32)
        arrays[f"{name}/gradients"] = _pack(result.gradients, layout)
    np.savez_compressed(
        path,
        layout=np.asarray(json.dumps(layout)),
        variants=np.asarray(list(frozen.results)),
        params=_pack(frozen.params, layout),
        **arrays,
    )


def load(path: Path) -> Frozen:
    """Read what `save` wrote."""
    with np.load(path) as file:
        layout = json.loads(str(file["layout"]))
        return Frozen(
            {n.removeprefix("input/"): file[n] for n in file.files if n.startswith("input/")},
            _unpack(file["params"], layout),
            {
                name: Result(
                    float(file[f"{name}/loss"]),
                    file[f"{name}/predictions"],
                    _unpack(file[f"{name}/gradients"], layout),
                )
                for name in map(str, file["variants"])
            },
        )


def _pack(tree: Tree, layout: Mapping[str, list[int]]) -> np.ndarray:
    assert tree.keys() == layout.keys()
    return np.concatenate([tree[path].ravel() for path in layout]).astype(np.float32)


def _unpack(vector: np.ndarray, layout: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    ends = np.cumsum([math.prod(shape) for shape in layout.values()])
    parts = np.split(vector, ends[:-1])
    return {n: part.reshape(layout[n]) for n, part in zip(layout, parts, strict=True)}
