"""Which files of a folder are read, in which split, with which label."""

import os

import pytest

from mae_jax.data.sources import EVAL_SPLITS, folder, open_source
from mae_jax.errors import ConfigError


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return str(root)


def labels(source):
    return dict(zip(source.names, source.labels, strict=True))


def both(path, **fields):
    return folder.make("train", path=path, **fields), folder.make("val", path=path, **fields)


class TestScan:
    def test_images_are_found_at_any_depth_in_sorted_order(self, tmp_path):
        path = write(tmp_path, "b.JPG", "a.jpeg", "x/c.PNG", "x/y/d.webp", "e.txt", "x/f.gif")
        train, val = both(path)
        assert sorted(train.names + val.names) == ["a.jpeg", "b.JPG", "x/c.PNG", "x/y/d.webp"]
        assert train.names == sorted(train.names)

    def test_hidden_files_and_folders_are_skipped(self, tmp_path):
        path = write(tmp_path, "a.jpg", "b.jpg", "._a.jpg", ".thumbs/c.jpg")
        train, val = both(path)
        assert sorted(train.names + val.names) == ["a.jpg", "b.jpg"]

    def test_links_are_followed_and_dead_ones_skipped(self, tmp_path):
        write(tmp_path / "store", "1.jpg", "deep/2.jpg")
        root = tmp_path / "data"
        path = write(root, "a.jpg")
        (root / "b.jpg").symlink_to(tmp_path / "store" / "1.jpg")
        (root / "c").symlink_to(tmp_path / "store")
        (root / "dead.jpg").symlink_to(tmp_path / "nowhere")
        train, val = both(path)
        assert sorted(train.names + val.names) == ["a.jpg", "b.jpg", "c/1.jpg", "c/deep/2.jpg"]

    def test_link_that_leads_back_is_no_endless_loop(self, tmp_path):
        path = write(tmp_path, "a.jpg", "x/b.jpg")
        (tmp_path / "x" / "up").symlink_to(tmp_path)
        train, val = both(path)
        assert sorted(train.names + val.names) == ["a.jpg", "x/b.jpg"]
        (tmp_path / "loop").mkdir()
        (tmp_path / "loop" / "self").symlink_to(tmp_path / "loop")
        with pytest.raises(ConfigError, match="got none"):
            folder.make("train", path=str(tmp_path / "loop"))

    def test_single_folders_are_descended_into(self, tmp_path):
        path = write(tmp_path, "readme.txt", "set/images/cat/1.jpg", "set/images/dog/1.jpg")
        write(tmp_path, "set/images/cat/2.jpg")
        train, val = both(path)
        assert train.root == val.root == str(tmp_path / "set" / "images")
        assert train.classes == ("cat", "dog")

    def test_bytes_and_label_of_an_example(self, tmp_path):
        source, _ = both(write(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg"))
        index = source.names.index("a/1.jpg")
        assert source[index] == {"image": b"a/1.jpg", "label": 0}
        assert source.describe(index) == str(tmp_path / "a" / "1.jpg")
        assert source.exif

    def test_name_that_is_not_utf_8(self, tmp_path):
        path = write(tmp_path, "a.jpg")
        with open(os.fsencode(path) + b"/\xff.jpg", "wb") as file:
            file.write(b"x")
        train, val = both(path)
        assert len(train) == len(val) == 1
        assert train.fingerprint() != val.fingerprint()
        assert {source[0]["image"] for source in (train, val)} == {b"a.jpg", b"x"}


class TestClasses:
    def test_top_folders_are_the_classes_sorted_by_name(self, tmp_path):
        path = write(tmp_path, "dog/1.jpg", "dog/2.jpg", "cat/x/1.jpg", "cat/y/1.jpg", "ape/1.jpg")
        train, val = both(path)
        assert train.classes == val.classes == ("ape", "cat", "dog")
        assert train.num_classes == 3
        known = labels(train) | labels(val)
        assert known == {
            "ape/1.jpg": 0, "cat/x/1.jpg": 1, "cat/y/1.jpg": 1, "dog/1.jpg": 2, "dog/2.jpg": 2,
        }  # fmt: skip

    @pytest.mark.parametrize(
        "names",
        [
            ["1.jpg", "2.jpg", "3.jpg"],
            ["cat/1.jpg", "dog/1.jpg", "stray.jpg"],
            ["cat/1.jpg", "cat/2.jpg"],
            ["train/x/1.jpg", "train/x/2.jpg", "val/x/3.jpg"],
        ],
    )
    def test_other_layouts_have_no_labels(self, tmp_path, names):
        for source in both(write(tmp_path, *names)):
            assert source.num_classes == 0
            assert set(source.labels) == {-1}

    def test_empty_class_folder_is_no_class(self, tmp_path):
        path = write(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "c/notes.txt")
        assert folder.make("train", path=path).classes == ("a", "b")


class TestSplitFolders:
    @pytest.mark.parametrize("name", ["val", "validation", "test"])
    def test_train_and_a_second_folder_are_the_splits(self, tmp_path, name):
        path = write(tmp_path, "train/1.jpg", "train/2.jpg", f"{name}/3.jpg", "other/4.jpg")
        train, val = both(path)
        assert train.names == ["1.jpg", "2.jpg"]
        assert val.names == ["3.jpg"]
        assert val.root == str(tmp_path / name)

    def test_of_several_the_one_that_is_asked_for_is_taken(self, tmp_path):
        path = write(tmp_path, "train/1.jpg", "val/2.jpg", "test/3.jpg")
        found = {split: folder.make(split, path=path).names for split in EVAL_SPLITS}
        assert found == {"val": ["2.jpg"], "validation": ["2.jpg"], "test": ["3.jpg"]}
        assert folder.make("train", path=path).names == ["1.jpg"]

    def test_val_is_preferred_to_test(self, tmp_path):
        path = write(tmp_path, "train/1.jpg", "test/2.jpg", "val/3.jpg")
        assert folder.make("val", path=path).names == ["3.jpg"]

    def test_classes_are_those_of_train_in_both_splits(self, tmp_path):
        path = write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/9.jpg")
        train, val = both(path)
        assert val.classes == train.classes == ("a", "b", "c")
        assert val.labels == [2]

    def test_a_flat_validation_folder_has_no_labels(self, tmp_path):
        path = write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/8.jpg", "val/9.jpg")
        assert folder.make("train", path=path).num_classes == 2
        held_out = folder.make("val", path=path)
        assert held_out.num_classes == 0
        assert held_out.labels == [-1, -1]

    @pytest.mark.parametrize("stray", ["val/z/9.jpg", "val/9.jpg"])
    def test_validation_image_of_no_training_class_is_refused(self, tmp_path, stray):
        path = write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/8.jpg", stray)
        assert len(folder.make("train", path=path)) == 2
        with pytest.raises(ConfigError, match=f"data.path: .* 2 class folders .* got .*{stray}"):
            folder.make("val", path=path)

    def test_train_alone_is_split_by_holding_out(self, tmp_path):
        train, val = both(write(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg"))
        assert (len(train), len(val)) == (2, 1)


class TestAll:
    def test_every_image_whatever_the_folders_are_called(self, tmp_path):
        path = write(tmp_path, "train/1.jpg", "val/2.jpg", "val/x/3.jpg", "other/4.jpg")
        source = folder.make("all", path=path)
        assert source.names == ["other/4.jpg", "train/1.jpg", "val/2.jpg", "val/x/3.jpg"]
        assert source.classes == ("other", "train", "val")
        assert source.labels == [0, 1, 2, 2]

    def test_nothing_is_held_out_and_the_share_does_not_matter(self, tmp_path):
        path = write(tmp_path, "dog/1.jpg", "cat/1.jpg", "cat/2.jpg", "readme.txt")
        for share in (0.5, 0.0):
            source = folder.make("all", path=path, held_out=share)
            assert labels(source) == {"cat/1.jpg": 0, "cat/2.jpg": 0, "dog/1.jpg": 1}
        assert len(source) == sum(map(len, both(path)))

    def test_single_folders_are_descended_into(self, tmp_path):
        path = write(tmp_path, "readme.txt", "imagenet-a/cat/1.jpg", "imagenet-a/dog/1.jpg")
        source = folder.make("all", path=path)
        assert source.root == str(tmp_path / "imagenet-a")
        assert source.classes == ("cat", "dog")

    def test_one_image_and_images_without_classes_will_do(self, tmp_path):
        source = folder.make("all", path=write(tmp_path, "1.jpg"))
        assert (source.names, source.labels, source.num_classes) == (["1.jpg"], [-1], 0)
        with pytest.raises(ConfigError, match=r"data.path: expected images \(.* got none in"):
            folder.make("all", path=write(tmp_path / "text", "a.txt"))


class TestHoldingOut:
    @pytest.mark.parametrize(
        ("count", "share", "expected"),
        [(2, 0.1, 1), (10, 0.1, 1), (20, 0.1, 2), (37, 0.1, 4), (37, 0.5, 18), (3, 0.99, 2)],
    )
    def test_share_is_rounded_and_neither_split_is_empty(self, tmp_path, count, share, expected):
        path = write(tmp_path, *(f"{i}.jpg" for i in range(count)))
        train, val = both(path, held_out=share)
        assert len(val) == expected
        assert len(train) == count - expected
        assert not set(train.names) & set(val.names)

    def test_each_class_gives_its_share(self, tmp_path):
        path = write(tmp_path, *(f"a/{i}.jpg" for i in range(40)))
        write(tmp_path, *(f"b/{i}.jpg" for i in range(10)), "c/0.jpg", "c/1.jpg", "d/0.jpg")
        val = folder.make("val", path=path, held_out=0.2)
        assert [val.labels.count(k) for k in range(4)] == [8, 2, 1, 0]
        assert folder.make("train", path=path, held_out=0.2).num_classes == 4

    def test_choice_depends_on_the_relative_path_alone(self, tmp_path):
        names = [f"{i}.jpg" for i in range(50)]
        first = folder.make("val", path=write(tmp_path / "x", *names))
        second = folder.make("val", path=write(tmp_path / "y", *reversed(names)))
        assert first.names == second.names
        assert first.names != sorted(names)[:5]  # not simply the first ones
        assert first.names == ["11.jpg", "12.jpg", "25.jpg", "30.jpg", "38.jpg"]

    def test_one_more_image_moves_at_most_one_of_the_others(self, tmp_path):
        path = write(tmp_path, *(f"{i}.jpg" for i in range(50)))
        before = set(folder.make("val", path=path).names)
        write(tmp_path, "new.jpg")
        after = set(folder.make("val", path=path).names)
        assert len(before - after) <= 1

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10])
    def test_share_outside_0_to_1_is_refused(self, tmp_path, share):
        path = write(tmp_path, "1.jpg", "2.jpg")
        with pytest.raises(ConfigError, match=f"data.held_out: .* between 0 and 1, got {share}"):
            folder.make("train", path=path, held_out=share)


class TestFingerprint:
    def test_names_and_labels_count_but_not_the_place(self, tmp_path):
        names = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]
        here = folder.make("train", path=write(tmp_path / "x", *names))
        there = folder.make("train", path=write(tmp_path / "y", *names))
        assert here.fingerprint() == there.fingerprint()
        fewer = folder.by_folder(folder.Files, here.root, here.names[1:], here.classes)
        unlabelled = folder.by_folder(folder.Files, here.root, here.names, ())
        prints = {source.fingerprint() for source in (here, fewer, unlabelled)}
        assert len(prints) == 3
        assert all(len(digest) == 16 for digest in prints)


class TestRefusals:
    @pytest.mark.parametrize("split", ["train", "val"])
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("", "expected a folder of images, got an empty string"),
            ("gs://bucket/images", "expected a local folder, got gs://bucket/images"),
            ("{tmp}/missing", "got nothing at .*missing"),
            ("{tmp}/file.jpg", "got a file at .*file.jpg"),
            ("{tmp}/empty", r"expected images \(.jpg .jpeg .png .webp\), got none in .*empty"),
            ("{tmp}/text", "got none in .*text"),
            ("{tmp}/one", "got 1 in .*one"),
            ("{tmp}/lonely", "got 2 of different classes in .*lonely"),
        ],
    )
    def test_what_cannot_be_read_is_named_in_one_line(self, tmp_path, split, path, message):
        write(tmp_path, "file.jpg", "text/a.txt", "one/1.jpg", "lonely/a/1.jpg", "lonely/b/1.jpg")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match=f"^data.path: .*{message}$") as caught:
            open_source("folder", split, path=path.format(tmp=tmp_path))
        assert "\n" not in str(caught.value)

    def test_empty_validation_folder_is_refused_when_it_is_read(self, tmp_path):
        path = write(tmp_path, "train/1.jpg", "val/readme.txt")
        assert len(folder.make("train", path=path)) == 1
        with pytest.raises(ConfigError, match=r"got none in .*val"):
            folder.make("val", path=path)

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write(tmp_path, "pictures/1.jpg", "pictures/2.jpg")
        assert len(folder.make("train", path="~/pictures")) == 1

    @pytest.mark.parametrize(
        "name", ["foldr", "", ".folder", "no.such.module", "mae_jax.data.sources.nope"]
    )
    def test_unknown_source_is_refused_with_the_known_ones(self, name):
        with pytest.raises(
            ConfigError, match=f"data.source: expected .*digits, folder.* got '{name}'"
        ):
            open_source(name, "train")

    def test_unknown_split_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="got 'tests'"):
            open_source("folder", "tests", path=str(tmp_path))

    def test_source_of_the_users_is_imported_by_its_dotted_name(self, tmp_path, monkeypatch):
        (tmp_path / "my_sources").mkdir()
        code = "def make(split, **fields): return split, fields"
        (tmp_path / "my_sources" / "birds.py").write_text(code)
        (tmp_path / "my_sources" / "broken.py").write_text("import not_installed_anywhere")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert open_source("my_sources.birds", "val", path="x") == ("val", {"path": "x"})
        with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
            open_source("my_sources.broken", "val")
