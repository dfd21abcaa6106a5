"""A folder of images with their captions in captions.jsonl."""

import json
import pickle

import pytest

from mae_jax.data.sources import class_names, labels_of, open_source, open_split
from mae_jax.errors import ConfigError


def write(folder, *lines, images=True):
    """Write captions.jsonl, of objects or of text, and files for images."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "captions.jsonl").write_text("\n".join(text) + "\n")
    for line in lines:
        if images and isinstance(line, dict) and isinstance(line.get("file"), str):
            path = folder / line["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(line["file"].encode())
    return str(folder)


def one(file, caption="words", **more):
    return {"file": file, "caption": caption, **more}


def names(path, held_out=0.5):
    """Return the images of both splits."""
    return [
        open_source("captions", split, path=path, held_out=held_out).names
        for split in ("train", "val")
    ]


def test_examples_are_bytes_with_captions_and_no_label(tmp_path):
    path = write(
        tmp_path,
        one("deep/a.jpg", "an owl", split="train", id=7),
        "",
        one("b.jpg", ["moss", "", "green moss"], split="train"),
        one("c.jpg", None, split="train"),
        one("b.jpg", "again", split="train"),
        one("d.jpg", "", split="validation"),
    )
    source = open_source("captions", "train", path=path, held_out=0.1)
    assert [source[i] for i in range(len(source))] == [
        {"image": b"deep/a.jpg", "label": -1, "caption": ("an owl",)},
        {"image": b"b.jpg", "label": -1, "caption": ("moss", "green moss", "again")},
        {"image": b"c.jpg", "label": -1, "caption": ()},
    ]
    assert list(source.captions()) == ["an owl", "moss", "green moss", "again"]
    assert source.describe(0) == str(tmp_path / "deep" / "a.jpg")
    assert (source.num_classes, class_names(source)) == (0, ())
    assert labels_of(source).tolist() == [-1] * 3
    assert source.exif
    again = pickle.loads(pickle.dumps(source))
    assert again[1] == source[1]
    assert again.fingerprint() == source.fingerprint()


class TestSplits:
    def test_lines_may_say_which(self, tmp_path):
        path = write(
            tmp_path,
            one("a.jpg", split="val"),
            one("b.jpg", split="train"),
        )
        assert names(path) == [["b.jpg"], ["a.jpg"]]

    @pytest.mark.parametrize("apart", [True, False])
    def test_of_several_the_one_that_is_asked_for_is_taken(self, tmp_path, apart):
        files = {"train": "a.jpg", "val": "b.jpg", "test": "c.jpg"}
        if apart:
            for split, name in files.items():
                write(tmp_path / split, one(name))
        else:
            write(tmp_path, *(one(name, split=split) for split, name in files.items()))
        for split, name in {**files, "validation": "b.jpg"}.items():
            assert open_source("captions", split, path=str(tmp_path)).names == [name]

    def test_folders_may_be(self, tmp_path):
        write(tmp_path / "train", one("a.jpg"), one("b.jpg"))
        write(tmp_path / "test", one("c.jpg"))
        assert names(str(tmp_path)) == [["a.jpg", "b.jpg"], ["c.jpg"]]
        write(tmp_path / "val", one("d.jpg"))
        assert names(str(tmp_path))[1] == ["d.jpg"]

    def test_else_a_share_is_held_out_whole_files_and_few_move(self, tmp_path):
        lines = [one(f"{number}.jpg", text) for number in range(40) for text in ("one", "two")]
        train, val = names(write(tmp_path, *lines), held_out=0.25)
        assert len(train) == 30
        assert len(val) == 10
        assert not set(train) & set(val)
        more = names(write(tmp_path, *lines, one("new.jpg")), held_out=0.25)[1]
        assert len(set(val) - set(more)) <= 1

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_an_empty_one_is_refused(self, tmp_path, split):
        path = write(tmp_path, one("a.jpg", split="val" if split == "train" else "train"))
        with pytest.raises(ConfigError, match=r"data.path: expected images .*, got none in"):
            open_source("captions", split, path=path)

    def test_one_image_cannot_be_split(self, tmp_path):
        with pytest.raises(ConfigError, match=r"data.path: expected a second image to hold out"):
            names(write(tmp_path, one("a.jpg")))

    def test_other_names_are_refused(self, tmp_path):
        path = write(tmp_path, one("a.jpg"), one("b.jpg"))
        with pytest.raises(ConfigError, match=r"data.split, data.eval_split: .* got 'dev'"):
            open_source("captions", "dev", path=path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"expected \{\"file\": .* on line 3 of .*captions.jsonl, got Expecting"),
        ("[1]", "on line 3 of .*, got list"),
        ({"file": "c.jpg", "captions": "words"}, "on line 3 of .*, got file, captions"),
        (one(7), "a relative path as file on line 3 of .*, got 7"),
        (one(""), "a relative path as file on line 3"),
        (one("/c.jpg"), "a relative path as file on line 3 of .*, got '/c.jpg'"),
        (one("c.jpg", 7), "list of texts or null as caption on line 3 of .*, got 7"),
        (one("c.jpg", ["words", None]), r"as caption on line 3 of .*, got \[\"words\", null\]"),
        (one("c.jpg", split="dev"), "expected train, val, .* as split on line 3 of .* got 'dev'"),
        (one("c.jpg", split="val"), "one split for each file, or none for any, got 'val' .* 3"),
    ],
)
def test_a_line_of_another_form_is_refused_by_number(tmp_path, line, message):
    path = write(tmp_path, one("a.jpg"), one("b.jpg"), line, images=False)
    with pytest.raises(ConfigError, match=message) as error:
        open_source("captions", "train", path=path)
    assert "\n" not in str(error.value)


def test_a_line_without_a_split_among_others_is_refused(tmp_path):
    path = write(tmp_path, one("a.jpg", split="val"), one("b.jpg"))
    with pytest.raises(ConfigError, match=r"got None for 'b.jpg' on line 2"):
        open_source("captions", "train", path=path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data.path: .*got No such file or directory at .*jsonl"):
        open_source("captions", "train", path=str(tmp_path))
    path = write(tmp_path, one("a.jpg"), one("b.jpg"), images=False)
    with pytest.raises(ConfigError, match=r"data.path: expected the images of .*got nothing at .*"):
        open_source("captions", "train", path=path, held_out=0.5)


def test_a_single_missing_image_is_left_to_the_loader(tmp_path):
    path = write(tmp_path, *(one(f"{n}.jpg", split="train") for n in range(5)))
    (tmp_path / "1.jpg").unlink()
    source = open_source("captions", "train", path=path)
    with pytest.raises(OSError, match=r"1\.jpg"):
        source[1]


def test_fingerprint_depends_on_names_and_captions(tmp_path):
    lines = [one("a.jpg", split="train"), one("b.jpg", ["x", "y"], split="train")]
    other_name = [lines[0], one("c.jpg", ["x", "y"], split="train")]
    other_caption = [lines[0], one("b.jpg", ["x", "z"], split="train")]
    moved = [one("a.jpg", ["words", "x"], split="train"), one("b.jpg", "y", split="train")]
    digests = {
        open_source("captions", "train", path=write(tmp_path, *some)).fingerprint()
        for some in (lines, other_name, other_caption, moved)
    }
    assert len(digests) == 4


def test_the_fields_of_a_config_reach_it(tmp_path):
    from ml_collections import ConfigDict

    path = write(tmp_path, *(one(f"{n}.jpg") for n in range(10)))
    data = ConfigDict({"source": "captions", "path": path, "held_out": 0.3, "split": "train"})
    assert len(open_split(data, "val")) == 3
    data.held_out = None  # the source's own
    assert len(open_split(data, "val")) == 1
