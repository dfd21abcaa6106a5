"""A folder as shards: what is written, what is done again after a kill, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from PIL import Image

from mae_jax.data.transforms import BadExample, Decode, resize
from mae_jax.tools import prepare_data, shards
from tests.helpers import environment, write_photographs


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare(images: Path, out: Path, *more: str, processes: int = 1) -> int:
    return prepare_data.main([str(images), str(out), f"--processes={processes}", *more])


def write_images(root: Path, count: int = 6) -> Path:
    """Write two classes to train on, and three images to validate on."""
    for number, name in enumerate(("train/cat", "train/dog", "val/cat")):
        write_photographs(root / name, 3 if name.startswith("val") else count, number)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def records(path: Path) -> list[bytes]:
    reader = ArrayRecordReader(str(path))
    read = reader.read_all()
    reader.close()
    return read


def test_a_record_is_a_line_of_json_and_the_bytes_of_the_file(images, tmp_path, capsys):
    assert prepare(images, tmp_path / "out", "--shards=4") == 0
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "manifest.json",
        "started.json",
        *(f"train-0000{number}-of-00004.array_record" for number in range(4)),
        "train.index.json",
        "val-00000-of-00001.array_record",
        "val.index.json",
    ]
    read = [
        r for name in files if name.startswith("train-") for r in records(tmp_path / "out" / name)
    ]
    names = sorted(
        path.relative_to(images / "train").as_posix() for path in images.glob("train/*/*")
    )
    assert len(read) == len(names) == 12
    for name, record in zip(names, read, strict=True):
        line, image = record.split(b"\n", 1)
        assert json.loads(line) == {"label": int(name.startswith("dog")), "name": name}
        assert image == (images / "train" / name).read_bytes()
    index = json.loads((tmp_path / "out" / "train.index.json").read_text())
    assert index == {"labels": [0] * 6 + [1] * 6, "names": names}
    said = capsys.readouterr().out
    assert "train-00000-of-00004.array_record: 3 images\n" in said
    assert "complete, 5 shards (0 were there), 15 images, 0.00 GB, 0 left out\n" in said


def test_the_manifest_says_what_there_is(images, tmp_path):
    out = tmp_path / "out"
    assert prepare(images, out, "--shards=2", "--short_side=32", "--quality=80") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["options"] == {
        "short_side": 32,
        "quality": 80,
        "shards": {"train": 2, "val": 1},
    }
    paths = [path for path in images.rglob("*") if path.is_file()]
    assert manifest["source"]["images"] == len(paths) == 15
    assert manifest["source"]["bytes"] == sum(path.stat().st_size for path in paths)
    assert manifest["classes"] == ["cat", "dog"]
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert (train["examples"], val["examples"]) == (12, 3)
    assert [shard["examples"] for shard in train["shards"]] == [6, 6]
    for part in (train, val):
        assert part["labelled"]
        assert part["left_out"] == []
        for file in (*part["shards"], part["index"]):
            data = (out / file["file"]).read_bytes()
            assert len(data) == file["bytes"]
            check = subprocess.run(["sha256sum"], input=data, capture_output=True, check=True)
            assert check.stdout.decode().split()[0] == file["sha256"]


@pytest.mark.parametrize(
    ("counts", "wanted", "expected"),
    [
        ({"train": 100}, None, {"train": [6] * 12 + [7] * 4}),
        ({"train": 5}, None, {"train": [1] * 5}),
        ({"train": 5}, 2, {"train": [2, 3]}),
        ({"train": 40, "val": 11}, 4, {"train": [10] * 4, "val": [11]}),
        ({"train": 40, "val": 25}, 4, {"train": [10] * 4, "val": [12, 13]}),
        ({"train": 3, "val": 9}, 7, {"train": [1] * 3, "val": [1] * 9}),
    ],
)
def test_images_are_shared_out_evenly_and_sorted(tmp_path, counts, wanted, expected):
    for split, count in counts.items():
        (tmp_path / split).mkdir()
        for number in range(count):
            (tmp_path / split / f"{number:03d}.jpg").write_bytes(b"x")
    plan = shards.plan(str(tmp_path), shards=wanted)
    for split, sizes in expected.items():
        planned = [shard for shard in plan.shards if shard.split == split]
        assert sorted(len(shard.names) for shard in planned) == sizes
        assert [shard.file for shard in planned] == [
            f"{split}-{i:05d}-of-{len(sizes):05d}.array_record" for i in range(len(sizes))
        ]
        names = [name for shard in planned for name in shard.names]
        assert names == [f"{number:03d}.jpg" for number in range(counts[split])]


def test_large_folders_have_a_shard_for_each_128_mib(tmp_path):
    for number in range(40):
        with open(tmp_path / f"{number}.jpg", "wb") as file:
            file.truncate(shards.SHARD_BYTES // 2)  # a hole: takes no space
    assert len(shards.plan(str(tmp_path)).shards) == 20


def test_several_processes_write_what_one_does(images, tmp_path):
    for processes in (1, 3):
        assert prepare(images, tmp_path / str(processes), "--shards=5", processes=processes) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_start_goes_on_to_the_same_bytes(tmp_path):
    many = tmp_path / "images"
    write_photographs(many, 120)
    out = tmp_path / "killed"
    flags = [str(many), str(out), "--shards=60", "--short_side=24"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mae_jax.tools.prepare_data", *flags, "--processes=2"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not list(out.glob("train-*-of-00060.array_record")):
            assert process.poll() is None
            time.sleep(1e-3)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # Its workers end with it; where nobody reaps orphans they stay in the list of processes.
    deadline = time.monotonic() + 10
    while is_group_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(1e-2)
    assert not (out / "manifest.json").exists()
    assert 0 < len(list(out.glob("train-*.array_record"))) < 60
    for folder in (out, tmp_path / "whole"):
        assert prepare(many, folder, *flags[2:]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_what_is_there_is_left_and_what_is_missing_or_damaged_is_written_again(
    images, tmp_path, capsys
):
    out = tmp_path / "out"
    assert prepare(images, out, "--shards=4") == 0
    before = contents(out)
    files = [out / f"train-0000{number}-of-00004.array_record" for number in range(4)]
    times = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    assert prepare(images, out, "--shards=4") == 0
    assert capsys.readouterr().out == f"{out}: complete already, 5 shards\n"

    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-100])
    (out / "train-00002-of-00004.array_record").write_bytes(files[3].read_bytes())  # another's
    (out / "val-00000-of-00001.array_record.tmp").write_bytes(b"half of it")
    assert prepare(images, out, "--shards=4") == 0
    said = capsys.readouterr().out
    assert [said.count(f"{file.name}: 3 images") for file in files] == [1, 1, 1, 0]
    assert "complete, 5 shards (2 were there)" in said
    left = contents(out)
    left.pop("val-00000-of-00001.array_record.tmp")  # no shard was written there
    assert left == before
    assert files[3].stat().st_mtime_ns == times[3]


def test_bad_images_are_named_once_left_out_and_counted(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    (images / "train" / "cat" / "no.jpg").write_bytes(b"no image")
    cut = images / "train" / "dog" / "photo_00.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (images / "val" / "cat" / "empty.png").touch()
    out = tmp_path / "out"
    assert prepare(images, out, "--shards=2") == 0
    said = capsys.readouterr().out
    assert said.count("left out: ") == 3
    assert said.count("left out: cat/no.jpg: not an image of a kind that Pillow knows\n") == 1
    assert said.count("left out: dog/photo_00.jpg: ") == 1
    assert said.count("left out: cat/empty.png: ") == 1
    assert "14 images, 0.00 GB, 3 left out\n" in said
    splits = json.loads((out / "manifest.json").read_text())["splits"]
    assert splits["train"]["left_out"] == ["cat/no.jpg", "dog/photo_00.jpg"]
    assert splits["val"]["left_out"] == ["cat/empty.png"]
    assert (splits["train"]["examples"], splits["val"]["examples"]) == (11, 3)
    whole = contents(out)
    (out / "manifest.json").unlink()
    assert prepare(images, out, "--shards=2") == 0  # what was left out is known from the shards
    assert contents(out) == whole


def refusal(capsys, argv) -> str:
    """Run, expect status 2, and return the one line."""
    assert prepare_data.main([str(argument) for argument in argv]) == 2
    last = capsys.readouterr().err.splitlines()
    assert len(last) == 1
    assert last[0].startswith("error: ")
    return last[0]


def test_too_many_bad_images_are_refused_and_the_start_can_go_on(tmp_path, capsys):
    write_photographs(tmp_path / "images", 12)
    for number in range(11):  # ten may be in any case
        (tmp_path / "images" / f"bad_{number:02d}.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    flags = [tmp_path / "images", out, "--shards=2", "--processes=2"]
    line = refusal(capsys, flags)
    assert "--max_bad_share=0.001: expected at most 10 of 23 images that cannot be used" in line
    assert "got 11 so far, such as bad_" in line
    assert not (out / "manifest.json").exists()
    assert prepare_data.main([*map(str, flags), "--max_bad_share=0.5"]) == 0
    assert "12 images, 0.00 GB, 11 left out" in capsys.readouterr().out


@pytest.mark.parametrize(("bad", "first"), [(2, 0), (11, 2)])
def test_an_image_that_is_good_by_now_is_no_longer_left_out(tmp_path, capsys, bad, first):
    images = tmp_path / "images"
    write_photographs(images, 14)
    good = contents(images)
    for name in sorted(good)[:bad]:  # of the same size, as a copy has it that is not finished
        (images / name).write_bytes(b"\0" * len(good[name]))
    out = tmp_path / "out"
    assert prepare(images, out, "--shards=3") == first  # complete, or refused
    for name in sorted(good)[1:bad]:
        (images / name).write_bytes(good[name])
    assert prepare(images, out, "--shards=3") == 0
    assert "13 images, 0.00 GB, 1 left out" in capsys.readouterr().out
    assert prepare(images, tmp_path / "fresh", "--shards=3") == 0
    assert contents(out) == contents(tmp_path / "fresh")
    capsys.readouterr()
    assert prepare(images, out, "--shards=3") == 0  # the one that stays bad is no reason
    assert capsys.readouterr().out == f"{out}: complete already, 3 shards\n"


def test_an_image_that_cannot_be_read_at_this_time_is_not_left_out(
    images, tmp_path, capsys, monkeypatch
):
    def broken(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as context:
        context.setattr(type(epath.Path("/")), "read_bytes", broken)
        line = refusal(capsys, [images, tmp_path / "out", "--processes=1"])
    assert "FOLDER: expected images that can be read, got Stale file handle at " in line
    assert "/train/cat/photo_00." in line
    for out in (tmp_path / "out", tmp_path / "fresh"):
        assert prepare(images, out) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_another_folder_or_other_options_are_refused_and_nothing_is_touched(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    out = tmp_path / "out"
    flags = [images, out, "--shards=2", "--processes=1"]
    assert prepare_data.main(list(map(str, flags))) == 0
    before = contents(out)
    for more, message in (
        (["--short_side=32"], "made with options.short_side 0, not 32: take another folder"),
        (["--quality=90"], "made with options.quality 95, not 90"),
        (["--shards=3"], "made with options.shards.train 2, not 3"),
    ):
        assert f"error: OUT={out}: {message}" in refusal(capsys, [*flags, *more])
    file = images / "train" / "cat" / "photo_00.jpg"
    other = images / "train" / "cat" / "photo_zz.jpg"
    file.rename(other)  # as many images, as many bytes
    assert "digest_of_names_labels_sizes" in refusal(capsys, flags)
    other.rename(file)
    file.write_bytes(file.read_bytes() + b"\0")
    assert "made with source.bytes" in refusal(capsys, flags)
    Image.new("RGB", (40, 40)).save(images / "train" / "cat" / "new.png")
    assert "made with source.images 15, not 16" in refusal(capsys, flags)
    (out / "started.json").write_text("nothing")
    assert "started.json is no manifest" in refusal(capsys, flags)
    (out / "started.json").unlink()
    assert "has train-00000-of-00002.array_record, but no started.json" in refusal(capsys, flags)
    before.pop("started.json")
    assert contents(out) == before


def test_verify_finds_a_flipped_bit_and_a_missing_file(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(images, out, "--shards=3") == 0
    capsys.readouterr()
    assert prepare_data.main(["--verify", str(out)]) == 0
    assert "6 files, 0.00 GB, are what the manifest says" in capsys.readouterr().out
    file = out / "train-00001-of-00003.array_record"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    line = refusal(capsys, ["--verify", out])
    assert f"OUT={out}: 1 of 6 files are missing or damaged: remove {file.name} and" in line
    (out / "val.index.json").unlink()
    assert f"remove {file.name}, val.index.json and" in refusal(capsys, ["--verify", out])
    file.unlink()
    assert prepare(images, out, "--shards=3") == 0  # as it was told
    assert prepare_data.main(["--verify", str(out)]) == 0


def test_a_split_that_is_not_taken_is_named(tmp_path, capsys):
    images = write_images(tmp_path / "images", 2)
    write_photographs(images / "test", 1)
    assert prepare(images, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert said.count("not taken: ") == 1
    assert f"not taken: {images}/test: the parts are train and val; prepare it by" in said
    (images / "val").rename(tmp_path / "gone")  # so that test is the second part
    assert prepare(images, tmp_path / "other") == 0
    assert prepare(images / "train", tmp_path / "one") == 0
    assert "not taken" not in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [True, False])
def test_an_index_that_is_missing_or_damaged_is_written_again(images, tmp_path, damaged):
    out = tmp_path / "out"
    assert prepare(images, out, "--shards=2") == 0
    before = contents(out)
    index = out / "train.index.json"
    if damaged:
        index.write_bytes(before[index.name].replace(b"photo_00", b"photo_99"))
    else:
        index.unlink()
    assert prepare(images, out, "--shards=2") == 0
    assert contents(out) == before


class TestPreparedImages:
    """One image, with a shorter side or without."""

    @staticmethod
    def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
        data = io.BytesIO()
        image.save(data, kind, **options)
        return data.getvalue()

    @staticmethod
    def photograph(height: int = 60, width: int = 90) -> Image.Image:
        coarse = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    @pytest.mark.parametrize("short_side", [0, 60, 61, 1000])
    def test_the_bytes_are_kept_if_nothing_is_to_be_resized(self, short_side):
        rotated = Image.Exif()
        rotated[0x0112] = 6
        data = self.encoded(self.photograph(), "JPEG", exif=rotated)
        assert shards.prepare_image(data, shards.Options(short_side)) == data

    @pytest.mark.parametrize(("height", "width", "size"), [(60, 90, (60, 40)), (91, 60, (40, 60))])
    def test_the_shorter_side_is_resized_to_jpeg_without_chroma_subsampling(
        self, height, width, size
    ):
        image = self.photograph(height, width)
        result = shards.prepare_image(self.encoded(image), shards.Options(40))
        with Image.open(io.BytesIO(result)) as opened:
            assert opened.format == "JPEG"
            assert opened.size == size
            assert [layer[1:3] for layer in opened.layer] == [(1, 1)] * 3
            expected = resize(np.asarray(image), size[::-1]).astype(float)
            assert np.abs(np.asarray(opened) - expected).mean() < 1.5
        coarse = shards.prepare_image(self.encoded(image), shards.Options(40, quality=20))
        assert len(coarse) < len(result) / 2

    def test_exif_rotation_is_applied_once(self):
        rotated = Image.Exif()
        rotated[0x0112] = 6
        data = self.encoded(self.photograph(60, 90), "JPEG", exif=rotated, quality=95)
        upright = Decode(3, exif=True)(data)
        assert upright.shape == (90, 60, 3)
        result = shards.prepare_image(data, shards.Options(30))
        pixels = Decode(3, exif=True)(result)  # as it is read in training
        np.testing.assert_array_equal(pixels, Decode(3, exif=False)(result))
        assert np.abs(pixels - resize(upright, (45, 30)).astype(float)).mean() < 2

    @pytest.mark.parametrize(
        ("mode", "stored", "kind"),
        [
            ("L", "L", "JPEG"), ("1", "L", "JPEG"), ("I;16", "L", "JPEG"), ("P", "RGB", "JPEG"),
            ("CMYK", "RGB", "JPEG"), ("RGBA", "RGBA", "PNG"), ("LA", "RGBA", "PNG"),
        ],
    )  # fmt: skip
    def test_other_modes_become_what_training_reads(self, mode, stored, kind):
        if mode == "I;16":
            image = Image.fromarray(
                np.asarray(self.photograph().convert("L")).astype(np.uint16) * 256
            )
        else:
            image = self.photograph().convert(mode)
        data = self.encoded(image, "TIFF" if mode == "CMYK" else "PNG")
        result = shards.prepare_image(data, shards.Options(50))
        with Image.open(io.BytesIO(result)) as opened:
            assert (opened.mode, opened.format, opened.size) == (stored, kind, (75, 50))
        wanted = resize(Decode(3)(data), (50, 75)).astype(float)
        assert np.abs(Decode(3)(result) - wanted).mean() < 4  # a palette's dots are hard for JPEG

    def test_hidden_colours_and_transparency_stay(self):
        pixels = np.dstack([np.asarray(self.photograph()), np.zeros((60, 90), np.uint8)])
        result = shards.prepare_image(self.encoded(Image.fromarray(pixels)), shards.Options(30))
        np.testing.assert_array_equal(Decode(4)(result), resize(pixels, (30, 45)))

    @pytest.mark.parametrize("short_side", [0, 30])
    def test_what_cannot_be_decoded_to_its_end_is_bad(self, short_side):
        whole = self.encoded(self.photograph(), "JPEG")
        for data in (b"", b"no image", whole[: len(whole) // 2]):
            with pytest.raises(BadExample):
                shards.prepare_image(data, shards.Options(short_side))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected FOLDER OUT, got nothing"),
        (["one"], "expected FOLDER OUT, got one"),
        (["one", "two", "three"], "expected FOLDER OUT, got one two three"),
        (["--verify", "one", "two"], "expected OUT, got one two"),
        (["one", "two", "--short_side=-1"], "--short_side=-1: expected at least 0"),
        (["one", "two", "--shards=0"], "--shards=0: expected at least 1"),
        (["one", "two", "--processes=0"], "--processes=0: expected at least 1"),
        (["one", "two", "--quality=101"], "--quality=101: expected in [1, 100]"),
        (["one", "two", "--max_bad_share=2"], "--max_bad_share=2.0: expected in [0, 1]"),
        (
            ["one", "two", "--shortside=2"],
            "--shortside: there is no such flag; did you mean --short_side?",
        ),
        (["one", "two", "--short_side=x"], "--short_side"),
        (
            ["one", "s3://bucket/two"],  # s3fs is not installed
            "OUT: expected a bucket that is there and may be read, got s3://bucket: ",
        ),
        (["one", "one/two"], "OUT=one/two: expected a folder outside of FOLDER=one"),
        (["/nowhere", "two"], "FOLDER: expected a folder of images, got nothing at /nowhere"),
        (["{images}", "/dev/null/two"], "OUT: cannot write /dev/null/two/started.json"),
        (["--verify", "/nowhere"], "OUT: expected a folder with manifest.json, got none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(images, capsys, argv, message):
    assert message in refusal(capsys, [argument.format(images=images) for argument in argv])
