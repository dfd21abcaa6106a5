"""Work on many machines: the files of one machine, whoever writes them, how often and where."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from mae_jax.errors import ConfigError
from mae_jax.tools import beam, beam_shards, extract_features, features, prepare_data, shards
from tests.checkpoints import tiny_config, write_checkpoint
from tests.helpers import write_photographs

MAIN = {"prepare": prepare_data.main, "extract": extract_features.main}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder of ten images to train on, one of which is none, and three others."""
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(("train/cat", "train/dog", "val/cat")):
        write_photographs(root / name, 3 if name.startswith("val") else 5, number)
    (root / "train" / "cat" / "photo_02.JPEG").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Return a folder of 10 grey images to train on and one other."""
    root = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 1)):
        (root / split).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "tiny", tiny_config())


@pytest.fixture(scope="module")
def commands(images, digits, workdir) -> dict[str, Callable[[object], list[str]]]:
    """Return the flags of each program, but for --beam, by the folder that is to be written."""
    extraction = ["--source=folder", f"--path={digits}", "--split=train"]
    return {
        "prepare": lambda out: [str(images), str(out), "--shards=3", "--short_side=32"],
        "extract": lambda out: [
            *(f"--checkpoint={workdir}", f"--out={out}", *extraction),
            *("--batch_size=2", "--shard_size=4"),
        ],
    }


@pytest.fixture
def workers(monkeypatch, tmp_path) -> list[str]:
    """Have two workers take the place of Beam; returns Beam's options, as soon as there are some.

    Each does all pieces, the second one backwards. They run in another folder, and get what they do
    as bytes.
    """
    given: list[str] = []

    def run(pieces: Iterable, make: Callable[[], Callable], options: Sequence[str]) -> None:
        given.extend(options)
        todo, sent = list(pieces), pickle.dumps(make)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        with monkeypatch.context() as context:
            context.chdir(tmp_path / "elsewhere")
            for order in (todo, todo[::-1]):
                do = pickle.loads(sent)()
                for piece in order:
                    do(piece)

    monkeypatch.setattr(beam, "run", run)
    monkeypatch.setattr(beam, "require", lambda: None)
    return given


def refusal(capsys, program: str, argv: Iterable[object]) -> str:
    """Run, expect status 2, and return the one line."""
    assert MAIN[program]([str(argument) for argument in argv]) == 2
    last = capsys.readouterr().err.splitlines()
    assert len(last) == 1
    assert last[0].startswith("error: ")
    return last[0]


@pytest.mark.parametrize("program", MAIN)
def test_workers_write_what_one_machine_writes(
    program, commands, workers, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    argv, options = commands[program], ["--runner=FlinkRunner", "--parallelism", "8"]
    assert MAIN[program](argv("one")) == 0
    assert workers == []
    assert MAIN[program]([*argv("many"), "--beam", "--", *options]) == 0
    assert workers == options
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert "complete" in capsys.readouterr().out


def test_finished_shards_are_left_and_damaged_ones_are_written_again(
    commands, workers, tmp_path, capsys
):
    out = tmp_path / "out"
    argv = [*commands["prepare"](out), "--beam"]
    assert prepare_data.main(argv) == 0
    before = contents(out)
    files = [out / f"train-0000{number}-of-00003.array_record" for number in range(3)]
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-100])
    capsys.readouterr()
    assert prepare_data.main(argv) == 0
    # The second worker finds all shards, and its word is the last.
    assert "complete, 4 shards (4 were there), 12 images, 0.00 GB, 1 left out" in (
        capsys.readouterr().out
    )
    assert contents(out) == before
    assert files[2].stat().st_mtime_ns == times[2]


@pytest.mark.parametrize("program", MAIN)
def test_one_machine_clears_up_after_a_killed_start_of_many(program, commands, tmp_path):
    out = tmp_path / "out"
    argv = commands[program](out)
    assert MAIN[program](argv) == 0
    before = contents(out)
    name = next(name for name in sorted(before) if "00000-of" in name)
    (out / name).unlink()
    (out / beam.SCRATCH).mkdir()
    (out / beam.SCRATCH / f"{name}.0123.tmp").touch()
    assert MAIN[program](argv) == 0
    assert contents(out) == before


def test_missing_features_alone_are_extracted(commands, workers, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = [*commands["extract"](out), "--beam"]
    assert extract_features.main(argv) == 0
    before = contents(out)
    (out / "features-00001-of-00003.npz").unlink()
    written = []
    original = features.Extraction.write

    def write(self, numbers):
        written.extend(numbers)
        original(self, numbers)

    monkeypatch.setattr(features.Extraction, "write", write)
    assert extract_features.main(argv) == 0
    assert written == [1]
    assert contents(out) == before


@pytest.mark.parametrize("kept", [True, False])
def test_workers_find_images_by_a_path_that_is_relative_here(
    kept, commands, digits, workers, workdir, tmp_path, monkeypatch
):
    monkeypatch.chdir(digits.parent)
    argv = commands["extract"]
    if kept:
        fields = {"data__source": "folder", "data__path": digits.name, "data__held_out": "0.1"}
        workdir = write_checkpoint(tmp_path / "kept", tiny_config(**fields))
    where = [f"--checkpoint={workdir}", *([] if kept else [f"--path={digits.name}"])]
    for out, more in ((tmp_path / "one", []), (tmp_path / "many", ["--beam"])):
        given = [word for word in argv(out) if not word.startswith(("--path", "--checkpoint"))]
        assert extract_features.main([*given, *where, *more]) == 0
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    manifest = json.loads((tmp_path / "many" / "features.json").read_text())
    assert manifest["source"]["path"] == str(digits)


def test_a_worker_that_finds_another_checkpoint_writes_nothing(
    commands, workers, workdir, tmp_path, monkeypatch, capsys
):
    other = write_checkpoint(tmp_path / "other", tiny_config(), steps=(4,))
    original = features._writer

    def writer(flags):
        flags.checkpoint = str(other)
        return original(flags)

    monkeypatch.setattr(features, "_writer", writer)
    # By its name, as pickle finds it.
    monkeypatch.setattr(writer, "__qualname__", "_writer")
    monkeypatch.setattr(writer, "__module__", features.__name__)
    out = tmp_path / "out"
    line = refusal(capsys, "extract", [*commands["extract"](out), "--beam"])
    assert "made with checkpoint.step 3, not 4" in line
    assert list(contents(out)) == ["features.json"]


@pytest.mark.parametrize(
    ("program", "lost"),
    [
        ("prepare", "train-00000-of-00003.array_record.result.json in "),
        ("extract", "features-00000-of-00003.npz in it"),
    ],
)
def test_files_that_workers_have_kept_to_themselves_are_missed(
    program, lost, commands, workers, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(beam, "run", lambda pieces, make, options: None)
    out = tmp_path / "out"
    stale = out / beam.SCRATCH / "train-00000-of-00003.array_record.result.json"
    stale.parent.mkdir(parents=True)
    facts = {"left_out": {}, "size": 1, "sha256": "", "written": True}
    stale.write_text(json.dumps(facts))  # of a start that was killed
    line = refusal(capsys, program, [*commands[program](out), "--beam"])
    assert f"{out}: expected a folder that all workers share, got no {lost}" in line
    assert not (out / "manifest.json").exists()


def test_a_worker_without_the_plans_or_the_images_says_so(images, tmp_path):
    writer = beam_shards._writer(str(tmp_path))
    with pytest.raises(ConfigError, match="expected a folder that all workers share, got"):
        writer("train-00000-of-00001.array_record")
    plan = shards.plan(str(images)).shards[0]
    gone = dataclasses.replace(plan, root=str(tmp_path / "nowhere"))
    beam_shards._write_plan(epath.Path(tmp_path) / beam.SCRATCH, gone)
    with pytest.raises(ConfigError, match="FOLDER: expected a folder that all workers see"):
        writer(plan.file)
    assert not (tmp_path / plan.file).exists()


def test_a_plan_reaches_a_worker_whole(tmp_path):
    names = ("a b/\udc80é.jpg", 'c/"\n.png')
    plan = shards.ShardPlan("x", "val", "/images", names, (0, -1), shards.Options(32, 80))
    scratch = epath.Path(tmp_path) / beam.SCRATCH
    beam_shards._write_plan(scratch, plan)
    assert beam_shards._read_plan(scratch, "x") == plan


def test_too_many_bad_images_are_refused_at_the_end(workers, tmp_path, capsys):
    write_photographs(tmp_path / "images", 3)
    for number in range(11):
        (tmp_path / "images" / f"bad_{number:02d}.jpg").write_bytes(b"no image")
    argv = [tmp_path / "images", tmp_path / "out", "--beam"]
    assert "at most 10 of 14 images that cannot be used, got 11" in refusal(capsys, "prepare", argv)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare_data.main([*map(str, argv), "--max_bad_share=1"]) == 0


@pytest.mark.parametrize("program", MAIN)
def test_without_the_package_the_extra_is_named(program, commands, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "apache_beam" else found(name)
    )
    line = refusal(capsys, program, [*commands[program](tmp_path / "out"), "--beam"])
    assert 'needs the package apache-beam: pip install "mae_jax[beam]"' in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        ("prepare", ["a", "b", "--", "--runner=x"], "--: expected options of Beam after --beam"),
        ("extract", ["--", "--beam"], "--: expected options of Beam after --beam alone"),
        ("prepare", ["a", "b", "--beam", "--processes=2"], "--beam: expected no --processes with"),
        ("prepare", ["--verify", "b", "--beam"], "--beam: expected no --verify with it"),
        ("prepare", ["a", "b", "--runner=x", "--beam"], "--runner: there is no such flag"),
        ("prepare", ["/nowhere", "x://b"], "OUT: expected a bucket that is there and may be read"),
        ("prepare", ["gs://a", "gs://a/b"], "OUT=gs://a/b: expected a folder outside of"),
    ],
)
def test_what_cannot_be_is_refused(program, argv, message, capsys):
    assert message in refusal(capsys, program, argv)


class Buckets(LocalFileSystem):
    """Buckets that are local folders: gs://NAME/... is ROOT/NAME/..., without a slash in front."""

    protocol = ("gcs", "gs")
    root = ""
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        if path.startswith("gs://"):
            return f"{cls.root}/{path.removeprefix('gs://').rstrip('/')}"
        return path.rstrip("/")

    def glob(self, path, **kwargs):
        return [found.removeprefix(f"{self.root}/") for found in super().glob(path, **kwargs)]


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """Return the local folder of gs://bucket."""
    # It asks the real storage.
    monkeypatch.setattr("mae_jax.files.require_bucket", lambda path, field: None)
    monkeypatch.setattr(Buckets, "root", str(tmp_path / "buckets"))
    monkeypatch.setattr(
        backend.fsspec_backend,
        "_get_filesystem",
        lambda name: Buckets() if name == "gcs" else fsspec.filesystem(name),
    )
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    return tmp_path / "buckets" / "bucket"


