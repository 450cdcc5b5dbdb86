"""Attention on NVIDIA GPUs: cuDNN's fused kernel, through JAX, where it can be used.

It is `causal_attention` without logits in memory. Segments are told apart by a mask [B, 1, T, T],
which JAX hands to the kernel as a bias in the inputs' dtype. The XLA form stays the reference, and
what float32 inputs and soft caps, which the kernel does not take, and windows are computed with.
"""

import jax
import jax.numpy as jnp

from easy_jax.parallel import chip

_LARGEST_HEAD = 128  # of every GPU that the kernel runs on


def fits(q_BTNH: jax.Array, window: int | None, cap: float | None) -> bool:
    """Whether the kernel is for these queries, and what is traced is for an NVIDIA GPU."""
    _, length, _, head_dim = q_BTNH.shape
    return (
        window is cap is None  # it has windows, which have not been tried
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
    """`causal_attention`, with the same arguments and result, without window and soft cap."""
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
