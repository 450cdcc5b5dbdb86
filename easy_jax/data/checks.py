"""Checks of the records and weights that a loader reads; errors name the examples' ids."""

import warnings
from collections.abc import Mapping

import jax
import numpy as np

from easy_jax.data.sources import DataError, DataWarning, Record, check_mapping, check_numbers

_RESERVED = ("example_id", "mask")


def checked_weights(weight_N: np.ndarray, size: int) -> np.ndarray:
    """Returns the weights in float32; a NaN, which marks an example to leave out, stays NaN."""
    try:
        given_N = np.asarray(weight_N, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"weights must be numbers, one an example: {error}") from error
    if given_N.shape != (size,):
        raise DataError(f"{given_N.shape} weights for {size} examples")
    with np.errstate(over="ignore", under="ignore"):
        weight_N = given_N.astype(np.float32)
    bad = np.flatnonzero(np.isinf(weight_N) | (given_N < 0))
    if bad.size:
        raise DataError(
            f"weights are negative or infinite for {bad.size} examples, ids {bad[:10].tolist()}"
        )
    tiny = np.finfo(np.float32).tiny
    lost = np.flatnonzero((weight_N < tiny) & (given_N > 0))
    if lost.size:
        warnings.warn(
            f"{lost.size} weights are positive and below {tiny:.1e}, which devices take for 0: "
            f"nothing is learnt from example ids {lost[:10].tolist()}"
            f"{' ...' if lost.size > 10 else ''}",
            DataWarning,
            stacklevel=3,
        )
    return np.where(weight_N < tiny, np.float32(0), weight_N)


def check_batch(batch: Mapping[str, np.ndarray], positions: list[int]) -> None:
    """Raises DataError unless all fields hold finite numbers that fit into the devices' types."""
    clash = [name for name in _RESERVED if name in batch]
    if clash:
        raise DataError(f"records have fields {clash}, which the loader makes itself; rename them")
    for name, array in batch.items():
        check_numbers(name, array, positions[0])
        _raise_if_too_large(name, array, positions)
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            finite = np.isfinite(array).reshape(len(positions), -1).all(axis=1)
            bad = sorted({positions[row] for row in np.flatnonzero(~finite)})
            raise DataError(f"field {name!r} has NaN or infinite values in example ids {bad}")


def _raise_if_too_large(name: str, array: np.ndarray, positions: list[int]) -> None:
    """Raises DataError for numbers that would overflow when 64 bits become 32 on the devices."""
    target = jax.dtypes.canonicalize_dtype(array.dtype)
    if target == array.dtype or target.kind not in "iuf":
        return
    limits = np.finfo(target) if target.kind == "f" else np.iinfo(target)
    outside = (array < limits.min) | (array > limits.max)
    if outside.any():
        rows = np.flatnonzero(outside.reshape(len(positions), -1).any(axis=1))
        raise DataError(
            f"field {name!r} has values that do not fit into {target} in example ids "
            f"{sorted({positions[row] for row in rows})}"
        )


def stack(records: list[Record], positions: list[int]) -> dict[str, np.ndarray]:
    """Stacks the records, one array per field; raises DataError if their fields differ, by id."""
    for record, position in zip(records, positions, strict=True):
        check_mapping(record, position)
    names = records[0].keys()
    batch = {}
    for name in names:
        values: list[np.ndarray] = []
        for record, position in zip(records, positions, strict=True):
            if record.keys() != names:
                raise DataError(
                    f"example {position} has fields {sorted(record)}, example {positions[0]} "
                    f"{sorted(names)}"
                )
            value = np.asarray(record[name])
            if values and value.shape != values[0].shape:
                raise DataError(
                    f"field {name!r} of example {position} has shape {value.shape}, that of "
                    f"example {positions[0]} {values[0].shape}"
                )
            values.append(value)
        batch[name] = np.stack(values)
    return batch


def check_own_weight(weight_b: np.ndarray, positions: list[int]) -> np.ndarray:
    """Returns a batch's field `weight`; raises DataError, by id, unless all are numbers >= 0."""
    if weight_b.ndim != 1 or weight_b.dtype.kind not in "biuf":
        raise DataError(
            f"field 'weight' must be a number per example; in example {positions[0]} it has shape "
            f"{weight_b.shape[1:]} and dtype {weight_b.dtype}"
        )
    if (weight_b < 0).any():
        bad = sorted({positions[row] for row in np.flatnonzero(weight_b < 0)})
        raise DataError(f"field 'weight' is negative in example ids {bad}")
    return weight_b
