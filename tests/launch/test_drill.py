"""`local.sh` with the program itself: processes that are killed and stopped, and go on."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from tests.launch.conftest import LAUNCH, ROOT, is_alive

FLAGS = (
    *("--config=demo", "--config.batch_size=16", "--config.run.save_every=20"),
    *("--config.model.depth=1", "--config.model.decoder_depth=1", "--config.eval.batch_size=16"),
    *("--config.eval.readouts=False", "--config.eval.pictures=0", "--config.eval.every=100000"),
)


@pytest.mark.drill
@pytest.mark.multihost
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes in /proc")
def test_a_pod_goes_on_after_a_kill_and_stops_at_sigterm(stage):
    said: list[str] = []
    running = stage.begin(
        *(LAUNCH / "local.sh", "--processes=2", f"--workdir={stage.folder}/run", *FLAGS),
        PYTHON=sys.executable,
        PYTHONPATH=str(ROOT),
        RESTART_WAIT="1",
        JAX_NUM_CPU_DEVICES="2",
    )
    assert running.stdout is not None
    watchdog = threading.Timer(900, running.kill)  # reading would wait for ever
    watchdog.daemon = True
    watchdog.start()

    def read_until(part: str) -> None:
        for line in running.stdout:
            said.append(line)
            if part in line:
                return
        raise AssertionError(f"ended without {part!r}: {''.join(said)}")

    read_until("saved step 40")
    first = stage.programs()
    assert sorted(first) == ["0", "1"]
    os.kill(first["1"], signal.SIGKILL)
    read_until("resumed from step ")
    assert int(said[-1].split()[-1]) >= 40
    read_until("saved step ")
    second = stage.programs()
    assert not {*first.values()} & {*second.values()}
    running.send_signal(signal.SIGTERM)
    read_until("everything is saved")
    assert stage.end(running).returncode == 75
    watchdog.cancel()
    assert not [pid for pid in (*first.values(), *second.values()) if is_alive(pid)]
