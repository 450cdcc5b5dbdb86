"""Cross-entropy of a linear head, without the logits `[tokens, vocabulary]` in memory.

With a vocabulary of 256,000 the logits of 2,048 tokens take 2 GB in float32, and their gradient as
much again. These functions compute one block of the vocabulary at a time (`vocabulary_blocks`), or
distribute the vocabulary over devices (`vocabulary_parallel`). Positions without a target cost
almost no time.

Shape suffixes: B rows, T positions, N positions of any shape, D features, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easy_jax.kernels import token_stats, vocabulary_blocks, vocabulary_parallel
from easy_jax.kernels.divergence import Frozen
from easy_jax.kernels.token_stats import TokenStats
from easy_jax.kernels.vocabulary_parallel import NO_TARGET, Rule
from easy_jax.parallel import chip, sharding

_VOCAB_BLOCK, _TOKEN_CHUNK = 2048, 512  # logits of this size fit a cache or a TPU's fast memory
_GPU_SIZE = 8192  # of block and chunk on GPUs; benchmarks/accelerator.py times other sizes


def linear_cross_entropy(
    hidden_ND: Float[Array, "*N D"],
    head_VD: Float[Array, "V D"],
    targets_N: Int[Array, "*N"],
    *,
    soft_cap: float | None = None,
    vocab_block: int | None = None,
    token_chunk: int | None = None,
) -> Float[Array, "*N"]:
    """Computes each target's negative log-likelihood under `softmax(soft_cap(hidden @ head.T))`.

    The result is differentiable in `hidden` and `head`, with any cotangent per token, so that
    the loss may be weighted per example or token. Matrix products accumulate in float32 for
    every dtype of the inputs; soft cap, softmax and loss are float32.

    If the batch is sharded over B, pass rows and positions as separate axes, [B, T, D]: positions
    are then moved within their row only. The head may be sharded over V (the blocks are
    strided, so that each device holds a share of every block) or over D.

    Args:
      hidden_ND: [T, D] or [B, T, D], float32 or bfloat16.
      head_VD: the head's rows, of the same dtype.
      targets_N: [T] or [B, T]; in [0, V), or `NO_TARGET` (-1) where there is none.
        Any other value gives NaN, which scoring and training report by example id.
      soft_cap: c of `c * tanh(logits / c)`, Gemma 2's final soft cap; None for none.
      vocab_block: maximal number of the head's rows in a block; default: 2,048, on GPUs 8,192.
        V is padded (which copies the head) if it has no divisor near this number.
      token_chunk: maximal number of positions in a chunk, over all rows, or over a device's rows
        if the head is distributed over devices; default: 512, or 8,192 on GPUs if the head is
        not distributed. Memory in use is about `2 * 4 * vocab_block * token_chunk` bytes.

    Returns:
      nll_N in nats, float32; 0 where there is no target.

    Example:
      >>> nll = linear_cross_entropy(jnp.zeros((3, 2)), jnp.ones((4, 2)), jnp.array([1, 3, -1]))
      >>> [round(float(x), 4) for x in nll]  # log(4) twice, no target
      [1.3863, 1.3863, 0.0]
    """
    arguments = (hidden_ND, head_VD, targets_N, None, soft_cap, vocab_block, token_chunk)
    return _losses(*arguments, False)[0]


def linear_cross_entropy_stats(
    hidden_ND: Float[Array, "*N D"],
    head_VD: Float[Array, "V D"],
    targets_N: Int[Array, "*N"],
    soft_cap: float | None = None,
    *,
    vocab_block: int | None = None,
    token_chunk: int | None = None,
) -> TokenStats:
    """Computes statistics of `softmax(soft_cap(hidden @ head.T))` for every token.

    One pass over the vocabulary computes `nll`, `lse`, `entropy`, `collision`, `max_prob` and
    `is_argmax`. Only `nll` is differentiable, as in `linear_cross_entropy`; the others are
    constants.

    Args:
      hidden_ND, head_VD, targets_N, soft_cap, vocab_block, token_chunk: as in
        `linear_cross_entropy`.

    Returns:
      Float32 arrays of the targets' shape; `mask` is False and all else 0 where there is no target.

    Example:
      >>> stats = linear_cross_entropy_stats(jnp.zeros((1, 2)), jnp.ones((4, 2)), jnp.array([1]))
      >>> [round(float(x[0]), 4) for x in (stats.entropy, stats.collision, stats.max_prob)]
      [1.3863, 0.25, 0.25]
    """
    arguments = (hidden_ND, head_VD, targets_N, None, soft_cap, vocab_block, token_chunk)
    nll_N, _, more = _losses(*arguments, True)
    more = jax.lax.stop_gradient(more)
    return TokenStats(nll_N, **more, mask=targets_N != NO_TARGET)


def linear_cross_entropy_and_kl(
    hidden_ND: Float[Array, "*N D"],
    head_VD: Float[Array, "V D"],
    targets_N: Int[Array, "*N"],
    frozen_hidden_ND: Float[Array, "*N D"],
    frozen_head_VD: Float[Array, "V D"],
    *,
    soft_cap: float | None = None,
    vocab_block: int | None = None,
    token_chunk: int | None = None,
) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """Losses, and the forward KL divergence from a frozen distribution p0 to the current p.

    One pass over the vocabulary for both, without either model's logits. Losses and divergences
    are differentiable in `hidden` and `head`; the frozen pair is a constant. The gradient of
    KL(p0 || p) = sum_v p0_v log(p0_v / p_v) for the logits is p - p0.

    Args:
      frozen_hidden_ND, frozen_head_VD: the frozen model's, in the shapes and dtypes of the current
        model's; the soft cap is that of both.
      hidden_ND, head_VD, targets_N, soft_cap, vocab_block, token_chunk: as in
        `linear_cross_entropy`.

    Returns:
      `(nll_N, kl_N)` in nats, float32; 0 where there is no target.

    Example:
      >>> head, hidden = jnp.eye(2), jnp.zeros((1, 2))
      >>> frozen = jnp.array([[jnp.log(3.0), 0.0]])  # p0 = (3/4, 1/4), p = (1/2, 1/2)
      >>> nll, kl = linear_cross_entropy_and_kl(hidden, head, jnp.array([0]), frozen, head)
      >>> round(float(nll[0]), 4), round(float(kl[0]), 4)
      (0.6931, 0.1308)
    """
    frozen = Frozen(frozen_hidden_ND, frozen_head_VD)
    arguments = (hidden_ND, head_VD, targets_N, frozen, soft_cap, vocab_block, token_chunk)
    nll_N, kl_N, _ = _losses(*arguments, False)
    assert kl_N is not None
    return nll_N, kl_N


def _losses(
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    frozen: Frozen | None,
    soft_cap: float | None,
    vocab_block: int | None,
    token_chunk: int | None,
    more: bool,
) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """Losses, divergences, and with `more` the fields of `token_stats.OF_DISTRIBUTION`."""
    chex.assert_rank(head_VD, 2)
    chex.assert_rank(targets_N, {1, 2})
    if hidden_ND.shape != (*targets_N.shape, head_VD.shape[1]):
        raise ValueError(
            f"hidden has shape {hidden_ND.shape}, targets {targets_N.shape} and the head "
            f"{head_VD.shape}; they must be [*N, D], [*N] and [V, D]"
        )
    if frozen is not None:
        _check_frozen(hidden_ND, head_VD, frozen)
        frozen = jax.lax.stop_gradient(frozen)
    if targets_N.ndim == 1:
        if frozen is not None:
            frozen = frozen._replace(hidden_ND=frozen.hidden_ND[None])
        pair = (hidden_ND[None], head_VD, targets_N[None], frozen)
        found = _losses(*pair, soft_cap, vocab_block, token_chunk, more)
        return jax.tree.map(lambda x_1N: x_1N[0], found)
    mesh = sharding.current_mesh()
    if vocabulary_parallel.divides(mesh, targets_N.shape[0], head_VD):
        shared_chunk = _TOKEN_CHUNK if token_chunk is None else token_chunk
        return vocabulary_parallel.losses(
            hidden_ND, head_VD, targets_N, frozen, soft_cap, shared_chunk, more
        )
    large = _GPU_SIZE if chip.is_gpu() else None  # smaller products leave a GPU idle
    vocab_block = vocab_block or large or _VOCAB_BLOCK
    token_chunk = token_chunk or large or _TOKEN_CHUNK
    length = targets_N.shape[1]
    chunk = max(1, min(length, token_chunk // targets_N.shape[0]))
    # Move targets to the front of each row: chunks after the last target are not computed.
    order_BT = jnp.argsort(targets_N == NO_TARGET, axis=1, stable=True)
    padding = -length % chunk
    target_BT = jnp.take_along_axis(targets_N, order_BT, axis=1)
    target_BT = jnp.pad(target_BT, ((0, 0), (0, padding)), constant_values=NO_TARGET)

    def in_order(hidden_BTD: jax.Array) -> jax.Array:
        hidden_BTD = jnp.take_along_axis(hidden_BTD, order_BT[:, :, None], axis=1)
        hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
        # Chunks also hold positions without a target, in shorter rows: exp(logits) or a NaN there
        # times a cotangent of 0 would be NaN in the head's gradient.
        return jnp.where((target_BT != NO_TARGET)[:, :, None], hidden_BTD, 0)

    if frozen is not None:
        frozen = frozen._replace(hidden_ND=in_order(frozen.hidden_ND))
    block = vocabulary_blocks.block_size(head_VD.shape[0], vocab_block)
    found = vocabulary_blocks.losses(
        in_order(hidden_ND), head_VD, target_BT, frozen, soft_cap, block, chunk, more
    )
    found = jax.tree.map(lambda x_BT: x_BT[:, :length], found)
    back_BT = jnp.argsort(order_BT, axis=1)
    return jax.tree.map(lambda x_BT: jnp.take_along_axis(x_BT, back_BT, axis=1), found)


def _check_frozen(hidden_ND: jax.Array, head_VD: jax.Array, frozen: Frozen) -> None:
    ours, theirs = (hidden_ND.shape, head_VD.shape), (frozen[0].shape, frozen[1].shape)
    if ours != theirs:
        raise ValueError(
            f"the frozen hidden states and head have shapes {theirs[0]} and {theirs[1]}; they must "
            f"have those of the current ones, {ours[0]} and {ours[1]}"
        )


def weighted_linear_cross_entropy(
    hidden_ND: Float[Array, "*N D"],
    head_VD: Float[Array, "V D"],
    targets_N: Int[Array, "*N"],
    weight_N: Float[Array, "*N"],
    *,
    soft_cap: float | None = None,
    token_chunk: int | None = None,
) -> Float[Array, ""]:
    """Computes the sum of `weight * linear_cross_entropy(...)` as a float32 scalar.

    As the weights are known in the forward pass, so are the gradients except for a common factor:
    if the head is distributed over devices, they are computed there, without recomputing logits.
    A token with weight 0 is left out. The result is not differentiable in the weights.

    Example:
      >>> total = weighted_linear_cross_entropy(
      ...     jnp.zeros((2, 2)), jnp.ones((4, 2)), jnp.array([1, 3]), jnp.array([0.5, 0.0]))
      >>> round(float(total), 4)  # log(4) / 2
      0.6931
    """
    arguments = (hidden_ND, head_VD, targets_N, weight_N)
    return weighted_sum(*arguments, soft_cap=soft_cap, token_chunk=token_chunk).total


class WeightedSum(NamedTuple):
    """A weighted sum of losses and divergences, and what it was made of.

    Attributes:
      total: scalar, float32; differentiable in hidden states and head.
      loss: the part of the losses, without the divergences; a constant.
      rule_N: the rule's weights, 0 where there is no target; None without a rule.
      kl_N: KL(p0 || p) in nats, 0 where there is no target; None without a frozen pair.
    """

    total: jax.Array
    loss: jax.Array
    rule_N: jax.Array | None
    kl_N: jax.Array | None


def weighted_sum(
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    weight_N: jax.Array,
    *,
    rule: Rule | None = None,
    given: Mapping[str, jax.Array] | None = None,
    more: bool = False,
    frozen: Frozen | None = None,
    kl_weight_N: jax.Array | None = None,
    soft_cap: float | None = None,
    token_chunk: int | None = None,
) -> WeightedSum:
    """Sums `weight * rule(stats) * nll + kl_weight * kl` over tokens.

    The rule is applied to each token between log-sum-exp and gradient, so that it needs no second
    pass. The sum is differentiable in hidden states and head only; all weights are constants.

    Args:
      weight_N: factors of every token's loss, such as an example's weight; 0 for none.
      rule: function `TokenStats -> w` that acts on each token independently; hashable, because
        it is compiled into the step; default: 1.
      given: further fields of `TokenStats` that the rule reads, such as `frozen_nll`, in the
        targets' shape.
      more: whether the rule reads any of `token_stats.OF_DISTRIBUTION`.
      frozen: the frozen model's hidden states and head; they have no gradient.
      kl_weight_N: the factor of each token's KL(p0 || p); 0 for none.
      hidden_ND, head_VD, targets_N, soft_cap, token_chunk: as in `linear_cross_entropy`.

    Example:
      >>> def rule(stats):
      ...     return jnp.exp(-stats.nll)  # the target's probability
      >>> found = weighted_sum(
      ...     jnp.zeros((1, 2)), jnp.ones((4, 2)), jnp.array([1]), jnp.ones(1), rule=rule)
      >>> round(float(found.total), 4), round(float(found.rule_N[0]), 4)  # log(4) / 4
      (0.3466, 0.25)
    """
    given = dict(given or {})
    chex.assert_equal_shape([targets_N, weight_N, *given.values()])
    weight_N, given = jax.lax.stop_gradient((weight_N, given))
    # Not 0 times its loss, which may be infinite: a token of weight 0 is no target.
    counts_N = weight_N != 0
    if kl_weight_N is not None:
        chex.assert_equal_shape([targets_N, kl_weight_N])
        kl_weight_N = jax.lax.stop_gradient(kl_weight_N)
        counts_N |= kl_weight_N != 0
    targets_N = jnp.where(counts_N, targets_N, NO_TARGET)
    mesh = sharding.current_mesh()
    if targets_N.ndim == 2 and vocabulary_parallel.divides(mesh, targets_N.shape[0], head_VD):
        # Half the chunk, because logits and their gradients are in memory at the same time.
        half = max(1, (token_chunk or _TOKEN_CHUNK) // 2)
        if frozen is not None:
            _check_frozen(hidden_ND, head_VD, frozen)
        if kl_weight_N is not None:
            given["kl_weight"] = kl_weight_N
        found = vocabulary_parallel.weighted_sum(
            hidden_ND, head_VD, targets_N, weight_N, given, frozen, soft_cap, half, rule, more
        )
        return WeightedSum(*found)
    nll_N, kl_N, fields = _losses(
        hidden_ND, head_VD, targets_N, frozen, soft_cap, None, token_chunk, more
    )
    rule_N, factor_N = None, weight_N
    if rule is not None:
        has_weight_N = (targets_N != NO_TARGET) & (weight_N != 0)
        stats = TokenStats(nll_N, **fields, **given, mask=has_weight_N)
        rule_N = jax.lax.stop_gradient(token_stats.weights(rule, jax.lax.stop_gradient(stats)))
        factor_N = weight_N * rule_N
    total = loss = jnp.sum(jnp.where(factor_N != 0, factor_N * nll_N, 0.0))
    if kl_N is not None and kl_weight_N is not None:
        total += jnp.sum(jnp.where(kl_weight_N != 0, kl_weight_N * kl_N, 0.0))
    return WeightedSum(total, jax.lax.stop_gradient(loss), rule_N, kl_N)
