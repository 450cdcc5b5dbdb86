"""What the training step does to a batch: removes examples of weight 0, splits it into parts."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def without_removed(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Masks examples of weight 0 like padding, and replaces their content.

    A factor of 0 is not enough to remove an example: an infinite loss or gradient times 0 is NaN.
    Floats become 1 and integers 0, where logarithms and roots are finite. Rows of packed text hold
    several examples, so only their mask changes.
    """
    seen = batch["mask"] & (batch["weight"] != 0)
    cleaned = {**batch, "mask": seen}
    for name, array in batch.items():
        if seen.ndim == 1 and array.dtype != jnp.bool_ and name != "weight":
            fill = jnp.asarray(jnp.issubdtype(array.dtype, jnp.floating), array.dtype)
            cleaned[name] = jnp.where(seen.reshape(-1, *[1] * (array.ndim - 1)), array, fill)
    return cleaned


def split(batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """Reshapes [B, ...] to [parts, B / parts, ...] without moving examples between devices.

    Micro-batch m takes the examples m, m + parts, ...: the sharded leading axis stays the
    leading axis of the reshape, and each device holds a share of every micro-batch.
    """
    parts_of = {}
    for name, array in batch.items():
        if array.shape[0] % parts:
            raise ValueError(f"a batch of {array.shape[0]} does not divide into {parts}")
        shape = (array.shape[0] // parts, parts, *array.shape[1:])
        parts_of[name] = jnp.swapaxes(array.reshape(shape), 0, 1)
    return parts_of
