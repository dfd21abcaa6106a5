"""Images of files as rows of a batch: crops of each, by Pillow or faster."""

import io
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data import fast, loader, transforms
from mae_jax.data.readers import images
from mae_jax.data.sources import folder
from mae_jax.errors import ConfigError

NUM_IMAGES = 14


def config(task="pretrain", **fields):
    data = {
        "image_size": (16, 16),
        "channels": 3,
        "augment": "random_resized_crop",
        "crop_scale": (0.2, 1.0),
        "crop_ratio": (0.75, 1.33),
        "crop_fraction": 0.875,
        "flip": True,
        "resample": "fast",
        "crops_per_image": 1,
        "rand_augment": "",
        "mean": (0.5, 0.5, 0.5),
    }
    return ConfigDict({"task": task, "data": {**data, **fields}})


def picture(number):
    """A smooth image of a brightness of its own."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 60, (4, 5, 3)) + 14 * number
    return Image.fromarray(coarse.astype(np.uint8)).resize((50 + number, 40), 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder: JPEGs, of which two are CMYK, and a PNG named as they are."""
    path = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        image = picture(number)
        kind = "PNG" if number == 3 else "JPEG"
        image = image.convert("CMYK") if number in (5, 9) else image
        target = path / "train" / "ab"[number % 2] / f"{number:02d}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, kind)
        if number < 2:
            target = path / "val" / "ab"[number] / "0.png"
            target.parent.mkdir(parents=True)
            image.save(target)
    return folder.make("train", path=str(path))


def train(source, count=1, fields=None, **options):
    options = {"batch_size": 4, "seed": 7, "threads": 0, **options}
    batches = loader.train_batches(source, images.training(config(**(fields or {}))), **options)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


