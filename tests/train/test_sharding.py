"""Where arrays live, and that no result depends on it."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mae_jax.errors import ConfigError
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.train import compiler, sharding
from mae_jax.train.checkpoint import abstract_state
from mae_jax.train.optimizer import adamw
from mae_jax.train.state import TrainState
from mae_jax.train.step import train_step
from mae_jax.types import Rng

BATCH_SIZE, STEPS, SEED, RATE = 32, 10, 4, 1e-3
LAYOUTS = [(8, 1, 1), (2, 4, 4), (1, 8, 1)]
"""Data, fsdp, accumulation."""
OPTIMIZER = adamw(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 2, (4, 2)), (2, 4, (2, 4)), (1, 8, (1, 8))]
)
def test_mesh_has_the_sizes_asked_for(data, fsdp, shape):
    mesh = sharding.make_mesh(data, fsdp)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == shape
    assert list(mesh.devices.flat) == jax.devices()
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_mesh_of_some_devices_uses_these_alone():
    some = jax.devices()[2:6]
    mesh = sharding.make_mesh(-1, 2, some)
    assert mesh.devices.tolist() == [some[:2], some[2:]]


@pytest.mark.parametrize(("data", "fsdp"), [(4, 1), (8, 2), (-1, 3), (-1, 16), (3, 3)])
def test_mesh_that_does_not_use_all_devices_is_refused(data, fsdp):
    with pytest.raises(ConfigError, match=rf"fsdp {fsdp} does not use the 8 devices there are"):
        sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize(("data", "fsdp"), [(0, 1), (-2, 1), (8, 0), (-1, -1)])
def test_size_that_is_not_positive_is_refused(data, fsdp):
    with pytest.raises(ConfigError, match=rf"run.mesh data {data}, fsdp {fsdp}: expected positive"):
        sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((16, 48), 8, P(None, "fsdp")),
        ((64, 16), 8, P("fsdp", None)),
        ((16, 16), 8, P("fsdp", None)),  # the first of equals
        ((16, 49), 8, P("fsdp", None)),  # the largest axis that can be divided
        ((1, 1, 24), 8, P(None, None, "fsdp")),
        ((3, 5), 2, P()),
        ((4096,), 8, P()),
        ((), 8, P()),
        ((16, 48), 1, P()),
    ],
)
def test_largest_axis_that_can_be_divided_is_split_and_vectors_stay_whole(shape, fsdp, spec):
    assert sharding.leaf_spec(shape, fsdp) == spec


def test_batch_is_split_by_rows_over_all_devices_in_their_order():
    mesh = sharding.make_mesh(4, 2)
    host = {
        "image": np.arange(16 * 2 * 2).reshape(16, 2, 2),
        "label": np.arange(16, dtype=np.int32),
    }
    batch = sharding.put_batch(host, sharding.batch_sharding(mesh))
    for name, rows in host.items():
        np.testing.assert_array_equal(batch[name], rows)
        parts = {shard.device: np.asarray(shard.data) for shard in batch[name].addressable_shards}
        for number, device in enumerate(jax.devices()):
            np.testing.assert_array_equal(parts[device], rows[2 * number : 2 * number + 2])


def test_replicated_array_is_whole_on_every_device():
    x = jax.device_put(np.arange(6), sharding.replicated(sharding.make_mesh(4, 2)))
    assert [shard.data.shape for shard in x.addressable_shards] == [(6,)] * 8


class Run(NamedTuple):
    """What ten steps on a mesh gave."""

    state: TrainState
    losses: np.ndarray
    grad_norms: np.ndarray
    masks: np.ndarray


@dataclasses.dataclass(frozen=True)
class WatchedTask(PretrainTask):
    """Pre-training that reports a fingerprint of the masks it used, each with its row's label."""

    def loss(self, params: Any, extra: Any, batch: Any, rng: Rng) -> Any:
        loss, (metrics, extra) = super().loss(params, extra, batch, rng)
        plan = batch["plan"]
        order = jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1)
        # Below 2^24, so that float32 holds it exactly; also its quarters.
        weights = np.random.default_rng(0).integers(1, 256, (BATCH_SIZE, order.shape[1])) * 4
        seen = jnp.sum(order * jnp.asarray(weights)[batch["label"]])
        return loss, (metrics | {"masks": seen}, extra)


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    shape = (BATCH_SIZE, 32, 32, 3)
    label = np.arange(BATCH_SIZE, dtype=np.int32)
    return [
        {"image": rng.integers(0, 256, shape, dtype=np.uint8), "label": label} for _ in range(STEPS)
    ]


