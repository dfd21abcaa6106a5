"""The loop: what happens at which step, with toys for everything that costs time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.train import loop, metrics
from mae_jax.train.checkpoint import Checkpoints
from mae_jax.train.loop import Cadence, NonFiniteError
from mae_jax.train.metrics import Throughput
from mae_jax.train.signals import StopRequest
from mae_jax.train.state import Counters, TrainState
from mae_jax.train.writers import Console, RunWriter


def state_at(step: int, total: float = 0.0) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        jnp.asarray(step, jnp.int32), {"sum": jnp.asarray(total)}, {}, (), Counters(zero, zero)
    )


class FakeCheckpoints:
    """Remembers what was to be saved; a step is committed at the second question after that."""

    def __init__(self, latest: int | None = None):
        self.latest = latest
        self.saved: dict[int, float] = {}
        self.items: list[dict[str, Any]] = []
        self._writing: list[int] = []
        self._asked = False

    def latest_step(self) -> int | None:
        return self.latest

    def save(self, state: TrainState, *, data: dict, meta: dict) -> int:
        step = int(state.step)
        assert step not in self.saved, "saved twice"
        self.saved[step] = float(state.params["sum"])
        self.items.append({"data": data, "meta": meta})
        self._writing.append(step)
        self._asked = False
        return step

    def committed(self, *, wait: bool = False) -> list[int]:
        if not self._writing or not (wait or self._asked):
            self._asked = True
            return []
        done, self._writing = self._writing, []
        self.latest = done[-1]
        return done


class FakeWriter:
    """Remembers rows, pictures and tables."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.pictures: list[tuple[int, str]] = []
        self.tables: list[tuple[int, str, str]] = []
        self.flushed = 0
        self.beats: list[int] = []
        self.heartbeat = SimpleNamespace(beat=self.beats.append, write=self.beats.append)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **values})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self.pictures.append((step, name))

    def table(self, step: int, name: str, text: str) -> None:
        self.tables.append((step, name, text))

    def flush(self) -> None:
        self.flushed = len(self.rows)

    def steps(self, name: str) -> list[int]:
        """Return the steps of the rows that have `name`."""
        return [int(row["step"]) for row in self.rows if name in row]


class Counting:
    """The batch of step n (from 0) is n; or those of `items`, or an error at the end of them."""

    def __init__(self, items: Iterable[Any]):
        self.items = iter(items)
        self.given = 0

    def __next__(self) -> Any:
        self.given += 1
        return next(self.items)

    def scalars(self) -> dict[str, float]:
        return {"bad_examples": float(self.given)}


class SumEvaluator:
    """Yields the one parameter, and a picture."""

    def run(self, params: Any, extra: Any) -> Iterator[tuple[str, float | np.ndarray]]:
        yield "sum", float(params["sum"])
        yield "pictures", np.zeros((2, 2, 3), np.uint8)


@dataclasses.dataclass
class Bench:
    """Everything that the loop works with."""

    checkpoints: Any = dataclasses.field(default_factory=FakeCheckpoints)
    writer: FakeWriter = dataclasses.field(default_factory=FakeWriter)
    stop: Any = dataclasses.field(default_factory=StopRequest)
    throughput: Throughput = dataclasses.field(default_factory=lambda: Throughput(8, 10, 1e3))
    evaluators: list[Any] = dataclasses.field(default_factory=lambda: [SumEvaluator()])
    bad_steps: frozenset[int] = frozenset()
    step_fn: Callable | None = None
    batches: Iterable[Any] | None = None
    keep_best: Callable | None = None

    def step(self, state: TrainState, batch: int) -> tuple[TrainState, dict[str, Any]]:
        """Add the batch to the parameter; report the step's number as its loss."""
        step = int(state.step) + 1
        in_a_row = 0
        while step - in_a_row in self.bad_steps:
            in_a_row += 1
        reported = {
            "loss": float(step),
            "learning_rate": step / 1000,
            "grad_norm": 1.0,
            "nonfinite_steps": float(sum(bad <= step for bad in self.bad_steps)),
            "nonfinite_in_a_row": float(in_a_row),
        }
        new = state.replace(step=state.step + 1, params={"sum": state.params["sum"] + batch})
        return new, {name: jnp.asarray(value) for name, value in reported.items()}

    def train(self, first: int = 0, **fields: int) -> int:
        """Train from a step on, 12 steps unless told otherwise."""
        usual = {
            "total_steps": 12,
            "last_step": fields.get("total_steps", 12),
            "log_every": 5,
            "eval_every": 0,
            "save_every": 100,
            "max_nonfinite_steps": 3,
        }
        cadence = Cadence(**(usual | fields))
        return loop.train(
            # The batch of step n (from 0) is n, so that the sum after n steps is n (n - 1) / 2.
            state_at(first, first * (first - 1) / 2),
            self.step_fn or self.step,
            Counting(itertools.count(first) if self.batches is None else self.batches),
            cadence,
            evaluators=self.evaluators,
            checkpoints=self.checkpoints,
            save_items=lambda step: {"data": {"next_step": step}, "meta": {"name": "toy"}},
            writer=self.writer,
            console=Console(cadence.total_steps, first),
            throughput=self.throughput,
            stop=self.stop,
            keep_best=self.keep_best,
        )


