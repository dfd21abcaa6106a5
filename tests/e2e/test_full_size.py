"""The paper's ViT-L and ViT-H at full size, on this machine. Need up to 16 GB of memory.

In one file, so that they run one after the other.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests import tfds_sets
from tests.e2e.vit_h_steps import PEAK
from tests.helpers import (
    ROOT,
    environment,
    finish,
    metrics,
    overrides,
    start,
    write_photographs,
)

pytestmark = pytest.mark.slow

# As published, less the two position tables, which are no parameters of ours.
PARAMETERS = {
    "vit_l": 329_541_888 - 201_728 - 100_864,
    "vit_h": 657_074_508 - 328_960 - 131_584,
}


@pytest.fixture
def workdir(tmp_path):
    """A work folder whose checkpoint of 4 GB does not outlive the test."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("source", ["tfds", pytest.param("folder", marks=pytest.mark.drill)])
def test_vit_l_takes_its_step(source, workdir, tmp_path):
    """Nothing is changed but the batch, and for a folder where the images are."""
    fields = {"batch_size": "2"}
    if source == "tfds":
        tfds_sets.prepare(tmp_path / "data")
    else:
        write_photographs(tmp_path / "data", 20)
        fields |= {"data.source": "folder", "data.path": str(tmp_path / "data")}
    # A module that no import of TensorFlow gets past.
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')")
    flags = ["--config=configs/vit_l.py", f"--workdir={workdir}", "--stop_at_step=1"]
    process = start(
        flags + overrides(fields),
        TFDS_DATA_DIR=str(tmp_path / "data"),
        PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}",
    )
    status, output = finish(process, timeout=1800)
    assert status == 0, output
    assert f"{PARAMETERS['vit_l'] / 1e6:.2f} M parameters" in output
    assert (
        "20 images to train on, 16" if source == "tfds" else "18 images to train on, 2"
    ) in output
    assert "finished at step 1 of " in output
    (row,) = [row for row in metrics(workdir) if "train/loss" in row]
    assert row["train/learning_rate"] == 0.0
    # A fresh decoder's outputs have nothing to do with the target: to its variance, 1, comes their
    # own, that of 512 normalised values through a Xavier kernel [512, 768].
    assert row["train/loss"] == pytest.approx(1 + 512 * 2 / (512 + 768), rel=0.1)
    assert row["train/grad_norm"] > 0
    assert row["train/bad_examples"] == 0
    assert (workdir / "checkpoints" / "1" / "params").is_dir()


def given_back(env: dict[str, str]) -> dict[str, str]:
    """Return `env` with glibc's defaults: the Makefile's settings keep freed memory, for speed."""
    return {name: value for name, value in env.items() if not name.startswith("MALLOC_")}


@pytest.fixture(scope="module")
def taken() -> dict[str, Any]:
    """Take the steps in a process of its own: its peak is theirs, and all of it is given back."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.e2e.vit_h_steps"],
        capture_output=True,
        text=True,
        env=given_back(environment()),
        cwd=ROOT,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.drill  # ten minutes of a core; ViT-L is in CI
def test_vit_h_takes_steps_at_full_size(taken):
    first, second = taken["steps"]
    print(
        f"losses {first['loss']:.4f} {second['loss']:.4f}; peak {taken['peak_bytes'] / 1e9:.2f} GB;"
        f" seconds, compilation with the first: {[round(s, 1) for s in taken['seconds']]}"
    )
    assert taken["count"] == PARAMETERS["vit_h"]
    assert taken["step"] == 2
    assert second["nonfinite_steps"] == 0
    assert [row["learning_rate"] for row in (first, second)] == pytest.approx([0.0, PEAK])
    # A fresh decoder's outputs have nothing to do with the target: to its variance, 1, comes their
    # own, that of 512 normalised values through a Xavier kernel [512, 588].
    expected = 1 + 512 * 2 / (512 + 588)
    for row in (first, second):
        assert row["loss"] == pytest.approx(expected, rel=0.1)
        assert math.isfinite(row["grad_norm"])
        assert row["grad_norm"] > 0
    # The second update of AdamW moves a parameter by at most 1.0003 of the rate, and decay by 0.05
    # of it as well; where the gradient is not all rounding, some of each leaf move nearly as far.
    moves = {path: move / PEAK for path, move in taken["moves"].items()}
    assert {path: move for path, move in moves.items() if not 0.5 < move < 1.1} == {}
    assert taken["peak_bytes"] < 16e9
