"""Who may import whom: the layers of the project, read from the source with `ast`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Third parties are free, but where a layer is to stay light.
ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "recipes": set(),
    "lookup": {"errors"},
    "files": {"errors"},
    "config": {"errors"},
    "nn": {"errors", "types", "nn"},
    "losses": {"errors", "types", "losses"},
    "data": {"errors", "files", "lookup", "types", "data"},
    "models": {"errors", "types", "nn", "losses", "models"},
    "pretrain": {"errors", "types", "nn", "models", "pretrain"},
    "tasks": {"errors", "types", "losses", "models", "pretrain", "tasks"},
    "train": {"errors", "types", "files", "train"},
    "build": {
        *("errors", "types", "config", "nn", "losses", "data", "models", "pretrain", "tasks"),
        *("train", "lookup"),
    },
    "run": {
        *("errors", "types", "config", "nn", "losses", "data", "models", "pretrain", "tasks"),
        *("train", "build", "api", "files", "job", "request", "__init__"),
    },
    "request": set(),
    "measurements": {"errors", "data", "models", "tasks", "train", "build", "api"},
    "measure": {
        *("errors", "config", "files", "train", "build", "api", "job", "measurements", "request"),
        "__init__",
    },
    "api": {
        *("errors", "types", "config", "nn", "losses", "data", "models", "pretrain", "tasks"),
        *("train", "build", "files", "__init__"),
    },
    "convert": {
        *("errors", "types", "files", "recipes", "nn", "models", "pretrain", "train", "build"),
        *("api", "convert", "__init__"),
    },
    "flags": {"errors", "config"},
    "job": {"errors", "files", "train"},
    "distributed": {"errors", "job"},
    "main": {
        *("errors", "config", "distributed", "files", "flags", "request", "run", "measure"),
        "__init__",
    },
    "tools": {
        *("errors", "types", "config", "flags", "nn", "data", "models", "tasks", "train", "build"),
        *("api", "convert", "files", "tools", "__init__"),
    },
    "__init__": set(),
}
FORBIDDEN = {
    "data": {"flax", "optax", "jax"},
    "recipes": {"jax", "flax", "optax", "numpy"},
    "config": {"jax", "flax", "optax"},
    "errors": {"jax", "flax"},
    "flags": {"jax", "flax", "optax", "numpy"},
    "request": {"jax", "flax", "optax", "numpy"},
    "job": {"jax", "flax", "optax", "numpy"},
}
# Modules that a wrong flag or --help must not load.
LIGHT = (
    *("main", "distributed", "job", "train/signals", "train/__init__"),
    *("flags", "request", "config", "recipes", "errors", "tools/__init__"),
    *("tools/family_table", "tools/bench"),
    *("tools/visualize", "tools/extract_features", "tools/export", "tools/convert_checkpoint"),
    *("tools/prepare_data", "tools/checkpoints", "tools/communication", "tools/beam"),
)


def modules() -> list[Path]:
    return sorted((ROOT / "mae_jax").rglob("*.py"))


def part(path: Path) -> str:
    relative = path.relative_to(ROOT / "mae_jax")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    parts = set()
    for name in names:
        if name == "mae_jax":
            parts.add("__init__")
        elif name.startswith("mae_jax."):
            parts.add(name.split(".")[1])
    return parts


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_points_up(path):
    layer = part(path)
    assert layer in ALLOWED, f"{path}: give the new part a place in the layers"
    up = ours(imported(path)) - ALLOWED[layer]
    assert not up, f"{path} must not import {sorted(up)}"
    heavy = {name.split(".")[0] for name in imported(path)} & FORBIDDEN.get(layer, set())
    assert not heavy, f"{path} must not import {sorted(heavy)}"


def test_configs_import_recipes_and_nothing_else_of_ours():
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert ours(imported(path)) <= {"recipes"}, path
        assert {name.split(".")[0] for name in imported(path)} <= {"ml_collections", "mae_jax"}, (
            path
        )


def test_only_one_module_imports_orbax():
    using = [p for p in modules() if any(n.startswith("orbax") for n in imported(p))]
    assert using == [ROOT / "mae_jax" / "train" / "checkpoint.py"]


def test_the_way_to_an_error_message_is_light():
    for layer in LIGHT:
        names = imported(ROOT / "mae_jax" / f"{layer}.py", top_level_only=True)
        heavy = {name.split(".")[0] for name in names} & {"jax", "flax", "optax", "numpy", "grain"}
        assert not heavy, layer


def test_an_arrow_that_points_up_is_found(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from mae_jax.train import loop\n")
    assert ours(imported(wrong)) - ALLOWED["nn"] == {"train"}
