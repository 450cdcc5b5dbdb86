"""Configuration of the device mesh."""

import dataclasses

from easy_jax.io.checks import require


@dataclasses.dataclass(frozen=True, slots=True)
class MeshConfig:
    """Axis sizes of the device mesh; one of them may be -1, "all remaining devices".

    Attributes:
      data: devices, or groups of them, that each take a part of the batch.
      fsdp: devices that share the parameters of a group, and its part of the batch.
      tensor: devices that share heads, features and vocabulary.

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
