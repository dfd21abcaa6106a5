"""k-nearest neighbours on the features of a checkpoint: nothing is trained.

    python -m mae_jax.main --config=knn --config.init_from=runs/demo

The vote of the 20 training images whose features have the largest cosine with the held-out one's;
features are the mean of the patch tokens (of a classifier: what its linear layer sees). Data are
the checkpoint's own, unless `--config.data.source`, `.path`, `.split`, `.eval_split` say otherwise.

Expected: features of masked autoencoders do worse here than those of contrastive methods. lightly
reports 11.2 % for a ViT-B after 100 epochs on ImageNet. `docs/recognition.md` has ours on digits.

Source: our own set-up.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = recipes.measurement("knn")
    config.eval.neighbours = 20
    return config
