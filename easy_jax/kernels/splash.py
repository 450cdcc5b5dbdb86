"""The choice of the attention kernel, and JAX's splash attention kernel for TPUs.

It computes `causal_attention` in one Pallas kernel that skips blocks of keys without queries, and
never writes logits to memory. The XLA form is the reference, and is used on other devices.
"""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from easy_jax.kernels import cudnn
from easy_jax.kernels.attention import causal_attention
from easy_jax.parallel import sharding

KEPT = "attention"  # name of attention's output in policies of `jax.checkpoint`
_LANES = 128
_BLOCK = 512


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Computes `causal_attention`, with the splash kernel on TPUs and cuDNN's on NVIDIA GPUs, if
    these support the inputs."""
    options: Any = {"scale": scale, "window": window, "cap": cap}
    y_BTNH: jax.Array
    if sharding.is_tpu(sharding.current_mesh()) and fits(q_BTNH):
        rows = PartitionSpec(sharding.BATCH, None, "tensor", None)
        kernel: Any = jax.shard_map(
            functools.partial(splash_attention, **options),
            in_specs=(rows, rows, rows, PartitionSpec(sharding.BATCH, None)),
            out_specs=rows,
            check_vma=False,
        )
        y_BTNH = kernel(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        return y_BTNH
    if cudnn.fits(q_BTNH, window, cap):
        y_BTNH = cudnn.attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, scale=scale)
        return checkpoint_name(y_BTNH, KEPT)
    return checkpoint_name(
        causal_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, **options), KEPT
    )


def fits(q_BTNH: jax.Array) -> bool:
    """Returns whether the kernel supports this length and size of head."""
    return q_BTNH.shape[1] % _LANES == 0 and q_BTNH.shape[3] % _LANES == 0


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes `causal_attention` on one device in a kernel.

    Args:
      interpret: whether to interpret the kernel, which works on any device, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q_BTNH.shape[1:3]
    mask: Any = splash.CausalMask((length, length))
    if window is not None and window < length:
        mask = splash.LocalMask((length, length), (window - 1, 0), offset=0)
    block = next(size for size in (_BLOCK, 256, _LANES) if length % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )

    def one(q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, ids_T: jax.Array) -> jax.Array:
        q_NTH, k_KTH, v_KTH = (x.swapaxes(0, 1) for x in (q_TNH * scale, k_TKH, v_TKH))
        return kernel(q_NTH, k_KTH, v_KTH, segment_ids=splash.SegmentIds(ids_T, ids_T))

    return jax.vmap(one)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT).swapaxes(1, 2)
