"""Prepared shards give what the folder that they were made of gives."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mae_jax.data import loader, transforms
from mae_jax.data.readers.images import ImageReader
from mae_jax.data.sources import class_names, labels_of, open_source, prepared
from mae_jax.data.sources import folder as folder_source
from mae_jax.errors import ConfigError
from mae_jax.tools import shards
from tests.helpers import write_photographs

CLASSES = ("ape", "cat", "dog")


def write_classes(root: Path) -> str:
    for seed, name in enumerate(CLASSES):
        write_photographs(root / name, 7, seed)
    return str(root)


def prepare(path: str, out: Path, **options: int) -> str:
    plan = shards.plan(path, shards.Options(**options), shards=4)
    ensure = functools.partial(shards.in_processes, processes=1)
    shards.prepare(plan, str(out), ensure=ensure, max_bad_share=0.0)
    return str(out)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return write_classes(tmp_path_factory.mktemp("images") / "all")


@pytest.fixture(scope="module")
def made(images, tmp_path_factory) -> str:
    return prepare(images, tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def assert_same(ours, theirs):
    """Assert that two sources have the same examples in the same order."""
    assert len(ours) == len(theirs)
    assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]
    np.testing.assert_array_equal(labels_of(ours), labels_of(theirs))
    assert ours.num_classes == theirs.num_classes
    assert class_names(ours) == class_names(theirs)
    assert ours.exif == theirs.exif


@pytest.mark.parametrize("split", ["train", "val", "validation", "test"])
@pytest.mark.parametrize("held_out", [0.1, 0.5])
def test_examples_are_those_of_the_folder_held_out_ones_included(images, made, split, held_out):
    ours = open_source("prepared", split, path=made, held_out=held_out)
    theirs = open_source("folder", split, path=images, held_out=held_out)
    assert_same(ours, theirs)
    assert ours.classes == CLASSES
    for index in range(len(ours)):
        name, _, shard = ours.describe(index).partition(" in ")
        assert theirs.describe(index).endswith(name)
        assert Path(shard).is_file()


def test_splits_of_the_folder_are_kept(tmp_path):
    for split, count in (("train", 5), ("test", 2)):
        for name in CLASSES[:2]:
            write_photographs(tmp_path / "images" / split / name, count)
    out = prepare(str(tmp_path / "images"), tmp_path / "out")
    for split, count in (("train", 10), ("val", 4)):
        ours = prepared.make(split, path=out, held_out=0.7)
        assert_same(ours, folder_source.make(split, path=str(tmp_path / "images")))
        assert len(ours) == count


def test_of_several_splits_the_one_that_is_asked_for_is_taken(tmp_path):
    for split, count in (("train", 5), ("val", 2)):
        write_photographs(tmp_path / "images" / split, count)
    out = prepare(str(tmp_path / "images"), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["splits"]["test"] = manifest["splits"]["train"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert len(prepared.make("test", path=out)) == 5
    assert len(prepared.make("validation", path=out)) == 2


def test_a_flat_folder_and_a_flat_validation_folder_have_no_labels(tmp_path):
    write_photographs(tmp_path / "flat", 8)
    out = prepare(str(tmp_path / "flat"), tmp_path / "out")
    for split in ("train", "val"):
        assert_same(
            prepared.make(split, path=out),
            folder_source.make(split, path=str(tmp_path / "flat")),
        )
    write_classes(tmp_path / "mixed" / "train")
    write_photographs(tmp_path / "mixed" / "val", 3)
    out = prepare(str(tmp_path / "mixed"), tmp_path / "mixed_out")
    assert prepared.make("train", path=out).num_classes == 3
    held_out = prepared.make("val", path=out)
    assert held_out.num_classes == 0
    assert set(held_out.labels.tolist()) == {-1}


def test_an_image_that_was_left_out_moves_no_other_between_the_splits(tmp_path):
    path = write_classes(tmp_path / "images")
    (tmp_path / "images" / "cat" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "cat" / "worse.jpg").write_bytes(b"no image")
    out = prepare(path, tmp_path / "out")
    for split in ("train", "val"):
        theirs = folder_source.make(split, path=path, held_out=0.3)
        expected = [name for name in theirs.names if name not in ("cat/bad.jpg", "cat/worse.jpg")]
        ours = prepared.make(split, path=out, held_out=0.3)
        assert [ours.names[i] for i in ours.indices] == expected


def test_batches_are_those_of_the_folder(images, made):
    read = ImageReader(3, transforms.train_transform((16, 16), augment="random_resized_crop"))
    pair = [
        loader.train_batches(
            open_source(name, "train", path=path), read, batch_size=4, seed=3, threads=0
        )
        for name, path in (("prepared", made), ("folder", images))
    ]
    for _ in range(6):  # an epoch and a bit
        ours, theirs = map(next, pair)
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_many_threads_and_other_processes_can_read(made):
    source = prepared.make("train", path=made)
    expected = [source[i]["image"] for i in range(len(source))]
    again = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).permutation(len(source)).repeat(20)
    for one in (source, again, prepared.make("train", path=made)):
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda i, one=one: one[i]["image"], order.tolist()))
        assert read == [expected[i] for i in order]
    assert again.fingerprint() == source.fingerprint()


def test_fingerprint_tells_splits_shares_and_sizes_apart(images, made, tmp_path):
    small = prepare(images, tmp_path / "small", short_side=30)
    prints = [
        prepared.make("train", path=made).fingerprint(),
        prepared.make("val", path=made).fingerprint(),
        prepared.make("train", path=made, held_out=0.4).fingerprint(),
        prepared.make("train", path=small).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert all(len(digest) == 16 for digest in prints)
    again = prepare(images, tmp_path / "again")
    assert prepared.make("train", path=again).fingerprint() == prints[0]


def test_a_flipped_bit_is_a_bad_example_and_the_others_are_read(copied):
    source = prepared.make("train", path=str(copied))
    expected = [source[i] for i in range(len(source))]
    file = copied / "train-00001-of-00004.array_record"
    inside = next(i for i in range(len(source)) if source.describe(i).endswith(file.name))
    image = expected[inside]["image"]
    data = bytearray(file.read_bytes())
    data[data.index(image) + len(image) // 2] ^= 16
    file.write_bytes(data)
    source = prepared.make("train", path=str(copied))
    wrong = []
    for index, example in enumerate(expected):
        try:
            assert source[index] == example
        except OSError as error:
            wrong.append((example["image"], str(error)))
    assert [image for image, _ in wrong] == [image]
    assert "\n" not in wrong[0][1]


def cut(folder: Path) -> None:
    file = folder / "train-00002-of-00004.array_record"
    file.write_bytes(file.read_bytes()[:-1000])


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write(text: str):
    return lambda folder: (folder / "manifest.json").write_text(text)


def edit(**fields):
    def do(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | fields))

    return do


def flip_label(folder: Path) -> None:
    file = folder / "train.index.json"
    file.write_text(file.read_text().replace("0", "1", 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"expected \d+ bytes, got \d+ bytes at .*train-00002-of-00004.array_record: copy"),
        (remove("train-00000-of-00004.array_record"), "bytes, got nothing at .*00000-of-"),
        (remove("manifest.json"), "manifest.json, got none in .*: it is not finished"),
        (write("{"), "is no manifest of .*JSONDecodeError"),
        (write("[]"), "is no manifest of .*TypeError"),
        (edit(format=2), r"expected format 1 in .*manifest.json, got 2"),
        (edit(splits={"train": {}}), "is no manifest of .*KeyError: 'shards'"),
        (remove("train.index.json"), "cannot read .*train.index.json: No such file"),
        (flip_label, "expected SHA-256 .*, got .* of .*train.index.json"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line_when_it_is_opened(copied, damage, message):
    damage(copied)
    with pytest.raises(ConfigError, match=f"^data.path: .*{message}") as caught:
        prepared.make("train", path=str(copied))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("split", "fields", "message"),
    [
        ("train", {"path": ""}, "data.path: expected a folder of images, got an empty string"),
        ("train", {"path": "/nowhere"}, "got nothing at /nowhere"),
        ("train", {"path": "{images}"}, "manifest.json, got none in .*: see prepare_data"),
        ("all", {}, "data.split, data.eval_split: expected train.* got 'all'"),
        ("train", {"held_out": 0.0}, "data.held_out: expected a share"),
    ],
)
def test_what_cannot_be_is_refused(images, made, split, fields, message):
    fields = {"path": made, **fields}
    fields["path"] = fields["path"].format(images=images)
    with pytest.raises(ConfigError, match=message):
        prepared.make(split, **fields)
