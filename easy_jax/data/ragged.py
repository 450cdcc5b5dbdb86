"""Vectors of different lengths, one for each example, in one array."""

import dataclasses

import numpy as np

from easy_jax.data.sources import DataError


@dataclasses.dataclass(frozen=True)
class Ragged:
    """A float32 vector per example: `values[offsets[i]:offsets[i + 1]]` belongs to example i.

    Raises:
      DataError: offsets that do not go up from 0 to the number of values.

    Example:
      >>> Ragged(np.float32([1, 2, 3]), np.array([0, 1, 3]))[1].tolist()
      [2.0, 3.0]
    """

    values: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        offsets = np.asarray(self.offsets)
        ok = offsets.ndim == 1 and offsets.size > 0 and (np.diff(offsets) >= 0).all()
        if not ok or offsets[0] != 0 or offsets[-1] != len(self.values):
            raise DataError(f"offsets must go up from 0 to {len(self.values)}, the values given")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, position: int) -> np.ndarray:
        return self.values[self.offsets[position] : self.offsets[position + 1]]
