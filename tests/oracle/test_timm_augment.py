"""RandAugment agrees with timm 0.3.2, which the official fine-tuning uses, bit by bit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import augment
from mae_jax.data.augment import OPERATIONS, apply_operation, parse_rand_augment
from mae_jax.recipes import IMAGENET_MEAN

pytestmark = pytest.mark.oracle

THEIR_NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
RECIPE = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
# 0 ... 10; those of the recipe lie around 9, and one in 44 is 10.
MAGNITUDES = (0.0, 0.2, 2.5, 3.7, 5.0, 7.5, 8.3, 9.0, 9.61, 9.99, 10.0)


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    """Return timm's file of augmentations alone: the package no longer imports with our torch."""
    distribution = importlib.metadata.distribution("timm")
    assert distribution.version == "0.3.2"
    path = distribution.locate_file("timm/data/auto_augment.py")
    spec = importlib.util.spec_from_file_location("timm_auto_augment", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images():
    """Return RGB images: noise, smooth ones, a dark one, a flat one, and a very small one."""
    rng = np.random.default_rng(0)

    def noise(height, width, low=0, high=256):
        return Image.fromarray(rng.integers(low, high, (height, width, 3), dtype=np.uint8))

    smooth = [noise(5, 5).resize(size, BICUBIC) for size in ((64, 48), (33, 57))]
    flat = Image.fromarray(np.full((8, 6, 3), (10, 130, 250), np.uint8))
    return [noise(40, 56), *smooth, noise(32, 32, 20, 90), flat, noise(4, 4)]


def hparams(**fields):
    """Return what timm makes of the arguments of the official fine-tuning for RandAugment."""
    fill = tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN)
    return {"translate_const": 100, "img_mean": fill, "interpolation": BICUBIC, **fields}


def their_operation(timm, monkeypatch, name, magnitude, sign, resample=BICUBIC):
    """Return timm's operation with the sign that its coin would give it."""
    monkeypatch.setattr(timm, "_randomly_negate", lambda value: sign * value)
    fields = hparams(interpolation=resample)
    return timm.AugmentOp(THEIR_NAMES[name], prob=1.0, magnitude=magnitude, hparams=fields)


def test_the_fifteen_are_theirs(timm):
    assert {THEIR_NAMES[name] for name in OPERATIONS} == set(timm._RAND_INCREASING_TRANSFORMS)
    assert len(OPERATIONS) == len(timm._RAND_INCREASING_TRANSFORMS) == 15


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_agrees_bit_by_bit(timm, name, monkeypatch):
    # To keep no bits gave black in Pillow's versions of that time; today's refuses.
    magnitudes = MAGNITUDES[:-1] if name == "posterize" else MAGNITUDES
    changed = 0
    for number, image in enumerate(images()):
        for magnitude in magnitudes:
            for sign, resample in ((1, BICUBIC), (-1, BICUBIC), (1, BILINEAR), (-1, BILINEAR)):
                theirs = their_operation(timm, monkeypatch, name, magnitude, sign, resample)(image)
                level = sign * magnitude / 10
                ours = apply_operation(name, image, level, fill=FILL, resample=resample)
                case = f"image {number}, magnitude {magnitude}, sign {sign}, {resample!r}"
                np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=case)
                changed += np.asarray(ours).tobytes() != image.tobytes()
    assert changed > 0.4 * len(images()) * len(magnitudes) * 4


def test_images_agree_operation_after_operation(timm, monkeypatch):
    transform, (image, *_) = parse_rand_augment(RECIPE, IMAGENET_MEAN), images()
    calls = []

    def record(name, image, level, **kwargs):
        calls.append((str(name), level))
        return apply_operation(name, image, level, **kwargs)

    monkeypatch.setattr(augment, "apply_operation", record)
    lengths = Counter()
    for seed in range(200):
        calls.clear()
        ours = transform(np.asarray(image), np.random.default_rng(seed))
        theirs = image
        for name, level in calls:
            sign = 1 if level >= 0 else -1
            theirs = their_operation(timm, monkeypatch, name, 10 * abs(level), sign)(theirs)
        np.testing.assert_array_equal(ours, np.asarray(theirs), err_msg=f"seed {seed}: {calls}")
        lengths[len(calls)] += 1
    assert min(lengths[0], lengths[1], lengths[2]) > 20


@pytest.mark.parametrize("text", [RECIPE, "rand-inc1", "rand-inc1-n3-m5", "rand-mstd1-m0-n1-inc1"])
def test_a_text_means_the_same(timm, text):
    ours = parse_rand_augment(text, IMAGENET_MEAN)
    theirs = timm.rand_augment_transform(text, hparams())
    assert theirs.choice_weights is None
    assert theirs.num_layers == ours.count
    assert len(theirs.ops) == len(OPERATIONS)
    for operation in theirs.ops:
        assert operation.prob == ours.probability
        assert operation.magnitude == ours.magnitude
        assert operation.magnitude_std == ours.magnitude_std
        assert operation.kwargs == {"fillcolor": ours.fill, "resample": ours.resample[0]}
    assert len(ours.resample) == 1


def their_draws(timm, images):
    """Return what timm would apply to so many images: our name, and the level without a sign."""
    calls = []
    transform = timm.rand_augment_transform(RECIPE, hparams())

    def recorder(name):
        return lambda magnitude, _: calls.append((name, magnitude / 10)) or ()

    ours = {theirs: name for name, theirs in THEIR_NAMES.items()}
    for name, operation in zip(timm._RAND_INCREASING_TRANSFORMS, transform.ops, strict=True):
        operation.level_fn = recorder(ours[name])
        operation.aug_fn = lambda image, **_: image
    timm.random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    for _ in range(images):
        transform(None)
    return calls


def our_draws(monkeypatch, images):
    """Return the same of ours."""
    calls = []

    def record(name, image, level, **_):
        calls.append((str(name), abs(level)))
        return image

    monkeypatch.setattr(augment, "apply_operation", record)
    transform, rng = parse_rand_augment(RECIPE, IMAGENET_MEAN), np.random.default_rng(0)
    for _ in range(images):
        transform(np.zeros((1, 1, 3), np.uint8), rng)
    return calls


def test_draws_are_distributed_as_theirs(timm, monkeypatch):
    images = 10_000  # 20,000 draws, of which half are applied
    ours, theirs = our_draws(monkeypatch, images), their_draws(timm, images)
    for calls in (ours, theirs):
        assert len(calls) == pytest.approx(images, abs=4.5 * 5000**0.5)
    mine, others = (Counter(name for name, _ in calls) for calls in (ours, theirs))
    assert mine.keys() == others.keys() == set(OPERATIONS)
    # The difference of two counts of 667 has a deviation of 36.
    assert max(abs(mine[name] - others[name]) for name in OPERATIONS) < 4.5 * 36.5
    mine, others = (np.array([level for _, level in calls]) for calls in (ours, theirs))
    assert mine.max() == others.max() == 1
    # Kolmogorov and Smirnov: a difference of 1.95 / sqrt(n / 2) has a probability of 0.001.
    grid = np.linspace(0.6, 1, 400, endpoint=False)
    apart = [abs((mine <= at).mean() - (others <= at).mean()) for at in grid]
    assert max(apart) < 1.95 / (images / 2) ** 0.5
