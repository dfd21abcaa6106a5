"""MixMIM (MixMAE) on ImageNet-1k at 224 pixels: the official recipe.

    python -m mae_jax.main --config=mixmim
    python -m mae_jax.main --config=mixmim:base_300ep
    python -m mae_jax.main --config=mixmim:demo

Variants: `base` (the default), `large` or `huge`, alone or with `_300ep`; `300ep`, that of base;
`demo`, digits enlarged to 64 pixels, minutes on a CPU. Data as in `vit_b`. What is hidden is a cell
of 32 pixels, 8 x 8 patches of the stem, behind the same cell of another image.

Images are paired among 128 (`model.pairing_group`), the batch of one of the 16 official GPUs; the
mask, which is one for each GPU there, is one for the batch here. A smaller batch needs a smaller
group, or 0, all of it.

Expected: the authors report, after fine-tuning (`mixmim_finetune`), 85.1 % (base) and 85.9 %
(large) top-1 on ImageNet for 600 epochs, and 84.6 % for base and 300. We have not run it to the
end. One step costs 111.35 GFLOP per image for base, 227.25 for large, 715.27 for huge.

Source: arXiv 2205.13137, appendix; Sense-X/MixMIM `exp/base_600ep/pretrain.sh`. For large and huge
no numbers of their own are published.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    size, _, epochs = ("base_300ep" if variant == "300ep" else variant).partition("_")
    if epochs not in ("", "300ep") or (size == "demo" and epochs):
        raise ValueError(f"variant {variant!r} is not a size, a size and 300ep, or demo")
    config = recipes.mae_pretrain()
    if size == "demo":
        config = recipes.digits(config, batch_size=128)
    config = recipes.mixmim(config, size)
    model = config.model
    for name in ("mask_sampling", "mask_tokens_in_encoder", "loss_on"):
        del model[name]
    model.mask_ratio = 0.5
    model.pairing_group = 128  # images; 0: the whole batch
    if size == "demo":
        config = recipes.digits_at_64(config)
        model.pairing_group = 0
        model.decoder_embed_dim = 64
        model.decoder_depth = 2
        model.decoder_num_heads = 4
        return config
    config.batch_size = 2048
    config.epochs = 300.0 if epochs else 600.0
    return config
