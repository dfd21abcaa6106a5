"""Records are found by hopping, and files that do not add up are refused by name."""

import functools
import itertools
import pickle

import numpy as np
import pytest

from mae_jax.data import loader, transforms
from mae_jax.data.readers.images import ImageReader
from mae_jax.data.sources import tfrecord
from mae_jax.data.sources.tfrecord import Part, Records
from mae_jax.errors import ConfigError
from tests.tfds_sets import jpeg, write_tfrecord

FIRST = [b"a", b"", b"three", bytes(1000)]
SECOND = [b"x" * 70_000, b"last"]


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "first", tmp_path / "second"]
    for path, records in zip(paths, (FIRST, SECOND), strict=True):
        write_tfrecord(path, records)
    return [str(path) for path in paths]


def whole(filename, total):
    return Part(filename, 0, total, total)


def read(parts):
    records = Records(parts, bytes)
    return [records[index] for index in range(len(records))]


def test_records_are_found_where_the_format_says(tmp_path):
    # 8 bytes of length, 4 of checksum, data, 4 of checksum.
    content = b"\x03\0\0\0\0\0\0\0CCCCabcDDDD" + b"\x01\0\0\0\0\0\0\0CCCCzDDDD"
    (tmp_path / "by_hand").write_bytes(content)
    assert read([whole(str(tmp_path / "by_hand"), 2)]) == [b"abc", b"z"]


def test_files_come_one_after_the_other(files):
    assert read([whole(files[0], 4), whole(files[1], 2)]) == FIRST + SECOND
    assert read([whole(files[1], 2), whole(files[0], 4)]) == SECOND + FIRST


@pytest.mark.parametrize(
    ("skip", "take"), list(itertools.combinations_with_replacement(range(5), 2))
)
def test_a_part_leaves_out_and_takes(files, skip, take):
    take = min(take, 4 - skip)
    expected = FIRST[skip : skip + take] + SECOND
    assert read([Part(files[0], skip, take, 4), whole(files[1], 2)]) == expected


def test_records_survive_pickling(files):
    records = pickle.loads(pickle.dumps(Records([whole(files[1], 2)], len)))
    assert [records[0], records[1]] == [70_000, 4]


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda data: data[:-1], "4 that end at 1070"),
        (lambda data: data[:-1016], "3 that end at 54"),
        (lambda data: data[:-1010], "3 that end at 54"),
        (lambda data: data + b"?", "4 that end at 1070"),
        (lambda data: data + bytes(16), "5 that end at 1086"),
        (lambda data: b"\x02" + data[1:], "got"),
        (lambda data: b"\xff" * 8 + data[8:], "1 that end at"),
        (lambda data: b"", "0 that end at 0"),
        (lambda data: b"text, and no records", "1 that end at"),
    ],
)
def test_a_file_that_does_not_add_up_is_refused_by_name(tmp_path, damage, got):
    path = tmp_path / "damaged"
    write_tfrecord(path, FIRST)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ConfigError, match=rf"^data.path: expected 4 .* of {path}, .*{got}"
    ) as caught:
        Records([whole(str(path), 4)], bytes)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"got No such file or directory at .*/nothing$"):
        Records([whole(str(tmp_path / "nothing"), 4)], bytes)


def test_a_part_of_nothing_needs_no_file(files):
    assert read([Part("nowhere", 4, 0, 4), whole(files[1], 2)]) == SECOND


class Jpegs:
    """The records as a source of images."""

    num_classes = 0
    exif = False

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return {"image": self.records[index], "label": -1}

    def describe(self, index):
        return f"record {index}"


def parse(data, refused=b"damaged"):
    if data.startswith(refused):
        raise KeyError("image")
    return data


@pytest.mark.parametrize("how", ["does not parse", "is gone", "is cut off"])
def test_what_is_damaged_after_opening_is_replaced_by_the_next_record(tmp_path, how):
    first, second = tmp_path / "first", tmp_path / "second"
    write_tfrecord(first, [b"damaged" if how == "does not parse" else jpeg(0)])
    write_tfrecord(second, [jpeg(1)])
    source = Jpegs(Records([whole(str(first), 1), whole(str(second), 1)], functools.partial(parse)))
    if how == "is gone":
        first.unlink()
    elif how == "is cut off":
        first.write_bytes(first.read_bytes()[:100])
    transform = transforms.eval_transform((8, 8))
    load = loader.LoadExample(source, ImageReader(3, transform))
    example = load.random_map(0, np.random.default_rng(0))
    assert (example["asked"], example["index"], example["replaced"]) == (0, 1, True)


def test_a_record_that_does_not_parse_names_its_file_and_place(files):
    def refuse(data):
        raise KeyError("image")

    records = Records([whole(files[0], 4)], refuse)
    with pytest.raises(OSError, match=rf"damaged at byte 45 of {files[0]}: 'image'"):
        records[2]


def test_many_threads_find_what_one_finds(files, monkeypatch):
    many = read([whole(files[0], 4), whole(files[1], 2)] * 20)
    monkeypatch.setattr(tfrecord, "THREADS", 1)
    assert many == read([whole(files[0], 4), whole(files[1], 2)] * 20)
