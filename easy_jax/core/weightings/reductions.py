"""Reductions over the target entries of `TokenStats`; they can be used under `jax.jit`."""

import jax
import jax.numpy as jnp

from easy_jax.kernels.token_stats import TokenStats


def mask(stats: TokenStats) -> jax.Array:
    """Returns which entries are targets, bool in the shape of `stats.nll`."""
    return jnp.ones(stats.nll.shape, bool) if stats.mask is None else stats.mask


def mean(value: jax.Array, where: jax.Array) -> jax.Array:
    """Returns the mean of the entries where `where` is True; 0 if there are none."""
    total = jnp.sum(jnp.where(where, value, 0.0))
    return total / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)


def quantile(value: jax.Array, where: jax.Array, share: float) -> jax.Array:
    """Returns a quantile, as `numpy.quantile`, of entries where `where` is True; 0 without any.

    Example:
      >>> value = jnp.array([1.0, 9.0, 3.0])
      >>> float(quantile(value, jnp.array([True, False, True]), 0.5))
      2.0
    """
    ordered = jnp.sort(jnp.where(where, value, jnp.inf).reshape(-1))
    count = jnp.sum(where)
    place = share * jnp.maximum(count - 1, 0).astype(jnp.float32)
    lower = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[lower], ordered[jnp.minimum(lower + 1, jnp.maximum(count - 1, 0))]
    part = place - lower
    found = jnp.where(part > 0, low + part * (high - low), low)  # not 0 * inf
    return jnp.where(count > 0, found, 0.0)


def median(value: jax.Array, where: jax.Array) -> jax.Array:
    """Returns the median of the entries where `where` is True; 0 if there are none."""
    return quantile(value, where, 0.5)


def example_means(value: jax.Array, stats: TokenStats) -> tuple[jax.Array, jax.Array]:
    """Returns the mean over each example's target tokens, and which examples have target tokens.

    In `[rows, tokens]` without `segment_ids`, each row is an example; in `[N]`, each entry.

    Returns:
      `(mean, is_there)` of one shape: `[rows, segments]`, or `[N]`.

    Example:
      >>> stats = TokenStats(jnp.array([[1.0, 3.0, 5.0]]), segment_ids=jnp.array([[1, 1, 2]]))
      >>> mean, is_there = example_means(stats.nll, stats)
      >>> mean[is_there].tolist()
      [2.0, 5.0]
    """
    where = mask(stats)
    if value.ndim < 2:
        return value, where
    if stats.segment_ids is None:
        total = jnp.sum(jnp.where(where, value, 0.0), axis=1)
        count = jnp.sum(where, axis=1)
    else:
        total, count = (_by_segment(x, stats.segment_ids) for x in (value * where, where))
    return total / jnp.maximum(count, 1), count > 0


def _by_segment(value_RT: jax.Array, segment_RT: jax.Array) -> jax.Array:
    """Sums over the tokens of segments 0 (the padding), 1, 2, ...: [rows, tokens + 1]."""
    rows, length = value_RT.shape
    zero = jnp.zeros((rows, length + 1), jnp.float32)
    row_RT = jnp.broadcast_to(jnp.arange(rows)[:, None], value_RT.shape)
    return zero.at[row_RT, segment_RT].add(value_RT.astype(jnp.float32))
