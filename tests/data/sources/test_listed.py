"""Examples named by list files in the forms of iNaturalist and Places."""

import json
import os
import pickle

import pytest

from mae_jax.data.sources import class_names, labels_of, open_source
from mae_jax.errors import ConfigError


def write(folder, name, text="", images=()):
    """Write a list and files for some images; returns the folder."""
    (folder / name).write_text(text)
    for image in images:
        path = folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.encode())
    return str(folder)


def coco(images, annotations=None, categories=None):
    """images: id -> file name; annotations: (image, category) pairs; categories: id -> name."""
    data = {"images": [{"id": i, "file_name": name} for i, name in images.items()]}
    if annotations is not None:
        data["annotations"] = [{"image_id": i, "category_id": c} for i, c in annotations]
    if categories is not None:
        data["categories"] = [{"id": c, "name": name} for c, name in categories.items()]
    return json.dumps(data)


class TestJson:
    def test_sorted_category_ids_are_the_labels_and_images_keep_their_order(self, tmp_path):
        text = coco(
            {7: "tv/b.jpg", 3: "tv/a.jpg", 9: "tv/c.jpg"},
            [(3, 40), (9, 5), (7, 11)],  # in another order than the images
            {40: "owl", 5: "moss", 11: "newt"},
        )
        path = write(tmp_path, "train.json", text, ["tv/b.jpg"])
        source = open_source("listed", "train.json", path=path, held_out=0.1)
        assert source.names == ["tv/b.jpg", "tv/a.jpg", "tv/c.jpg"]
        assert labels_of(source).tolist() == [1, 2, 0]
        assert class_names(source) == ("moss", "newt", "owl")
        assert source[0] == {"image": b"tv/b.jpg", "label": 1}
        assert source.describe(2) == str(tmp_path / "tv" / "c.jpg")
        assert source.exif

    def test_inaturalist_2018_has_its_8142_classes_in_a_small_split_too(self, tmp_path):
        categories = {number: f"species {number}" for number in reversed(range(8142))}
        text = coco({1: "a.jpg", 2: "b.jpg"}, [(1, 0), (2, 4711)], categories)
        path = write(tmp_path, "val.json", text, ["a.jpg"])
        source = open_source("listed", "val.json", path=path)
        assert source.num_classes == len(class_names(source)) == 8142
        assert source.labels == [0, 4711]

    def test_ids_stand_for_names_that_are_not_there(self, tmp_path):
        data = json.loads(coco({1: "a.jpg"}, [(1, 8)], {8: ""}))
        del data["categories"][0]["name"]
        path = write(tmp_path, "x.json", json.dumps(data), ["a.jpg"])
        assert class_names(open_source("listed", "x.json", path=path)) == ("8",)

    def test_images_of_a_test_file_have_no_labels(self, tmp_path):
        path = write(tmp_path, "test.json", coco({1: "a.jpg", 2: "b.jpg"}), ["a.jpg"])
        source = open_source("listed", "test.json", path=path)
        assert source.num_classes == 0
        assert source.labels == [-1, -1]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "images .id, file_name.*JSONDecodeError"),
            ("[]", "images .id, file_name.*TypeError"),
            ('{"images": [{"id": 1}]}', "KeyError: 'file_name'"),
            (coco({}), "a list with images, got none"),
            (coco({1: "a.jpg"}, [(1, 3)]), "one of the 0 categories .* image 1, got category_id 3"),
            (coco({1: "a.jpg"}, [(1, 3), (1, 4)], {3: "x", 4: "y"}), "one category for image 1"),
            (coco({1: "a.jpg", 2: "b.jpg"}, [(1, 3)], {3: "x"}), "got none of b.jpg .1 such"),
        ],
    )
    def test_what_does_not_fit_is_refused_in_one_line(self, tmp_path, text, message):
        path = write(tmp_path, "x.json", text, ["a.jpg"])
        with pytest.raises(
            ConfigError, match=rf"^data.split, data.eval_split: .*{message}"
        ) as error:
            open_source("listed", "x.json", path=path)
        assert "\n" not in str(error.value)

    def test_the_same_annotation_twice_is_one(self, tmp_path):
        text = coco({1: "a.jpg"}, [(1, 3), (1, 3)], {3: "x"})  # two birds of a kind
        path = write(tmp_path, "x.json", text, ["a.jpg"])
        assert open_source("listed", "x.json", path=path).labels == [0]


