"""Device meshes with axes `(data, fsdp, tensor)`; sharding of states (`RULES`) and batches."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from easy_jax.io.checks import ConfigError
from easy_jax.parallel.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes over which the rows of a batch are split

Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis of a parameter -> mesh axis or axes. An axis that is not listed is an error, so that
# a misspelled axis cannot silently replicate the parameters of a new model.
RULES: Rules = {
    "conv_height": None,
    "conv_width": None,
    "conv_in": None,
    "conv_out": ("fsdp", "tensor"),
    "features": ("fsdp", "tensor"),
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


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the device mesh with axes `data`, `fsdp` and `tensor`.

    Args:
      config: axis sizes, one of which may be -1. Default: all devices on `data`.
      devices: the devices to use. Default: all devices of all processes. With several TPU slices,
        the slices form the outermost part of `data`.

    Raises:
      ConfigError: the product of the sizes is not the number of devices, or `data` is not a
        multiple of the number of slices.

    Example:
      >>> make_mesh().axis_names
      ('data', 'fsdp', 'tensor')
    """
    config = config if config is not None else MeshConfig()
    config.validate()
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if math.prod(sizes) != count:
        raise ConfigError(
            f"mesh sizes {dict(zip(AXES, sizes, strict=True))} do not multiply to the "
            f"{count} available devices; set one axis to -1"
        )
    auto = (jax.sharding.AxisType.Auto,) * 3
    return Mesh(arrange(sizes, devices), AXES, axis_types=auto)


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges devices in the shape of a mesh; mesh neighbours are physically adjacent if possible.

    Physical axes of a TPU torus are split if the sizes require it. With several TPU slices, only
    `data` extends over more than one.

    Raises:
      ConfigError: see `hybrid_shape`.
    """
    on_tpu = devices[0].platform == "tpu"  # devices described ahead of time may have no slice_index
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices < 2:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within, between = hybrid_shape(sizes, slices)
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


def hybrid_shape(sizes: Sequence[int], slices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Splits axis sizes into those within and across TPU slices; only `data` extends across.

    Raises:
      ConfigError: the size of `data` is not a multiple of the number of slices.
    """
    data, fsdp, tensor = sizes
    if data % slices:
        raise ConfigError(
            f"mesh.data is {data}; it must be a multiple of the {slices} slices, because only "
            "gradients should be sent between slices"
        )
    return (data // slices, fsdp, tensor), (slices, 1, 1)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def num_shares(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of shares into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def splits_parameters(mesh: Mesh | AbstractMesh) -> bool:
    """Returns whether parameters are split over several devices."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def check_batch_size(batch_size: int, mesh: Mesh, field: str = "batch_size") -> None:
    """Raises ConfigError if the rows of a global batch do not divide evenly over the mesh."""
    shares = num_shares(mesh)
    if batch_size % shares:
        raise ConfigError(
            f"{field} is {batch_size}; it must be a multiple of the {shares} devices "
            f"on the mesh axes data and fsdp"
        )


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns the sorted indices of the global batch's rows that this process's devices need.

    They need not be contiguous, because the mesh follows the physical topology. They need not be
    exclusive either: processes along `tensor` need the same rows.

    Raises:
      ConfigError: the batch size does not divide evenly over the mesh.
    """
    check_batch_size(batch_size, mesh)
    shares, size = _shares(mesh), batch_size // num_shares(mesh)
    return (shares[:, None] * size + np.arange(size)[None, :]).reshape(-1)


def owned_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns a bool mask of `process_rows`, so that exactly one process reports each row."""
    owned = _holders(mesh).min(axis=1)[_shares(mesh)] == jax.process_index()
    return np.repeat(owned, batch_size // num_shares(mesh))


@functools.lru_cache(maxsize=32)  # called for every batch, and a pod has thousands of devices
def _holders(mesh: Mesh) -> np.ndarray:
    """Returns the process id of every device, [shares of a batch, devices with the same share]."""
    process = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return process.reshape(num_shares(mesh), -1)


def _shares(mesh: Mesh) -> np.ndarray:
    """Returns the indices of the shares of a batch that this process's devices hold."""
    return np.flatnonzero((_holders(mesh) == jax.process_index()).any(axis=1))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows of a global batch (`process_rows`) on its devices.

    Args:
      batch: arrays by field name, [rows of this process, ...].
      mesh: a mesh made by `make_mesh`.

    Returns:
      Global arrays by field name, [rows of the global batch, ...], split over `data` and `fsdp`.

    Raises:
      ValueError: the rows do not divide evenly into this process's shares.

    Example:
      >>> mesh = make_mesh()
      >>> shard_batch({"x": np.zeros((8, 3))}, mesh)["x"].shape
      (8, 3)
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)  # all fields in one call
    shares = _shares(mesh)
    devices = mesh.devices.reshape(num_shares(mesh), -1)
    placed: dict[str, jax.Array] = {}
    for name, array in batch.items():
        if len(array) % len(shares):
            raise ValueError(f"{name}: {len(array)} rows do not divide into {len(shares)} shares")
        size = len(array) // len(shares)
        parts = [
            jax.device_put(rows, device)
            for rows, share in zip(np.split(array, len(shares)), shares, strict=True)
            for device in devices[share]
            if device.process_index == jax.process_index()
        ]
        shape = (size * len(devices), *array.shape[1:])
        placed[name] = jax.make_array_from_single_device_arrays(shape, sharding, parts)
    return placed


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns the shardings of a tree of NNX variables and plain arrays.

    Args:
      tree: arrays or `ShapeDtypeStruct`s. Variables with `logical_axes` metadata follow the rules;
        everything else is replicated. Optimizer states keep the metadata of the parameters that
        they were made from, so moments are sharded like their parameters.
      mesh: the mesh.
      rules: logical axis -> mesh axis, tuple of mesh axes, or None for no split.

    Returns:
      A tree of the same structure with a `NamedSharding` at each leaf.

    Raises:
      ValueError: a logical axis is unknown, or its size does not divide evenly over the mesh.
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
            axes_used = (mesh_axis,) if isinstance(mesh_axis, str) else mesh_axis or ()
            shares = math.prod(mesh.shape[axis] for axis in axes_used)
            if size % shares:
                raise ValueError(
                    f"{name}: axis {logical!r} of size {size} does not divide over the "
                    f"{shares} devices of mesh axis {mesh_axis!r}"
                )
        return leaf.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def shard_tree(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree to the devices in the layout of `tree_shardings`.

    Every process must pass the same values, or arrays that are already on the mesh.
    """
    shardings = tree_shardings(tree, mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_place, tree, shardings)


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _place(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def jit_init(make: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Jits a function that makes a tree, so that every leaf is created in its shards on the mesh.

    The arguments of the returned function must be on the mesh or equal in all processes.
    """

    def init(*args: Any) -> Any:
        tree = make(*args)
        return jax.lax.with_sharding_constraint(tree, tree_shardings(tree, mesh))

    jitted = jax.jit(init)
    if jax.process_count() == 1:
        return jitted
    return lambda *args: jitted(*shard_tree(args, mesh))


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
    """Returns the compiler options of `jax.jit` for a mesh; None for XLA's defaults.

    On CPUs, the options make Eigen compute convolutions, because XLA's default library uses only
    one core for convolutions with few features.
    """
    if mesh is None or mesh.devices.flat[0].platform != "cpu":
        return None
    return _eigen_convolutions()


# The default without INDIVIDUAL_CONVOLUTION.
_EIGEN_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}


