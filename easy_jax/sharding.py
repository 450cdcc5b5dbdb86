"""One mesh, `(data, fsdp, tensor)`: logical-axis rules, and placing states and batches."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easy_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis. Axes not listed are an error, so that a new
# model cannot be replicated by a spelling mistake.
RULES: Mapping[str, str | None] = {
    "conv_height": None,
    "conv_width": None,
    "conv_in": None,
    "conv_out": "fsdp",
    "features": "fsdp",
    "classes": None,
    "norm": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "rank": None,
}


def make_mesh(config: MeshConfig | None = None) -> Mesh:
    """The device mesh with axes `data`, `fsdp` and `tensor`.

    Args:
      config: axis sizes, one of which may be -1. Default: all devices on `data`.

    Returns:
      A mesh over all devices of all processes.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.

    Example:
      >>> make_mesh().axis_names
      ('data', 'fsdp', 'tensor')
    """
    config = config if config is not None else MeshConfig()
    config.validate()
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count()
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if math.prod(sizes) != count:
        raise ConfigError(
            f"mesh sizes {dict(zip(AXES, sizes, strict=True))} do not multiply to the "
            f"{count} devices there are; set one axis to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(batch_size: int, mesh: Mesh, field: str = "batch_size") -> None:
    """Raises ConfigError if a global batch does not divide over the mesh and its processes."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise ConfigError(
            f"{field} is {batch_size}; it must be a multiple of the {shards} devices "
            f"on the mesh axes data and fsdp"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows of a global batch on its devices; nothing is gathered."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)  # all fields in one call
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def tree_shardings(tree: Any, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """Shardings for a tree of NNX variables (parameters, optimiser moments) and plain arrays.

    Args:
      tree: arrays or `ShapeDtypeStruct`s; variables with `logical_axes` metadata follow
        the rules, everything else is replicated. Optimiser states made from variables
        keep the metadata, so their moments are sharded like their parameters.
      mesh: the mesh.
      rules: logical axis -> mesh axis or None.

    Returns:
      A tree of the same structure with a `NamedSharding` at each leaf.

    Raises:
      ValueError: an unknown logical axis, or a dimension that does not divide.
    """

    def one(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return replicated(mesh)
        axes = leaf.get_metadata().get("logical_axes")
        if axes is None:
            return leaf.replace(replicated(mesh))
        name = jax.tree_util.keystr(path)
        unknown = [axis for axis in axes if axis not in rules]
        if unknown:
            raise ValueError(f"{name}: no sharding rule for the logical axes {unknown}")
        spec = tuple(rules[axis] for axis in axes)
        for size, logical, mesh_axis in zip(leaf.get_value().shape, axes, spec, strict=True):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise ValueError(
                    f"{name}: axis {logical!r} of size {size} does not divide over the "
                    f"{mesh.shape[mesh_axis]} devices of mesh axis {mesh_axis!r}"
                )
        return leaf.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def shard_tree(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree to the devices in the layout of `tree_shardings`."""
    return jax.device_put(tree, tree_shardings(tree, mesh))


def jit_init(make: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Jits a function that makes a tree, every leaf born in its shards on the mesh."""

    def init(*args: Any) -> Any:
        tree = make(*args)
        return jax.lax.with_sharding_constraint(tree, tree_shardings(tree, mesh))

    return jax.jit(init)


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array split over its leading axis, in order, on the host."""
    if array.is_fully_addressable:
        return jax.device_get(array)
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([jax.device_get(rows[start]) for start in sorted(rows)])