@pytest.mark.parametrize("more", [[], ["--beam"]])
def test_images_and_shards_may_lie_in_buckets(more, images, bucket, workers, tmp_path, capsys):
    (bucket / "images").symlink_to(images)
    flags = ["--shards=3", "--short_side=32"]
    assert prepare_data.main([str(images), str(tmp_path / "local"), *flags]) == 0
    flags += more or ["--processes=1"]
    assert prepare_data.main(["gs://bucket/images", "gs://bucket/out", *flags]) == 0
    assert contents(bucket / "out") == contents(tmp_path / "local")
    capsys.readouterr()
    assert prepare_data.main(["gs://bucket/images", "gs://bucket/out", *flags]) == 0
    assert "gs://bucket/out: complete already, 4 shards" in capsys.readouterr().out
    (bucket / "out" / "val.index.json").write_text("{}")
    assert "remove val.index.json" in refusal(capsys, "prepare", ["--verify", "gs://bucket/out"])
    assert "data.path" not in refusal(capsys, "prepare", ["gs://bucket/no", "gs://bucket/x"])


@pytest.mark.parametrize("more", [[], ["--beam"], ["--format=array_record"]])
def test_features_may_lie_in_buckets(more, commands, bucket, workers, tmp_path):
    argv = commands["extract"]
    assert extract_features.main([*argv(tmp_path / "local"), *more]) == 0
    assert extract_features.main([*argv("gs://bucket/out"), *more]) == 0
    assert contents(bucket / "out") == contents(tmp_path / "local")


