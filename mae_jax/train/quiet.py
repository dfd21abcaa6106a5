"""What Orbax says of an error, hundreds of lines from several threads, goes to a logger.

The logger is `mae_jax.orbax`; it writes nowhere until somebody adds a handler.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
import warnings

LOG = logging.getLogger("mae_jax.orbax")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False

ITS_CODE = os.path.join("orbax", "checkpoint")
# What its storage says where no code of Orbax is on the stack any more.
ITS_WORDS = (ITS_CODE, "OCDBT", "TensorStore", "Event loop is closed")


def _stays(record: logging.LogRecord) -> bool:
    """Return whether a record is not of Orbax; those that are go to the logger."""
    is_its = ITS_CODE in record.pathname or (
        record.name == "asyncio" and _is_its(record.getMessage())
    )
    if is_its:
        LOG.handle(record)
    return not is_its


def _is_its(text: str) -> bool:
    return any(word in text for word in ITS_WORDS)


logging.getLogger("absl").addFilter(_stays)


@functools.cache
def after_a_failed_read() -> None:
    """Keep quiet the other reads of an item of which one has failed; for good, for all threads.

    Nobody waits for them any more: each complains when its file has answered, to the hook of the
    interpreter. What is not of Orbax goes to the hook that was there.
    """
    logging.getLogger("asyncio").addFilter(_stays)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    unraisable = sys.unraisablehook

    def on_unraisable(args: sys.UnraisableHookArgs) -> None:
        trace = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        text = "".join(trace)
        if _is_its(text):
            LOG.error(text)
        else:
            unraisable(args)

    sys.unraisablehook = on_unraisable
