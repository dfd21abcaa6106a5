"""End-to-end fine-tuning of a pre-trained MixMIM on ImageNet-1k: the official recipe.

    python -m mae_jax.main --config=mixmim_finetune --config.init_from=runs/mixmim
    python -m mae_jax.main --config=mixmim_finetune:base_384 --config.init_from=runs/mixmim

Variants: `base` (the default); `base_384`, at 384 pixels, whose windows have 16, 16, 24 and 12
tokens a side in place of 14, 14, 14 and 7 (the tables are resized); `large`; both with the numbers
of base, for none of their own are published; `demo`, 100 digits with the encoder of
`--config=mixmim:demo`. Norm and head have the rate of the last block, as the authors count layers.

Expected on ImageNet, as the authors report: 85.1 (base; 84.6 after 300 epochs), 86.3 (base_384) and
85.9 % (large) top-1. We have not run them.

Source: arXiv 2205.13137, appendix; Sense-X/MixMIM `exp/base_600ep/finetune.sh`.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    variants = ("base", "base_384", "large", "demo")
    if (variant or "base") not in variants:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(variants)}")
    config = recipes.finetune()
    config.optimizer.layer_decay = 0.7
    config.optimizer.no_decay = ()  # beside all vectors: tables of relative positions decay
    if variant == "demo":
        config = recipes.digits_finetune(config)
        config.init_from = "runs/mixmim_demo"
    else:
        config.data.mixup_group = 128  # a GPU's batch of the official command
    config = recipes.mixmim(config, variant.removesuffix("_384"))
    if variant == "base_384":
        config.model.image_size = (384, 384)
    return config
