"""The benchmark program: what is timed, in which order, and what is said of it, not how long."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.losses.reconstruction import example_losses
from mae_jax.pretrain import mae
from mae_jax.tools import (
    bench,
    ceilings,
    memory_sizes,
    peer_times,
    profiles,
    records,
    rounds,
    step_times,
)
from mae_jax.tools.plain_mae import PlainMAE
from mae_jax.train.writers import RunWriter
from tests.conftest import TINY
from tests.helpers import ROOT, environment
from tests.weights import apply, normal, random_params

CONFIG = """
from mae_jax import recipes


def get_config(variant=""):
    config = recipes.digits(recipes.mae_pretrain(), batch_size=128)
    config.model.embed_dim = 16
    config.model.num_heads = 2
    config.model.depth = {depth}
    config.model.decoder_embed_dim = 16
    config.model.decoder_depth = 1
    config.model.decoder_num_heads = 2
    return config
"""
SCRIPTS = sorted((ROOT / "launch" / "benchmarks").glob("[0-9]*.sh"))


@pytest.fixture
def config_files(tmp_path):
    paths = []
    for depth in (1, 3):
        paths.append(str(tmp_path / f"depth_{depth}.py"))
        (tmp_path / f"depth_{depth}.py").write_text(CONFIG.format(depth=depth))
    return paths


# Flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected one of step, encode_all, memory, data, loop, peers, got None"),
        (["steps"], "expected one of step, encode_all, memory, data, loop, peers, got 'steps'"),
        (["step"], "step: expected at least one config, got none"),
        (["encode_all"], "encode_all: expected at least one config, got none"),
        (["step", "demo", "--rounds=0"], "--rounds: expected a whole number from 1, got '0'"),
        (["step", "demo", "--batch_size=8,x"], "expected whole numbers from 1, got '8,x'"),
        (["step", "no_such"], "no_such"),
        (
            ["step", "demo depth"],
            "'demo depth': expected FIELD=VALUE after the config, got 'depth'",
        ),
        (["step", "demo", "demo model.dept=3"], "model.dept"),
        (["step", "demo", "--batchsize=3"], "--batchsize: there is no such flag"),
        (["step", "demo", "--resume"], "--resume: expected --json as well"),
        (["encode_all", "um_mae:demo"], "sees no mask tokens"),
        (["memory", "demo", "--batch_size=8"], "--batch_size: expected two, whose difference"),
        (["memory", "demo model.dept=3"], "model.dept"),
        (["peers", "--size=vit_x"], "--size=vit_x: expected one of vit_s, vit_b"),
        (["peers", "--dtype=float16"], "--dtype=float16: expected one of float32, bfloat16"),
        (["peers", "--contenders=ours,spda"], "did you mean sdpa?"),
        (["peers", "--contenders=ours@"], "--contenders=ours@: expected one of"),
        (["peers", "--contenders=official"], "expected --official as well, its checkout"),
        (["peers", "--threads=4096"], "--threads=4096: expected at most"),
        (["peers", "--also=new"], "--also: expected LABEL=PYTHON, a program, got 'new'"),
        (["peers", "--also=new=/no/such"], "a program, got 'new=/no/such'"),
    ],
)
def test_mistakes_are_answered_in_one_line(argv, message, capsys):
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_contenders_that_need_a_checkout_are_there_with_one():
    def names(*argv):
        return peer_times.chosen(bench.parse(["peers", *argv])[1])

    assert names() == ["ours", "plain", "eager", "sdpa", "compile"]
    assert names("--official=x")[-1] == "official"
    assert names("--contenders=ours, ours@--xla_a=1 --xla_b=2") == [
        "ours",
        "ours@--xla_a=1 --xla_b=2",
    ]


@pytest.mark.parametrize("smoke", ["", "1"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_commands_of_the_device_scripts_are_understood(script, smoke, tmp_path):
    # In place of Python something that notes what it is asked for.
    noted, stub = tmp_path / "noted", tmp_path / "stub"
    stub.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(noted)!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))\nprint('| a table |')"
    )
    stub.chmod(0o755)
    ours = {"PYTHON": str(stub), "OUT": str(tmp_path / "out"), "SMOKE": smoke, "OFFICIAL": "x"}
    done = subprocess.run(
        ["bash", str(script)], env={**os.environ, **ours}, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    commands = [json.loads(line) for line in noted.read_text().splitlines()]
    for command in commands:
        assert command[:2] == ["-m", "mae_jax.tools.bench"]
        what, flags = bench.parse(command[2:])
        assert flags.resume
        assert flags.json.startswith(str(tmp_path / "out"))
        if what == "peers":
            assert flags.official == "x"
            peer_times.specs(flags, 8)
        else:
            for name in flags.configs:
                size = flags.image_size[0] if flags.image_size else None
                step_times.Case(name, 8, size).config()
    assert done.stdout.count("| a table |") == 2 * len(commands)


def test_a_device_script_whose_time_is_up_says_so(tmp_path):
    ours = {"PYTHON": "false", "OUT": str(tmp_path), "LIMIT": "0"}
    done = subprocess.run(
        ["bash", str(SCRIPTS[0])], env={**os.environ, **ours}, capture_output=True, text=True
    )
    assert done.returncode == 75
    assert "start it again" in done.stderr


# Records and rounds


def test_rows_say_what_they_were_measured_on_and_come_back(tmp_path):
    path = tmp_path / "new" / "figures.jsonl"
    records.append(path, [{"a": 1, "jax": "another"}])
    with path.open("a") as file:
        file.write('{"a": 2, "torn')
    records.append(path, [{"a": 3}])
    first, last = records.read(path)
    assert (first["a"], first["jax"], last["a"], last["jax"]) == (1, "another", 3, jax.__version__)
    assert last["devices"] == len(jax.devices())
    assert last["cores"] >= 1
    assert records.find([first, last], a=3) is last
    assert records.find([first, last], a=3, jax="another") is None
    assert records.read(tmp_path / "none") == []
    # Figures of other processes: this one's device is nothing to them.
    records.append(path, [{"a": 4}], records.host())
    assert "device" not in records.read(path)[-1]


def test_a_table_has_dashes_where_nothing_is_and_no_empty_columns():
    columns = {"a": ("A", ".1f"), "b": ("B", ""), "c": ("C", "d")}
    text = records.table([{"a": 1.26, "b": "x|y"}, {"a": None}], columns)
    assert text.splitlines() == ["| A | B |", "| --- | --- |", "| 1.3 | x\\|y |", "| - | - |"]


def test_who_goes_first_changes_from_round_to_round():
    assert [rounds.turn("ABC", i) for i in range(4)] == [
        *(["A", "B", "C"], ["B", "C", "A"], ["C", "A", "B"], ["A", "B", "C"])
    ]
    assert rounds.turn([], 1) == []
    # The ratio of the medians would be 2 / 4.
    assert rounds.ratio([2, 8, 1], [1, 4, 10]) == 2
    assert rounds.spread([2.0, 4.0, 5.0]) == 0.75


# Steps


class Fake:
    """A contender that takes no time and says when it was asked."""

    dtype, gflop, temporary, program, compile_seconds = jnp.float32, 1.0, 2**20, 2**21, 3.0

    def __init__(self, case, asked):
        self.case, self._asked = case, asked
        self.losses, self.seconds, self.processor_seconds = [], [], []

    def take(self, steps):
        self._asked.append((self.case.name, steps))
        self.losses.append(float(len(self._asked)))
        self.seconds.append(0.5)
        self.processor_seconds.append(0.25)

    def warm_up(self):
        self.losses.append(0.0)


@pytest.fixture
def fakes(monkeypatch):
    """Return what contenders were asked for; "demo model.depth=9" does not fit."""
    asked = []

    def contender(case):
        if "depth=9" in case.name:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return Fake(case, asked)

    monkeypatch.setattr(step_times, "contender", contender)
    made = SimpleNamespace(flops=2e12, bytes_per_second=0.0, measure=lambda: None)
    monkeypatch.setattr(step_times, "Ceilings", lambda dtype, copy: made)
    return asked


def test_configs_take_turns_and_one_that_does_not_fit_is_a_row(fakes, tmp_path, capsys):
    path = tmp_path / "figures.jsonl"
    argv = ["step", "demo", "demo model.depth=9", "demo model.depth=2", f"--json={path}"]
    assert bench.main([*argv, "--batch_size=8", "--rounds=2", "--steps=4"]) == 0
    other = "demo model.depth=2"
    assert fakes == [("demo", 4), (other, 4), (other, 4), ("demo", 4)]
    first, second, third = records.read(path)
    assert second["note"] == "does not fit in memory"
    assert first["images_per_second"] == 16
    assert first["mfu_of_product"] == 16e9 / 2e12
    assert third["time_over_first"] == 1
    assert "does not fit in memory" in capsys.readouterr().out


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(case):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(step_times, "contender", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        bench.main(["step", "demo"])


def test_what_a_file_has_is_not_measured_again(fakes, tmp_path, capsys):
    path = tmp_path / "figures.jsonl"
    argv = ["step", "demo", "--rounds=1", f"--json={path}", "--resume"]
    assert bench.main([*argv, "--batch_size=4"]) == 0
    assert bench.main([*argv, "--batch_size=4,8"]) == 0
    assert len(fakes) == 2
    assert [row["batch_size"] for row in records.read(path)] == [4, 8]
    assert capsys.readouterr().out.count("| demo |") == 3
    # Without --resume all is measured anew.
    assert bench.main([*argv[:-1], "--batch_size=4"]) == 0
    assert len(fakes) == 3


def test_a_row_of_another_place_or_beside_another_first_is_not_taken(fakes, tmp_path):
    path = tmp_path / "figures.jsonl"
    argv = ["--rounds=1", "--batch_size=4", f"--json={path}", "--resume"]
    assert bench.main(["step", "small", "demo", *argv]) == 0
    assert len(fakes) == 2
    assert bench.main(["step", "demo", "small", *argv]) == 0  # demo is the first one now
    assert len(fakes) == 4
    for change in ({"device": "another"}, {"jax": "0.1"}):
        path.write_text("".join(json.dumps(row | change) + "\n" for row in records.read(path)))
        fakes.clear()
        assert bench.main(["step", "demo", "small", *argv]) == 0
        assert len(fakes) == 2
    assert bench.main(["step", "demo", *argv]) == 0
    assert len(fakes) == 2


def test_all_units_in_the_encoder_are_compared_with_the_config_as_it_is(fakes, capsys):
    assert bench.main(["encode_all", "demo", "--rounds=1"]) == 0
    assert [name for name, _ in fakes] == ["demo", "demo model.mask_tokens_in_encoder=True"]
    assert "demo, batch 8: with all units" in capsys.readouterr().out


@pytest.mark.slow
def test_what_an_image_needs_falls_with_the_tokens(tmp_path):
    """The blocks of the encoder see what is kept of 49 units, that of the decoder all."""
    sizes = {"patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3}
    sizes |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    config = " ".join(["demo", *(f"model.{name}={size}" for name, size in sizes.items())])
    cases = [f"{config} model.mask_ratio={ratio}" for ratio in (0.02, 0.9)]
    path = tmp_path / "rows"
    rows = memory_sizes.run(bench.parse(["memory", *cases, f"--json={path}"])[1])
    assert records.read(path) == rows
    for row in rows:
        assert row["most_mib"] == pytest.approx(row["least_mib"] + 8 * row["image_mib"])

    def tokens(kept):
        return 2 * 96 * (kept + 1) + 1 * 32 * 50

    every, few = (row["image_over_first"] for row in rows)
    assert every == 1
    assert few == pytest.approx(tokens(4) / tokens(48), rel=0.2)


def test_ceilings_are_the_best_seen(monkeypatch):
    monkeypatch.setattr(ceilings, "SIDES", {"cpu": (8, 16)})
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 64})
    made = ceilings.Ceilings(jnp.float32, copy=True)
    assert made.flops == made.bytes_per_second == 0
    made.measure()
    assert made.flops > 0
    assert made.bytes_per_second > 0
    made.flops = 1e20
    made.measure()
    assert made.flops == 1e20


def test_operations_of_one_name_are_taken_together():
    found = [
        ("dot.1", 1e6),
        ("%dot.23 = f32[2] dot(a)", 5e6),
        ("add_fusion", 2e6),
        ("while.2", 9e9),
    ]
    first, second = profiles.summed(found, steps=2)
    assert first == {"operation": "dot", "milliseconds": 3.0, "share": 0.75, "count": 1}
    assert second["operation"] == "add_fusion"


def test_a_trace_of_a_device_is_read_from_its_streams():
    def line(name, *events):
        made = [SimpleNamespace(name=n, duration_ns=ns, stats=stats) for n, ns, stats in events]
        return SimpleNamespace(name=name, events=made)

    host = SimpleNamespace(
        name="/host:CPU", lines=[line("a", ("dot", 3, [("hlo_op", "dot")]), ("wait", 9, []))]
    )
    gpu = SimpleNamespace(
        name="/device:GPU:0",
        lines=[line("Stream #13(Compute)", ("gemm", 5, [])), line("Steps", ("all", 50, []))],
    )
    assert list(profiles.events(SimpleNamespace(planes=[host, gpu]))) == [("gemm", 5)]
    assert list(profiles.events(SimpleNamespace(planes=[host]))) == [("dot", 3)]


@pytest.mark.slow
def test_both_are_timed_and_compared_with_the_first(config_files, tmp_path, capsys):
    out = tmp_path / "figures.jsonl"
    argv = ["step", *config_files, "--batch_size=8", "--rounds=3", "--steps=2", f"--json={out}"]
    assert bench.main([*argv, f"--profile={tmp_path / 'trace'}"]) == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["config"], second["config"]) == tuple(config_files)
    assert first["time_over_first"] == first["temporary_over_first"] == 1
    assert second["gflop_over_first"] == second["gflop_per_image"] / first["gflop_per_image"] > 1.2
    for row in (first, second):
        assert row["images_per_second"] == pytest.approx(8e3 / row["milliseconds"])
        assert 0 < row["fastest_milliseconds"] <= row["milliseconds"]
        assert row["batch_size"] == 8
        assert row["jax"] == jax.__version__
        assert row["loss"][0] != row["loss"][1]
        assert row["note"] is None
        assert row["program_mib"] > row["temporary_mib"] > 0
        assert sum(one["share"] for one in row["operations"]) <= 1.001
        assert row["operations"][0]["milliseconds"] > 0
    table = capsys.readouterr().out
    assert f"| {second['gflop_over_first']:.2f} |" in table


def test_a_config_may_have_other_values(config_files):
    case = step_times.Case(f"{config_files[0]} model.depth=3 model.patch_size=16", 2, 64)
    model = case.config().model
    assert (model.depth, model.patch_size, model.image_size) == (3, 16, (64, 64))
    assert case.key()["image_size"] == 64


@pytest.mark.slow
def test_a_device_script_runs_on_a_cpu(tmp_path):
    ours = {"PYTHON": sys.executable, "OUT": str(tmp_path), "SMOKE": "1"}
    done = subprocess.run(
        ["bash", str(SCRIPTS[0])], env=environment(**ours), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = records.read(tmp_path / "1_ceilings.jsonl")
    assert [row["batch_size"] for row in rows] == [2, 4]
    assert all(row["copy_gb_per_second"] > 0 for row in rows)
    assert "a copy:" in (tmp_path / "1_ceilings.md").read_text()


# Peers


@pytest.mark.parametrize("size", sorted(mae.SIZES))
def test_sizes_and_flops_are_those_of_the_method(size):
    dims = peer_times.SIZES[size]
    of_method = mae.SIZES[size]._asdict()
    assert {name: getattr(dims, name) for name in of_method} == of_method
    method = mae.make(size=size, image_size=(dims.image_size, dims.image_size))
    assert dims.gflop() == pytest.approx(method.step_flops() / 1e9)


def test_the_plain_one_has_our_loss_with_our_weights(tiny_mae):
    ours = tiny_mae(depth=1)
    images, noise = normal((2, 32, 32, 3)), normal((2, 16), seed=1)
    plan = ours.plan(jax.random.key(0), 2, jnp.asarray(noise))
    params = random_params(ours.init, {"image": images}, plan, method="predict")
    expected = example_losses(apply(ours, params, {"image": images}, plan, method="predict")).sum()
    dims = {k: v for k, v in TINY.items() if k not in ("size", "image_size")} | {"depth": 1}
    loss = apply(PlainMAE(**dims), params, jnp.asarray(images), jnp.asarray(noise))
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert np.isfinite(loss)


def row(contender, rate, **fields):
    return {"contender": contender, "clock": "wall", "images_per_second": rate, **fields}


def test_each_at_its_best_batch_is_compared_with_the_fastest_in_torch():
    rows = [
        *(row("ours", 10.0), row("ours", 20.0), {"contender": "ours", "clock": "wall"}),
        *(row("plain", 50.0), row("eager", 5.0), row("sdpa", 8.0), row("compile", 25.0)),
    ]
    made = peer_times.compared(rows)
    assert [one.get("time_over_peer") for one in made] == [None, 1.25, None, 0.5, 5, 3.125, 1]
    assert made[1]["peer"] == "compile"
    # Nothing in PyTorch, nothing to compare with.
    assert peer_times.compared(rows[:4]) == rows[:4]


def test_in_rounds_the_ratio_is_that_within_a_round():
    rows = [
        row("ours", 1.0, clock="processor", seconds=[2.0, 8.0, 1.0]),
        row("sdpa", 1.0, clock="processor", seconds=[1.0, 4.0, 10.0]),
    ]
    assert [one["time_over_peer"] for one in peer_times.compared(rows)] == [2, 1]


def test_processes_start_with_one_allocator_and_as_many_threads(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a")
    made = peer_times.environment({"threads": 2}, "--b")
    assert made["XLA_FLAGS"] == "--a --b"
    assert made["OMP_NUM_THREADS"] == "2"
    assert made["MALLOC_TRIM_THRESHOLD_"] == made["MALLOC_MMAP_THRESHOLD_"] == "1000000000"
    assert peer_times.environment({"threads": 2}, "")["XLA_FLAGS"] == "--a"


def test_all_have_one_recipe_and_their_cores():
    flags = bench.parse(["peers", "--contenders=ours,eager", "--dtype=bfloat16"])[1]
    one, two = peer_times.specs(flags, 64)
    assert one | {"name": "", "row": ""} == two | {"name": "", "row": ""}
    assert one["adamw"]["learning_rate"] == pytest.approx(1.5e-4 * 64 / 256)
    assert len(one["cores"]) == 1
    config = step_times.Case(one["config"], 64).config()
    assert (config.model.embed_dim, config.model.dtype) == (384, "bfloat16")
    flags.wall = True
    assert peer_times.specs(flags, 64)[0]["cores"] == []


def test_those_in_jax_take_part_from_another_environment_as_well():
    flags = bench.parse(["peers", "--contenders=ours,plain,sdpa", f"--also=0.12={sys.executable}"])[
        1
    ]
    flags.also.append(("new", "python-new"))
    made = peer_times.specs(flags, 8)
    assert [(spec["name"], spec["row"], spec["python"]) for spec in made] == [
        *((name, name, sys.executable) for name in ("ours", "plain", "sdpa")),
        *((name, f"{name} (0.12)", sys.executable) for name in ("ours", "plain")),
        *((name, f"{name} (new)", "python-new") for name in ("ours", "plain")),
    ]
    rows = [{"jax": "0.10", "torch": "2"}, {"jax": "0.12"}, {"note": "left out"}]
    line = peer_times.heading(rows, flags)
    assert "jax 0.10 and 0.12, " in line
    assert "torch 2" in line


def test_with_wall_each_is_measured_once_by_itself(monkeypatch, tmp_path):
    asked = []

    def measured(group, flags):
        asked.append([(spec["name"], spec["batch_size"]) for spec in group])
        return [{**peer_times.key(spec, flags), "images_per_second": 1.0} for spec in group]

    monkeypatch.setattr(peer_times, "_measured", measured)
    monkeypatch.setattr(peer_times, "_place", lambda python: {"device": "this"})
    path = tmp_path / "figures.jsonl"
    argv = ["peers", "--contenders=ours,sdpa", f"--json={path}", "--resume"]
    assert bench.main([*argv, "--wall", "--batch_sizes=2,4"]) == 0
    assert bench.main([*argv, "--wall", "--batch_sizes=2,8"]) == 0
    assert asked == [[("ours", 2)], [("sdpa", 2)], [("ours", 4)], [("sdpa", 4)], *asked[4:]]
    assert asked[4:] == [[("ours", 8)], [("sdpa", 8)]]
    monkeypatch.setattr(peer_times, "_place", lambda python: {"device": "another"})
    assert bench.main([*argv, "--wall", "--batch_sizes=2"]) == 0
    assert asked[6:] == asked[:2]


def test_proportions_to_different_contenders_are_not_mixed(monkeypatch, tmp_path):
    asked = []

    def measured(group, flags):
        names = [spec["name"] for spec in group]
        asked.append(names)
        return [{**peer_times.key(spec, flags), "peer": names[-1]} for spec in group]

    monkeypatch.setattr(peer_times, "_measured", measured)
    monkeypatch.setattr(peer_times, "_place", lambda python: None)
    argv = ["peers", f"--json={tmp_path / 'figures.jsonl'}", "--resume"]
    for names in ("ours,sdpa", "plain,eager", "plain,eager", "ours,plain"):
        assert bench.main([*argv, f"--contenders={names}"]) == 0
    assert asked == [["ours", "sdpa"], ["plain", "eager"], ["ours", "plain"]]


def test_another_interpreter_says_what_it_would_be_measured_on(tmp_path):
    place = peer_times._place(sys.executable)
    assert place is not None
    assert place["device"] == "cpu"
    assert place["jax"] == jax.__version__
    assert place.keys() >= records.installed().keys()
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert peer_times._place(str(broken)) is None


@pytest.mark.slow
def test_processes_take_turns_and_one_that_cannot_start_is_named(tmp_path, capsys):
    path = tmp_path / "figures.jsonl"
    (tmp_path / "empty").mkdir()
    argv = ["peers", "--size=toy", "--batch_size=2", "--rounds=2", "--steps=1", f"--json={path}"]
    argv += ["--contenders=ours,plain,m3ae_public", f"--m3ae_public={tmp_path / 'empty'}"]
    assert bench.main(argv) == 0
    ours, plain, other = records.read(path)
    assert other["note"].startswith("cannot be imported")
    for one in (ours, plain):
        assert one["note"] is None  # weights and loss have changed
        assert len(one["seconds"]) == 2
        assert one["loss"][0] != one["loss"][1]
        assert one["device"] == "cpu"
    assert "m3ae_public" in capsys.readouterr().out


@pytest.mark.oracle
def test_ours_is_compared_with_transformers(tmp_path):
    path = tmp_path / "figures.jsonl"
    argv = ["peers", "--size=toy", "--batch_size=2", "--rounds=1", "--steps=1", f"--json={path}"]
    assert bench.main([*argv, "--contenders=ours,eager,sdpa"]) == 0
    ours, eager, sdpa = records.read(path)
    assert {ours["peer"]} <= {"eager", "sdpa"}
    assert 1 in (eager["time_over_peer"], sdpa["time_over_peer"])
    assert ours["note"] is eager["note"] is sdpa["note"] is None
    assert "torch" in eager
    assert "jax" not in eager


def test_the_loop_takes_its_steps_and_logs_them(tmp_path, capsys, monkeypatch):
    path, logged = tmp_path / "figures.jsonl", []
    monkeypatch.setattr(
        RunWriter, "scalars", lambda writer, step, values: logged.append((step, *values))
    )
    assert bench.main(["loop", "--leaves=3", "--steps=40", "--rounds=2", f"--json={path}"]) == 0
    (row,) = records.read(path)
    assert (row["leaves"], row["rounds"]) == (3, 2)  # a third one warmed up
    assert [step for step, *_ in logged] == [1, 20, 40, 41, 60, 80, 81, 100, 120]
    assert all("train/loss" in names for _, *names in logged)
    assert 0 < row["least"] <= row["steps_per_second"]
    assert "| 3 |" in capsys.readouterr().out
