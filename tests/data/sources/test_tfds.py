"""Sets of TensorFlow Datasets, prepared here without TensorFlow."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import loader, transforms
from mae_jax.data.sources import open_source
from mae_jax.errors import ConfigError
from tests.helpers import ROOT, SHRINK, overrides, run

SIZES = {"train": 20, "validation": 16}


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 60)).save(file, format="JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepare 20 + 16 JPEGs as `imagenet2012`, which hides the class that TFDS has of that name."""
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            names = [f"n{number:08d}" for number in range(1000)]
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="jpeg"),
                        "label": tfds.features.ClassLabel(names=names),
                        "file_name": tfds.features.Text(),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(count) for name, count in SIZES.items()}

        def _generate_examples(self, count):
            for number in range(count):
                image = io.BytesIO(jpeg(number))
                yield number, {"image": image, "label": number % 7, "file_name": f"{number}.JPEG"}

    folder = tmp_path_factory.mktemp("tfds")
    builder = Imagenet2012(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return folder


@pytest.fixture
def prepared(data_dir):
    return str(data_dir / "imagenet2012" / "5.1.0")


def test_records_are_the_stored_bytes_and_labels(prepared):
    source = open_source("tfds", "train", path=prepared)
    assert len(source) == 20
    assert source.num_classes == 1000
    stored = {jpeg(number): number % 7 for number in range(20)}
    read = {source[i]["image"]: source[i]["label"] for i in range(20)}
    assert read == stored
    assert source.describe(3) == "record 3 of imagenet2012/5.1.0 train"


def test_a_part_of_a_split_can_be_named(prepared):
    assert len(open_source("tfds", "train[:50%]", path=prepared)) == 10


def test_fingerprint_tells_splits_apart(prepared):
    first, second = (
        open_source("tfds", split, path=prepared).fingerprint() for split in ("train", "validation")
    )
    assert first != second


def test_workers_can_read_it(prepared):
    source = open_source("tfds", "train", path=prepared)
    again = pickle.loads(pickle.dumps(source))
    assert again[5]["image"] == source[5]["image"]
    transform = transforms.eval_transform((32, 32))
    batches = loader.train_batches(source, transform, channels=3, batch_size=4, seed=0)
    assert next(batches)["image"].shape == (4, 32, 32, 3)


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("", "train", "data.path: expected the name of a TFDS set or a folder"),
        ("imagenet2013", "train", "data.path: 'imagenet2013' is no set of TFDS here"),
        ("/tmp", "train", "data.path: '/tmp' is no set of TFDS here"),
        ("cifar10", "train", "data.path: cifar10/.* is not prepared in .*array_record"),
        (None, "val", "imagenet2012/5.1.0 has train, validation, got 'val'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(prepared, path, split, message):
    with pytest.raises(ConfigError, match=message) as error:
        open_source("tfds", split, path=prepared if path is None else path)
    assert "\n" not in str(error.value)


def test_tfrecord_is_refused_with_what_to_do(prepared, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(
        tfds.core.DatasetInfo, "file_format", property(lambda _: tfds.core.FileFormat.TFRECORD)
    )
    with pytest.raises(ConfigError, match=r"prepared as tfrecord.*file_format='array_record'"):
        open_source("tfds", "train", path=prepared)


def test_the_imagenet_configs_read_it_by_name_without_tensorflow(data_dir, tmp_path):
    flags = ["--config=configs/vit_l.py", f"--workdir={tmp_path / 'run'}", *overrides(SHRINK)]
    flags += ["--config.model.image_size=64", "--stop_at_step=1"]
    # A module that no import of TensorFlow gets past.
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')")
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    status, output = run(flags, TFDS_DATA_DIR=str(data_dir), PYTHONPATH=path)
    assert status == 0, output
    assert "20 images to train on, 16 held out, 1000 classes" in output
