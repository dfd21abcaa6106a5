"""Features of a split in files: whose they are, when they are written, and what is refused."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from PIL import Image

from mae_jax import api
from mae_jax.data.sources import folder as folder_source
from mae_jax.tools import extract_features, features, outputs
from mae_jax.train import sharding
from tests.checkpoints import tiny_config, write_checkpoint
from tests.helpers import environment

BAD = 3  # index in the training split of the file that is no image
TOTAL = 20


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "tiny", tiny_config())


@pytest.fixture(scope="module")
def model(workdir) -> api.Pretrained:
    return api.load(workdir)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder with 20 images of two classes to train on, one of them bad, and 4 others."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", TOTAL), ("val", 4)):
        for number in range(count):
            path = folder / split / "ab"[number * 2 // count] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (28, 28 + number), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    (folder / "train" / "a" / f"{BAD:02d}.png").write_bytes(b"nothing")
    return folder


def flags(workdir: Path, out: Path, *more: str) -> list[str]:
    return [f"--checkpoint={workdir}", f"--out={out}", *more]


def of_folder(images: Path, size: int = 4, per_file: int = 8) -> list[str]:
    return [
        "--source=folder",
        f"--path={images}",
        "--split=train",
        f"--batch_size={size}",
        f"--shard_size={per_file}",
    ]


def extract(workdir: Path, out: Path, *more: str) -> dict[str, np.ndarray]:
    """Run to the end; returns the arrays of all files, put together."""
    assert extract_features.main(flags(workdir, out, *more)) == 0
    files = [np.load(path) for path in sorted(out.glob("features-*.npz"))]
    return {name: np.concatenate([file[name] for file in files]) for name in files[0]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_example_of_the_split_has_its_features_in_the_order_of_the_source(
    workdir, model, images, tmp_path, capsys
):
    out = tmp_path / "deep" / "features"
    arrays = extract(workdir, out, *of_folder(images))
    assert sorted(contents(out)) == [
        *(f"features-0000{number}-of-00003.npz" for number in range(3)),
        "features.json",
    ]
    assert [len(np.load(path)["index"]) for path in sorted(out.glob("*.npz"))] == [8, 8, 4]
    assert {name: array.dtype for name, array in arrays.items()} == {
        "features": np.float32,
        "label": np.int32,
        "index": np.int32,
        "replaced": np.bool_,
    }
    with zipfile.ZipFile(out / "features-00000-of-00003.npz") as file:  # nothing of the clock
        assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    np.testing.assert_array_equal(arrays["index"], np.arange(TOTAL))
    np.testing.assert_array_equal(arrays["label"], [0] * 10 + [1] * 10)
    np.testing.assert_array_equal(np.flatnonzero(arrays["replaced"]), [BAD])
    source = folder_source.make("train", path=str(images))
    read = [source.describe(BAD + 1 if i == BAD else i) for i in range(TOTAL)]
    expected = model.features(model.prepare(read))
    np.testing.assert_allclose(arrays["features"], expected, rtol=0, atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    said = capsys.readouterr().out
    assert f"{out}: mean [16] of 20 examples, folder train, step 3\n" in said
    assert "00000-of-00003.npz: 8 examples, 1 of them bad, with the features of the next" in said
    assert said.endswith("complete: 3 files\n")


@pytest.mark.parametrize("pool", ["cls", "tokens"])
def test_another_pool_is_what_the_model_has_of_it(workdir, model, images, tmp_path, pool):
    found = extract(workdir, tmp_path, *of_folder(images), f"--pool={pool}")["features"]
    source = folder_source.make("train", path=str(images))
    prepared = model.prepare([source.describe(i) for i in range(BAD)])
    expected = model.encode(prepared) if pool == "tokens" else model.features(prepared, pool=pool)
    assert found.shape == (TOTAL, *expected.shape[1:])
    np.testing.assert_allclose(found[:BAD], expected, rtol=0, atol=1e-6)


def test_the_held_out_images_of_the_run_are_taken_unless_told_otherwise(images, tmp_path):
    fields = {"data__source": "folder", "data__path": str(images), "data__held_out": "0.5"}
    run = write_checkpoint(tmp_path / "run", tiny_config(**fields), averaged=True)
    arrays = extract(run, tmp_path / "out")
    np.testing.assert_array_equal(arrays["index"], np.arange(4))
    np.testing.assert_array_equal(arrays["label"], [0, 0, 1, 1])
    manifest = json.loads((tmp_path / "out" / "features.json").read_text())
    assert manifest["source"]["held_out"] == 0.5
    assert manifest["source"]["split"] == tiny_config().data.eval_split
    assert manifest["checkpoint"]["averaged"]


def test_a_record_of_an_array_record_file_is_a_row(workdir, images, tmp_path):
    arrays = extract(workdir, tmp_path / "npz", *of_folder(images))
    more = [*of_folder(images), "--format=array_record"]
    for name in ("first", "second"):
        assert extract_features.main(flags(workdir, tmp_path / name, *more)) == 0
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    records = []
    for path in sorted((tmp_path / "first").glob("*.array_record")):
        reader = ArrayRecordReader(str(path))
        records += reader.read_all()
        reader.close()
    assert len(records) == TOTAL
    for number, record in enumerate(records):
        row = np.load(io.BytesIO(record))
        assert set(row) == set(arrays)
        for name in row:
            assert row[name].dtype == arrays[name].dtype
            np.testing.assert_array_equal(row[name], arrays[name][number])


def test_one_device_gives_what_eight_give(model, images):
    source = folder_source.make("train", path=str(images))
    shards = features.Shards(epath.Path("unused"), TOTAL, 12, "npz")
    output = outputs.choose(model, "mean")
    one, eight = (
        list(features.extract(model, output, source, shards, [0, 1], 6, mesh))
        for mesh in (sharding.make_mesh(1, 1, jax.devices()[:1]), sharding.make_mesh(8, 1))
    )
    assert [number for number, _ in one] == [0, 1]
    for (_, a), (_, b) in zip(one, eight, strict=True):
        assert len(a["features"]) == len(a["index"])
        np.testing.assert_allclose(a["features"], b["features"], rtol=0, atol=1e-6)
        for name in ("index", "label", "replaced"):
            np.testing.assert_array_equal(a[name], b[name])


def test_what_is_there_is_left_and_what_is_missing_is_written_again(
    workdir, images, tmp_path, capsys
):
    extract(workdir, tmp_path, *of_folder(images))
    before = contents(tmp_path)
    untouched = tmp_path / "features-00001-of-00003.npz"
    times = untouched.stat().st_mtime_ns
    for number in (0, 2):
        (tmp_path / f"features-0000{number}-of-00003.npz").unlink()
    (tmp_path / "features-00000-of-00003.npz.tmp").write_bytes(b"half of it")
    extract(workdir, tmp_path, *of_folder(images))
    assert "1 of 3 files are there already\n" in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert untouched.stat().st_mtime_ns == times
    extract(workdir, tmp_path, *of_folder(images))
    said = capsys.readouterr().out
    assert "3 of 3 files are there already\ncomplete: 3 files\n" in said
    assert contents(tmp_path) == before


def test_a_killed_run_goes_on_to_the_same_bytes(workdir, images, tmp_path):
    many = tmp_path / "images"
    for split in ("train", "val"):
        (many / split).mkdir(parents=True)
    for number in range(300):
        Image.new("L", (28, 28), number % 256).save(many / "train" / f"{number:03d}.png")
    Image.new("L", (28, 28)).save(many / "val" / "0.png")
    more = of_folder(many, size=2, per_file=2)
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "mae_jax.tools.extract_features", *flags(workdir, out, *more)],
        env=environment(JAX_NUM_CPU_DEVICES="8"),
    )
    try:
        while not list(out.glob("features-00000*.npz")):
            assert process.poll() is None
            time.sleep(1e-3)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(list(out.glob("features-*.npz"))) < 150
    for folder in (out, tmp_path / "whole"):
        assert extract_features.main(flags(workdir, folder, *more)) == 0
    assert len(contents(out)) == 151
    assert contents(out) == contents(tmp_path / "whole")


def refusal(capsys, argv):
    """Run, expect status 2, and return the one line."""
    assert extract_features.main([str(argument) for argument in argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_a_folder_of_other_features_is_refused_and_left_alone(workdir, images, tmp_path, capsys):
    extract(workdir, tmp_path / "out", *of_folder(images))
    before = contents(tmp_path / "out")
    other = write_checkpoint(tmp_path / "other", tiny_config(), steps=(3,), averaged=True)
    for run, more, message in (
        (workdir, ["--pool=cls"], "made with features.pool 'mean', not 'cls'"),
        (workdir, ["--shard_size=4"], "files.count 3, not 5"),
        (workdir, ["--batch_size=8"], "files.batch_size 4, not 8"),
        (workdir, ["--format=array_record"], "files.format 'npz', not 'array_record'"),
        (workdir, ["--split=val"], "source.split 'train', not 'val'"),
        (workdir, [f"--path={images / 'train'}"], "source.path"),
        (other, [], "checkpoint.averaged False, not True"),
    ):
        last = refusal(capsys, flags(run, tmp_path / "out", *of_folder(images), *more))
        assert f"--out={tmp_path / 'out'}: " in last
        assert message in last
        assert last.endswith(": take another folder")
    assert contents(tmp_path / "out") == before


def test_other_parameters_and_other_images_are_noticed(workdir, images, tmp_path, capsys):
    own = tmp_path / "images"
    for split in ("train", "val"):
        (own / split).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (28, 28)).save(own / split / f"{number}.png")
    out = tmp_path / "out"
    extract(workdir, out, *of_folder(own))
    Image.new("L", (28, 28)).save(own / "train" / "2.png")
    assert "source.fingerprint" in refusal(capsys, flags(workdir, out, *of_folder(own)))
    (own / "train" / "2.png").unlink()
    # Step 3 again, but with other parameters: those that the other run has for step 4.
    other = write_checkpoint(tmp_path / "other", tiny_config(), steps=(4,))
    (other / "checkpoints" / "4").rename(other / "checkpoints" / "3")
    assert "checkpoint.parameters" in refusal(capsys, flags(other, out, *of_folder(own)))


def test_a_folder_with_shards_of_unknown_origin_is_refused(workdir, images, tmp_path, capsys):
    (tmp_path / "features-00000-of-00003.npz").touch()
    last = refusal(capsys, flags(workdir, tmp_path, *of_folder(images)))
    assert "has features-00000-of-00003.npz, but no features.json" in last
    (tmp_path / "features.json").write_text("nothing")
    assert "features.json is no manifest of features" in refusal(
        capsys, flags(workdir, tmp_path, *of_folder(images))
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out=x"], "--checkpoint: expected a folder, got nothing"),
        (["--checkpoint=x"], "--out: expected a folder, got nothing"),
        (["--chekpoint=x"], "--chekpoint: there is no such flag; did you mean --checkpoint?"),
        (["--pool=max"], "argument --pool: invalid choice: 'max'"),
        (["--format=csv"], "argument --format: invalid choice: 'csv'"),
        (["--checkpoint=x", "--out=x", "--batch_size=0"], "--batch_size=0: expected at least 1"),
        (
            ["--checkpoint=x", "--out=x", "--batch_size=100"],
            "--shard_size=4096: expected a multiple of --batch_size, which is 100",
        ),
        (["--checkpoint=/no/such", "--out=x"], "/no/such: expected the folder of a run"),
    ],
)
def test_a_wrong_flag_is_refused(capsys, argv, message):
    assert message in refusal(capsys, argv)


def test_what_does_not_fit_is_refused_before_anything_is_written(workdir, images, tmp_path, capsys):
    out = tmp_path / "out"
    for more, message in (
        (["--pool=logits"], "--pool=logits: expected mean, tokens, cls of this pre-trained model"),
        (["--source=folders"], "or the dotted name of a module, got 'folders'"),
        (["--source=folder"], "data.path: expected a folder of images, got an empty string"),
        (["--split=tst"], "got 'tst'"),
    ):
        assert message in refusal(capsys, flags(workdir, out, *more))
    assert not out.exists()
    last = refusal(capsys, flags(workdir, "/dev/null/out", *of_folder(images)))
    assert "--out: cannot write /dev/null/out/features.json: Not a directory" in last
