"""The cores that a process may use, and processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """End this worker when its parent dies: workers outlive a parent that is killed otherwise."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
