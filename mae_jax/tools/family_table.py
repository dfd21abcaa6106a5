"""All methods on the digits, same images seen: a table.

    python -m mae_jax.tools.family_table --out=runs/family

Each row is a run of `python -m mae_jax.main --config=...`, in a folder of its own below `--out`;
one that is finished stays, one that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_jax.errors import ConfigError
from mae_jax.flags import Parser, exit_status

# Configs that see the same images in the same order: the digits at 64 pixels.
COMPARED = {
    "MAE": "demo:64px",
    "HiViT": "hivit:demo",
    "MixMIM": "mixmim:demo",
    "UM-MAE, Swin": "um_mae:demo",
    "UM-MAE, PVT": "um_mae:demo_pvt",
    "UM-MAE, ViT": "um_mae:demo_vit",
    "SimMIM, Swin": "simmim:demo",
}
COLUMNS = (
    *("method", "parameters: encoder / all", "held-out loss", "of the mean predictor's"),
    *("linear (random)", "k-NN (random)", "images/s", "minutes"),
)


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m mae_jax.tools.family_table",
        description="Train each method on the digits at 64 pixels and compare: "
        + ", ".join(f"{name} ({config})" for name, config in COMPARED.items())
        + ". What is finished stays.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the runs and the table")
    parser.add_argument(
        "--only", action="append", metavar="CONFIG", help="a config of the table; may be repeated"
    )
    return parser


def train(config: str, folder: Path) -> float:
    """Run a config to its end; return the seconds of the whole process.

    Raises:
      ConfigError: if the run ends otherwise; it has said why.
    """
    begun = time.perf_counter()
    command = [sys.executable, "-m", "mae_jax.main", f"--config={config}", f"--workdir={folder}"]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ConfigError(f"--config={config}: ended with status {status}")
    return time.perf_counter() - begun


def figures(folder: Path) -> dict[str, float]:
    """Return what a finished run has measured at its end, and its median speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    last = [row for row in rows if "val/loss" in row][-1]
    # The first figure has the first steps' warming up.
    speeds = [row["train/images_per_second"] for row in rows if "train/loss" in row][1:]
    values = {name.removeprefix("val/"): value for name, value in last.items()}
    return values | {"images_per_second": statistics.median(speeds) if speeds else math.nan}


def parameters(folder: Path) -> tuple[int, int]:
    """Return the number of parameters of the encoder, and of all."""
    import jax

    from mae_jax import api

    model = api.load(folder)
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in model.params.items()
    }
    return sizes["encoder"], sum(sizes.values())


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |"]
    for name, row in rows.items():
        cells = (
            name,
            f"{row['encoder'] / 1e3:,.0f} k / {row['all'] / 1e3:,.0f} k",
            f"{row['loss']:.4f}",
            f"{row['loss'] / row['mean_predictor_loss']:.3f}",
            f"{row['linear_top1']:.1f} ± {row['linear_top1_std']:.1f}"
            f" ({row['random_linear_top1']:.1f})",
            f"{row['knn_top1']:.1f} ({row['random_knn_top1']:.1f})",
            f"{row['images_per_second']:.0f}",
            f"{row['seconds'] / 60:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare(out: str, only: Sequence[str] | None) -> int:
    """Fill a folder with runs, `results.json` and `table.md`, and print the table.

    Raises:
      ConfigError: if a config is none of the table, or a run fails.
    """
    unknown = sorted(set(only or ()) - set(COMPARED.values()))
    if unknown:
        raise ConfigError(f"--only={unknown[0]}: expected one of {', '.join(COMPARED.values())}")
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, config in COMPARED.items():
        if name in rows or (only and config not in only):
            continue
        run = folder / config.replace(":", "_")
        seconds = train(config, run)
        encoder, everything = parameters(run)
        rows[name] = figures(run) | {"seconds": seconds, "encoder": encoder, "all": everything}
        path.write_text(json.dumps(rows, indent=2) + "\n")
    text = table({name: rows[name] for name in COMPARED if name in rows})
    (folder / "table.md").write_text(text)
    print(f"\n{text}\n{folder / 'table.md'}; pictures in {folder}/*/pictures")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int:
        flags = make_parser().parse(argv)
        if not flags.out:
            raise ConfigError("--out: expected a folder, got nothing")
        return compare(flags.out, flags.only)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
