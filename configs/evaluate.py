"""Accuracy of a fine-tuned classifier on a whole set: top-1, top-5, loss, a table of the classes.

    python -m mae_jax.main --config=evaluate --config.init_from=runs/finetune_vit_b/best

Data are those the checkpoint was held out from, unless `--config.data.source`, `.path` and
`.eval_split` say otherwise; weights of the official code, converted (`docs/weights.md`), are
evaluated in the same way.

Expected: the official fine-tuned weights have 83.664 (B), 85.952 (L), 86.928 (H) % top-1 on
ImageNet, and users found the same to 0.1.

Source: facebookresearch/mae `FINETUNE.md`, "Evaluation".
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config() -> ConfigDict:
    """Return the configuration."""
    return recipes.measurement("evaluate")
