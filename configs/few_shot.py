"""Linear read-out of a checkpoint's features with 1, 5 and 10 labels a class.

    python -m mae_jax.main --config=few_shot --config.init_from=runs/demo

Ridge regression on standardised features, its strength by leave-one-out, mean and standard
deviation over draws of the labels. To fine-tune on few labels instead, take `finetune` with
`--config.data.per_class=10`. Data are the checkpoint's own unless told otherwise, as with `knn`.

Source: our own set-up.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = recipes.measurement("few_shot")
    config.eval.labels_per_class = (1, 5, 10)
    config.eval.draws = 5
    return config