def fresh_state(task: PretrainTask) -> TrainState:
    batch = {"image": jnp.zeros((1, 32, 32, 3), jnp.uint8)}
    init = task.init(jax.random.key(SEED), batch)
    return TrainState.create(*init, OPTIMIZER, averaged=True)


def train_on(mesh: Mesh, task: PretrainTask, state: TrainState, accumulation: int = 1) -> Run:
    """Make a few steps from `state`, compiled as `mae_jax.run` compiles them."""
    shardings = sharding.state_sharding(state, mesh)
    by_row = sharding.batch_sharding(mesh)
    step = functools.partial(
        train_step,
        task=task,
        optimizer=OPTIMIZER,
        schedule=lambda step: RATE + 0.0 * step,
        seed=SEED,
        accumulation=accumulation,
        ema_decay=0.9,
    )
    placed = [sharding.put_batch(batch, by_row) for batch in batches()]
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row), placed[0]
    )
    compiled = compiler.lower_step(step, abstract_state(state, shardings), batch).compile()
    state = jax.device_put(jax.tree.map(np.asarray, state), shardings)
    rows = []
    for batch in placed:
        state, metrics = compiled(state, batch)
        rows.append(jax.device_get(metrics))
    losses, norms, masks = (
        np.array([row[name] for row in rows]) for name in ("loss", "grad_norm", "masks")
    )
    return Run(state, losses, norms, masks * accumulation)  # metrics are means over the parts


@pytest.fixture(scope="module")
def task(tiny_mae) -> WatchedTask:
    return WatchedTask(tiny_mae(depth=1), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))


@pytest.fixture(scope="module")
def start(task) -> TrainState:
    return jax.jit(functools.partial(fresh_state, task))()


@pytest.fixture(scope="module")
def one_device(task, start) -> Run:
    return train_on(sharding.make_mesh(1, 1, jax.devices()[:1]), task, start)


@pytest.fixture(
    scope="module",
    params=[
        sizes if 1 not in sizes[:2] else pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in LAYOUTS
    ],
    ids=lambda sizes: "data{}-fsdp{}-parts{}".format(*sizes),
)
def layout(request, task, start) -> tuple[Mesh, Run]:
    data, fsdp, accumulation = request.param
    mesh = sharding.make_mesh(data, fsdp)
    return mesh, train_on(mesh, task, start, accumulation)


def test_fresh_state_has_the_same_bits_on_any_layout(task, start):
    shardings = sharding.state_sharding(start, sharding.make_mesh(1, 8))
    spread = jax.jit(functools.partial(fresh_state, task), out_shardings=shardings)()
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_are_the_same_on_any_layout(one_device, layout):
    _, run = layout
    assert run.masks.tolist() == one_device.masks.tolist()
    assert len(set(run.masks)) == STEPS
    assert run.masks.max() < 2**24


def test_losses_and_gradient_norms_are_the_same_on_any_layout(one_device, layout):
    _, run = layout
    apart = np.abs(run.losses / one_device.losses - 1).max()
    print(f"losses of {STEPS} steps: at most {apart:.2g} apart")
    np.testing.assert_allclose(run.losses, one_device.losses, rtol=1e-5)
    np.testing.assert_allclose(run.grad_norms, one_device.grad_norms, rtol=1e-5)
    assert len(set(run.losses)) == STEPS


