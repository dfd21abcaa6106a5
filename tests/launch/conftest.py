"""A place where launch scripts run with stubs for the programs they call; nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
HERE = Path(__file__).resolve().parent
STUBS = HERE / "stubs"
TIMEOUT = 60  # seconds; a script takes one or two


@pytest.fixture(scope="session", autouse=True)
def heeded_interrupts() -> None:
    """Undo what a suite that runs in the background hands down: a script cannot, once started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Stage:
    """A folder with the records of the stubs, and ways to run scripts among them.

    Attributes:
      folder: holds what the stubs read and write (see `stubs/`); also the working directory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            # The stubs alone, and the system's tools: never a real gcloud.
            "PATH": f"{STUBS}:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(folder),
            "STUB": str(folder),
            "STUB_FOLDER": str(STUBS),
            "STUB_PYTHON": sys.executable,
            "PYTHON": "python",
            "RESTART_WAIT": "0",
            "TPU_POLL": "0.05",
        }
        self.plan("exit 0")

    def plan(self, *runs: str, process: int = 0) -> None:
        """Say what the runs of a process do, one after the other: lines of bash."""
        (self.folder / f"plan.{process}").write_text("".join(f"{run}\n" for run in runs))

    def begin(self, *command: str | Path, **variables: str) -> subprocess.Popen[str]:
        """Start a script, its output on pipes."""
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        return self.end(self.begin(*command, **variables))

    def end(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        """Wait for a script that was begun."""
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something has happened in another process."""
        limit = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < limit, "waited in vain"
            time.sleep(0.02)

    def runs(self, process: int = 0) -> int:
        """Return how often the program was started as this process."""
        path = self.folder / f"runs.{process}"
        text = path.read_text().strip() if path.exists() else ""
        return int(text) if text else 0

    def arguments(self, process: int = 0, run: int = 1) -> list[str]:
        """Return the arguments that the program was given."""
        text = (self.folder / f"arguments.{process}.{run}").read_text()
        return text.split("\0")[:-1]

    def variables(self, process: int = 0, run: int = 1) -> dict[str, str]:
        """Return the environment that the program was given."""
        text = (self.folder / f"environment.{process}.{run}").read_text()
        return dict(item.split("=", 1) for item in text.split("\0")[:-1])

    def log(self, name: str) -> list[str]:
        """Return the calls of a stub."""
        path = self.folder / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []

    def programs(self) -> dict[str, int]:
        """Return the pid of each process of the job in `run` of the folder, by its number.

        Of the program itself, not of a stub; found in /proc.
        """
        found = {}
        for process in (name for name in os.listdir("/proc") if name.isdigit()):
            try:
                command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                environ = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            is_ours = f"--workdir={self.folder}/run".encode() in command
            if is_ours and command[1:3] == [b"-m", b"mae_jax.main"]:
                variables = dict(item.split(b"=", 1) for item in environ if b"=" in item)
                found[variables[b"MAE_JAX_PROCESS_ID"].decode()] = int(process)
        return found

    def survivors(self) -> list[int]:
        """Return the programs that are alive still."""
        path = self.folder / "pids"
        pids = [int(line) for line in path.read_text().split()] if path.exists() else []
        return [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie of a parent that is gone as well.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Return a stage; a program that is alive after the test fails it."""
    folder = tmp_path / 'it\'s a "stage"'  # what file names may hold
    folder.mkdir()
    made = Stage(folder)
    yield made
    survivors = made.survivors()
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    assert not survivors, "a program has outlived its script"


def check_golden(name: str, text: str) -> None:
    """Compare with a file of `golden/`; GOLDEN=write in the environment writes it instead."""
    path = HERE / "golden" / name
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
