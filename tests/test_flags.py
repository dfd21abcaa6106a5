"""Every program answers `--help` and a typo at once, without the libraries that take seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mae_jax.errors import ConfigError, StopError
from mae_jax.flags import exit_status
from tests.helpers import ROOT, environment

# A program is a module with a parser of its own.
PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [ROOT / "mae_jax" / "main.py", *sorted((ROOT / "mae_jax" / "tools").glob("*.py"))]
    if "def make_parser" in path.read_text()
]


def test_the_programs_are_found():
    assert {"mae_jax.main", "mae_jax.tools.visualize"} <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("flag", ["--help", "--hlep"])
def test_help_and_a_typo_are_answered_without_jax(program, flag):
    code = (
        f"import sys; from {program} import main\n"
        "try: status = main([sys.argv[1]])\n"
        "except SystemExit as stop: status = stop.code\n"
        "heavy = {'jax', 'flax', 'numpy', 'torch'} & sys.modules.keys()\n"
        "print('STATUS', status, sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, flag],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert f"STATUS {0 if flag == '--help' else 2} []" in done.stdout
    if flag == "--hlep":
        assert "error: --hlep: there is no such flag; did you mean --help?" in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("seed: expected a number"), 2, "error: seed: expected a number"),
        (StopError("the disk is full"), 1, "stopped: the disk is full"),
    ],
)
def test_what_ends_a_program_is_one_line_and_a_status(capsys, error, status, line):
    def program() -> int:
        raise error

    assert exit_status(program) == status
    assert capsys.readouterr().err == f"{line}\n"