def test_parameters_after_training_are_the_same_on_any_layout(one_device, layout):
    _, run = layout
    # Adam's first steps are the sign of the gradient: where that is rounding alone (the key
    # biases), it may be either, so that a few values are up to the sum of the rates away.
    far = total = 0
    for a, b in zip(
        jax.tree.leaves(run.state.params), jax.tree.leaves(one_device.state.params), strict=True
    ):
        difference = np.abs(np.asarray(a) - np.asarray(b))
        assert difference.max() <= 2.1 * RATE * STEPS
        far += int((difference > 1e-5).sum())
        total += difference.size
    assert far < 0.02 * total


def test_state_stays_where_the_rule_puts_it(layout):
    mesh, run = layout
    fsdp = mesh.shape["fsdp"]
    for leaf in jax.tree.leaves(run.state):
        expected = sharding.leaf_spec(leaf.shape, fsdp)
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, expected), leaf.ndim)
        assert not isinstance(leaf.sharding, SingleDeviceSharding)
    assert int(run.state.step) == STEPS


def test_moments_live_where_their_parameters_do(task):
    shapes = jax.eval_shape(functools.partial(fresh_state, task))
    shardings = sharding.state_sharding(shapes, sharding.make_mesh(1, 8))
    adam = shardings.opt_state[0]
    assert adam.mu == adam.nu == shardings.ema == shardings.params
    assert shardings.step.spec == adam.count.spec == P()
    block = shardings.params["encoder"]["block_00"]
    assert block["attn"]["qkv"]["kernel"].spec == P(None, "fsdp")
    assert block["attn"]["qkv"]["bias"].spec == P()


def bytes_on(device: jax.Device, tree: Any) -> int:
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def test_fsdp_makes_the_state_of_a_device_smaller(one_device, layout):
    mesh, run = layout
    fsdp = mesh.shape["fsdp"]
    whole = bytes_on(jax.devices()[0], one_device.state)
    vectors = sum(x.nbytes for x in jax.tree.leaves(one_device.state) if x.ndim < 2)
    print(f"fsdp {fsdp}: {bytes_on(jax.devices()[0], run.state):,} bytes a device of {whole:,}")
    for device in mesh.devices.flat:
        # Every matrix of the tiny model can be divided by 8.
        assert bytes_on(device, run.state) == vectors + (whole - vectors) // fsdp
    assert vectors < 0.15 * whole


def test_tree_that_is_held_in_full_is_put_where_its_shardings_say():
    mesh = sharding.make_mesh(2, 4)
    tree = {"kernel": np.arange(32.0, dtype=np.float32).reshape(8, 4), "bias": jnp.arange(3)}
    where = sharding.state_sharding(tree, mesh)
    placed = sharding.put_tree(tree, where)
    for name, leaf in placed.items():
        assert leaf.sharding == where[name]
        assert leaf.dtype == tree[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), tree[name])
    assert placed["kernel"].addressable_shards[0].data.shape == (2, 4)


def test_state_that_does_not_fit_a_device_is_refused_where_its_size_is_known():
    def device(stats):
        return SimpleNamespace(memory_stats=lambda: stats, device_kind="toy")

    sharding.check_memory(2**40, device(None))  # a CPU does not say
    sharding.check_memory(2**30, device({"bytes_limit": 2**30}))
    with pytest.raises(ConfigError) as refusal:
        sharding.check_memory(3 * 2**30, device({"bytes_limit": 2**30}))
    assert str(refusal.value).startswith(
        "run.mesh.fsdp: expected a state that fits the 1.000 GiB of a toy, got 3.000 GiB per device"
    )


def test_devices_of_a_process_stand_together(monkeypatch):
    """As rows of a batch do; a TPU numbers its chips by where they are."""
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: devices[::-1])
    assert sharding.make_mesh(-1, 2).devices.ravel().tolist() == devices
