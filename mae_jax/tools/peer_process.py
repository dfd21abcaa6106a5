"""A process of `bench peers`: one contender, which takes steps when it is told to.

    python -m mae_jax.tools.peer_process SPEC

The parent writes a number of steps a line, the answer is a line of JSON; see `peer_times`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

from mae_jax.tools import rounds
from mae_jax.tools.peer_times import IN_JAX


def module_of(name: str) -> str:
    """Return the module that makes a contender."""
    in_jax = name.partition("@")[0] in IN_JAX
    return f"mae_jax.tools.{'peer_jax' if in_jax else 'peer_torch'}"


def main() -> int:
    """Run; returns the exit status."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    if spec["cores"]:
        # Before jax or torch start threads, which they do for as many cores as they find.
        os.sched_setaffinity(0, spec["cores"])
    # What libraries print is not to get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")

    try:
        module = importlib.import_module(module_of(spec["name"]))
        begun = time.perf_counter()
        contender = module.make(spec)
        before, first_loss = contender.checksum(), contender.take(1)
        seconds = time.perf_counter() - begun
        contender.take(rounds.WARM_UP - 1)
        from mae_jax.tools import records

        answer(
            ready=True,
            environment=records.environment() | {"device": module.device_kind()},
            start_seconds=seconds,
            compile_seconds=contender.compile_seconds,
            note=contender.note,
        )
        loss = first_loss
        for line in sys.stdin:
            if not line.strip():
                break
            begun, processor = time.perf_counter(), time.process_time()
            loss = contender.take(int(line))
            answer(
                processor=(time.process_time() - processor) / int(line),
                wall=(time.perf_counter() - begun) / int(line),
                loss=loss,
            )
        answer(
            trained=contender.checksum() != before and loss != first_loss,
            loss=[first_loss, loss],
            peak_bytes=module.peak_bytes(),
        )
    except BrokenPipeError:  # nobody listens: the parent was stopped
        return 1
    except ImportError as error:
        answer(left_out=f"cannot be imported: {error}")
    except Exception as error:
        if not rounds.no_memory(error):
            # The last line of what went wrong; all of it is on stderr.
            answer(left_out=f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            raise
        answer(left_out=rounds.DOES_NOT_FIT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
