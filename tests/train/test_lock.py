"""The lock of a folder: one run at a time, and none for ever."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from mae_jax.errors import ConfigError, StopError
from mae_jax.train import lock
from mae_jax.train.lock import FolderLock
from tests.bucket import Bucket, served


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lock").read_text())


def write(folder: Path, **fields: Any) -> None:
    """Write a lock as another run would: fresh, and of this very process if not told otherwise."""
    mine = {"pid": os.getpid(), "started": lock._started(os.getpid()), "token": "another"}
    content = {"host": socket.gethostname(), "heartbeat": time.time(), **mine, **fields}
    (folder / "lock").write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def gone() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=60)
    return process.pid


def test_lock_says_who_works_there_and_goes_with_the_run(tmp_path):
    folder = tmp_path / "runs" / "new"
    with FolderLock(folder) as held:
        content = found(folder)
        assert (content["host"], content["pid"]) == (socket.gethostname(), os.getpid())
        assert abs(content["heartbeat"] - time.time()) < 60
        assert held.note is None
        held.check()
    assert list(folder.iterdir()) == []


def test_lock_goes_when_the_run_ends_with_an_error(tmp_path):
    with pytest.raises(ConfigError, match="of the run"), FolderLock(tmp_path):
        raise ConfigError("of the run")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_run_that_is_alive_is_refused_in_one_line(tmp_path):
    with FolderLock(tmp_path):
        before = found(tmp_path)
        with pytest.raises(ConfigError) as caught, FolderLock(tmp_path):
            pass
        assert found(tmp_path) == before
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: expected a folder that no run works in, got one of")
    assert f"process {os.getpid()} on {socket.gethostname()} (heartbeat 0 s ago)" in message
    assert message.endswith(f"remove {tmp_path / 'lock'}")
    assert "\n" not in message


@pytest.mark.parametrize("age", [-50.0, 0.0, 50.0])
def test_run_on_another_host_whose_heart_beats_is_alive(tmp_path, age, gone, monkeypatch):
    def beat(seconds):
        write(tmp_path, host="elsewhere", pid=gone, heartbeat=time.time() - age + 10)

    write(tmp_path, host="elsewhere", pid=gone, heartbeat=time.time() - age)
    monkeypatch.setattr(time, "sleep", beat)
    with pytest.raises(ConfigError, match="on elsewhere"), FolderLock(tmp_path):
        pass
    assert found(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize("age", [-50.0, 0.0, 50.0])
def test_run_on_another_host_that_is_silent_is_waited_for_and_taken_over(
    tmp_path, age, monkeypatch, caplog
):
    now, waited = time.time(), []
    monkeypatch.setattr(time, "time", lambda: now + sum(waited))
    monkeypatch.setattr(time, "sleep", waited.append)
    write(tmp_path, host="elsewhere", pid=7, heartbeat=now - age)
    with FolderLock(tmp_path) as held:
        assert held.note.startswith("took over the lock of process 7 on elsewhere")
    assert 60 - age <= sum(waited) <= 62 - age
    assert "waiting for a sign of process 7 on elsewhere" in caplog.text


def test_lock_of_another_host_that_is_released_meanwhile_is_free(tmp_path, monkeypatch):
    def release(seconds):
        if found(tmp_path)["host"] == "elsewhere":
            (tmp_path / "lock").unlink()

    write(tmp_path, host="elsewhere", pid=7)
    monkeypatch.setattr(time, "sleep", release)
    with FolderLock(tmp_path):
        assert found(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("age", [61.0, 1e6, -1e6])  # the last: of a clock that has jumped
def test_lock_without_a_heartbeat_is_taken_over_and_it_is_said(tmp_path, age):
    write(tmp_path, host="elsewhere", pid=7, heartbeat=time.time() - age)
    with FolderLock(tmp_path) as held:
        assert found(tmp_path)["pid"] == os.getpid()
        assert held.note.startswith("took over the lock of process 7 on elsewhere (heartbeat ")
        assert held.note.endswith(" s ago), which is gone")
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path, gone):
    write(tmp_path, pid=gone, started=None)
    with FolderLock(tmp_path) as held:
        assert f"process {gone} on" in held.note


def test_lock_of_a_process_that_has_ended_unnoticed_is_taken_over_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = lock._started(process.pid)
        if started is None:
            pytest.skip("needs /proc")
        write(tmp_path, pid=process.pid, started=started)
        with pytest.raises(ConfigError, match=f"process {process.pid}"), FolderLock(tmp_path):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from now on
        with FolderLock(tmp_path) as held:
            assert f"process {process.pid} on" in held.note
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_another_process_with_the_same_number_is_not_the_run(tmp_path):
    # As after the restart of a container, in which every run is process 1.
    if lock._started(os.getpid()) is None:
        pytest.skip("needs /proc")
    write(tmp_path, started="1")
    with FolderLock(tmp_path) as held:
        assert held.note is not None


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 4}', "\x00\xff"])
def test_lock_that_cannot_be_read_holds_nobody_off(tmp_path, content):
    (tmp_path / "lock").write_bytes(content.encode("latin-1"))
    with FolderLock(tmp_path) as held:
        held.check()
    assert list(tmp_path.iterdir()) == []


def test_heartbeat_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with FolderLock(tmp_path):
        first = found(tmp_path)
        while found(tmp_path)["heartbeat"] == first["heartbeat"]:
            time.sleep(0.01)
        assert found(tmp_path)["token"] == first["token"]
    assert not any(thread.name == "lock heartbeat" for thread in threading.enumerate())


def test_lock_that_its_own_run_cannot_read_stops_it_in_one_line(tmp_path, monkeypatch):
    with FolderLock(tmp_path) as held:

        def stale(path: epath.Path) -> str:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        with monkeypatch.context() as patched:
            patched.setattr(type(held._path), "read_text", stale)
            with pytest.raises(StopError, match=r"lock cannot be read: Stale file handle$"):
                held.check()


def test_run_whose_lock_was_taken_saves_nothing_more_and_leaves_the_new_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with FolderLock(tmp_path) as held:
        write(tmp_path, pid=12, host="elsewhere")  # while this process was frozen
        with pytest.raises(ConfigError, match=r"process 12 on elsewhere .* nothing more is"):
            held.check()
        time.sleep(0.05)
        assert found(tmp_path)["token"] == "another"
    assert found(tmp_path)["token"] == "another"


def test_run_whose_lock_was_removed_saves_nothing_more(tmp_path):
    with FolderLock(tmp_path) as held:
        (tmp_path / "lock").unlink()
        with pytest.raises(ConfigError, match="lock is gone; nothing more is saved"):
            held.check()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path, monkeypatch, stale):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.5)
    if stale:
        write(tmp_path, host="elsewhere", heartbeat=0.0)
    together, done = threading.Barrier(8), threading.Barrier(8)

    def attempt(_: int) -> bool:
        together.wait(timeout=60)
        try:
            with FolderLock(tmp_path):
                done.wait(timeout=60)
                return True
        except ConfigError:
            done.wait(timeout=60)
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(attempt, range(8))) == [False] * 7 + [True]
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_take_over_the_first_gives_way(tmp_path, monkeypatch):
    write(tmp_path, host="elsewhere", heartbeat=0.0)
    # The other one, which found the same old lock, writes its own a moment later.
    monkeypatch.setattr(time, "sleep", lambda seconds: write(tmp_path, pid=12, host="there"))
    with pytest.raises(ConfigError, match="now that of process 12 on there"), FolderLock(tmp_path):
        pass
    assert found(tmp_path)["pid"] == 12


def test_other_processes_of_a_run_do_nothing(tmp_path):
    write(tmp_path)
    with FolderLock(tmp_path, active=False) as held:
        held.check()
    assert found(tmp_path)["token"] == "another"
    with FolderLock(tmp_path / "new", active=False):
        assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "run"
    message = f"--workdir={folder}: expected a folder to write to, got: Not a directory"
    with pytest.raises(ConfigError) as refusal, FolderLock(folder):
        pass
    assert str(refusal.value) == message


@pytest.fixture
def bucket(monkeypatch) -> Iterator[Bucket]:
    pytest.importorskip("gcsfs", reason='buckets need gcsfs: pip install "mae_jax[gcs]"')
    with served() as bucket:
        for name, value in bucket.environment().items():
            monkeypatch.setenv(name, value)
        yield bucket


def test_heartbeat_of_a_bucket_outlives_whatever_that_says(bucket, monkeypatch):
    # Errors of gcsfs, as of a token that could not be renewed, are no OSErrors.
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    tried = threading.Event()

    def refused(path: epath.Path, text: str, **options: str) -> None:
        tried.set()
        raise RuntimeError("503")

    with FolderLock(bucket.path("run")):
        with monkeypatch.context() as patched:
            patched.setattr(lock, "write_text", refused)
            assert tried.wait(timeout=60)
        first = bucket.objects["run/lock"].content
        while bucket.objects["run/lock"].content == first:
            time.sleep(0.01)
    assert bucket.names("run/") == []


def test_lock_in_a_bucket_is_that_of_one_run(bucket):
    folder = bucket.path("run")
    with FolderLock(folder) as held:
        assert json.loads(bucket.objects["run/lock"].content)["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=f"^{folder}: expected a folder that no run"):
            FolderLock(folder).__enter__()
        held.check()
        bucket.write("run/lock", bucket.objects["run/lock"].content.replace(b"token", b"other"))
        with pytest.raises(ConfigError, match="nothing more is saved"):
            held.check()
    assert bucket.names("run/") == ["lock"]  # that of the other one
