"""Reading and writing other libraries' files. Nothing here runs code out of a file."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.convert import linen
from mae_jax.errors import ConfigError

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
SAFETENSORS, SHARDS, TORCH = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)


# Constant indices, which the authors of Swin and others save beside the parameters.
INTEGERS = "*relative_position_index"
# Of parameters, and of those: as PyTorch and as safetensors call them.
DTYPES, SHORT_DTYPES = ("float32", "int64"), ("F32", "I64")


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file or a folder of another library holds.

    Attributes:
      name: of the file or folder, for messages.
      kind: of file.
      state: float32 arrays by name; int64 by a name like `INTEGERS`.
      args: flags of the training script, where the file has kept them.
      config: `config.json` of transformers; {} without one.
      preprocessor: `preprocessor_config.json` of transformers; {} without one.
    """

    name: str
    kind: str
    state: dict[str, np.ndarray]
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read(path: Path, ignore: Sequence[str] = ()) -> Stored:
    """Read a PyTorch file, a safetensors file or a folder of transformers, told by their contents.

    Args:
      path: of the file or folder.
      ignore: names of arrays to leave out; `*`, `?` and `[]` as in a shell.

    Raises:
      ConfigError: if it is none of these, is damaged, or an array is not float32 (or int64 by its
        name); names it.
    """
    wanted = _Wanted(ignore)
    if path.is_dir():
        stored = _read_folder(path, wanted)
    elif path.is_file():
        stored = _read_file(path, wanted)
    else:
        raise ConfigError(f"{path}: expected a file or a folder of weights, got none there")
    wanted.check()
    return stored


class _Wanted:
    """Whether an array is to be read; remembers which patterns have matched."""

    def __init__(self, ignore: Sequence[str]):
        self._unused = dict.fromkeys(ignore)
        self._ignore = tuple(ignore)

    def __call__(self, name: str) -> bool:
        hits = [pattern for pattern in self._ignore if fnmatch.fnmatchcase(name, pattern)]
        for pattern in hits:
            self._unused.pop(pattern, None)
        return not hits

    def check(self) -> None:
        for pattern in self._unused:
            raise ConfigError(f"--ignore={pattern}: no array has such a name")


def _read_file(path: Path, wanted: Callable[[str], bool]) -> Stored:
    with path.open("rb") as file:
        start = file.read(9)
    # First: the length of its header, which comes before the brace, may begin as a pickle does.
    if start[8:] == b"{":
        return Stored(path.name, "safetensors file", _read_safetensors(path, wanted))
    if start.startswith(PICKLE) and start[1] >= 4:  # PyTorch's own are of protocol 2
        return Stored(path.name, "pickle of a linen tree", linen.read(path, wanted))
    if start.startswith((ZIP, PICKLE)):
        state, args = _read_torch(path, wanted, mapped=start.startswith(ZIP))
        return Stored(path.name, "PyTorch file", state, args=args)
    raise ConfigError(f"{path}: expected a PyTorch or a safetensors file, it is neither")


def _read_folder(path: Path, wanted: Callable[[str], bool]) -> Stored:
    config, preprocessor = (
        _read_json(path / name) for name in ("config.json", "preprocessor_config.json")
    )
    name = path.resolve().name
    if (path / SAFETENSORS).is_file():
        state = _read_safetensors(path / SAFETENSORS, wanted)
    elif (path / SHARDS).is_file():
        state = _read_shards(path, wanted)
    elif (path / TORCH).is_file():
        state = _read_file(path / TORCH, wanted).state
    else:
        raise ConfigError(
            f"{path}: expected a run of ours, or a folder with {SAFETENSORS}, {SHARDS} or {TORCH};"
            " got neither"
        )
    return Stored(name, "folder", state, config=config, preprocessor=preprocessor)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_shards(folder: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    index = _read_json(folder / SHARDS).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ConfigError(f"{folder / SHARDS}: expected 'weight_map', a file for each array")
    state: dict[str, np.ndarray] = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"{folder / SHARDS}: {name!r} is no file in this folder")
        state |= _read_safetensors(folder / name, wanted)
    for key in sorted(index):
        if key not in state and wanted(key):
            raise ConfigError(f"{folder / index[key]}: {key} is missing, though the index has it")
    return state


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    import safetensors

    state: dict[str, np.ndarray] = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in sorted(filter(wanted, file.keys())):
                _check_dtype(path, name, SHORT_DTYPES, file.get_slice(name).get_dtype())
                state[name] = file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: a damaged safetensors file: {_one_line(error)}") from error
    return state


def _read_torch(
    path: Path, wanted: Callable[[str], bool], *, mapped: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the flags of the training script.

    Args:
      path: of the file.
      wanted: by name.
      mapped: leave on disk what is not needed, such as the optimiser's state; for zip files alone.
    """
    torch = _import_torch(path)
    try:
        # Tensors, plain containers and the namespace of the official training script's flags;
        # another class in the pickle is refused before anything of it is called.
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises whatever its readers of zip and pickle do
        raise ConfigError(
            f"{path}: refused, and nothing in it was run: {_one_line(error)}"
        ) from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{path}: expected a dict of tensors, got {type(stored).__name__}")
    # "module" is where deepspeed keeps them.
    inner = (stored.get(name) for name in ("model", "module"))
    tensors = next((tree for tree in inner if isinstance(tree, dict)), stored)
    state: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if not wanted(str(name)):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{path}: {name}: expected a tensor, got {type(tensor).__name__}")
        dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
        # A small file can claim a huge tensor, all of whose numbers are one and the same.
        if not dense or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ConfigError(f"{path}: {name}: expected a dense tensor with all its values")
        _check_dtype(path, str(name), DTYPES, str(tensor.dtype).removeprefix("torch."))
        state[str(name)] = tensor.detach().numpy()
    args = stored.get("args")
    return state, vars(args) if isinstance(args, argparse.Namespace) else {}


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{path}: PyTorch files need PyTorch: pip install 'mae_jax[convert]'"
        ) from None
    return torch


def _check_dtype(path: Path, name: str, known: tuple[str, str], dtype: str) -> None:
    """Refuse an array of another dtype than its name asks for."""
    number = int(fnmatch.fnmatchcase(name, INTEGERS))
    if dtype != known[number]:
        raise ConfigError(f"{path}: {name}: expected {DTYPES[number]}, got {dtype}")


def _one_line(error: Exception) -> str:
    """Return the line of a message that says most: torch puts the forbidden name further down."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (telling or lines or [repr(error)])[0]


def write_torch(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Write `{"model": state}`, as the official training code does."""
    torch = _import_torch(path)
    tensors = {k: torch.from_numpy(np.array(v, order="C")) for k, v in state.items()}
    torch.save({"model": tensors}, path)


def write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file."""
    from safetensors.numpy import save_file

    # transformers 4 wants to be told that a file was made for it, in this way.
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path, {"format": "pt"})


def write_folder(path: Path, state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` into a new folder, for transformers."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_safetensors(path / SAFETENSORS, state)
