"""Sets of TensorFlow Datasets, prepared here without TensorFlow."""

import os
import pickle

import pytest

from mae_jax.data import loader, transforms
from mae_jax.data.sources import open_source
from mae_jax.errors import ConfigError
from tests import tfds_sets
from tests.helpers import ROOT, SHRINK, overrides, run


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds_sets.prepare(folder)
    return folder


@pytest.fixture
def prepared(data_dir):
    return str(data_dir / "imagenet2012" / tfds_sets.VERSION)


@pytest.fixture(scope="module")
def rewritten(data_dir, tmp_path_factory):
    """The same set as TFRecord."""
    folder = tmp_path_factory.mktemp("tfrecord") / "imagenet2012" / tfds_sets.VERSION
    return str(tfds_sets.as_tfrecord(data_dir / "imagenet2012" / tfds_sets.VERSION, folder))


def test_records_are_the_stored_bytes_and_labels(prepared):
    source = open_source("tfds", "train", path=prepared)
    assert len(source) == 20
    assert source.num_classes == 1000
    stored = {tfds_sets.jpeg(number): number % 7 for number in range(20)}
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


def test_a_format_without_random_access_is_refused_with_what_to_do(prepared, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(
        tfds.core.DatasetInfo, "file_format", property(lambda _: tfds.core.FileFormat.RIEGELI)
    )
    with pytest.raises(ConfigError, match=r"prepared as riegeli.*file_format='array_record'"):
        open_source("tfds", "train", path=prepared)


class TestTfRecord:
    @pytest.mark.parametrize(
        "split", ["train", "validation", "train[:50%]", "train[5:-2]", "train[3:4]"]
    )
    def test_it_gives_what_array_record_gives(self, prepared, rewritten, split):
        source, expected = (open_source("tfds", split, path=p) for p in (rewritten, prepared))
        assert len(source) == len(expected) > 0
        assert [source[i] for i in range(len(source))] == [expected[i] for i in range(len(source))]
        assert source.num_classes == expected.num_classes
        assert source.describe(0) == expected.describe(0)
        assert source.fingerprint() == expected.fingerprint()

    def test_an_unknown_split_is_refused(self, rewritten):
        with pytest.raises(ConfigError, match="has train, validation, got 'test'"):
            open_source("tfds", "test", path=rewritten)

    def test_batches_are_those_of_array_record(self, prepared, rewritten):
        first, second = (
            next(
                loader.train_batches(
                    pickle.loads(pickle.dumps(open_source("tfds", "train", path=path))),
                    transforms.eval_transform((32, 32)),
                    channels=3,
                    batch_size=20,
                    seed=0,
                )
            )
            for path in (prepared, rewritten)
        )
        assert first["image"].tobytes() == second["image"].tobytes()
        assert first["label"].tolist() == second["label"].tolist()


def test_the_imagenet_configs_read_it_by_name_without_tensorflow(data_dir, tmp_path):
    flags = ["--config=configs/vit_l.py", f"--workdir={tmp_path / 'run'}", *overrides(SHRINK)]
    flags += ["--config.model.image_size=64", "--stop_at_step=1"]
    # A module that no import of TensorFlow gets past.
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')")
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    status, output = run(flags, TFDS_DATA_DIR=str(data_dir), PYTHONPATH=path)
    assert status == 0, output
    assert "20 images to train on, 16 held out, 1000 classes" in output
