"""A fine-tuned ImageNet classifier on ImageNet-C, -A, -R and -Sketch: the paper's table 13.

    python -m mae_jax.main --config=robustness --config.init_from=runs/finetune_vit_b/best \
        --config.sets.imagenet_a=/path/to/imagenet-a --config.sets.imagenet_c=/path/to/imagenet-c

Each set is a folder with class folders named by WordNet ids (ImageNet-C:
CORRUPTION/SEVERITY/ID), or a prepared set of TFDS, as `tfds:imagenet_a` or
`tfds:imagenet2012_corrupted`; sets that are not named are left out. TFDS corrupts its images anew,
so that its figures are close to those of the published images, not equal. A run that is stopped
goes on with what is missing.

Results: `top1` in percent; of A and R the arg-max over their 200 classes; of C `mce`, the mean of
the errors over AlexNet's (lower is better), beside the plain `mean_error`.

Expected, as the paper reports for B / L / H: C 51.7 / 41.8 / 33.8 mCE; A 35.9 / 57.1 / 68.2; R
48.3 / 59.9 / 64.4; Sketch 34.5 / 45.3 / 49.6 % top-1. We have not run it.

Source: arXiv 2111.06377, table 13; arXiv 1903.12261 (C), 1907.07174 (A), 2006.16241 (R), 1905.13549
(Sketch).
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = recipes.measurement("robustness")
    names = ("imagenet_c", "imagenet_a", "imagenet_r", "imagenet_sketch")
    config.sets = ConfigDict(dict.fromkeys(names, ""))
    return config
