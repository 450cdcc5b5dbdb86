"""Configuration of the device mesh."""

import dataclasses

from easy_jax.io.checks import require


@dataclasses.dataclass(frozen=True, slots=True)
class MeshConfig:
    """Axis sizes of the device mesh; one of them may be -1, for all remaining devices.

    Attributes:
      data: number of device groups (replicas of the parameters) over which the batch is split.
      fsdp: number of devices over which the parameters, and a group's part of the batch, are split.
      tensor: number of devices over which heads, features and vocabulary are split.

    Example:
      >>> MeshConfig(data=-1, fsdp=4).tensor
      1
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def validate(self, path: str = "mesh") -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"{path}.{name}", size, "-1 or positive")
        free = [name for name, size in sizes.items() if size == -1]
        require(len(free) <= 1, path, sizes, "at most one axis of size -1")
