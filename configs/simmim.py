"""SimMIM with the pyramids of UM-MAE on the full grid: what UM-MAE is compared with.

    python -m mae_jax.main --config=simmim
    python -m mae_jax.main --config=simmim:demo

Variants: `swin_t` (the default) and `pvt_s` at 256 pixels; `demo` (Swin), digits enlarged to 64
pixels, minutes on a CPU. Data as in `vit_b`.

Expected: the paper of UM-MAE reports 82.20 (Swin-T) and 79.28 (PVT-S) % top-1 on ImageNet after
fine-tuning as `um_mae_finetune` does, in 49.3 and 38.0 hours of pre-training to the 25.0 and 21.3
of UM-MAE. We have not run them to the end.

Source: arXiv 2205.10063, table 1, and implus/UM-MAE `Makefile`; the method is arXiv 2111.09886.
"""

from ml_collections import ConfigDict

from mae_jax import recipes

VARIANTS = ("swin_t", "pvt_s", "demo")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.mae_pretrain()
    if variant.startswith("demo"):
        config = recipes.digits(config, batch_size=128)
    config = recipes.um_mae_pretrain(config, variant, VARIANTS)
    for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
        del config.model[name]
    config.model.name = "simmim"
    config.model.norm_pix_loss = False
    return config
