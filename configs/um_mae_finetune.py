"""End-to-end fine-tuning of an encoder of UM-MAE, or of SimMIM beside it, on ImageNet-1k.

    python -m mae_jax.main --config=um_mae_finetune --config.init_from=runs/um_mae

Variants: `swin_t` (the default), `swin_l` and `pvt_s` at 256 pixels, `vit_b` at 224; `demo`, 100
digits with the encoder of `--config=um_mae:demo`. The encoder sees the full grid, Swin in windows
twice as long as in pre-training, PVT with averages of squares twice as long.

Expected on ImageNet, as the paper reports: 82.04 (Swin-T), 85.2 (Swin-L), 79.31 (PVT-S) and 82.88
(ViT-B) % top-1. We have not run them.

Source: arXiv 2205.10063; implus/UM-MAE `FINETUNE.md`, `Makefile`.
"""

from ml_collections import ConfigDict

from mae_jax import recipes

VARIANTS = ("swin_t", "swin_l", "pvt_s", "vit_b", "demo")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.finetune()
    if variant == "demo":
        config = recipes.digits_finetune(config)
        config.init_from = "runs/um_mae_demo"
    return recipes.um_mae_finetune(config, variant, VARIANTS)
