"""Make `tests/pretrain/frozen_mae_small.npz`: python -m tests.oracle.make_frozen_mae

The file holds random weights, four images and noise of the small case (`mae_case.SMALL`, numpy
seeds 0 and 100), and what `ViTMAEForPreTraining` of transformers makes of them: loss, predictions
of the hidden patches and all gradients, with and without `norm_pix_loss`. Theirs is computed in
float64 and stored in float32 (the loss in float64), so the rounding that shows is ours.

Made with torch 2.13.0 (CPU), transformers 5.23.0, numpy 2.4.6, on Linux x86-64.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mae_jax.pretrain import mae
from tests.oracle import frozen, mae_case, transformers_mae

PATH = Path(__file__).parents[1] / "pretrain" / "frozen_mae_small.npz"


def compute() -> frozen.Frozen:
    """Return what the file is to hold."""
    model = mae.make(**mae_case.SMALL)
    params = mae_case.random_weights(model, seed=0)
    image, noise = mae_case.random_inputs(model, mae_case.BATCH_SIZE, seed=100)
    results = {
        name: transformers_mae.run(
            model.clone(norm_pix_loss=name == "norm_pix"), params, image, noise, torch.float64
        )
        for name in ("norm_pix", "raw")
    }
    return frozen.Frozen({"image": image, "noise": noise}, params, results)


if __name__ == "__main__":
    frozen.save(PATH, compute())
    print(f"{PATH}: {PATH.stat().st_size} bytes")
