"""End-to-end fine-tuning of a pre-trained HiViT on ImageNet-1k.

    python -m mae_jax.main --config=hivit_finetune --config.init_from=runs/hivit

Variants: `base` (the default); `small` and `tiny` with the same numbers, which nobody has
published; `demo`, 100 digits with the encoder of `--config=hivit:demo`. Positions are learned, and
attention has biases by relative place, which pre-training has not: they start at zero.

Expected on ImageNet, as the paper reports: 84.6 % top-1. We have not run it.

Source: arXiv 2205.14949; zhangxiaosong18/hivit `self_supervised/get_started.md`, and
`util/lr_decay.py` for the layers and what does not decay.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.finetune()
    config.model.drop_path_rate = 0.2
    config.optimizer.layer_decay = 0.85
    config.optimizer.no_decay = ("pos_embed", "table")
    if variant == "demo":
        config = recipes.digits_finetune(config)
        config.init_from = "runs/hivit_demo"
    else:
        config.data.mixup_group = 64  # a GPU's batch of the official command
    config = recipes.hivit(config, variant)
    config.model.relative_positions = True
    return config
