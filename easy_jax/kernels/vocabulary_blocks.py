"""Losses, statistics and divergences of a linear head, one block of the vocabulary at a time.

The forward pass updates a running log-sum-exp over the blocks. The backward pass recomputes each
block's logits and completes the gradient of the block's rows of the head in one go.

Shape suffixes: B rows, T positions, D features, V vocabulary, C positions of a chunk, U rows of
the head in a block, K number of blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from easy_jax.kernels import divergence, token_stats
from easy_jax.kernels.divergence import Frozen
from easy_jax.kernels.vocabulary_parallel import NO_TARGET


def block_size(vocab: int, at_most: int) -> int:
    """Returns the vocabulary's largest divisor up to `at_most`, or `at_most` if it is too small."""
    best = max(size for size in range(1, min(at_most, vocab) + 1) if vocab % size == 0)
    return best if 4 * best >= min(at_most, vocab) else at_most


def _blocks(head_VD: jax.Array, block: int) -> jax.Array:
    """Reshapes the head to [U, number of blocks, D]: block k has the rows k, k + blocks, ..."""
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def losses(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    frozen: Frozen | None,
    cap: float | None,
    block: int,
    chunk: int,
    more: bool,
) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """Returns losses [B, T], KL(p0 || p) where there is a frozen pair, and further statistics.

    The statistics are the fields of `token_stats.OF_DISTRIBUTION`, with `more`. Losses and
    divergences are differentiable in hidden states and head.

    Every row must begin with its targets: chunks after the last target of any row are skipped.
    """
    return _forward(hidden_BTD, head_VD, target_BT, frozen, cap, block, chunk, more)[0]


def _forward(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    frozen: Frozen | None,
    cap: float | None,
    block: int,
    chunk: int,
    more: bool,
) -> tuple[tuple[jax.Array, jax.Array | None, dict[str, jax.Array]], Any]:
    vocab = head_VD.shape[0]
    head_UKD = _blocks(head_VD, block)
    frozen_head_UKD = None if frozen is None else _blocks(frozen.head_VD, block)
    num_blocks = head_UKD.shape[1]
    num_chunks = _num_chunks(target_BT, chunk)

    def one_block(carry: Any, k: jax.Array) -> tuple[Any, None]:
        head_UD = head_UKD[:, k]
        ids_U = jnp.arange(block) * num_blocks + k

        def one_chunk(c: jax.Array, carry: Any) -> Any:
            own, given = jax.tree.map(lambda x: _slice(x, c, chunk), carry)
            max_BC, chosen_BC, *before_BC = own
            hidden_BCD = _slice(hidden_BTD, c, chunk)
            logits_BCU = _logits(hidden_BCD, head_UD, ids_U[None, None, :], vocab, cap)
            is_target_BCU = _slice(target_BT, c, chunk)[:, :, None] == ids_U[None, None, :]
            new_max_BC = jnp.maximum(max_BC, jnp.max(logits_BCU, axis=2))
            if more:
                valid_BCU = jnp.broadcast_to(ids_U < vocab, logits_BCU.shape)
                sums_BC = token_stats.update(before_BC, max_BC, new_max_BC, logits_BCU, valid_BCU)
            else:
                scaled_BC = before_BC[0] * jnp.exp(max_BC - new_max_BC)
                more_BC = jnp.sum(jnp.exp(logits_BCU - new_max_BC[:, :, None]), axis=2)
                sums_BC = (scaled_BC + more_BC,)
            chosen_BC += jnp.sum(jnp.where(is_target_BCU, logits_BCU, 0.0), axis=2)
            if frozen is not None and frozen_head_UKD is not None:
                frozen_BCD = _slice(frozen.hidden_ND, c, chunk)
                frozen_BCU = _logits(
                    frozen_BCD, frozen_head_UKD[:, k], ids_U[None, None, :], vocab, cap
                )
                largest_BC = jnp.maximum(given[0], jnp.max(frozen_BCU, axis=2))
                given = divergence.update(
                    given, largest_BC, frozen_BCU, logits_BCU, ids_U[None, None, :] < vocab
                )
            new = ((new_max_BC, chosen_BC, *sums_BC), given)
            return jax.tree.map(lambda x, y: _update(x, y, c, chunk), carry, new)

        return jax.lax.fori_loop(0, num_chunks, one_chunk, carry), None

    zero_BT = jnp.zeros(target_BT.shape, jnp.float32)
    start = (
        (zero_BT - jnp.inf, zero_BT, zero_BT, *[zero_BT] * (2 * more)),
        () if frozen is None else (zero_BT - jnp.inf, zero_BT, zero_BT),
    )
    (own, given), _ = jax.lax.scan(one_block, start, jnp.arange(num_blocks))
    found, sums = _finished(own, given, target_BT, vocab, more)
    return found, (hidden_BTD, head_VD, target_BT, frozen, *sums)


