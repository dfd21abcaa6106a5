"""What the image of the manifests is made of."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.launch.conftest import ROOT

PATTERNS = [
    line
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]
ALLOWED = [pattern[1:] for pattern in PATTERNS if pattern.startswith("!")]


def test_nothing_is_copied_that_is_not_named():
    assert PATTERNS[0] == "*"  # the last pattern that fits counts
    assert not [name for name in ALLOWED if "*" in name or name.startswith(".")]


def test_what_is_copied_can_be_installed_and_started(tmp_path):
    """`COPY . .`, then what pip asks setup.py, then the command of the manifests."""
    pytest.importorskip("setuptools", reason="what pip fetches to ask setup.py")
    for name in ALLOWED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)
        else:
            shutil.copy(ROOT / name, tmp_path)
    asked = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 0, asked.stderr
    packages = (tmp_path / "mae_jax.egg-info/SOURCES.txt").read_text().splitlines()
    assert {"LICENSE", "README.md", "configs/vit_l.py", "mae_jax/main.py"} <= set(packages)
    finished = ["true", "--workdir=run"]
    assert subprocess.run(["launch/restart.sh", *finished], cwd=tmp_path).returncode == 0
