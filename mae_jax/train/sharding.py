"""Where arrays live: the mesh, and one rule for the batch and one for the state."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax.errors import ConfigError

AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a run: batches are split over both axes, parameters over `fsdp`.

    Args:
      data: copies of the parameters; -1: whatever the devices leave.
      fsdp: devices over which one copy is spread.
      devices: all of the job, unless given.

    Raises:
      ConfigError: if the product is not the number of devices.
    """
    if devices is None:
        # By process, for process p has the p-th part of the rows; TPUs number chips otherwise.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if fsdp < 1 or (data != -1 and data < 1):
        raise ConfigError(
            f"run.mesh data {data}, fsdp {fsdp}: expected positive sizes (data -1: all)"
        )
    if data == -1:
        data = len(devices) // fsdp
    if data * fsdp != len(devices):
        raise ConfigError(
            f"run.mesh data {data} x fsdp {fsdp} does not use the {len(devices)} devices there are"
        )
    return Mesh(
        np.asarray(devices).reshape(data, fsdp), AXES, axis_types=(AxisType.Auto, AxisType.Auto)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of every array of a batch: its first axis over all devices."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds in full."""
    return NamedSharding(mesh, P())


def leaf_spec(shape: Sequence[int], fsdp: int) -> P:
    """Return the split of one array: its largest axis that `fsdp` divides; vectors stay whole."""
    if fsdp == 1 or len(shape) < 2:
        return P()
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not divisible:
        return P()
    largest = max(divisible, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == largest else None for axis in range(len(shape))))


def state_sharding(shapes: Any, mesh: Mesh) -> Any:
    """Return the shardings of a tree of shapes (a train state, or parameters alone)."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: NamedSharding(mesh, leaf_spec(x.shape, fsdp)), shapes)


def shardings_of(target: Any) -> Any:
    """Return the shardings of a tree of arrays, or of `jax.ShapeDtypeStruct` that have them."""
    return jax.tree.map(lambda leaf: leaf.sharding, target)


def whole(params: Any, shardings: Any) -> Any:
    """Return parameters that each device has in full, and whose gradients are spread like them.

    For XLA spreads what is computed as it finds its operands spread. Where a matrix is cut along
    its outputs it may go on with a part of the width of all rows of the batch, and exchange
    activations in every layer, in place of parameters.

    Args:
      params: a tree.
      shardings: where its leaves are.
    """
    return jax.tree.map(_whole, params, shardings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(x: jax.Array, where: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(where.mesh, P()))


def _whole_forward(x: jax.Array, where: NamedSharding) -> tuple[jax.Array, None]:
    return _whole(x, where), None


def _whole_backward(where: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, where),)


_whole.defvjp(_whole_forward, _whole_backward)


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Make global arrays of this process's rows; the copy to the devices runs asynchronously."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def put_tree(tree: Any, shardings: Any) -> Any:
    """Make global arrays of a tree that every process has in full, on the host or a device."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def bytes_per_device(target: Any) -> int:
    """Return what a tree of `jax.ShapeDtypeStruct` with shardings takes on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(target)
    )


def check_memory(needed: int, device: jax.Device) -> None:
    """Refuse a state that cannot fit a device, where the device says how much it has.

    Args:
      needed: bytes of the state on each device.
      device: one of them, of this process.

    Raises:
      ConfigError: if it has less.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None and needed > limit:
        raise ConfigError(
            f"run.mesh.fsdp: expected a state that fits the {limit / 2**30:.3f} GiB of a"
            f" {device.device_kind}, got {needed / 2**30:.3f} GiB per device of parameters and"
            " optimiser state: spread it over more devices, or take a smaller model"
        )
