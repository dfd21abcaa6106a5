"""The table of faults in docs/reliability.md: each line names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT

TABLE = (ROOT / "docs" / "reliability.md").read_text().partition("## Faults")[2]
LINES = [line for line in TABLE.splitlines() if line.startswith("| ")][2:]
# `FILE -k WORDS`, or `-k WORDS` of the file before, and whether it is said to be a drill.
NAMED = re.compile(r'`(?:(\S+\.py) ?)?(?:-k ("[^"]+"|\S+))?`( \*drill\*)?')


def named() -> list[tuple[str, tuple[str, ...], bool]]:
    """Return file, words and whether it is a drill, of each test that a line names."""
    found = []
    for line in LINES:
        file = ""
        for match in NAMED.finditer(line.split("|")[-2]):
            file = match[1] or file
            words = (match[2] or "").strip('"').split(" or ")
            found.append((file, tuple(words), bool(match[3])))
    return found


def functions_of(file: str) -> dict[str, str]:
    """Return the name of each test of a file, with all that marks it as text."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = " ".join(map(ast.unparse, node.decorator_list))
    return found


def test_the_table_is_read():
    assert len(LINES) > 40
    assert all(line.count("|") == 5 for line in LINES)
    assert len(named()) > 60


@pytest.mark.parametrize(("file", "words", "is_drill"), dict.fromkeys(named()))
def test_a_line_names_tests_that_are_there_and_says_which_are_drills(file, words, is_drill):
    tests = functions_of(file)
    source = Path(ROOT / "tests" / file).read_text()
    all_are = re.search(r"^pytestmark = .*drill", source, re.MULTILINE) is not None
    for word in words:
        chosen = {name: marks for name, marks in tests.items() if word in name}
        assert chosen, f"no test of {file} has {word!r} in its name"
        drills = [all_are or "drill" in marks for marks in chosen.values()]
        assert any(drills) if is_drill else not all(drills), (file, word)


def test_a_third_of_the_faults_and_more_are_shown_without_drills():
    cells = [line.split("|")[-2] for line in LINES]
    shown = [not all(match[3] for match in NAMED.finditer(cell)) for cell in cells]
    assert sum(shown) >= len(LINES) / 3
