"""One mesh, `(data, fsdp, tensor)`: logical-axis rules, and placing states and batches."""

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
BATCH = ("data", "fsdp")  # what the rows of a batch are split over

Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis of a parameter -> mesh axis, or axes. Axes not listed are an error, so that a new
# model cannot be replicated by a spelling mistake.
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
    """The device mesh with axes `data`, `fsdp` and `tensor`.

    Args:
      config: axis sizes, one of which may be -1. Default: all devices on `data`.
      devices: default: all devices of all processes. Of several TPU slices, the outermost
        part of `data` is the slices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.

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
            f"{count} devices there are; set one axis to -1"
        )
    auto = (jax.sharding.AxisType.Auto,) * 3
    return Mesh(arrange(sizes, devices), AXES, axis_types=auto)


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the shape of a mesh, neighbours on the wires where that can be.

    An axis of the torus is split where the sizes ask for it. Of several TPU slices, only `data`
    goes over from one to the next.

    Raises:
      ConfigError: as in `hybrid_shape`.
    """
    on_tpu = devices[0].platform == "tpu"  # described ones (ahead of time) may have no slice
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices < 2:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within, between = hybrid_shape(sizes, slices)
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


def hybrid_shape(sizes: Sequence[int], slices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axis sizes within a slice and over slices: only `data` crosses the slower network.

    Raises:
      ConfigError: the data axis does not divide over the slices.
    """
    data, fsdp, tensor = sizes
    if data % slices:
        raise ConfigError(
            f"mesh.data is {data}; it must be a multiple of the {slices} slices, between which "
            "only gradients should travel"
        )
    return (data // slices, fsdp, tensor), (slices, 1, 1)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def num_shares(mesh: Mesh | AbstractMesh) -> int:
    """How many shares a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def splits_parameters(mesh: Mesh | AbstractMesh) -> bool:
    """Whether parameters lie on several devices, a part on each."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def check_batch_size(batch_size: int, mesh: Mesh, field: str = "batch_size") -> None:
    """Raises ConfigError if a global batch does not divide over the mesh and its processes."""
    shares = num_shares(mesh)
    if batch_size % shares:
        raise ConfigError(
            f"{field} is {batch_size}; it must be a multiple of the {shares} devices "
            f"on the mesh axes data and fsdp"
        )


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process's devices need, in order.

    Not always a block of their own: a mesh follows the wires between the devices, and
    processes along `tensor` need the same rows.

    Raises:
      ConfigError: a batch size that does not divide over the mesh.
    """
    check_batch_size(batch_size, mesh)
    shares, size = _shares(mesh), batch_size // num_shares(mesh)
    return (shares[:, None] * size + np.arange(size)[None, :]).reshape(-1)


def owned_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Of `process_rows`, bool: those that this process reports, so that one does for each row."""
    owned = _holders(mesh).min(axis=1)[_shares(mesh)] == jax.process_index()
    return np.repeat(owned, batch_size // num_shares(mesh))


@functools.lru_cache(maxsize=32)  # asked for every batch; a pod has thousands of devices
def _holders(mesh: Mesh) -> np.ndarray:
    """The process of every device, [shares of a batch, devices with the same share]."""
    process = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return process.reshape(num_shares(mesh), -1)


def _shares(mesh: Mesh) -> np.ndarray:
    """The shares of a batch that this process's devices hold."""
    return np.flatnonzero((_holders(mesh) == jax.process_index()).any(axis=1))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows of a global batch (`process_rows`) on its devices.

    Raises:
      ValueError: a number of rows that does not divide over this process's shares.

    Args:
      batch: arrays by field, each with this process's rows of the global batch in front.
      mesh: as `make_mesh` makes it.

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
    """Shardings for a tree of NNX variables (parameters, optimiser moments) and plain arrays.

    Args:
      tree: arrays or `ShapeDtypeStruct`s; variables with `logical_axes` metadata follow
        the rules, everything else is replicated. Optimiser states made from variables
        keep the metadata, so their moments are sharded like their parameters.
      mesh: the mesh.
      rules: logical axis -> mesh axis, several, or None.

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

    Every process gives the same values, or arrays that are on the mesh already.
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
    """Jits a function that makes a tree, every leaf born in its shards on the mesh.

    Its arguments may be on the mesh, or the same in every process.
    """

    def init(*args: Any) -> Any:
        tree = make(*args)
        return jax.lax.with_sharding_constraint(tree, tree_shardings(tree, mesh))

    jitted = jax.jit(init)
    if jax.process_count() == 1:
        return jitted
    return lambda *args: jitted(*shard_tree(args, mesh))


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
    """What a computation on the mesh is compiled with, for `jax.jit`; None for XLA's defaults.

    On CPUs, Eigen computes convolutions: XLA's default library computes those with few features on
    one core.
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
    except jax.errors.JaxRuntimeError:  # it is experimental: a later version may not have it
        return None
    return _EIGEN_CONVOLUTIONS


def tracing_on(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Inside a jitted function: what is traced knows the mesh (`current_mesh`), and its chip."""
    if mesh is None:
        return contextlib.nullcontext()
    context: Any = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return context


def current_mesh() -> AbstractMesh | None:
    """The mesh that a computation is traced for, None where it is not known or not ours."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES else None


def is_tpu(mesh: AbstractMesh | None) -> bool:
    """Whether a mesh is one of TPUs."""
    device = mesh.abstract_device if mesh is not None else None
    return device is not None and device.platform == "tpu"


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Pins an array to mesh axes, one entry per dimension; nothing without a mesh."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gather_parameter(value: jax.Array, logical_axes: tuple[str, ...]) -> jax.Array:
    """A parameter as it is used: whole along `fsdp`, still split along `tensor`.

    Its gradient is summed straight into the parameter's shards. Cast before: what travels is
    the argument's dtype, both ways. Nothing without a mesh.
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
    # Summed first, cut then: asked for the shard alone, XLA would compute the gradient in as many
    # small products as there are devices, between which it travels.
    cotangent = jax.lax.with_sharding_constraint(cotangent, PartitionSpec(*used))
    return (jax.lax.with_sharding_constraint(cotangent, PartitionSpec(*stored)),)


_gather.defvjp(_gather_forward, _gather_backward)


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array split over its leading axis, in order, on the host."""
    if array.is_fully_addressable:
        return jax.device_get(array)
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([jax.device_get(rows[start]) for start in sorted(rows)])


def whole(array: jax.Array) -> np.ndarray:
    """An array on the host of every process, wherever its shards are."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        assert isinstance(array.sharding, NamedSharding)
        array = jax.device_put(array, replicated(array.sharding.mesh))
    return np.asarray(jax.device_get(array))
