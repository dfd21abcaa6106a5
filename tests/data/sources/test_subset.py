"""Some examples of a source, other labels, and labels and names of sources with and without."""

import pickle

import numpy as np
import pytest

from mae_jax.data.sources import class_names, labels_of
from mae_jax.data.sources.digits import Digits
from mae_jax.data.sources.subset import Relabelled, Subset


class Plain:
    """A source with no more than it must have; example 4 cannot be read."""

    num_classes = 3
    exif = True

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 4:
            raise OSError("damaged")
        return {"image": b"%d" % index, "label": index % 3}

    def describe(self, index):
        return f"plain {index}"

    def fingerprint(self):
        return "00ff"


def digits():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    return Digits("train", images, np.array([3, 1, 4, 1, 5, 9], np.int32))


def test_examples_come_in_the_given_order():
    subset = Subset(Plain(), [5, 0, 2, 0])
    assert len(subset) == 4
    assert [subset[i]["image"] for i in range(4)] == [b"5", b"0", b"2", b"0"]
    assert [subset[i]["label"] for i in range(4)] == [2, 0, 2, 0]
    assert subset.describe(0) == "plain 5"
    assert (subset.num_classes, subset.exif) == (3, True)


def test_labels_and_names_are_those_of_the_source():
    subset = Subset(digits(), np.array([5, 0, 1]))
    assert labels_of(subset).tolist() == [9, 3, 1]
    assert class_names(subset) == class_names(digits()) == tuple("0123456789")
    assert (subset.num_classes, subset.exif) == (10, False)


def test_a_source_without_labels_at_hand_is_read():
    labels = labels_of(Plain())
    assert labels.dtype == np.int32
    assert labels.tolist() == [0, 1, 2, 0, -1, 2]
    assert class_names(Plain()) == ()
    subset = Subset(Plain(), [2, 3])
    assert not hasattr(subset, "labels")
    assert labels_of(subset).tolist() == [2, 0]


def test_labels_at_hand_are_not_read():
    source = digits()
    source.images = None
    labels = labels_of(source)
    assert labels.dtype == np.int32
    assert labels.tolist() == [3, 1, 4, 1, 5, 9]


def test_a_subset_of_a_subset():
    subset = Subset(Subset(digits(), [5, 4, 3]), [2, 0])
    assert labels_of(subset).tolist() == [1, 9]
    assert subset.describe(1) == "digit 5 of split train"


def test_fingerprint_is_of_the_source_and_the_indices_in_order():
    prints = [
        Subset(source, indices).fingerprint()
        for source, indices in (
            (digits(), [0, 1]),
            (digits(), [1, 0]),
            (digits(), [0, 1, 2]),
            (Plain(), [0, 1]),
        )
    ]
    assert len({*prints, digits().fingerprint()}) == 5
    assert Subset(digits(), np.array([0, 1], np.int32)).fingerprint() == prints[0]


def test_workers_can_have_it():
    again = pickle.loads(pickle.dumps(Subset(digits(), [5, 2])))
    assert again[1]["label"] == 4
    assert labels_of(again).tolist() == [9, 4]


@pytest.mark.parametrize("indices", [[], [0, 6], [-1]])
def test_indices_out_of_range_are_refused(indices):
    with pytest.raises(ValueError, match=r"expected indices in 0 ... 5"):
        Subset(Plain(), indices)


class TestRelabelled:
    def test_labels_go_through_the_table_and_images_do_not(self):
        source = Relabelled(Plain(), [7, -1, 2], tuple("abcdefgh"))
        assert len(source) == 6
        assert [source[i]["label"] for i in (0, 1, 2, 3, 5)] == [7, -1, 2, 7, 2]
        assert source[2] == {"image": b"2", "label": 2}
        assert type(source[0]["label"]) is int
        assert (source.num_classes, source.exif) == (8, True)
        assert class_names(source) == tuple("abcdefgh")
        assert source.describe(3) == "plain 3"

    def test_an_example_without_a_label_gets_none(self):
        images = np.zeros((2, 1, 1, 1), np.uint8)
        source = Relabelled(Digits("train", images, np.array([-1, 1], np.int32)), [3, 5], "abcdef")
        assert [source[i]["label"] for i in (0, 1)] == [-1, 5]  # not that of the last class

    def test_its_labels_are_not_those_of_the_source(self):
        source = Relabelled(digits(), [9 - label for label in range(10)], tuple("9876543210"))
        assert labels_of(source).tolist() == [6, 8, 5, 8, 4, 0]
        assert labels_of(Relabelled(Plain(), [1, 2, 0], "abc")).tolist() == [1, 2, 0, 1, -1, 0]

    def test_damage_is_told_as_the_source_tells_it(self):
        with pytest.raises(OSError, match="damaged"):
            Relabelled(Plain(), [0, 1, 2], "abc")[4]

    def test_fingerprint_is_of_the_source_and_the_table(self):
        made = [(Plain(), [0, 1, 2]), (Plain(), [1, 0, 2]), (digits(), [0, 1, 2])]
        prints = {Relabelled(source, table, "abc").fingerprint() for source, table in made}
        assert len(prints | {Plain().fingerprint(), digits().fingerprint()}) == 5
        again = Relabelled(Plain(), np.array([0, 1, 2], np.int64), "abc").fingerprint()
        assert again in prints

    def test_workers_can_have_it(self):
        again = pickle.loads(pickle.dumps(Relabelled(digits(), list(range(10)), "0123456789")))
        assert again[1]["label"] == 1
