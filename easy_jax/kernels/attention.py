"""Causal attention within segments, computed by blocks of queries; rotary position embedding.

A block of queries is multiplied only with the keys up to its own end and, with a sliding window,
not with those before the window; with eight blocks these are 9/16 of all products. Probabilities
are not stored for the backward pass, which computes them again block by block.

Shape suffixes: B rows, T positions, N heads, K key-value heads, M query heads per key-value head,
H head_dim, Q queries in a block, S keys that a block is multiplied with.
"""

import functools

import chex
import jax
import jax.numpy as jnp

MIN_BLOCK = 128  # queries; smaller blocks do not fill the matrix units
MAX_BLOCKS = 8  # the blocks are unrolled: more would take longer to compile and save little


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    block: int | None = None,
) -> jax.Array:
    """Computes softmax attention to the position itself and the earlier ones of its segment.

    Logits and softmax are float32 for any input dtype; queries are scaled in their own dtype.

    Args:
      q_BTNH, k_BTKH, v_BTKH: queries, keys, values; N is a multiple of K, and head n reads
        the keys and values of head n // (N / K).
      segment_ids_BT: integers; segments are contiguous, so that the distance in the row is
        the distance in the segment.
      scale: factor of the logits.
      window: number of positions that a query attends to, including its own; None for all.
      cap: c of `c * tanh(logits / c)`, Gemma 2's soft cap; None for none.
      block: number of queries in a block; default: an eighth of the row, but at least 128.

    Returns:
      [B, T, N, H], in the dtype of the values.

    Raises:
      ValueError: N is not a multiple of K, or `window` or `block` is below 1.
      AssertionError: the shapes do not match.

    Example:
      >>> ones = jnp.ones((1, 3, 1, 2))
      >>> value = jnp.arange(6.0).reshape(1, 3, 1, 2)
      >>> y = causal_attention(ones, ones, value, jnp.array([[1, 1, 2]]), scale=1.0)
      >>> y[0, :, 0].tolist()  # itself; the mean of both; a segment of its own
      [[0.0, 1.0], [1.0, 2.0], [4.0, 5.0]]
    """
    chex.assert_rank([q_BTNH, k_BTKH, v_BTKH, segment_ids_BT], [4, 4, 4, 2])
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    chex.assert_shape([k_BTKH, v_BTKH], (batch, length, kv_heads, head_dim))
    chex.assert_shape(segment_ids_BT, (batch, length))
    if heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} key-value heads evenly")
    for name, size in (("window", window), ("block", block)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if block is None:
        block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    q_BKMTH = q_BTNH.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = (x.transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKH))
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if window is None else max(0, start + 1 - window) // block * block
        attend = functools.partial(_block, start=start - first, scale=scale, window=window, cap=cap)
        blocks.append(
            jax.checkpoint(attend)(
                q_BKMTH[:, :, :, start:end],
                k_BKTH[:, :, first:end],
                v_BKTH[:, :, first:end],
                segment_ids_BT[:, start:end],
                segment_ids_BT[:, first:end],
            )
        )
    y_BKMTH = jnp.concatenate(blocks, axis=3)
    return y_BKMTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _block(
    q_BKMQH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segment_BQ: jax.Array,
    segment_BS: jax.Array,
    *,
    start: int,
    scale: float,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    """Computes the attention of the queries from `start` on to all keys given, [B, K, M, Q, H]."""
    batch, kv_heads, shared, queries, head_dim = q_BKMQH.shape
    keys = k_BKSH.shape[2]
    # Heads that share keys become further rows of one matrix product.
    q_BKRH = (q_BKMQH * scale).reshape(batch, kv_heads, shared * queries, head_dim)
    logits_BKRS = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    logits_BKMQS = logits_BKRS.reshape(batch, kv_heads, shared, queries, keys)
    if cap is not None:
        logits_BKMQS = cap * jnp.tanh(logits_BKMQS / cap)
    distance_QS = start + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
    seen_BQS = (segment_BQ[:, :, None] == segment_BS[:, None, :]) & (distance_QS >= 0)[None]
    if window is not None:
        seen_BQS &= (distance_QS < window)[None]
    lowest = jnp.finfo(jnp.float32).min
    logits_BKMQS = jnp.where(seen_BQS[:, None, None], logits_BKMQS, lowest)
    max_BKMQ1 = jax.lax.stop_gradient(jnp.max(logits_BKMQS, axis=-1, keepdims=True))
    share_BKMQS = jnp.exp(logits_BKMQS - max_BKMQ1)
    sum_BKMQ1 = jnp.sum(share_BKMQS, axis=-1, keepdims=True)
    share_BKRS = share_BKMQS.astype(v_BKSH.dtype).reshape(logits_BKRS.shape)
    y_BKRH = jnp.einsum("bkrs,bksh->bkrh", share_BKRS, v_BKSH, preferred_element_type=jnp.float32)
    # Divided last: one division per feature, not per key.
    return (y_BKRH.reshape(q_BKMQH.shape) / sum_BKMQ1).astype(v_BKSH.dtype)


def rotate(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Applies rotary position embedding in float32, with paired halves (Hugging Face's order)."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [a * cos_BT1H - b * sin_BT1H, b * cos_BT1H + a * sin_BT1H]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)
