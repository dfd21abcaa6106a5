"""UM-MAE on ImageNet-1k: masked autoencoders of pyramids, which see a quarter of the units.

    python -m mae_jax.main --config=um_mae
    python -m mae_jax.main --config=um_mae:pvt_s
    python -m mae_jax.main --config=um_mae:demo

Variants: `swin_t` (the default), `swin_l` and `pvt_s` at 256 pixels, `vit_b` at 224 (the paper's
ablation); `demo` (Swin), `demo_pvt`, `demo_vit`, digits enlarged to 64 pixels, minutes on a CPU.
Data as in `vit_b`. A unit, what is kept or hidden, is 16 x 16 pixels, for a pyramid 4 x 4 patches
of the stem. Sides of a pyramid's images are multiples of 64 such that windows divide the grids:
128, 256 or 512 pixels.

Expected: the paper reports 82.04 (Swin-T), 85.2 (Swin-L), 79.31 (PVT-S) and 82.88 (ViT-B) % top-1
on ImageNet after fine-tuning (`um_mae_finetune`). We have not run them to the end.

Source: arXiv 2205.10063; implus/UM-MAE `PRETRAIN.md`, `Makefile`.
"""

from ml_collections import ConfigDict

from mae_jax import recipes

VARIANTS = ("swin_t", "swin_l", "pvt_s", "vit_b", "demo", "demo_pvt", "demo_vit")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.mae_pretrain()
    if variant.startswith("demo"):
        config = recipes.digits(config, batch_size=128)
    config = recipes.um_mae_pretrain(config, variant, VARIANTS)
    model = config.model
    for name in ("mask_ratio", "mask_sampling"):  # one of each 2 x 2 is kept
        del model[name]
    model.secondary_ratio = 0.25
    if model.size != "vit_b":
        model.compat_decoder_order = False
    if variant.startswith("demo"):
        model.decoder_embed_dim = 64
        model.decoder_depth = 2
        model.decoder_num_heads = 4
    return config
