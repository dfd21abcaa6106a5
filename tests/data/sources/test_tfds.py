"""Sets of TensorFlow Datasets, prepared here without TensorFlow."""

import os
import pickle

import pytest
from ml_collections import ConfigDict

from mae_jax.data import loader, transforms
from mae_jax.data.readers.images import ImageReader
from mae_jax.data.sources import open_source, open_split
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
    assert source.classes[:2] == ("n00000000", "n00000001")
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
    batches = loader.train_batches(source, ImageReader(3, transform), batch_size=4, seed=0)
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
        assert source.classes == expected.classes
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
                    ImageReader(3, transforms.eval_transform((32, 32))),
                    batch_size=20,
                    seed=0,
                )
            )
            for path in (prepared, rewritten)
        )
        assert first["image"].tobytes() == second["image"].tobytes()
        assert first["label"].tolist() == second["label"].tolist()


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return str(tfds_sets.prepare_captioned(tmp_path_factory.mktemp("captioned")))


class TestCaptions:
    def test_one_or_several_come_with_each_example(self, captioned):
        title, both = (
            open_source("tfds", "train", path=captioned, caption=name)
            for name in ("image/title", "captions/text")
        )
        images = [tfds_sets.jpeg(number) for number in range(3)]
        for source in (title, pickle.loads(pickle.dumps(both))):
            by_image = {example["image"]: example for example in map(source.__getitem__, range(3))}
            some = slice(0, 1) if source is title else slice(0, 2)
            for number, image in enumerate(images):
                true = tfds_sets.CAPTIONS[2 * number : 2 * number + 2][some]
                assert by_image[image] == {"image": image, "label": -1, "caption": true}
        assert sorted(both.captions()) == sorted(tfds_sets.CAPTIONS)
        assert title.fingerprint() != both.fingerprint()

    def test_there_are_none_unless_they_are_asked_for(self, captioned):
        source = open_source("tfds", "train", path=captioned)
        assert source[0].keys() == {"image", "label"}
        assert not list(source.captions())

    def test_a_config_names_the_feature(self, captioned):
        data = {"source": "tfds", "path": captioned, "held_out": None, "caption": "image/title"}
        source = open_split(ConfigDict(data), "train")
        assert source.caption == ("image/title",)

    @pytest.mark.parametrize("name", ["title", "captions", "captions/id", "image/id", "image/x/y"])
    def test_what_holds_no_texts_is_refused(self, captioned, name):
        with pytest.raises(ConfigError, match=rf"data.caption: .* got '{name}'; captioned"):
            open_source("tfds", "train", path=captioned, caption=name)


@pytest.mark.slow
def test_the_imagenet_configs_read_it_by_name_without_tensorflow(data_dir, tmp_path):
    flags = ["--config=configs/vit_l.py", f"--workdir={tmp_path / 'run'}", *overrides(SHRINK)]
    flags += ["--config.model.image_size=64", "--stop_at_step=1"]
    # A module that no import of TensorFlow gets past.
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')")
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    status, output = run(flags, TFDS_DATA_DIR=str(data_dir), PYTHONPATH=path)
    assert status == 0, output
    assert "20 images to train on, 16 held out, 1000 classes" in output