def sum_at(step: int) -> float:
    return step * (step - 1) / 2


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_every_batch_makes_one_step_and_the_last_step_is_returned(bench):
    assert bench.train() == 12
    assert bench.checkpoints.saved == {12: sum_at(12)}


def test_rows_are_written_at_the_first_step_and_every_few_and_at_the_last(bench):
    bench.train()
    assert bench.writer.steps("train/loss") == [1, 5, 10, 12]


def test_last_row_is_written_once(bench):
    bench.train(total_steps=10)
    assert bench.writer.steps("train/loss") == [1, 5, 10]


def test_row_holds_the_values_of_its_own_step(bench):
    bench.train()
    for row in bench.writer.rows:
        if "train/loss" in row:
            assert row["train/loss"] == row["step"]
            assert row["train/learning_rate"] == pytest.approx(row["step"] / 1000)
            assert row["train/nonfinite_steps"] == 0.0
            assert "train/nonfinite_in_a_row" not in row
            assert row.keys() >= {
                "train/grad_norm",
                "train/images_per_second",
                "train/mfu",
                "train/data_stall",
            }
            # Taken when the row is written, while a later step may have its batch already.
            assert 0 <= row["train/bad_examples"] - row["step"] <= 1


def test_progress_is_shown_with_each_row(bench, capsys):
    bench.train()
    shown = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert [line.split("  ")[:2] for line in shown] == [
        [f"step {step}/12", f"loss {step:.4f}"] for step in (1, 5, 10, 12)
    ]


def test_evaluators_run_every_few_steps_and_at_the_end_on_the_state_of_that_step(bench, capsys):
    bench.train(eval_every=5)
    val = [row for row in bench.writer.rows if "val/sum" in row]
    assert val == [{"step": step, "val/sum": sum_at(step)} for step in (5, 10, 12)]
    assert bench.writer.pictures == [(step, "pictures") for step in (5, 10, 12)]
    assert f"step 5 held out:  sum {sum_at(5):g}" in capsys.readouterr().out


def test_scalars_of_all_evaluators_stand_in_one_row(bench):
    class Another:
        def run(self, params: Any, extra: Any) -> Iterator[tuple[str, float]]:
            yield "other", np.float64(1.5)

    bench.evaluators = [SumEvaluator(), Another()]
    bench.train()
    assert bench.writer.rows[-1] == {"step": 12, "val/sum": sum_at(12), "val/other": 1.5}


def test_a_table_goes_to_the_writer_and_into_no_row(bench):
    class Table:
        def run(self, params: Any, extra: Any) -> Iterator[tuple[str, str | float]]:
            yield "per_class", "class,top1\n"
            yield "top1", 50.0

    bench.evaluators = [Table()]
    bench.train(eval_every=5)
    assert bench.writer.tables == [(step, "per_class", "class,top1\n") for step in (5, 10, 12)]
    assert bench.writer.rows[-1] == {"step": 12, "val/top1": 50.0}


def test_best_is_told_of_each_evaluation_with_the_state_that_was_measured(bench):
    told = []
    bench.keep_best = lambda state, scalars: told.append(
        (int(state.step), float(state.params["sum"]), scalars)
    )
    bench.train(eval_every=5)
    assert told == [(step, sum_at(step), {"val/sum": sum_at(step)}) for step in (5, 10, 12)]


