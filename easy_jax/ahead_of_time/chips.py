"""Published figures of TPU chips and slices, and what libtpu's compiler assumes about them.

Peak, HBM bandwidth and link bandwidth are the published figures. The clock is the one at which
the matrix units reach the peak; libtpu estimates times in its cycles. Usable HBM is the limit that
the compiler reports when a program does not fit ("Used ... of ... hbm").
"""

import dataclasses
import math
import re

from easy_jax.io.checks import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip.

    Attributes:
      peak_flops: peak bfloat16 operations per second.
      clock: cycles per second.
      hbm_bytes: bytes of HBM that a program may use.
      hbm_bandwidth: bytes per second to and from HBM.
      link_bandwidth: bytes per second of one interconnect link in one direction.
      dimensions: number of axes of the torus.
      wraps_at: number of chips along an axis from which on the axis is closed to a ring.
      accelerator: prefix of libtpu's `TPU_ACCELERATOR_TYPE`.
      cores: number of cores per chip that the name counts.
    """

    peak_flops: float
    clock: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    wraps_at: int
    accelerator: str
    cores: int = 1


CHIPS = {
    "v4": Chip(275e12, 1.05e9, 30.75 * GIB, 1228e9, 45e9, 3, 4, "v4", 2),
    "v5e": Chip(197e12, 1.5e9, 15.75 * GIB, 819e9, 45e9, 2, 16, "v5litepod"),
    "v5p": Chip(459e12, 1.75e9, 95.74 * GIB, 2765e9, 90e9, 3, 4, "v5p", 2),
    "v6e": Chip(918e12, 1.75e9, 31.25 * GIB, 1640e9, 90e9, 2, 16, "v6e"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, such as `v5e:4x4`: 16 chips in a square.

    Attributes:
      name: the slice's name, as in the example.
      chip: the properties of each of its chips.
      sizes: number of chips along each axis.
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.sizes)

    @property
    def accelerator_type(self) -> str:
        """Returns libtpu's name of the slice, such as `v5litepod-16`."""
        return f"{self.chip.accelerator}-{self.num_chips * self.chip.cores}"

    def bandwidth(self, group: int) -> float:
        """Returns the bytes per second that a chip sends in a collective over a group of chips.

        A group of all chips uses every axis of the torus; any smaller group is assumed to lie
        along a single axis. A ring is used in both directions, a line in one.
        """
        axes = self.sizes if group >= self.num_chips else self.sizes[:1]
        directions = [2 if size >= self.chip.wraps_at else 1 for size in axes if size > 1]
        return self.chip.link_bandwidth * max(1, sum(directions))


def parse_topology(name: str) -> Topology:
    """Parses the name of a topology, `CHIP:AxB` or `CHIP:AxBxC`.

    Raises:
      ConfigError: the text has another form, or the chip is unknown.

    Example:
      >>> parse_topology("v5e:4x4").num_chips
      16
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found.group(1) not in CHIPS:
        raise ConfigError(f"topology is {name!r}; it must be like v5e:4x4, of {sorted(CHIPS)}")
    chip = CHIPS[found.group(1)]
    sizes = tuple(int(size) for size in found.group(2).split("x"))
    if len(sizes) != chip.dimensions or 0 in sizes:
        raise ConfigError(
            f"topology is {name!r}; {found.group(1)} has {chip.dimensions} axes of chips"
        )
    return Topology(name, chip, sizes)
