"""Attention on NVIDIA GPUs by cuDNN's fused kernel, where its restrictions are met.

It computes `causal_attention` without logits in memory. A mask [B, 1, T, T] separates segments;
JAX passes it to the kernel as a bias in the inputs' dtype. The XLA form is the reference, and is
used for windows, and for float32 inputs and soft caps, which the kernel does not support.
"""

import jax
import jax.numpy as jnp

from easy_jax.parallel import chip

_LARGEST_HEAD = 128  # the largest head_dim that the kernel supports on every GPU


def fits(q_BTNH: jax.Array, window: int | None, cap: float | None) -> bool:
    """Returns whether the kernel supports these queries, and the trace is for an NVIDIA GPU."""
    _, length, _, head_dim = q_BTNH.shape
    return (
        window is cap is None  # the kernel also supports windows, but that is not tested
        and q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= _LARGEST_HEAD
        and length % 2 == 0
        and chip.is_nvidia()
    )


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Computes `causal_attention` without window and soft cap."""
    y_BTNH: jax.Array = jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :],
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    return y_BTNH
