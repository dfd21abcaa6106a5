"""HiViT on ImageNet-1k at 224 pixels, pre-trained as a masked autoencoder.

    python -m mae_jax.main --config=hivit
    python -m mae_jax.main --config=hivit:demo

Variants: `base` (the default; the released "dec512d6b"); `small` and `tiny`, the sizes that are
published for supervised training alone, with the same recipe; `demo`, digits enlarged to 64 pixels,
minutes on a CPU. Data as in `vit_b`. What is hidden is a unit of 16 pixels, 4 x 4 patches of the
stem.

Expected: the paper reports 84.6 % top-1 on ImageNet after fine-tuning (`hivit_finetune`), for 1600
epochs. We have not run it to the end. One step costs 47.32 GFLOP per image. Measured, `demo`:
`val/loss` 0.490, that of the mean predictor 0.639; linear read-out 50.4 % (untrained 25.5 %).

Source: arXiv 2205.14949; zhangxiaosong18/hivit `self_supervised/get_started.md`.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.mae_pretrain()
    if variant == "demo":
        config = recipes.digits(config, batch_size=128)
    config = recipes.hivit(config, variant)
    model = config.model
    for name in ("mask_tokens_in_encoder", "loss_on"):
        del model[name]
    model.relative_positions = False
    model.multi_scale = True
    config.epochs = 1600.0
    config.optimizer.base_learning_rate = 1e-4
    if variant == "demo":
        config = recipes.digits_at_64(config)
        model.decoder_embed_dim = 48
        model.decoder_depth = 2
        model.decoder_num_heads = 4
        config.optimizer.base_learning_rate = 2.4e-2  # weights start small, and narrow layers weak
    return config
