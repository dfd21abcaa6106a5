"""The lists of ImageNet's classes."""

import numpy as np
import pytest

from mae_jax.data import imagenet
from mae_jax.errors import ConfigError


def test_there_are_1000_classes_in_sorted_order():
    wnids = imagenet.wnids()
    assert len(set(wnids)) == len(wnids) == 1000
    assert list(wnids) == sorted(wnids)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)


# Class k of ILSVRC-2012 as published with many models: tench, goldfish, great white shark, tabby,
# coffee mug, toilet tissue.
@pytest.mark.parametrize(
    ("label", "wnid"),
    [
        (0, "n01440764"),
        (1, "n01443537"),
        (2, "n01484850"),
        (281, "n02123045"),
        (504, "n03063599"),
        (999, "n15075141"),
    ],
)
def test_known_classes_have_their_labels(label, wnid):
    assert imagenet.wnids()[label] == wnid
    assert imagenet.columns([wnid]).tolist() == [label]


def test_labels_are_those_of_tensorflow_datasets():
    import tensorflow_datasets as tfds

    names = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    assert list(imagenet.wnids()) == names


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_a_and_r_have_200_of_the_classes(name):
    wnids = imagenet.wnids_of(name)
    assert len(set(wnids)) == len(wnids) == 200
    assert list(wnids) == sorted(wnids)
    assert set(wnids) <= set(imagenet.wnids())


def test_a_and_r_share_some_classes_and_not_all():
    first, second = (set(imagenet.wnids_of(name)) for name in ("imagenet_a", "imagenet_r"))
    assert len(first & second) == 86
    # The first classes of each: stingray, goldfinch, junco; goldfish, great white, hammerhead.
    columns = [imagenet.columns(imagenet.wnids_of(n))[:3].tolist() for n in imagenet.FILES]
    assert columns == [[0, 1, 2], [6, 11, 13], [1, 2, 4]]


def test_columns_are_in_the_order_of_the_names():
    wnids = imagenet.wnids()
    order = np.random.default_rng(0).permutation(1000)
    columns = imagenet.columns([wnids[k] for k in order])
    assert columns.dtype == np.int32
    np.testing.assert_array_equal(columns, order)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"data.path: expected .* got 'cat'"):
        imagenet.columns(["n01440764", "cat", "dog"])
    with pytest.raises(ConfigError, match="expected imagenet2012, imagenet_a, imagenet_r, got 'x'"):
        imagenet.wnids_of("x")
