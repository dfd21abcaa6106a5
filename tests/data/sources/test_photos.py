"""Whole photographs are held out, and the views of each are fixed and spread out."""

import importlib.util
import pickle

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import loader, transforms
from mae_jax.data.readers.images import ImageReader
from mae_jax.data.sources import open_source, photos
from mae_jax.errors import ConfigError

pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def splits():
    return {name: photos.make(name) for name in ("train", "val")}


@pytest.mark.parametrize(("split", "photographs", "views"), [("train", 7, 512), ("val", 3, 64)])
def test_there_are_as_many_views_of_each_photograph(splits, split, photographs, views):
    source = splits[split]
    assert len(source) == photographs * views
    assert source.num_classes == 0
    names = [source.describe(i).partition(",")[0] for i in range(len(source))]
    assert {names.count(name) for name in names} == {views}
    evenly = [names[i * len(source) // 8] for i in range(8)]  # what a picture shows
    assert len(set(evenly)) == photographs


def test_no_photograph_is_in_both_splits(splits):
    train, val = (set(splits[name].photographs) for name in ("train", "val"))
    assert not train & val
    assert val == {"chelsea.png", "coffee.png", "rocket.jpg"}


def test_photographs_are_the_ones_of_the_packages(splits):
    from skimage import data

    np.testing.assert_array_equal(splits["val"].photographs["chelsea.png"], data.chelsea())
    np.testing.assert_array_equal(splits["train"].photographs["astronaut.png"], data.astronaut())
    shapes = {n: p.shape for s in splits.values() for n, p in s.photographs.items()}
    assert shapes["china.jpg"] == (427, 640, 3)
    assert shapes["retina.jpg"] == (1411, 1411, 3)


def test_an_example_is_a_window_of_its_photograph(splits):
    source = splits["val"]
    index = 64 + 20
    assert source.describe(index) == "coffee.png, view 20"
    top, left, side = photos.window(400, 600, 20)
    example = source[index]
    assert example["label"] == -1
    assert example["image"].dtype == np.uint8
    assert example["image"].shape == (side, side, 3)
    expected = source.photographs["coffee.png"][top : top + side, left : left + side]
    np.testing.assert_array_equal(example["image"], expected)


def test_windows_by_hand():
    # The number g = 1.2207440846 solves x^4 = x + 1; view 0 has the fractions 1/g, 1/g^2, 1/g^3.
    # 1/g = 0.819172513: side 400 x (0.25 + 0.5 x 0.8192) = 263.8; 1/g^2 = 0.671043607: top
    # 0.6710 x (400 - 264 + 1) = 91.9; 1/g^3 = 0.549700478: left 0.5497 x (600 - 264 + 1) = 185.2.
    assert photos.window(400, 600, 0) == (91, 185, 264)
    # View 1: twice the fractions less 1: 0.638345, 0.342087, 0.099401.
    assert photos.window(400, 600, 1) == (int(0.342087 * 173), int(0.099401 * 373), 228)
    root = photos.ROOT
    assert root**4 == pytest.approx(root + 1, rel=1e-14)


@pytest.mark.parametrize("shape", [(300, 451), (451, 300), (40, 40)])
def test_windows_lie_within_the_photograph_and_cover_it_evenly(shape):
    windows = np.array([photos.window(*shape, view) for view in range(512)])
    top, left, side = windows.T
    assert min(top.min(), left.min()) >= 0
    assert (top + side).max() <= shape[0]
    assert (left + side).max() <= shape[1]
    assert len(np.unique(windows, axis=0)) > 500
    shares = np.array([side / min(shape), top / (shape[0] - side), left / (shape[1] - side)])
    for share, low, high in zip(shares, (0.25, 0, 0), (0.75, 1, 1), strict=True):
        quantiles = np.quantile(share, [0.1, 0.3, 0.5, 0.7, 0.9])
        expected = low + (high - low) * np.array([0.1, 0.3, 0.5, 0.7, 0.9])
        np.testing.assert_allclose(quantiles, expected, atol=0.04)
    assert np.abs(np.corrcoef(shares) - np.eye(3)).max() < 0.05


def test_fingerprint_depends_on_pixels_views_and_names(splits):
    images = {"a": np.zeros((8, 8, 3), np.uint8)}
    other = {"a": np.ones((8, 8, 3), np.uint8)}
    sources = [photos.Photos(images, 2), photos.Photos(images, 3), photos.Photos(other, 2)]
    sources += [photos.Photos({"b": images["a"]}, 2), *splits.values()]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert photos.Photos(images, 2).fingerprint() == sources[0].fingerprint()


def test_workers_can_read_it(splits):
    again = pickle.loads(pickle.dumps(splits["val"]))
    np.testing.assert_array_equal(again[5]["image"], splits["val"][5]["image"])


def test_the_loader_takes_views_of_all_photographs(splits):
    read = ImageReader(3, transforms.train_transform((16, 16), augment="random_resized_crop"))
    batches = loader.train_batches(splits["train"], read, batch_size=64, seed=0)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (64, 16, 16, 3)
    assert batch["label"].tolist() == [-1] * 64
    assert not batch["replaced"].any()
    assert set(batch["index"] // 512) == set(range(7))


def test_fields_that_ask_for_other_data_are_refused():
    with pytest.raises(ConfigError, match=r"data.path: expected '' .* got '/data'"):
        open_source("photos", "train", path="/data", held_out=0.3)
    with pytest.raises(ConfigError, match=r"data.held_out: expected 0.3 .* got 0.1"):
        open_source("photos", "train", held_out=0.1)


@pytest.fixture
def no_cache():
    photos._load.cache_clear()
    yield
    photos._load.cache_clear()


@pytest.mark.parametrize(
    ("package", "name"), [("sklearn", "scikit-learn"), ("skimage", "scikit-image")]
)
def test_a_missing_package_is_named_in_one_line(monkeypatch, no_cache, package, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda p: None if p == package else find(p))
    with pytest.raises(ConfigError) as caught:
        open_source("photos", "train", path="", held_out=0.3)
    assert f'needs the package {name}: pip install "mae_jax[demo]"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_photograph_is_named_in_one_line(monkeypatch, no_cache):
    def vanish(path):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(Image, "open", vanish)
    with pytest.raises(ConfigError, match=r"expected data/chelsea.png in the package scikit-image"):
        photos.make("val")