@functools.cache
def _eigen_convolutions() -> dict[str, str] | None:
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0, compiler_options=_EIGEN_CONVOLUTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:  # the flag is experimental and may disappear
        return None
    return _EIGEN_CONVOLUTIONS


def tracing_on(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Context manager for use in a jitted function, in which `current_mesh` returns the mesh."""
    if mesh is None:
        return contextlib.nullcontext()
    context: Any = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return context


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh for which a computation is traced; None if unknown or if its axes differ."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES else None


def is_tpu(mesh: AbstractMesh | None) -> bool:
    """Returns whether a mesh consists of TPUs."""
    device = mesh.abstract_device if mesh is not None else None
    return device is not None and device.platform == "tpu"


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Constrains an array to mesh axes, one entry per dimension; does nothing without a mesh."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gather_parameter(value: jax.Array, logical_axes: tuple[str, ...]) -> jax.Array:
    """Gathers a parameter along `fsdp`, as computations use it; it stays split along `tensor`.

    The gradient is sharded like the parameter. Cast the parameter before the call: its dtype is the
    one in which the parameter and the gradient are communicated. Does nothing without a mesh.
    """
    mesh = current_mesh()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return value
    stored = tuple(RULES[axis] for axis in logical_axes)
    return _gather(value, stored, tuple(None if axis == "fsdp" else axis for axis in stored))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(value: jax.Array, stored: tuple[Any, ...], used: tuple[Any, ...]) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, PartitionSpec(*used))


def _gather_forward(
    value: jax.Array, stored: tuple[Any, ...], used: tuple[Any, ...]
) -> tuple[jax.Array, None]:
    return _gather(value, stored, used), None


def _gather_backward(
    stored: tuple[Any, ...], used: tuple[Any, ...], residuals: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    del residuals
    # Sum over the devices first, then take the shard. With the second constraint alone, XLA would
    # compute the gradient in one small product per device, with communication in between.
    cotangent = jax.lax.with_sharding_constraint(cotangent, PartitionSpec(*used))
    return (jax.lax.with_sharding_constraint(cotangent, PartitionSpec(*stored)),)


_gather.defvjp(_gather_forward, _gather_backward)


def local_rows(array: jax.Array) -> np.ndarray:
    """Copies this process's rows of an array that is split over its leading axis to the host."""
    if array.is_fully_addressable:
        return jax.device_get(array)
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([jax.device_get(rows[start]) for start in sorted(rows)])


def whole(array: jax.Array) -> np.ndarray:
    """Copies an entire array to the host of every process; all processes must call it."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        assert isinstance(array.sharding, NamedSharding)
        array = jax.device_put(array, replicated(array.sharding.mesh))
    return np.asarray(jax.device_get(array))
