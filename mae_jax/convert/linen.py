"""Pickles of linen trees, as M3AE's authors save them. Nothing in a file is imported or run.

Their files hold a training state whose classes are theirs, flax's and optax's, and, in what was to
update it, functions that cloudpickle took apart. All that becomes a `StandIn`, which does nothing;
arrays are numpy's; any other class is refused.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.errors import ConfigError

Arrays = Mapping[str, np.ndarray]

# Where the classes and functions of a training state come from; stand-ins take their places. The
# functions of its optimiser name many: those of Python are there but for the ones that run code or
# open files, with which nothing of the kind has to do.
INERT = (
    *("m3ae", "flax", "optax", "jax", "jaxlib", "chex", "ml_collections", "cloudpickle", "numpy"),
    *("builtins", "types", "typing", "functools", "operator", "_operator", "inspect", "math"),
)
REFUSED = ("eval", "exec", "compile", "__import__", "open", "input", "breakpoint")
# What numpy's arrays are made with, under the names of numpy 1 and 2.
NUMPY: dict[str, Any] = {
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "_reconstruct": np.zeros(()).__reduce__()[0],
    "scalar": np.float32(0).__reduce__()[0],
    "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
}
NUMPY_MODULES = (
    "numpy",
    *(f"numpy.{core}.{m}" for core in ("core", "_core") for m in ("multiarray", "numeric")),
)
CONTAINERS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


class StandIn:
    """In place of an object whose class is not to be imported: keeps what it was made of."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        """Take whatever the class takes."""
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        self.args: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        """Stand in for what a function would return, too."""
        return StandIn(*args)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget an item."""

    def append(self, value: Any) -> None:
        """Forget an element."""

    extend = add = update = append


class _Unpickler(pickle.Unpickler):
    """Makes arrays, plain containers and stand-ins, and refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle may call in place of a class or function."""
        if module in NUMPY_MODULES and name in NUMPY:
            return NUMPY[name]
        if (module, name) in CONTAINERS:
            return CONTAINERS[module, name]
        if module.partition(".")[0] in INERT and name not in REFUSED:
            return StandIn
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Return the arrays of `state.params["params"]`, by names as PyTorch would have them.

    `Block_3/Dense_0/kernel` [in, out] is `Block.3.Dense_0.weight` [out, in]: so the layouts of
    `mae_jax.convert.layouts` serve for both.

    Raises:
      ConfigError: if there is something else in the file than such a state, or an array is not
        float32.
    """
    try:
        stored = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # whatever a damaged pickle makes of stand-ins
        line = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path}: refused, and nothing in it was run: {line}") from error
    tree = stored
    for step in ("state", "params", "params"):
        tree = _fields(tree).get(step)
    state = {name: array for name, array in _flatten(_fields(tree), "").items() if wanted(name)}
    if not state:
        raise ConfigError(f"{path}: expected state.params['params'] of M3AE, got none in it")
    for name, array in state.items():
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            kind = getattr(array, "dtype", type(array).__name__)
            raise ConfigError(f"{path}: {name}: expected float32, got {kind}")
    return state


def _fields(value: Any) -> dict[str, Any]:
    """Return the items of a dict, or of what stands in for a state or a frozen dict."""
    if isinstance(value, StandIn):
        value = value.state if isinstance(value.state, dict) else next(iter(value.args), None)
        if isinstance(value, dict) and value.keys() == {"_dict", "_hash"}:  # a FrozenDict's own
            value = value["_dict"]
    return value if isinstance(value, dict) else {}


def _flatten(tree: Mapping[str, Any], start: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _fields(value)
        name = str(key)
        if inner:
            flat |= _flatten(inner, f"{start}{name.replace('Block_', 'Block.')}.")
        elif name == "kernel" and isinstance(value, np.ndarray):
            flat[f"{start}weight"] = value.T
        else:
            flat[start + ("weight" if name == "scale" else name)] = value
    return flat


def write(path: Path, state: Arrays) -> None:
    """Write a pickle of the same form, of plain dicts: `state["params"]["params"]` is the tree."""
    tree: dict[str, Any] = {}
    for name, array in state.items():
        *modules, leaf = name.replace("Block.", "Block_").split(".")
        if leaf == "weight":
            is_norm = modules[-1].startswith("LayerNorm_")
            leaf, array = ("scale", array) if is_norm else ("kernel", array.T)
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = np.ascontiguousarray(array)
    stored = {"step": 0, "epoch": 0, "variant": {}, "state": {"params": {"params": tree}}}
    path.write_bytes(pickle.dumps(stored, protocol=4))