class TestLines:
    @pytest.mark.parametrize(
        ("text", "names", "labels"),
        [
            ("/a/x/1.jpg 0\n/a/y/2.jpg 2\n", ["a/x/1.jpg", "a/y/2.jpg"], [0, 2]),  # Places365
            ("a/x/1.jpg,0\r\na/y/2.jpg,2\r\n", ["a/x/1.jpg", "a/y/2.jpg"], [0, 2]),  # Places205
            ("my cat.jpg 1\n\ndog, old.jpg, 0", ["my cat.jpg", "dog, old.jpg"], [1, 0]),
            ("img 1.jpg\t3\n", ["img 1.jpg"], [3]),
            ("img 1.jpg\n/img é.jpg", ["img 1.jpg", "img é.jpg"], [-1, -1]),
            ("\ufeffa.jpg 0\n17 1", ["a.jpg", "17"], [0, 1]),
        ],
    )
    def test_a_line_is_a_path_and_perhaps_a_label(self, tmp_path, text, names, labels):
        path = write(tmp_path, "list.txt", text, names[:1])
        source = open_source("listed", "list.txt", path=path)
        assert source.names == names
        assert labels_of(source).tolist() == labels
        assert source.num_classes == max(labels) + 1
        assert source.describe(0) == str(tmp_path / names[0])
        assert class_names(source) == ()

    def test_images_may_lie_in_a_folder_of_their_own(self, tmp_path):
        path = write(tmp_path, "val.csv", "1.jpg,1\n", ["deep/val_256/1.jpg"])
        source = open_source("listed", "val.csv:deep/val_256", path=path)
        assert source[0] == {"image": b"deep/val_256/1.jpg", "label": 1}
        assert source.describe(0) == str(tmp_path / "deep" / "val_256" / "1.jpg")

    def test_a_list_may_lie_in_a_folder_of_its_own(self, tmp_path):
        (tmp_path / "lists").mkdir()
        path = write(tmp_path, "lists/val.txt", "1.jpg 1\n", ["1.jpg"])
        assert len(open_source("listed", "lists/val.txt", path=path)) == 1

    @pytest.mark.parametrize("name", ["categories_places365.txt", "categoryIndex_places205.csv"])
    def test_a_list_of_categories_gives_number_and_names(self, tmp_path, name):
        path = write(tmp_path, "val.txt", "1.jpg 0\n", ["1.jpg"])
        write(tmp_path, name, "/b/bar 1\n/a/attic 0\n/c/cafe 2\n")
        source = open_source("listed", "val.txt", path=path)
        assert source.num_classes == 3
        assert class_names(source) == ("a/attic", "b/bar", "c/cafe")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a.jpg 0\nb.jpg\n", r"a path and a label.* on line 2 of .*list.txt, got 'b.jpg'"),
            ("a.jpg\n\nb.jpg 0\n", r"a path alone.* on line 3 of .*list.txt, got 'b.jpg 0'"),
            ("\n \n", "a list with images, got none"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_its_line(self, tmp_path, text, message):
        path = write(tmp_path, "list.txt", text, ["a.jpg"])
        with pytest.raises(ConfigError, match=rf"^data.split, data.eval_split: .*{message}"):
            open_source("listed", "list.txt", path=path)

    def test_categories_that_do_not_fit_are_refused(self, tmp_path):
        path = write(tmp_path, "val.txt", "0.jpg 0\n1.jpg 2\n", ["0.jpg"])
        write(tmp_path, "categories.txt", "cat 0\ndog 1\n")
        with pytest.raises(ConfigError, match=r"labels below 2 .* got 2 for 1.jpg"):
            open_source("listed", "val.txt", path=path)
        write(tmp_path, "categories.txt", "cat 1\ndog 2\n")
        with pytest.raises(ConfigError, match=r"data.path: .* each label from 0 on once"):
            open_source("listed", "val.txt", path=path)
        write(tmp_path, "categories_b.txt", "cat 0\ndog 1\nemu 2\n")
        with pytest.raises(ConfigError, match=r"got categories.txt, categories_b.txt"):
            open_source("listed", "val.txt", path=path)


@pytest.mark.parametrize("split", ["train", "other.txt", "images", "", "readme.md", ":images"])
def test_an_unknown_list_is_refused_with_those_there_are(tmp_path, split):
    path = write(tmp_path, "train.txt", "1.jpg 0", ["images/1.jpg"])
    write(tmp_path, "val.json")
    write(tmp_path, "readme.md")
    with pytest.raises(ConfigError, match=r"which has train.txt, val.json; got") as error:
        open_source("listed", split, path=path)
    assert repr(split) in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.path: expected .* got nothing at"):
        open_source("listed", "train.txt", path=str(tmp_path / "nowhere"))


def test_images_that_are_not_there_are_noticed_by_looking_at_three(tmp_path, monkeypatch):
    names = [f"{number}.jpg" for number in range(1000)]
    path = write(tmp_path, "list.txt", "\n".join(names), ["999.jpg"])
    looked, exists = [], os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda p: looked.append(p) or exists(p))
    open_source("listed", "list.txt", path=path)
    assert len(looked) <= 3
    with pytest.raises(ConfigError, match=r"below .*wrong, got nothing at .*wrong/0.jpg"):
        open_source("listed", "list.txt:wrong", path=path)


def test_a_missing_image_is_an_os_error_for_the_loader(tmp_path):
    source = open_source(
        "listed", "l.txt", path=write(tmp_path, "l.txt", "a.jpg\nb.jpg", ["a.jpg"])
    )
    with pytest.raises(OSError, match=r"b.jpg"):
        source[1]


def test_a_name_that_is_not_utf_8_is_found(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    (tmp_path / "l.txt").write_bytes(b"\xff.jpg 0\n")
    source = open_source("listed", "l.txt", path=str(tmp_path))
    assert source[0]["image"] == b"x"
    assert source.fingerprint()


def test_workers_can_have_it_and_the_fingerprint_is_of_names_and_labels(tmp_path):
    path = write(tmp_path, "1.txt", "a.jpg 0\nb.jpg 1", ["a.jpg", "b.jpg"])
    write(tmp_path, "2.txt", "a.jpg 0\nb.jpg 0")
    write(tmp_path, "3.txt", "b.jpg 0\na.jpg 1")
    write(tmp_path, "4.csv", "a.jpg,0\nb.jpg,1")
    sources = [open_source("listed", name, path=path) for name in ("1.txt", "2.txt", "3.txt")]
    assert len({source.fingerprint() for source in sources}) == 3
    again = open_source("listed", "4.csv", path=path)
    assert again.fingerprint() == sources[0].fingerprint()
    assert pickle.loads(pickle.dumps(again))[1] == {"image": b"b.jpg", "label": 1}