def test_a_connection_that_breaks_does_not_leave_an_image_out(images, bucket, monkeypatch):
    (bucket / "images").symlink_to(images)
    plan = shards.plan("gs://bucket/images").shards[0]
    original = Buckets.open

    def broken(self, path, mode="rb", **fields):
        if "/images/" in str(path):
            raise TimeoutError("no answer")
        return original(self, path, mode, **fields)

    monkeypatch.setattr(Buckets, "open", broken)
    with pytest.raises(ConfigError, match="no answer"):
        shards.write_shard(plan, "gs://bucket/out")


class TestBeam:
    """The same with Beam itself, in this process."""

    # What DirectRunner takes in the end; it first tries to fetch another one.
    RUNNER = "--runner=FnApiRunner"

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip(
            "apache_beam", reason="needs the extra `beam`, which moves protobuf and Pillow back"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("program", MAIN)
    def test_it_writes_what_one_machine_writes(self, program, commands, tmp_path):
        argv = commands[program]
        assert MAIN[program](argv(tmp_path / "one")) == 0
        assert MAIN[program]([*argv(tmp_path / "many"), "--beam", "--", self.RUNNER]) == 0
        assert contents(tmp_path / "many") == contents(tmp_path / "one")

    @pytest.mark.slow
    def test_a_mistake_that_a_worker_finds_is_one_line(self, images, tmp_path, monkeypatch, capsys):
        def describe(scratch, plan):
            fields = dataclasses.asdict(plan) | {"root": "/nowhere"}
            scratch.mkdir(parents=True, exist_ok=True)
            (scratch / f"{plan.file}.plan.json").write_text(json.dumps(fields))

        monkeypatch.setattr(beam_shards, "_write_plan", describe)
        argv = [str(images), str(tmp_path / "out"), "--beam", "--", self.RUNNER]
        assert prepare_data.main(argv) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        message = "expected a folder that all workers see, got nothing at /nowhere"
        assert last == f"error: FOLDER: {message}"

    @pytest.mark.slow
    def test_an_unknown_runner_is_one_line(self, images, tmp_path, capsys):
        argv = [str(images), str(tmp_path / "out"), "--beam", "--", "--runner=Fast"]
        assert prepare_data.main(argv) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: --beam: Unexpected pipeline runner: Fast. Valid values are")
