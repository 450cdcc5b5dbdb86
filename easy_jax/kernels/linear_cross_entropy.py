"""Cross-entropy of a linear head, without the logits `[tokens, vocabulary]`.

At a vocabulary of 256,000 the logits of 2,048 tokens take 2 GB in float32, and their gradient
as much again. Here one block of the vocabulary is looked at at a time: going forward, a
running log-sum-exp; going back, the block's logits are computed again, and the gradient of
its rows of the head is finished at once. Positions without a target cost (next to) nothing.

Shape suffixes: B rows, T positions, N positions of any shape, D features, V vocabulary,
C positions of a chunk, U rows of the head in a block.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easy_jax.kernels import vocabulary_parallel
from easy_jax.kernels.vocabulary_parallel import NO_TARGET
from easy_jax.parallel import chip, sharding

_VOCAB_BLOCK, _TOKEN_CHUNK = 2048, 512  # what stays in a cache, or a TPU's fast memory
_GPU_SIZE = 8192  # of both; benchmarks/accelerator.py has the times of others


def linear_cross_entropy(
    hidden_ND: Float[Array, "*N D"],
    head_VD: Float[Array, "V D"],
    targets_N: Int[Array, "*N"],
    *,
    soft_cap: float | None = None,
    vocab_block: int | None = None,
    token_chunk: int | None = None,
) -> Float[Array, "*N"]:
    """Negative log-likelihood of each target under `softmax(soft_cap(hidden @ head.T))`.

    Differentiable in `hidden` and `head`, with any cotangent per token: that is where the
    weights of examples and tokens arrive. Matrix products accumulate in float32, whatever
    the inputs' dtype; soft cap, softmax and loss are float32.

    Give rows and positions apart, [B, T, D], where the batch is sharded over B: positions
    are then moved within their row only. The head may be sharded over V (the blocks are
    strided, so that each device holds a share of every block) or over D.

    Args:
      hidden_ND: [T, D] or [B, T, D], float32 or bfloat16.
      head_VD: the head's rows, of the same dtype.
      targets_N: [T] or [B, T]; in [0, V), or `NO_TARGET` (-1) where there is none.
        Any other value gives NaN, which scoring and training report by example id.
      soft_cap: c of `c * tanh(logits / c)`, Gemma 2's final soft cap; None for none.
      vocab_block: rows of the head looked at together, at most; default: 2,048, on GPUs 8,192.
        V is padded (the head copied) if none of its divisors is near.
      token_chunk: positions looked at together, over all rows (of a device, where the head is
        shared out over devices), at most; default: 512, on GPUs, where the head is not shared
        out, 8,192. Memory in use is about `2 * 4 * vocab_block * token_chunk` bytes.

    Returns:
      nll_N in nats, float32; 0 where there is no target.

    Example:
      >>> nll = linear_cross_entropy(jnp.zeros((3, 2)), jnp.ones((4, 2)), jnp.array([1, 3, -1]))
      >>> [round(float(x), 4) for x in nll]  # log(4) twice, no target
      [1.3863, 1.3863, 0.0]
    """
    chex.assert_rank(head_VD, 2)
    chex.assert_rank(targets_N, {1, 2})
    if hidden_ND.shape != (*targets_N.shape, head_VD.shape[1]):
        raise ValueError(
            f"hidden has shape {hidden_ND.shape}, targets {targets_N.shape} and the head "
            f"{head_VD.shape}; they must be [*N, D], [*N] and [V, D]"
        )
    if targets_N.ndim == 1:
        options: Any = {"vocab_block": vocab_block, "token_chunk": token_chunk}
        return linear_cross_entropy(
            hidden_ND[None], head_VD, targets_N[None], soft_cap=soft_cap, **options
        )[0]
    mesh = sharding.current_mesh()
    if vocabulary_parallel.divides(mesh, targets_N.shape[0], head_VD):
        shared_chunk = _TOKEN_CHUNK if token_chunk is None else token_chunk
        return vocabulary_parallel.losses(hidden_ND, head_VD, targets_N, soft_cap, shared_chunk)
    large = _GPU_SIZE if chip.is_gpu() else None  # smaller products leave a GPU idle
    vocab_block = vocab_block or large or _VOCAB_BLOCK
    token_chunk = token_chunk or large or _TOKEN_CHUNK
    length = targets_N.shape[1]
    chunk = max(1, min(length, token_chunk // targets_N.shape[0]))
    # Targets first in every row: chunks behind the last target of any row are not computed.
    order_BT = jnp.argsort(targets_N == NO_TARGET, axis=1, stable=True)
    padding = -length % chunk
    hidden_BTD = jnp.take_along_axis(hidden_ND, order_BT[:, :, None], axis=1)
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    target_BT = jnp.take_along_axis(targets_N, order_BT, axis=1)
    target_BT = jnp.pad(target_BT, ((0, 0), (0, padding)), constant_values=NO_TARGET)
    # Chunks also hold positions without a target, in shorter rows: exp(logits) or a NaN there
    # times a cotangent of 0 would be NaN in the head's gradient.
    hidden_BTD = jnp.where((target_BT != NO_TARGET)[:, :, None], hidden_BTD, 0)
    block = _block_size(head_VD.shape[0], vocab_block)
    nll_BT = _nll(hidden_BTD, head_VD, target_BT, soft_cap, block, chunk)[:, :length]
    return jnp.take_along_axis(nll_BT, jnp.argsort(order_BT, axis=1), axis=1)


def weighted_linear_cross_entropy(
    hidden_ND: Float[Array, "*N D"],
    head_VD: Float[Array, "V D"],
    targets_N: Int[Array, "*N"],
    weight_N: Float[Array, "*N"],
    *,
    soft_cap: float | None = None,
    token_chunk: int | None = None,
) -> Float[Array, ""]:
    """The sum of `weight * linear_cross_entropy(...)`, float32; a weight of 0 removes a token.

    The weights are known going forward, and so are the gradients but for one factor: where the
    head is shared out over devices they are made then, and no logits are computed again. The
    result is not differentiable in the weights.

    Example:
      >>> total = weighted_linear_cross_entropy(
      ...     jnp.zeros((2, 2)), jnp.ones((4, 2)), jnp.array([1, 3]), jnp.array([0.5, 0.0]))
      >>> round(float(total), 4)  # log(4) / 2
      0.6931
    """
    chex.assert_equal_shape([targets_N, weight_N])
    weight_N = jax.lax.stop_gradient(weight_N)
    # Not 0 times its loss, which may be infinite: a token of weight 0 is no target.
    targets_N = jnp.where(weight_N != 0, targets_N, NO_TARGET)
    mesh = sharding.current_mesh()
    if targets_N.ndim == 2 and vocabulary_parallel.divides(mesh, targets_N.shape[0], head_VD):
        # Logits and their gradients are in memory at once.
        half = max(1, (token_chunk or _TOKEN_CHUNK) // 2)
        return vocabulary_parallel.weighted_sum(
            hidden_ND, head_VD, targets_N, weight_N, soft_cap, half
        )
    nll_N = linear_cross_entropy(
        hidden_ND, head_VD, targets_N, soft_cap=soft_cap, token_chunk=token_chunk
    )
    return jnp.sum(jnp.where(weight_N != 0, weight_N * nll_N, 0.0))


def _block_size(vocab: int, at_most: int) -> int:
    """The largest divisor of the vocabulary, or `at_most` if all divisors are much smaller."""
    best = max(size for size in range(1, min(at_most, vocab) + 1) if vocab % size == 0)
    return best if 4 * best >= min(at_most, vocab) else at_most


def _blocks(head_VD: jax.Array, block: int) -> jax.Array:
    """The head as [U, number of blocks, D]: block k has the rows k, k + blocks, ..."""
    vocab, features = head_VD.shape
    head_VD = jnp.pad(head_VD, ((0, -vocab % block), (0, 0)))
    return head_VD.reshape(block, -1, features)


def _logits(
    hidden_BCD: jax.Array, head_UD: jax.Array, ids_U: jax.Array, vocab: int, cap: float | None
) -> jax.Array:
    logits_BCU = jnp.einsum("bcd,ud->bcu", hidden_BCD, head_UD, preferred_element_type=jnp.float32)
    if cap is not None:
        logits_BCU = cap * jnp.tanh(logits_BCU / cap)
    return jnp.where(ids_U < vocab, logits_BCU, -jnp.inf)


def _slice(x_BT: jax.Array, chunk: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_BT, chunk * size, size, axis=1)


def _update(x_BT: jax.Array, value_BC: jax.Array, chunk: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BT, value_BC, chunk * size, axis=1)


def _num_chunks(target_BT: jax.Array, chunk: int) -> jax.Array:
    used = jnp.max(jnp.sum(target_BT != NO_TARGET, axis=1))
    return (used + chunk - 1) // chunk


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _nll(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    cap: float | None,
    block: int,
    chunk: int,
) -> jax.Array:
    return _forward(hidden_BTD, head_VD, target_BT, cap, block, chunk)[0]


def _forward(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    cap: float | None,
    block: int,
    chunk: int,
) -> tuple[jax.Array, Any]:
    vocab = head_VD.shape[0]
    head_UKD = _blocks(head_VD, block)
    num_blocks = head_UKD.shape[1]
    num_chunks = _num_chunks(target_BT, chunk)

    def one_block(carry: Any, k: jax.Array) -> tuple[Any, None]:
        head_UD = head_UKD[:, k]
        ids_U = jnp.arange(block) * num_blocks + k

        def one_chunk(c: jax.Array, carry: Any) -> Any:
            max_BC, sum_BC, chosen_BC = (_slice(x, c, chunk) for x in carry)
            hidden_BCD = _slice(hidden_BTD, c, chunk)
            logits_BCU = _logits(hidden_BCD, head_UD, ids_U[None, None, :], vocab, cap)
            is_target_BCU = _slice(target_BT, c, chunk)[:, :, None] == ids_U[None, None, :]
            new_max_BC = jnp.maximum(max_BC, jnp.max(logits_BCU, axis=2))
            new = (
                new_max_BC,
                sum_BC * jnp.exp(max_BC - new_max_BC)
                + jnp.sum(jnp.exp(logits_BCU - new_max_BC[:, :, None]), axis=2),
                chosen_BC + jnp.sum(jnp.where(is_target_BCU, logits_BCU, 0.0), axis=2),
            )
            return tuple(_update(x, y, c, chunk) for x, y in zip(carry, new, strict=True))

        return jax.lax.fori_loop(0, num_chunks, one_chunk, carry), None

    zero_BT = jnp.zeros(target_BT.shape, jnp.float32)
    start = (zero_BT - jnp.inf, zero_BT, zero_BT)
    (max_BT, sum_BT, chosen_BT), _ = jax.lax.scan(one_block, start, jnp.arange(num_blocks))
    has_target_BT = target_BT != NO_TARGET
    max_BT = jnp.where(has_target_BT, max_BT, jnp.inf)  # going back: e^(x - inf) = 0
    sum_BT = jnp.where(has_target_BT, sum_BT, 1.0)
    in_range_BT = (target_BT >= 0) & (target_BT < vocab)
    chosen_BT = jnp.where(in_range_BT, chosen_BT, jnp.nan)
    # Maximum and sum stay apart: their logarithm's rounding would be a bias of every gradient.
    nll_BT = (max_BT - chosen_BT) + jnp.log(sum_BT)
    # Rounding can leave -1e-7 where the model is certain; the loss is non-negative.
    nll_BT = jnp.where(nll_BT < 0, 0.0, nll_BT)
    nll_BT = jnp.where(has_target_BT, nll_BT, 0.0)
    return nll_BT, (hidden_BTD, head_VD, target_BT, max_BT, sum_BT)


def _backward(
    cap: float | None, block: int, chunk: int, residuals: Any, cotangent_BT: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    hidden_BTD, head_VD, target_BT, max_BT, sum_BT = residuals
    vocab = head_VD.shape[0]
    head_UKD = _blocks(head_VD, block)
    num_blocks = head_UKD.shape[1]
    num_chunks = _num_chunks(target_BT, chunk)
    cotangent_BT = jnp.where(target_BT != NO_TARGET, cotangent_BT, 0.0)

    def one_block(carry: Any, k: jax.Array) -> tuple[Any, None]:
        hidden_bar_BTD, head_bar_UKD = carry
        head_UD = head_UKD[:, k]
        ids_U = jnp.arange(block) * num_blocks + k

        def one_chunk(c: jax.Array, carry: Any) -> Any:
            hidden_bar_BTD, head_bar_UD = carry
            hidden_BCD = _slice(hidden_BTD, c, chunk)
            logits_BCU = _logits(hidden_BCD, head_UD, ids_U[None, None, :], vocab, cap)
            is_target_BCU = _slice(target_BT, c, chunk)[:, :, None] == ids_U[None, None, :]
            share_BCU = jnp.exp(logits_BCU - _slice(max_BT, c, chunk)[:, :, None])
            share_BCU = share_BCU / _slice(sum_BT, c, chunk)[:, :, None]
            bar_BCU = (share_BCU - is_target_BCU) * _slice(cotangent_BT, c, chunk)[:, :, None]
            if cap is not None:
                capped_BCU = jnp.where(ids_U[None, None, :] < vocab, logits_BCU, 0.0)
                bar_BCU = bar_BCU * (1.0 - jnp.square(capped_BCU / cap))
            bar_BCU = bar_BCU.astype(hidden_BTD.dtype)
            more_BCD = jnp.einsum(
                "bcu,ud->bcd", bar_BCU, head_UD, preferred_element_type=jnp.float32
            )
            more_UD = jnp.einsum(
                "bcu,bcd->ud", bar_BCU, hidden_BCD, preferred_element_type=jnp.float32
            )
            more_BCD = _slice(hidden_bar_BTD, c, chunk) + more_BCD
            return _update(hidden_bar_BTD, more_BCD, c, chunk), head_bar_UD + more_UD

        start = (hidden_bar_BTD, jnp.zeros(head_UD.shape, jnp.float32))
        hidden_bar_BTD, head_bar_UD = jax.lax.fori_loop(0, num_chunks, one_chunk, start)
        # Written into place: the gradient of the head is the result itself, never a second copy.
        head_bar_UKD = head_bar_UKD.at[:, k].set(head_bar_UD.astype(head_VD.dtype))
        return (hidden_bar_BTD, head_bar_UKD), None

    start = (jnp.zeros(hidden_BTD.shape, jnp.float32), jnp.zeros_like(head_UKD))
    (hidden_bar_BTD, head_bar_UKD), _ = jax.lax.scan(one_block, start, jnp.arange(num_blocks))
    head_bar_VD = head_bar_UKD.reshape(-1, head_VD.shape[1])[:vocab]
    return hidden_bar_BTD.astype(hidden_BTD.dtype), head_bar_VD, None


_nll.defvjp(_forward, _backward)