def test_best_is_kept_before_the_step_counts_as_saved(bench):
    # Killed between the two, a run would go on after the evaluation and never hear of it.
    order = []
    bench.keep_best = lambda state, scalars: order.append(("best", int(state.step)))
    save = bench.checkpoints.save
    bench.checkpoints.save = lambda state, **items: (
        order.append(("save", int(state.step))),
        save(state, **items),
    )[1]
    bench.train(eval_every=6, save_every=6)
    assert order == [("best", 6), ("save", 6), ("best", 12), ("save", 12)]


def test_evaluation_comes_after_the_row_of_its_step(bench):
    bench.train(eval_every=5)
    kinds = [(row["step"], "val/sum" in row) for row in bench.writer.rows]
    assert kinds == sorted(kinds)


@pytest.mark.parametrize("eval_every", [0, 6, 12])
def test_evaluators_run_once_at_the_end_of_the_schedule(bench, eval_every):
    bench.train(eval_every=eval_every)
    assert bench.writer.steps("val/sum") == ([6, 12] if eval_every == 6 else [12])


def test_evaluators_do_not_run_where_a_run_ends_in_the_middle_of_its_schedule(bench):
    assert bench.train(total_steps=40, last_step=12, eval_every=10) == 12
    assert bench.writer.steps("val/sum") == [10]
    assert bench.writer.steps("train/loss") == [1, 5, 10, 12]
    assert bench.checkpoints.saved.keys() == {12}


def test_states_are_saved_every_few_steps_and_at_the_last(bench):
    bench.train(save_every=5)
    assert bench.checkpoints.saved == {step: sum_at(step) for step in (5, 10, 12)}
    assert bench.checkpoints.items == [
        {"data": {"next_step": step}, "meta": {"name": "toy"}} for step in (5, 10, 12)
    ]


def test_last_step_is_saved_once(bench):
    bench.train(save_every=6)
    assert bench.checkpoints.saved.keys() == {6, 12}


def test_a_save_is_announced_once_it_is_committed(bench, capsys):
    bench.train(save_every=5, log_every=1)
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("saved")]
    assert said == ["saved step 5", "saved step 10", "saved step 12"]
    # `FakeCheckpoints` needs one more step until a save is there.
    assert lines.index("saved step 5") > next(
        number for number, line in enumerate(lines) if line.startswith("step 5/")
    )
    assert bench.checkpoints.latest == 12


def test_rows_are_on_disk_when_the_run_returns(bench):
    bench.train()
    assert bench.writer.flushed == len(bench.writer.rows)


def stop_in_step(bench: Bench, number: int) -> None:
    """Let the wish to stop come while a step runs."""

    def step_fn(state: TrainState, batch: int) -> Any:
        if int(state.step) + 1 == number:
            bench.stop.name = "SIGTERM"
        return bench.step(state, batch)

    bench.step_fn = step_fn


def test_wish_to_stop_ends_the_step_and_saves(bench):
    stop_in_step(bench, 7)
    assert bench.train(save_every=5, eval_every=5) == 7
    assert bench.checkpoints.saved == {5: sum_at(5), 7: sum_at(7)}
    assert bench.checkpoints.latest == 7
    assert bench.writer.steps("val/sum") == [5]


def test_wish_to_stop_in_a_step_that_is_saved_anyway_saves_once(bench):
    stop_in_step(bench, 10)
    assert bench.train(save_every=5) == 10
    assert bench.checkpoints.saved.keys() == {5, 10}


def test_run_that_is_stopped_before_its_first_step_saves_step_zero(bench):
    bench.stop.name = "SIGINT"
    assert bench.train() == 0
    assert bench.checkpoints.saved == {0: 0.0}
    assert bench.writer.rows == []


def test_resumed_run_that_is_stopped_at_once_saves_nothing_again(bench):
    bench.checkpoints = FakeCheckpoints(latest=10)
    bench.stop.name = "SIGINT"
    assert bench.train(first=10) == 10
    assert bench.checkpoints.saved == {}


