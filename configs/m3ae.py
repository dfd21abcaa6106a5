"""M3AE: one encoder for images and their captions; both are hidden in part and predicted.

    python -m mae_jax.main --config=m3ae --config.data.path=cc12m --config.data.vocabulary=vocab.txt
    python -m mae_jax.main --config=m3ae:demo

Variants: `large` (the default), `small`, `base` and `huge`; with `_mae` (`large_mae`) the authors'
baseline, which sees images alone; `demo`, pairs of digits with captions, minutes on a CPU.
`data.path` is a folder with `captions.jsonl` (`docs/data.md`); `data.vocabulary` a BERT `vocab.txt`
or a `tokenizer.json`, or, if empty, learnt from the captions.

Expected: the paper reports linear probes on ImageNet above MAE's at equal size and epochs. We have
not run it to the end.

Source: arXiv 2205.14204; young-geng/m3ae_public, whose command has 100 epochs (its released weights
50) and a weight of 0.5 for words.
"""

from ml_collections import ConfigDict

from mae_jax import recipes

SIZES = ("large", "small", "base", "huge")
VARIANTS = (*SIZES, *(f"{size}_mae" for size in SIZES), "demo")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    variant = variant or "large"
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    config = recipes.mae_pretrain()
    model, data = config.model, config.data
    for name in (
        *("use_cls_token", "norm_pix_loss", "mask_sampling", "mask_tokens_in_encoder", "loss_on"),
    ):
        del model[name]
    model.name = "m3ae"
    model.size = variant.partition("_")[0]
    model.image_size = (256, 256)
    model.vocabulary_size = 30522  # of BERT base, uncased
    model.text_length = 64
    model.use_type_vectors = True  # they tell patches from words
    model.output_head_depth = 0  # layers of each of the decoder's heads before the last
    model.mask_per = "batch"
    model.text_mask_ratio = 0.75
    model.text_loss_weight = 0.5
    model.unpaired_text_length = 256
    model.unpaired_loss_weight = 0.0  # of the texts of data.unpaired_text
    data.source = "captions"
    data.path = ""
    data.reader = "captions"
    data.caption = ""  # of a TFDS set, the feature that holds the caption, as "captions/text"
    data.vocabulary = ""
    data.vocabulary_size = model.get_ref("vocabulary_size")
    data.text_length = model.get_ref("text_length")
    data.unpaired_text = ""  # a file of texts without an image, one a line
    data.unpaired_text_length = model.get_ref("unpaired_text_length")
    # Words whose accuracy is measured where they are hidden, with the image and without it.
    data.scored_words = ()
    data.mean = recipes.CC12M_MEAN
    data.std = recipes.CC12M_STD
    config.epochs = 100.0
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.no_decay = (
        *("cls_token", "image_type", "text_type", "image_mask", "text_mask", "embedding"),
    )
    if variant == "demo":
        return recipes.captions_demo(config)
    if variant.endswith("_mae"):
        model.vocabulary_size = 0
        model.use_type_vectors = False
        data.reader = "images"
    return config
