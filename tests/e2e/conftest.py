"""What the tests of the program share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import CACHE, kept_programs


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Programs compiled in this process are kept for those that are started, and vice versa."""
    with kept_programs(str(CACHE)):
        yield
