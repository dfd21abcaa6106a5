"""The program with its work folder in a bucket: a stand-in of Google's, which the libraries take.

Orbax commits a step there in another way than on a disk: by an object that says so, for there is no
rename of folders.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from mae_jax import api
from mae_jax.tools import checkpoints as tool
from tests.bucket import Bucket, served
from tests.e2e.cases import STEPS
from tests.helpers import assert_same_state, kill, metrics, run_here, start, tiny_run
from tests.processes import job, outcomes, run_job, told

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("compiled_once"),
    pytest.mark.skipif(
        importlib.util.find_spec("gcsfs") is None,
        reason='buckets need gcsfs: pip install "mae_jax[gcs]"',
    ),
]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with served() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment().items():
            patch.setenv(name, value)
        yield bucket


def in_bucket(bucket: Bucket, folder: str = "run") -> list[str]:
    """Return the flags of a run whose folder is in a bucket."""
    flags = [flag for flag in tiny_run(Path()) if not flag.startswith("--workdir=")]
    return [*flags, f"--workdir={bucket.path(folder)}"]


@pytest.fixture(scope="module")
def local(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the local folder of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    status, output = run_here(tiny_run(workdir))
    assert status == 0, output
    return workdir


def wait_for_a_save(bucket: Bucket, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Return when a write has come that the bucket holds."""
    while not bucket.reached.wait(1):
        assert all(process.poll() is None for process in processes)


@pytest.fixture(scope="module")
def resumed(compiled_once: None, bucket: Bucket) -> str:
    """Return the output of a run in the bucket that goes on after one that was killed."""
    bucket.hold("run/checkpoints/20/commit_success.txt")  # all of step 20 is there, but for that
    process = start(in_bucket(bucket), JAX_NUM_CPU_DEVICES=str(jax.device_count()))
    try:
        wait_for_a_save(bucket, [process])
    finally:
        print(kill(process))
    bucket.hold("")
    assert bucket.names("run/checkpoints/20/params/")
    assert json.loads(bucket.objects["run/lock"].content)["pid"] == process.pid
    status, output = run_here(in_bucket(bucket))
    assert status == 0, output
    return output


@pytest.fixture
def fetched(resumed: str, bucket: Bucket, tmp_path: Path) -> Path:
    """Return a local copy of the run in the bucket."""
    bucket.copy_to("run/", tmp_path)
    return tmp_path


def test_a_run_that_was_killed_in_a_save_goes_on_from_the_step_before(bucket, resumed):
    assert "took over the lock of process" in resumed
    assert "resumed from step 10" in resumed
    assert f"finished at step {STEPS}: {bucket.path('run')}/checkpoints/{STEPS}" in resumed
    assert "Traceback" not in resumed


def test_the_bucket_holds_what_a_folder_does(bucket, resumed):
    names = bucket.names("run/")
    steps = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert steps == {"20", "30", "40"}
    assert [name for name in names if not name.startswith("checkpoints/")] == [
        "config.json",
        "heartbeat.json",
        "metrics.jsonl",
        "pictures/step_20.png",
        "pictures/step_40.png",
    ]
    beat = json.loads(bucket.objects["run/heartbeat.json"].content)
    assert (beat["step"], beat["restarts"]) == (STEPS, 1)


def test_steps_pictures_and_metrics_are_those_of_a_local_run(local, fetched):
    for step in (20, 30, STEPS):
        assert_same_state(local, fetched, step)
    for step in (20, STEPS):
        name = f"pictures/step_{step}.png"
        assert (local / name).read_bytes() == (fetched / name).read_bytes()
    ours = {row["step"]: row["train/loss"] for row in metrics(fetched) if "train/loss" in row}
    theirs = {row["step"]: row["train/loss"] for row in metrics(local) if "train/loss" in row}
    assert ours.pop(11)  # a process logs its first step as well
    assert ours == theirs


def test_parameters_are_loaded_from_a_bucket(bucket, resumed, local):
    ours, theirs = api.load(bucket.path("run")), api.load(local)
    assert ours.step == STEPS
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_checkpoints_in_a_bucket_are_listed_and_verified(bucket, resumed, capsys):
    assert tool.main(["ls", bucket.path("run")]) == 0
    for step, line in zip((20, 30, STEPS), capsys.readouterr().out.splitlines(), strict=True):
        size = sum(
            len(bucket.objects[f"run/checkpoints/{step}/{name}"].content)
            for name in bucket.names(f"run/checkpoints/{step}/")
        )
        # The stand-in says that all was written on the first of January.
        assert line.startswith(f"step {step}  {size:,} bytes  2026-01-01 ")
        assert "  complete  pretrain mae vit_s, " in line
    assert tool.main(["verify", bucket.path("run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"step {step}: intact, 148 arrays" for step in (20, 30, STEPS)]


def test_damage_in_a_bucket_is_set_aside(bucket, resumed, fetched):
    for name in bucket.names(""):
        if f"/{STEPS}/params/" in name and "/d/" in name:
            raw = bytearray(bucket.objects[name].content)
            raw[len(raw) // 2] ^= 1
            bucket.write(name, bytes(raw))
    assert tool.main(["verify", bucket.path("run"), f"--step={STEPS}"]) == 1
    before = bucket.names(f"run/checkpoints/{STEPS}/")
    status, output = run_here(in_bucket(bucket))
    assert status == 0, output
    assert f"skipped step {STEPS}: params" in output
    assert f"; kept as {STEPS}.refused" in output
    assert "resumed from step 30" in output
    assert bucket.names(f"run/checkpoints/{STEPS}.refused/") == before
    again = fetched / "again"
    bucket.copy_to("run/", again)
    assert_same_state(fetched, again, STEPS)


def test_a_bucket_that_is_not_there_is_named_at_once(bucket):
    status, output = run_here(["--config=demo", "--workdir=gs://no-such-bucket/run"])
    assert status == 2
    assert output == (
        "error: --workdir: expected a bucket that is there and may be read, got"
        " gs://no-such-bucket\n"
    )


@pytest.mark.drill
def test_two_processes_that_were_killed_in_a_save_go_on_to_the_same_bits(bucket, tmp_path):
    assert [status for status, _ in run_job(in_bucket(bucket, "whole"), 2)] == [0, 0]
    flags = in_bucket(bucket, "killed")
    bucket.hold("killed/checkpoints/20/commit_success.txt")
    with job(flags, told(2)) as processes:
        wait_for_a_save(bucket, processes)
    bucket.hold("")
    with job(flags, told(2)) as processes:
        (first, output), (second, _) = outcomes(processes)
    assert (first, second) == (0, 0), output
    assert "resumed from step 10" in output
    for folder in ("whole", "killed"):
        bucket.copy_to(f"{folder}/", tmp_path / folder)
    assert_same_state(tmp_path / "whole", tmp_path / "killed", STEPS)