def test_resumed_run_goes_on_where_the_state_is(bench):
    bench.checkpoints = FakeCheckpoints(latest=7)
    assert bench.train(first=7, save_every=5, eval_every=4) == 12
    assert bench.writer.steps("train/loss") == [8, 10, 12]
    assert bench.writer.steps("val/sum") == [8, 12]
    assert bench.checkpoints.saved == {10: sum_at(10), 12: sum_at(12)}


def test_run_that_is_finished_already_does_nothing(bench):
    bench.checkpoints = FakeCheckpoints(latest=12)
    assert bench.train(first=12) == 12
    assert bench.checkpoints.saved == {}
    assert bench.writer.rows == []


def test_no_batch_is_taken_beyond_the_last_step(bench):
    taken = []
    bench.batches = (taken.append(n) or n for n in itertools.count())
    bench.train()
    assert taken == list(range(12))


def test_skipped_updates_are_named_and_training_goes_on(bench, capsys):
    bench.bad_steps = frozenset({3, 7, 8})
    assert bench.train(max_nonfinite_steps=3) == 12
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert said == [
        f"step {step}: loss or gradient not finite, update skipped" for step in (3, 7, 8)
    ]
    assert bench.writer.rows[-2]["train/nonfinite_steps"] == 3.0


@pytest.mark.parametrize("save_every", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("total_steps", [6, 7, 12])
def test_too_many_skipped_updates_in_a_row_end_the_run_and_are_not_saved(
    bench, save_every, total_steps
):
    bench.bad_steps = frozenset({2, 4, 5, 6})
    with pytest.raises(NonFiniteError, match=r"not finite in 3 steps in a row, the last step 6"):
        bench.train(total_steps=total_steps, save_every=save_every)
    assert list(bench.checkpoints.saved) == list(range(save_every, 6, save_every))
    assert 6 not in bench.writer.steps("train/loss")


def test_rows_are_on_disk_when_a_run_diverges(bench):
    bench.bad_steps = frozenset({4, 5, 6})
    with pytest.raises(NonFiniteError):
        bench.train(max_nonfinite_steps=3, log_every=1, save_every=100)
    assert bench.writer.flushed == len(bench.writer.rows) == 5


def test_error_names_the_newest_checkpoint(bench):
    bench.bad_steps = frozenset({8, 9})
    with pytest.raises(NonFiniteError, match=r"the last step 9; newest checkpoint: 5$"):
        bench.train(save_every=5, max_nonfinite_steps=2)


class Clock:
    """Time that passes only where the test lets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Pending:
    """A scalar on a device: reading it waits until its step is done."""

    def __init__(self, clock: Clock, done: float, value: float):
        self._clock, self._done, self._value = clock, done, value

    def is_ready(self) -> bool:
        return self._clock.now >= self._done

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._clock.now = max(self._clock.now, self._done)
        return np.asarray(self._value, dtype)


class Device:
    """Works through steps one after another while the host goes on."""

    def __init__(self, clock: Clock, bench: Bench, step_seconds: float):
        self._clock, self._bench, self._step_seconds = clock, bench, step_seconds
        self._free_at = 0.0

    def step(self, state: TrainState, batch: int) -> Any:
        self._free_at = max(self._free_at, self._clock.now) + self._step_seconds
        state, values = self._bench.step(state, batch)
        pending = {k: Pending(self._clock, self._free_at, float(v)) for k, v in values.items()}
        return state, pending

    def wait(self) -> None:
        self._clock.now = max(self._clock.now, self._free_at)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(metrics, "time", clock)
    return clock


@pytest.mark.parametrize("log_every", [1, 4, 5])
def test_rate_in_every_row_is_that_of_the_device_alone(bench, clock, log_every):
    device = Device(clock, bench, step_seconds=0.5)

    class SlowCheckpoints(FakeCheckpoints):
        def save(self, state: TrainState, **items: Any) -> int:
            device.wait()  # a state is read once its step is done
            clock.now += 3.0
            return super().save(state, **items)

    class SlowEvaluator:
        def run(self, params: Any, extra: Any) -> Iterator[tuple[str, float]]:
            device.wait()
            clock.now += 50.0
            yield "loss", 1.0

    bench.throughput.reset()
    bench.checkpoints, bench.evaluators, bench.step_fn = (
        SlowCheckpoints(),
        [SlowEvaluator()],
        device.step,
    )
    bench.train(total_steps=42, log_every=log_every, eval_every=10, save_every=7)
    rows = [row for row in bench.writer.rows if "train/loss" in row]
    assert len(rows) >= 9
    for row in rows:
        # 8 images in half a second, 10 FLOPs each of 1e3 a second.
        assert row["train/images_per_second"] == pytest.approx(16.0), row
        assert row["train/mfu"] == pytest.approx(0.16)
        assert row["train/data_stall"] == 0.0


@pytest.mark.parametrize(("batch_seconds", "stall"), [(0.1, 0.0), (2.0, 1.0)])
def test_stall_is_the_time_for_which_an_idle_device_waits(bench, clock, batch_seconds, stall):
    device = Device(clock, bench, step_seconds=0.5)

    def slow_batches() -> Iterator[int]:
        for number in itertools.count():
            clock.now += batch_seconds
            yield number

    bench.throughput.reset()
    bench.step_fn, bench.batches = device.step, slow_batches()
    bench.train(total_steps=40, log_every=10)
    rows = {row["step"]: row for row in bench.writer.rows if "train/loss" in row}
    for step in (20, 30):
        assert rows[step]["train/data_stall"] == pytest.approx(stall)
        seconds = max(0.5, batch_seconds)
        assert rows[step]["train/images_per_second"] == pytest.approx(8 / seconds)


def test_metrics_of_a_step_are_read_while_the_next_one_runs(bench, clock):
    device = Device(clock, bench, step_seconds=1.0)
    started: list[float] = []

    def step_fn(state: TrainState, batch: int) -> Any:
        started.append(clock.now)
        return device.step(state, batch)

    bench.step_fn = step_fn
    bench.train(total_steps=40, last_step=8)
    # Each is started when the one before the previous is done: the device never waits.
    assert started == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_loop_works_with_real_checkpoints_and_writer(tmp_path, capsys):
    def go(first: int, **fields: int) -> int:
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
        assert checkpoints.latest_step() == (first or None)
        writer = RunWriter(tmp_path, first_step=first)
        bench = Bench(checkpoints=checkpoints, writer=writer)
        try:
            return bench.train(first=first, save_every=4, **fields)
        finally:
            writer.close()
            checkpoints.close()

    assert go(0, total_steps=12, last_step=6) == 6
    assert go(6, total_steps=12) == 12
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"8", "12"}
    lines = capsys.readouterr().out.splitlines()
    saved = [line for line in lines if line.startswith("saved")]
    assert saved == [f"saved step {step}" for step in (4, 6, 8, 12)]
    assert (tmp_path / "pictures" / "step_12.png").exists()


def test_averaged_parameters_are_measured_where_they_are_kept(bench, capsys):
    plain = bench.step

    def step_fn(state: TrainState, batch: int) -> tuple[TrainState, dict[str, Any]]:
        new, reported = plain(state, batch)
        return new.replace(ema={"sum": -new.params["sum"]}), reported

    bench.step_fn = step_fn
    bench.train()
    assert [row["val/sum"] for row in bench.writer.rows if "val/sum" in row] == [-sum_at(12)]
    assert f"held out, averaged parameters:  sum {-sum_at(12):g}" in capsys.readouterr().out


def test_state_is_saved_before_an_error_of_the_data_ends_the_run(bench, capsys):
    def batches() -> Iterator[int]:
        yield from range(7)
        raise ValueError("no such file")

    bench.batches = batches()
    with pytest.raises(ValueError, match="no such file"):
        bench.train()
    assert bench.checkpoints.saved == {7: sum_at(7)}
    assert "saved step 7" in capsys.readouterr().out


def test_state_is_saved_before_data_that_cannot_be_evaluated_on_end_the_run(bench):
    class Unreadable:
        def run(self, params: Any, extra: Any) -> Iterator[tuple[str, float]]:
            raise ConfigError("no such file")

    bench.evaluators = [Unreadable()]
    with pytest.raises(ConfigError, match="no such file"):
        bench.train(eval_every=7)
    assert bench.checkpoints.saved == {7: sum_at(7)}


def test_nothing_is_saved_twice_when_the_data_end_right_after_a_save(bench):
    bench.batches = iter(range(6))
    with pytest.raises(StopIteration):
        bench.train(save_every=6)
    assert bench.checkpoints.saved == {6: sum_at(6)}