def _finished(
    own: tuple[jax.Array, ...],
    given: tuple[jax.Array, ...],
    target_BT: jax.Array,
    vocab: int,
    more: bool,
) -> tuple[tuple[jax.Array, jax.Array | None, dict[str, jax.Array]], tuple[Any, Any]]:
    """Returns losses, divergences and statistics, and the maxima and sums for the gradient.

    Args:
      own: largest logit, target's logit and sums of all blocks.
      given: the same of the frozen model, as `divergence.update` carries it; empty without one.
    """
    max_BT, chosen_BT, sum_BT, *sums_BT = own
    has_target_BT = target_BT != NO_TARGET
    kl_BT, frozen_sums = None, None
    if given:
        kl_BT = jnp.where(has_target_BT, divergence.divergence(given, max_BT, sum_BT), 0.0)
        frozen_sums = _masked_out(given[0], given[1], has_target_BT)
    fields = {}
    if more:
        fields = token_stats.derived(max_BT, chosen_BT, sum_BT, *sums_BT)
        fields = token_stats.masked(fields, has_target_BT)
    max_BT, sum_BT = _masked_out(max_BT, sum_BT, has_target_BT)
    in_range_BT = (target_BT >= 0) & (target_BT < vocab)
    chosen_BT = jnp.where(in_range_BT, chosen_BT, jnp.nan)
    # Save maximum and sum separately: rounding of log-sum-exp would bias every gradient.
    nll_BT = (max_BT - chosen_BT) + jnp.log(sum_BT)
    # Rounding can give -1e-7 where the model is certain; the loss is non-negative.
    nll_BT = jnp.where(nll_BT < 0, 0.0, nll_BT)
    nll_BT = jnp.where(has_target_BT, nll_BT, 0.0)
    return (nll_BT, kl_BT, fields), ((max_BT, sum_BT), frozen_sums)


def _masked_out(
    max_BT: jax.Array, sum_BT: jax.Array, has_target_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replaces maximum and sum where there is no target: going back, e^(x - inf) / 1 = 0."""
    return jnp.where(has_target_BT, max_BT, jnp.inf), jnp.where(has_target_BT, sum_BT, 1.0)


def _backward(
    cap: float | None, block: int, chunk: int, more: bool, residuals: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None]:
    del more
    nll_bar_BT, kl_bar_BT, _ = cotangents  # the statistics are constants
    hidden_BTD, head_VD, target_BT, frozen, sums, frozen_sums = residuals
    vocab = head_VD.shape[0]
    head_UKD = _blocks(head_VD, block)
    frozen_head_UKD = None if frozen is None else _blocks(frozen.head_VD, block)
    num_blocks = head_UKD.shape[1]
    num_chunks = _num_chunks(target_BT, chunk)
    nll_bar_BT = jnp.where(target_BT != NO_TARGET, nll_bar_BT, 0.0)
    if frozen is not None:
        kl_bar_BT = jnp.where(target_BT != NO_TARGET, kl_bar_BT, 0.0)

    def one_block(carry: Any, k: jax.Array) -> tuple[Any, None]:
        hidden_bar_BTD, head_bar_UKD = carry
        head_UD = head_UKD[:, k]
        ids_U = jnp.arange(block) * num_blocks + k

        def one_chunk(c: jax.Array, carry: Any) -> Any:
            hidden_bar_BTD, head_bar_UD = carry
            hidden_BCD = _slice(hidden_BTD, c, chunk)
            logits_BCU = _logits(hidden_BCD, head_UD, ids_U[None, None, :], vocab, cap)
            is_target_BCU = _slice(target_BT, c, chunk)[:, :, None] == ids_U[None, None, :]
            share_BCU = _share(logits_BCU, sums, c, chunk)
            bar_BCU = (share_BCU - is_target_BCU) * _slice(nll_bar_BT, c, chunk)[:, :, None]
            if frozen is not None and frozen_head_UKD is not None:
                frozen_BCD = _slice(frozen.hidden_ND, c, chunk)
                frozen_BCU = _logits(
                    frozen_BCD, frozen_head_UKD[:, k], ids_U[None, None, :], vocab, cap
                )
                apart_BCU = share_BCU - _share(frozen_BCU, frozen_sums, c, chunk)
                bar_BCU += apart_BCU * _slice(kl_bar_BT, c, chunk)[:, :, None]
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
        # Written in place into the result, without a second copy of the head's gradient.
        head_bar_UKD = head_bar_UKD.at[:, k].set(head_bar_UD.astype(head_VD.dtype))
        return (hidden_bar_BTD, head_bar_UKD), None

    start = (jnp.zeros(hidden_BTD.shape, jnp.float32), jnp.zeros_like(head_UKD))
    (hidden_bar_BTD, head_bar_UKD), _ = jax.lax.scan(one_block, start, jnp.arange(num_blocks))
    head_bar_VD = head_bar_UKD.reshape(-1, head_VD.shape[1])[:vocab]
    return hidden_bar_BTD.astype(hidden_BTD.dtype), head_bar_VD, None, None


def _share(
    logits_BCU: jax.Array, given: tuple[jax.Array, jax.Array], chunk: Any, size: int
) -> jax.Array:
    """Returns the probabilities of a block, from the maximum and sum [B, T] of all blocks."""
    max_BC, sum_BC = (_slice(x_BT, chunk, size)[:, :, None] for x_BT in given)
    return jnp.exp(logits_BCU - max_BC) / sum_BC


losses.defvjp(_forward, _backward)
