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


def check(
    ragged: Ragged, targets_N: np.ndarray, may_lack_N: np.ndarray, what: str = "token weights"
) -> None:
    """Checks that every target token has a value that is finite and at least 0.

    Args:
      ragged: the values of all examples.
      targets_N: the number of target tokens of every example.
      may_lack_N: bool, the examples whose number of values does not matter, such as dropped ones.
      what: what the message calls the values.

    Raises:
      DataError: gives the ids of the examples.
    """
    if len(ragged) != len(targets_N):
        raise DataError(f"{what} for {len(ragged)} of {len(targets_N)} examples")
    wrong = np.flatnonzero((np.diff(ragged.offsets) != targets_N) & ~may_lack_N)
    if wrong.size:
        raise DataError(
            f"the number of {what} differs from that of target tokens in {wrong.size} "
            f"examples, ids {wrong[:10].tolist()}"
        )
    bad = ~np.isfinite(ragged.values) | (ragged.values < 0)
    if bad.any():
        ids = np.searchsorted(ragged.offsets, np.flatnonzero(bad), side="right") - 1
        raise DataError(
            f"{what} are negative or not finite in example ids {np.unique(ids)[:10].tolist()}"
        )


def product(first: Ragged, second: Ragged) -> Ragged:
    """Returns the products of two vectors per example; none where either has none.

    Raises:
      DataError: another number of examples, or of values for an example that has some in both.

    Example:
      >>> first = Ragged(np.float32([1, 2, 3]), np.array([0, 1, 3]))
      >>> product(first, Ragged(np.float32([5, 5]), np.array([0, 0, 2]))).values.tolist()
      [10.0, 15.0]
    """
    if len(first) != len(second):
        raise DataError(f"token weights for {len(first)} examples, and for {len(second)}")
    lengths = np.diff(first.offsets), np.diff(second.offsets)
    both = (lengths[0] > 0) & (lengths[1] > 0)
    wrong = np.flatnonzero(both & (lengths[0] != lengths[1]))
    if wrong.size:
        raise DataError(
            "token weights of different lengths for the same examples, ids "
            f"{wrong[:10].tolist()}; give none for those that scoring dropped"
        )
    values = [
        each.values[np.repeat(both, length)]
        for each, length in zip((first, second), lengths, strict=True)
    ]
    return Ragged(values[0] * values[1], np.cumsum([0, *np.where(both, lengths[0], 0)]))
