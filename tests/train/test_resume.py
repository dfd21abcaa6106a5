"""Going on: from the newest step that can be trusted, and never from nothing in silence."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.errors import ConfigError
from mae_jax.train import sharding
from mae_jax.train.checkpoint import Checkpoints, abstract_state
from mae_jax.train.resume import newest_meta, restore_newest
from mae_jax.train.state import TrainState
from tests.helpers import ROOT, environment


@contextlib.contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Checkpoints]:
    with contextlib.closing(Checkpoints(folder, **options)) as checkpoints:
        yield checkpoints


def state_at(step: int, width: int = 5) -> TrainState:
    """Return a state all of whose arrays depend on the step, with an average and statistics."""
    kernel = jnp.sin(jnp.arange(400.0 * width).reshape(400, width) + step)
    params = {"encoder": {"kernel": kernel}}
    extra = {"batch_stats": {"mean": jnp.arange(3.0) - step}}
    state = TrainState.create(params, extra, optax.sgd(0.1, momentum=0.9), averaged=True)
    return state.replace(step=jnp.asarray(step, jnp.int32))


def save(checkpoints: Checkpoints, step: int) -> None:
    data, meta = {"next_step": step, "fingerprint": "f"}, {"config": {"epochs": step}}
    checkpoints.save(state_at(step), data=data, meta=meta)
    assert checkpoints.committed(wait=True) == [step]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the steps 10, 20 and 30; to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    with opened(folder) as checkpoints:
        for step in (10, 20, 30):
            save(checkpoints, step)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a folder with the steps 10, 20 and 30."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def target(width: int = 5) -> TrainState:
    shapes = jax.eval_shape(lambda: state_at(0, width))
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    return abstract_state(shapes, sharding.state_sharding(shapes, mesh))


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def damage(folder: Path, step: int, item: str = "params") -> None:
    """Flip a bit in each file that holds numbers of an item; Orbax merges small ones into `d`."""
    for pattern in ("d/*", "ocdbt.process_*/d/*"):
        for path in (folder / str(step) / item).glob(pattern):
            flip(path)


def damage_json(folder: Path, step: int, item: str) -> None:
    """Change a digit, as one bit can."""
    path = folder / str(step) / item / "metadata"
    text = path.read_text()
    path.write_text(text.replace(str(step), str(step + 1)))
    assert path.read_text() != text


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_is_step(state: TrainState, step: int) -> None:
    expected = state_at(step)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_nothing_saved_is_nothing_restored(tmp_path):
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()  # a save that was killed
    with opened(tmp_path) as checkpoints:
        assert restore_newest(checkpoints, target()) is None
        assert newest_meta(checkpoints) is None


def test_newest_step_is_restored_and_nothing_said(folder):
    before = contents(folder)
    with opened(folder) as checkpoints:
        resumed = restore_newest(checkpoints, target())
    assert (resumed.step, resumed.notes) == (30, [])
    assert resumed.data == {"next_step": 30, "fingerprint": "f"}
    assert_is_step(resumed.state, 30)
    assert contents(folder) == before


def test_damaged_step_is_skipped_named_and_kept(folder):
    damage(folder, 30)
    before = contents(folder)
    with opened(folder, keep=1) as checkpoints:
        resumed = restore_newest(checkpoints, target())
        assert resumed.step == checkpoints.latest_step() == 20
        assert_is_step(resumed.state, 20)
        (note,) = resumed.notes
        assert note.startswith("skipped step 30: params")
        assert note.endswith("; kept as 30.refused")
        # The run goes on, and keeps the newest step alone; what was refused is not counted.
        save(checkpoints, 30)
        save(checkpoints, 40)
        assert restore_newest(checkpoints, target()).step == 40
    assert {path.name for path in folder.iterdir()} == {"30.refused", "40"}
    kept = {name: raw for name, raw in before.items() if name.startswith("30/")}
    assert contents(folder / "30.refused") == {n.removeprefix("30/"): r for n, r in kept.items()}


def test_same_step_may_be_refused_again(folder):
    with opened(folder) as checkpoints:
        for name in ("30.refused", "30.refused_2", "30.refused_3"):
            damage(folder, 30)
            resumed = restore_newest(checkpoints, target())
            assert resumed.step == 20
            assert resumed.notes[0].endswith(f"kept as {name}")
            save(checkpoints, 30)
        assert restore_newest(checkpoints, target()).step == 30


@pytest.mark.parametrize("item", ["params", "ema", "extra", "train"])
def test_changed_numbers_are_noticed_in_each_item(folder, item, monkeypatch):
    # As if storage had changed them without an error: one number of each array, by one bit.
    with opened(folder) as checkpoints:
        read = checkpoints._read_arrays

        def changed(step: int, targets: dict[str, Any]) -> dict[str, Any]:
            restored = read(step, targets)
            if step == 30 and item in restored:
                leaves, structure = jax.tree.flatten(restored[item])
                leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].add(1)
                restored[item] = jax.tree.unflatten(structure, leaves)
            return restored

        monkeypatch.setattr(checkpoints, "_read_arrays", changed)
        resumed = restore_newest(checkpoints, target())
        assert resumed.step == 20
        assert resumed.notes[0].startswith(f"skipped step 30: {item}/")
        assert "is damaged (checksum)" in resumed.notes[0]


@pytest.mark.parametrize("item", ["data", "meta", "checksums"])
def test_changed_digit_of_json_is_noticed(folder, item):
    if item == "checksums":
        flip(folder / "30" / item / "metadata")
    else:
        damage_json(folder, 30, item)
    with opened(folder) as checkpoints:
        resumed = restore_newest(checkpoints, target())
    assert resumed.step == 20
    assert f"skipped step 30: {item} is damaged" in resumed.notes[0]


def test_meta_of_the_newest_step_where_it_is_intact(folder):
    with opened(folder) as checkpoints:
        assert newest_meta(checkpoints) == {"config": {"epochs": 30}}
        damage_json(folder, 30, "meta")
        (folder / "40").mkdir()
        assert newest_meta(checkpoints) == {"config": {"epochs": 20}}


@pytest.mark.parametrize("item", ["params", "ema", "extra", "train", "data", "meta", "checksums"])
def test_step_that_lacks_an_item_is_skipped(folder, item):
    shutil.rmtree(folder / "30" / item)
    with opened(folder) as checkpoints:
        resumed = restore_newest(checkpoints, target())
    assert resumed.step == 20
    assert resumed.notes == [f"skipped step 30: it has no item '{item}'; kept as 30.refused"]


def test_empty_folder_with_a_number_is_no_reason_to_start_from_nothing(folder):
    (folder / "50").mkdir()
    with opened(folder) as checkpoints:
        resumed = restore_newest(checkpoints, target())
    assert resumed.step == 30
    assert resumed.notes == ["skipped step 50: it has no item 'params'; kept as 50.refused"]


def test_several_steps_are_skipped_newest_first(folder):
    damage(folder, 20)
    shutil.rmtree(folder / "30" / "train")
    with opened(folder) as checkpoints:
        resumed = restore_newest(checkpoints, target())
    assert_is_step(resumed.state, 10)
    assert [note.split(":")[0] for note in resumed.notes] == ["skipped step 30", "skipped step 20"]


def test_if_no_step_is_good_the_run_stops_and_nothing_is_touched(folder):
    damage(folder, 10)
    damage_json(folder, 20, "meta")
    shutil.rmtree(folder / "30" / "train")
    before = contents(folder)
    with opened(folder) as checkpoints, pytest.raises(ConfigError) as caught:
        restore_newest(checkpoints, target())
    message = str(caught.value)
    assert message.startswith(f"cannot restore any step of {folder}: step 30: it has no item")
    assert "step 20: meta is damaged (checksum); step 10: params" in message
    assert "\n" not in message
    assert contents(folder) == before


def test_another_model_is_refused_and_nothing_is_touched(folder):
    before = contents(folder)
    with opened(folder) as checkpoints, pytest.raises(ConfigError) as caught:
        restore_newest(checkpoints, target(width=6))
    reason = (
        "params/encoder/kernel: expected float32[400,6], got float32[400,5]; nor any older step"
    )
    assert str(caught.value) == f"cannot restore {folder / '30'}: {reason}"
    assert contents(folder) == before


def test_only_step_is_named_alone(tmp_path):
    (tmp_path / "7").mkdir()
    with opened(tmp_path) as checkpoints, pytest.raises(ConfigError) as caught:
        restore_newest(checkpoints, target())
    assert str(caught.value) == f"cannot restore {tmp_path / '7'}: it has no item 'params'"
    assert (tmp_path / "7").exists()


def forget_checksums(step: Path) -> None:
    """Make a step one of the time before there were checksums."""
    shutil.rmtree(step / "checksums")
    listed = step / "_CHECKPOINT_METADATA"
    content = json.loads(listed.read_text())
    del content["item_handlers"]["checksums"]
    listed.write_text(json.dumps(content))


def test_step_of_the_time_before_checksums_is_restored_and_it_is_said(folder):
    forget_checksums(folder / "30")
    with opened(folder) as checkpoints:
        resumed = restore_newest(checkpoints, target())
        assert not checkpoints.has_checksums(30)
    assert_is_step(resumed.state, 30)
    assert resumed.notes == ["note: step 30 has no checksums; it is taken as it is"]


def test_average_that_was_lost_is_not_replaced_by_the_parameters(folder):
    shutil.rmtree(folder / "30" / "ema")
    with opened(folder) as checkpoints:
        assert checkpoints.has_average(30)
        with pytest.raises(ConfigError, match="it has no item 'ema'"):
            checkpoints.restore_params(30, target().params, averaged=True)


def flip_bit(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= 1 << position % 8
    path.write_bytes(raw)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "removed": Path.unlink,
    "cut": cut_in_half,
    "first bit": lambda path: flip_bit(path, 0),
    "bit near the start": lambda path: flip_bit(path, 45),
    "bit in the middle": lambda path: flip_bit(path, path.stat().st_size // 2),
    "bit near the end": lambda path: flip_bit(path, -10),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("cut", "bit in the middle") else pytest.mark.slow)
        for kind in DAMAGES
    ],
)
def test_no_damage_to_any_file_gives_wrong_numbers_or_a_silent_restart(folder, kind, capfd):
    # Each file of the newest step, one after the other; 6 kinds of damage to 40 files or so.
    files = sorted(path for path in (folder / "30").rglob("*") if path.is_file())
    assert len(files) >= 30
    outcomes: dict[str, int] = {}
    for path in files:
        original = path.read_bytes()
        DAMAGES[kind](path)
        assert not path.exists() or path.read_bytes() != original
        with opened(folder) as checkpoints:
            resumed = restore_newest(checkpoints, target())
        assert resumed is not None, path
        outcomes[str(path.relative_to(folder / "30"))] = resumed.step
        assert_is_step(resumed.state, resumed.step)
        assert resumed.data == {"next_step": resumed.step, "fingerprint": "f"}
        if resumed.step == 20:
            (note,) = resumed.notes
            assert note.startswith("skipped step 30: ")
            assert note.endswith("; kept as 30.refused")
            assert "\n" not in note
            (folder / "30.refused").rename(folder / "30")
        else:
            assert (resumed.step, resumed.notes) == (30, [])
        path.write_bytes(original)
    noticed = [name for name, step in outcomes.items() if step == 20]
    # What holds the numbers, of which each item has some, and what is said of them.
    for item in ("params", "ema", "extra", "train", "data", "meta", "checksums"):
        assert any(name.startswith(f"{item}/") for name in noticed), item
    assert capfd.readouterr().err == ""
    print(f"{kind}: {len(files)} files, {len(noticed)} noticed")


@pytest.mark.slow
@pytest.mark.multihost
def test_all_processes_restore_the_same_step_though_one_alone_finds_damage(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.two_processes", str(port), str(i), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [line for output in outputs for line in output.splitlines() if "restored" in line]
    assert len(said) == 4
    assert said[0] == (
        "restored 20 skipped step 30: another process could not read it; kept as 30.refused"
    )
    assert said[2].startswith("restored 20 skipped step 30: params cannot be read: ")
    assert said[1] == said[3] == "restored 30"
    # And one process reads what two have saved.
    with opened(tmp_path) as checkpoints:
        assert_is_step(restore_newest(checkpoints, target()).state, 30)
