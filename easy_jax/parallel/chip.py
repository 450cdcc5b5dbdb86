"""The kind of chip for which a computation is traced: that of its mesh, else the default device."""

from typing import Any

import jax

from easy_jax.parallel.sharding import current_mesh


def is_gpu() -> bool:
    """Returns whether the computation is traced for a GPU."""
    return getattr(_device(), "platform", None) == "gpu"


def is_nvidia() -> bool:
    """Returns whether the computation is traced for an NVIDIA GPU."""
    return is_gpu() and str(_device().device_kind).startswith("NVIDIA")


def _device() -> Any:
    mesh = current_mesh()
    if mesh is not None:
        return mesh.abstract_device
    device = getattr(jax.config, "jax_default_device", None)
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return jax.local_devices()[0] if device is None else device
