"""What Orbax says goes to its logger, and nothing else does."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mae_jax.train import quiet


@contextlib.contextmanager
def records(logger: logging.Logger) -> Iterator[list[logging.LogRecord]]:
    """Collect what a logger's handlers get."""
    kept: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = kept.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield kept
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("logger", "path", "text", "is_its"),
    [
        ("absl", "/lib/orbax/checkpoint/_src/futures/future.py", "failed", True),
        ("absl", "/lib/grain/worker.py", "orbax/checkpoint is not to blame", False),
        ("asyncio", "/lib/asyncio/events.py", "Future <error in OCDBT> was never read", True),
        ("asyncio", "/lib/asyncio/events.py", "Future <another> was never read", False),
    ],
)
def test_records_of_orbax_go_to_its_logger_alone(logger, path, text, is_its):
    quiet.after_a_failed_read()
    record = logging.LogRecord(logger, logging.ERROR, path, 1, text, None, None)
    with records(logging.root) as console, records(quiet.LOG) as its:
        logging.getLogger(logger).handle(record)
    assert (record in its, record in console) == (is_its, not is_its)


def test_errors_that_nobody_can_catch_are_kept_quiet_if_they_are_of_orbax(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_value))
    quiet.after_a_failed_read.cache_clear()
    quiet.after_a_failed_read()
    of_orbax = [RuntimeError("Event loop is closed"), ValueError("Error in OCDBT database")]
    others = [RuntimeError("another"), KeyError("x")]
    with records(quiet.LOG) as its:
        for error in (*of_orbax, *others):
            args = SimpleNamespace(exc_type=type(error), exc_value=error, exc_traceback=None)
            sys.unraisablehook(args)  # type: ignore[arg-type]
    assert seen == others
    assert len(its) == 2
