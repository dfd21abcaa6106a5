"""Films of a folder, and of lists in the authors' form; nothing is decoded."""

import pickle

import pytest

from mae_jax.data.sources import class_names, labels_of, open_source
from mae_jax.data.sources.clips import _split_line
from mae_jax.errors import ConfigError


def write(folder, *names, **lists):
    """Write empty files, and lists by their name before the ending .csv; returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name, text in lists.items():
        (folder / f"{name}.csv").write_text(text)
    return str(folder)


class TestFolder:
    def test_folders_are_classes_and_an_example_is_a_path(self, tmp_path):
        names = [f"{c}/{i}.{e}" for c in ("run", "jump") for i in range(5) for e in ("mp4", "AVI")]
        path = write(tmp_path, *names, "run/notes.txt", "run/cover.jpg")
        train, val = (
            open_source("clips", split, path=path, held_out=0.2) for split in ("train", "val")
        )
        assert class_names(train) == ("jump", "run")
        assert sorted(train.names + val.names) == sorted(names)
        assert len(val) == 4
        assert labels_of(val).tolist() == [0, 0, 1, 1]
        assert train[0] == {"video": str(tmp_path / train.names[0]), "label": 0}
        assert train.describe(0) == str(tmp_path / train.names[0])
        assert not train.exif
        assert pickle.loads(pickle.dumps(train))[3] == train[3]

    def test_splits_of_a_folder_are_kept(self, tmp_path):
        path = write(tmp_path, "train/a/1.webm", "train/b/2.mkv", "val/b/3.mov")
        assert open_source("clips", "train", path=path).names == ["a/1.webm", "b/2.mkv"]
        val = open_source("clips", "val", path=path)
        assert (val.names, val.labels) == (["b/3.mov"], [1])

    def test_a_folder_of_images_is_none_of_films(self, tmp_path):
        path = write(tmp_path, "a.jpg")
        with pytest.raises(
            ConfigError, match=r"data.path: expected films \(.mp4 .webm .avi .mkv .mov"
        ):
            open_source("clips", "train", path=path)


class TestLists:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("a/b.mp4 300 17", ("a/b.mp4", 17)),
            ("a/b.mp4 17", ("a/b.mp4", 17)),
            ("a/b.avi,300,17", ("a/b.avi", 17)),
            ("a/b.avi, 17", ("a/b.avi", 17)),
            ("/data/k400/a b 7 12.MP4\t3", ("/data/k400/a b 7 12.MP4", 3)),
            ("x.mp4.webm", ("x.mp4.webm", None)),
        ],
    )
    def test_lines(self, line, expected):
        assert _split_line(line) == expected

    def test_lists_beside_each_other_are_the_splits(self, tmp_path):
        path = write(
            tmp_path,
            "clips/a b.mp4",
            "clips/c.mp4",
            train="clips/a b.mp4 300 2\nclips/c.mp4 250 0\n",
            val="clips/c.mp4 250 1\n",
        )
        train = open_source("clips", "train", path=path)
        assert (train.names, train.labels) == (["clips/a b.mp4", "clips/c.mp4"], [2, 0])
        assert train.num_classes == 3
        assert train[0]["video"] == str(tmp_path / "clips" / "a b.mp4")
        assert open_source("clips", "val.csv", path=path).labels == [1]
        assert open_source("clips", "val", path=path).labels == [1]

    def test_a_list_may_name_the_folder_of_its_films(self, tmp_path):
        path = write(tmp_path, "k400/c.mp4", mine="c.mp4 0")
        assert open_source("clips", "mine.csv:k400", path=path)[0] == {
            "video": str(tmp_path / "k400" / "c.mp4"),
            "label": 0,
        }

    def test_absolute_paths_stay(self, tmp_path):
        there = write(tmp_path / "there", "a.mp4")
        path = write(tmp_path, train=f"{there}/a.mp4 0")
        assert open_source("clips", "train", path=path)[0]["video"] == f"{there}/a.mp4"

    def test_a_share_of_a_single_list_is_held_out(self, tmp_path):
        names = [f"{number}.mp4" for number in range(20)]
        write(tmp_path, *names, all="".join(f"{name} {i % 4}\n" for i, name in enumerate(names)))
        file = str(tmp_path / "all.csv")
        train, val = (
            open_source("clips", split, path=file, held_out=0.25) for split in ("train", "val")
        )
        assert len(val) == 5
        assert sorted(train.names + val.names) == sorted(names)
        assert train.num_classes == val.num_classes == 4
        for source in (train, val):
            assert source.labels == [int(name[:-4]) % 4 for name in source.names]
            assert source[0]["video"] == str(tmp_path / source.names[0])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "a.mp4 0\nframes/b 30 1\n",
                r"PATH \[FRAMES\] LABEL .* on line 2 of .*'frames/b 30 1'",
            ),
            ("a.mp4 x\n", "on line 1 of .*, got 'a.mp4 x'"),
            ("a.mp4 0\nb.mp4\n", "expected a path and a label, .* on line 2"),
            ("", "expected a list with films, got none"),
            ("b.mp4 0\n", "expected the films of .*train.csv below .*, got nothing at .*b.mp4"),
        ],
    )
    def test_other_lists_are_refused(self, tmp_path, text, message):
        path = write(tmp_path, "a.mp4", train=text)
        with pytest.raises(ConfigError, match=message):
            open_source("clips", "train", path=path)

    def test_a_list_that_is_not_there_is_named_beside_those_that_are(self, tmp_path):
        path = write(tmp_path, "a.mp4", test="a.mp4 0")
        with pytest.raises(ConfigError, match=r"which has test.csv; got 'train.csv'"):
            open_source("clips", "train.csv", path=path)

    def test_of_a_list_of_one_film_nothing_can_be_held_out(self, tmp_path):
        write(tmp_path, "a.mp4", one="a.mp4 0")
        with pytest.raises(ConfigError, match="two films or more"):
            open_source("clips", "train", path=str(tmp_path / "one.csv"))