class TestResample:
    def test_pil_is_pillow_bit_for_bit(self, source):
        for index in range(len(source)):
            example = source[index]
            read = images.training(config(resample="pil", flip=False))
            found = read(example, np.random.default_rng(index))["image"]
            whole = Image.open(io.BytesIO(example["image"])).convert("RGB")
            crop = transforms.RandomResizedCrop((16, 16), (0.2, 1.0), (0.75, 1.33))
            rng = np.random.default_rng(index)
            top, left, height, width = crop.box(whole.height, whole.width, rng)
            box = whole.crop((left, top, left + width, top + height))
            expected = box.resize((16, 16), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(found, np.asarray(expected))

    def test_fast_takes_the_same_boxes_and_flips(self, source):
        fast_batches = train(source, 6)
        for batch, exact in zip(fast_batches, train(source, 6, {"resample": "pil"}), strict=True):
            assert batch.keys() - exact.keys() == {"by_pillow"}
            difference = batch["image"].astype(int) - exact["image"]
            assert 0 < np.abs(difference).max() < 24
            assert np.abs(difference).mean() < 2

    def test_evaluation_is_pillow_bit_for_bit_whatever_training_is(self, source):
        read = images.evaluation(config().data)
        for index in range(len(source)):
            arrays = read(source[index], np.random.default_rng(0))
            image = Image.open(io.BytesIO(source[index]["image"])).convert("RGB")
            short = 18  # 16 / 0.875
            size = (int(short * image.width / image.height), short)
            image = image.resize(size, Image.Resampling.BICUBIC)
            left = round((image.width - 16) / 2)
            expected = np.asarray(image.crop((left, 1, left + 16, 17)))
            np.testing.assert_array_equal(arrays["image"], expected)
            assert arrays.keys() == {"image"}

    @pytest.mark.parametrize("augment", ["random_resized_crop_clamped", "random_crop", "none"])
    def test_all_crops_are_resized_by_it(self, augment, monkeypatch):
        calls = []
        once = fast.resize
        monkeypatch.setattr(fast, "resize", lambda *args: calls.append(args) or once(*args))
        read = images.training(config(augment=augment))
        read({"image": np.asarray(picture(0))}, np.random.default_rng(0))
        assert len(calls) == 1

    def test_jpegs_left_to_pillow_are_counted_once_each(self, source):
        read = images.training(config())
        batches = loader.train_batches(source, read, batch_size=7, seed=0, threads=0)
        for _ in range(4):  # two epochs
            next(batches)
        assert batches.scalars() == {"bad_examples": 0.0, "jpegs_by_pillow": 2.0}
        batches.close()

    def test_without_the_packages_pillow_does_it_and_one_line_says_so(
        self, source, monkeypatch, caplog
    ):
        monkeypatch.delitem(sys.modules, "mae_jax.data.fast")
        monkeypatch.delattr("mae_jax.data.fast")
        monkeypatch.setitem(sys.modules, "cv2", None)
        with caplog.at_level(logging.WARNING):
            batches = train(source, 2)
        assert_same(batches, train(source, 2, {"resample": "pil"}))
        (record,) = caplog.records
        assert "data.resample=fast: Pillow decodes and resizes" in record.getMessage()
        assert "cv2" in record.getMessage()

    def test_another_word_is_refused(self):
        with pytest.raises(ConfigError, match=r"data.resample: expected fast or pil, got 'quick'"):
            images.training(config(resample="quick"))


THREE = {"crops_per_image": 3, "flip": False}


class TestCropsPerImage:
    def test_crops_are_rows_beside_each_other_of_one_decoded_image(self, source, monkeypatch):
        decoded = []
        once = fast.Decode.read
        monkeypatch.setattr(
            fast.Decode, "read", lambda self, data: decoded.append(data) or once(self, data)
        )
        (batch,) = train(source, 1, THREE)
        assert len(decoded) == 4
        assert batch["image"].shape == (12, 16, 16, 3)
        for name in ("label", "index", "asked", "replaced", "by_pillow"):
            assert (batch[name].reshape(4, 3) == batch[name][::3, None]).all()
        assert len(set(batch["index"].tolist())) == 4
        for index, crops in zip(
            batch["index"][::3], batch["image"].reshape(4, 3, 16, 16, 3), strict=True
        ):
            brightness = np.asarray(picture(int(Path(source.describe(index)).stem))).mean()
            assert np.abs(crops.mean((1, 2, 3)) - brightness).max() < 20
            assert len(np.unique(crops.reshape(3, -1), axis=0)) == 3  # each cropped by itself
        assert batch["label"].tolist() == [source.labels[i] for i in batch["index"]]

    def test_the_first_crop_is_the_one_there_would_be_alone(self, source):
        for batch, alone in zip(
            train(source, 3, THREE), train(source, 3, {"flip": False}), strict=True
        ):
            np.testing.assert_array_equal(batch["image"][::3], alone["image"])
            np.testing.assert_array_equal(batch["index"][::3], alone["index"])

    def test_an_epoch_counts_images(self, source):
        batches = train(source, 2, {"crops_per_image": 2}, batch_size=7)
        index = np.concatenate([batch["index"] for batch in batches])
        assert sorted(index) == sorted([*range(NUM_IMAGES)] * 2)

    @pytest.mark.parametrize("fields", [{}, THREE])
    def test_threads_do_not_change_them(self, source, fields):
        assert_same(train(source, 4, fields, threads=2), train(source, 4, fields))

    @pytest.mark.slow
    def test_worker_processes_do_not_change_them(self, source):
        assert_same(train(source, 4, THREE, workers=2), train(source, 4, THREE))

    def test_the_reader_can_be_sent_to_workers(self):
        read = pickle.loads(pickle.dumps(images.training(config(**THREE))))
        assert (read.views, read.decode) == (3, fast.Decode)

    def test_none_is_refused(self):
        with pytest.raises(ConfigError, match=r"data.crops_per_image: expected at least 1, got 0"):
            images.training(config(crops_per_image=0))
