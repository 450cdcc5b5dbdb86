"""Cross-entropy of a linear head whose rows are distributed over devices.

Every device holds V / (fsdp * tensor) rows of the head. The tokens of a data-parallel group are
gathered chunk by chunk, each device computes the logits of its rows, and maximum, sum and target's
logit are combined over the group: no device ever holds all logits or all of the head. If the
weight of every token's loss is known in the forward pass, the gradients of hidden states and head
are computed there from the same logits.

Shape suffixes: B rows, T positions, D features, V vocabulary, C positions of a chunk, N tokens of
a chunk over all devices of a group, U rows of the head on a device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from easy_jax.kernels import divergence, token_stats
from easy_jax.kernels.divergence import Frozen
from easy_jax.kernels.token_stats import TokenStats
from easy_jax.parallel import sharding

Rule = Callable[[TokenStats], jax.Array]
NO_TARGET = -1
_VOCAB = ("tensor", "fsdp")
_LARGEST_CAP = 40.0  # exp(-2 * cap) is still a normal float32
_ROWS = PartitionSpec(sharding.BATCH, None)
_ROWS_D = PartitionSpec(sharding.BATCH, None, None)
_HEAD = PartitionSpec("tensor", "fsdp")  # as the parameter is kept
_PAIR: tuple[Any, Any] = (_ROWS_D, _HEAD)


def divides(mesh: AbstractMesh | None, rows: int, head_VD: jax.Array) -> bool:
    """Returns whether the mesh shards parameters and divides rows, vocabulary and features."""
    if mesh is None or not sharding.splits_parameters(mesh):
        return False
    vocab, features = head_VD.shape
    spare = rows % sharding.num_shares(mesh)
    return spare == vocab % mesh.shape["tensor"] == features % mesh.shape["fsdp"] == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def losses(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    frozen: Frozen | None,
    cap: float | None,
    chunk: int,
    more: bool = False,
) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """Negative log-likelihoods [B, T], KL(p0 || p) where there is a frozen pair, and statistics.

    With `more`, the third output has the fields of `token_stats.OF_DISTRIBUTION`, which are
    constants to a gradient; else it is empty.
    """
    fields, _ = _sharded(hidden_BTD, head_VD, target_BT, {}, frozen, cap, chunk, more=more)
    return fields.pop("nll"), fields.pop("kl", None), fields


def _losses_forward(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    frozen: Frozen | None,
    cap: float | None,
    chunk: int,
    more: bool,
) -> tuple[Any, Any]:
    found = losses(hidden_BTD, head_VD, target_BT, frozen, cap, chunk, more)
    return found, (hidden_BTD, head_VD, target_BT, frozen)


def _losses_backward(
    cap: float | None, chunk: int, more: bool, residuals: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None]:
    del more
    hidden_BTD, head_VD, target_BT, frozen = residuals
    given = {"weight": cotangents[0]}
    if frozen is not None:
        given["kl_weight"] = cotangents[1]
    _, (hidden_bar_BTD, head_bar_VD) = _sharded(
        hidden_BTD, head_VD, target_BT, given, frozen, cap, chunk
    )
    return hidden_bar_BTD, head_bar_VD, None, None


losses.defvjp(_losses_forward, _losses_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def weighted_sum(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    given: dict[str, jax.Array],
    frozen: Frozen | None,
    cap: float | None,
    chunk: int,
    rule: Rule | None = None,
    more: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The sum of `weight * rule(stats) * nll + kl_weight * kl`, the rule's weights and the KL.

    Args:
      given: further fields of the rule's `TokenStats`, as in
        `linear_cross_entropy.weighted_sum`; with a
        frozen pair also `kl_weight`, [B, T].
      rule: None for 1.
      more: whether the rule reads any of `token_stats.OF_DISTRIBUTION`.
    """
    kl_weight_BT, given = _popped(given)
    nll_BT, kl_BT, fields = losses(hidden_BTD, head_VD, target_BT, frozen, cap, chunk, more)
    rule_BT = None
    if rule is not None:
        rule_BT = _rule_weights(rule, {"nll": nll_BT, **fields}, given, target_BT, weight_BT)
        weight_BT = weight_BT * rule_BT
    total = loss = _total(nll_BT, weight_BT)
    if kl_BT is not None and kl_weight_BT is not None:
        total += _total(kl_BT, kl_weight_BT)
    return total, loss, rule_BT, kl_BT


def _sum_forward(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    given: dict[str, jax.Array],
    frozen: Frozen | None,
    cap: float | None,
    chunk: int,
    rule: Rule | None,
    more: bool,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None], Any]:
    given = {**given, "weight": weight_BT}
    options: Any = {"more": more, "rule": rule}
    found, gradients = _sharded(
        hidden_BTD, head_VD, target_BT, given, frozen, cap, chunk, **options
    )
    rule_BT, kl_BT = found.get("rule"), found.get("kl")
    total = loss = _total(found["nll"], weight_BT if rule_BT is None else weight_BT * rule_BT)
    if kl_BT is not None:
        total += _total(kl_BT, given["kl_weight"])
    return (total, loss, rule_BT, kl_BT), gradients


def _sum_backward(
    cap: float | None, chunk: int, rule: Rule | None, more: bool, gradients: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None, None, None]:
    del cap, chunk, rule, more
    hidden_bar_BTD, head_bar_VD = (cotangents[0].astype(g.dtype) * g for g in gradients)
    return hidden_bar_BTD, head_bar_VD, None, None, None, None


weighted_sum.defvjp(_sum_forward, _sum_backward)


def _popped(given: dict[str, jax.Array]) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    """Returns the weight of the KL, and the fields that a rule reads."""
    return given.get("kl_weight"), {k: v for k, v in given.items() if k != "kl_weight"}


def _total(nll_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(weight_BT != 0, weight_BT * nll_BT, 0.0))


def _sharded(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    given: dict[str, jax.Array],
    frozen: Frozen | None,
    cap: float | None,
    chunk: int,
    *,
    more: bool = False,
    rule: Rule | None = None,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """Returns losses, optional statistics or weights, and gradients of hidden states and head.

    Args:
      given: `weight`, [B, T], if gradients of the weighted sum are wanted; with it, `kl_weight`
        if there is a frozen pair, and what the rule reads beside the statistics.

    Returns:
      `(found, gradients)`: `nll`, with a frozen pair `kl`, with `more` the statistics, or with a
      rule its weights, `rule`; no gradients without weights.
    """
    mesh = sharding.current_mesh()
    assert mesh is not None
    length = target_BT.shape[1]
    rows = target_BT.shape[0] // sharding.num_shares(mesh)
    chunk = max(1, min(length, chunk // rows))
    padding = ((0, 0), (0, -length % chunk))
    target_BT = jnp.pad(target_BT, padding, constant_values=NO_TARGET)

    def padded(hidden_BTD: jax.Array) -> jax.Array:
        hidden_BTD = jnp.pad(hidden_BTD, (*padding, (0, 0)))
        # A NaN where there is no target would reach the head's gradient.
        return jnp.where((target_BT != NO_TARGET)[:, :, None], hidden_BTD, 0)

    if frozen is not None:
        frozen = frozen._replace(hidden_ND=padded(frozen.hidden_ND))
    given = {
        name: jnp.where(target_BT == NO_TARGET, 0.0, jnp.pad(array_BT, padding))
        for name, array_BT in given.items()
    }
    frozen_specs: Any = None if frozen is None else Frozen(*_PAIR)
    run: Callable[..., Any] = functools.partial(
        _on_device, vocab=head_VD.shape[0], cap=cap, chunk=chunk, more=more, rule=rule
    )
    found, gradients = jax.shard_map(
        run,
        in_specs=(_ROWS_D, _HEAD, _ROWS, _ROWS, frozen_specs),
        check_vma=False,
        out_specs=(_ROWS, _PAIR if given else ()),
    )(padded(hidden_BTD), head_VD, target_BT, given, frozen)
    found = {name: array_BT[:, :length] for name, array_BT in found.items()}
    if not given:
        return found, ()
    hidden_bar_BTD, head_bar_VD = gradients
    return found, (hidden_bar_BTD[:, :length], head_bar_VD)


def _on_device(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    given: dict[str, jax.Array],
    frozen: Frozen | None,
    *,
    vocab: int,
    cap: float | None,
    chunk: int,
    more: bool,
    rule: Rule | None,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """One device's part: its rows of the batch; its features of the head, exchanged for rows."""
    rows = head_VD.shape[0]  # of all devices along fsdp together
    head_UD = _rows_of(head_VD)
    frozen_head_UD = None if frozen is None else _rows_of(frozen.head_VD)
    frozen_hidden_BTD = None if frozen is None else frozen.hidden_ND
    ids_U = _ids(head_UD.shape[0], rows, vocab)
    chunks = _chunks((hidden_BTD, target_BT, given, frozen_hidden_BTD), chunk)

    def one_chunk(head_bar_UD: jax.Array | None, chunk: Any) -> tuple[Any, Any]:
        hidden_ND, target_N, given_N, frozen_ND = jax.tree.map(_gathered, chunk)
        logits_NU = _logits(hidden_ND, head_UD, cap)
        is_target_NU = ids_U[None, :] == target_N[:, None]
        stats, share_NU, (max_N, sum_N) = _losses(
            logits_NU, is_target_NU, target_N, ids_U, vocab, cap, more
        )
        weight_N, kl_weight_N = given_N.pop("weight", None), given_N.pop("kl_weight", None)
        if rule is not None:
            rule_N = _rule_weights(rule, stats, given_N, target_N, weight_N)
            stats, weight_N = {"nll": stats["nll"], "rule": rule_N}, weight_N * rule_N
        if frozen_head_UD is not None:
            frozen_NU = _logits(frozen_ND, frozen_head_UD, cap)
            pair = (frozen_NU, logits_NU, (ids_U < vocab)[None, :])
            kl_N, frozen_share_NU = divergence.over_devices(*pair, max_N, sum_N, _VOCAB)
            stats["kl"] = jnp.where(target_N != NO_TARGET, kl_N, 0.0)
        found_BC = {name: _own(x.reshape(-1, *chunk[1].shape)) for name, x in stats.items()}
        if head_bar_UD is None:
            return None, (found_BC,)
        share_NU = share_NU / sum_N[:, None]
        bar_NU = (share_NU - is_target_NU) * weight_N[:, None]
        if kl_weight_N is not None:
            bar_NU += (share_NU - frozen_share_NU) * kl_weight_N[:, None]
        if cap is not None:
            bar_NU = bar_NU * (1.0 - jnp.square(logits_NU / cap))
        bar_NU = bar_NU.astype(hidden_ND.dtype)
        head_bar_UD += jnp.einsum(
            "nu,nd->ud", bar_NU, hidden_ND, preferred_element_type=jnp.float32
        )
        hidden_bar_ND = _summed_share(jnp.einsum("nu,ud->nd", bar_NU, head_UD))
        return head_bar_UD, (found_BC, hidden_bar_ND.reshape(chunk[0].shape))

    start = jnp.zeros(head_UD.shape, jnp.float32) if given else None
    head_bar_UD, parts = jax.lax.scan(one_chunk, start, chunks)
    found, *hidden_bar_BTD = jax.tree.map(_joined, parts)
    if head_bar_UD is None:
        return found, ()
    head_bar_UD = jax.lax.psum(head_bar_UD, "data").astype(head_UD.dtype)
    head_bar_VD = jax.lax.all_to_all(head_bar_UD, "fsdp", split_axis=1, concat_axis=0, tiled=True)
    return found, (hidden_bar_BTD[0], head_bar_VD[:rows])


def _ids(size: int, rows: int, vocab: int) -> jax.Array:
    """The ids of a device's rows of the head; a row of the padding has an id that no target has."""
    place_U = size * jax.lax.axis_index("fsdp") + jnp.arange(size)
    return jnp.where(place_U < rows, place_U + rows * jax.lax.axis_index("tensor"), vocab)


def _rows_of(head_VD: jax.Array) -> jax.Array:
    """A device's rows of the head, from its features of all rows."""
    rows = head_VD.shape[0]
    head_VD = jnp.pad(head_VD, ((0, -rows % jax.lax.axis_size("fsdp")), (0, 0)))
    return jax.lax.all_to_all(head_VD, "fsdp", split_axis=0, concat_axis=1, tiled=True)


def _logits(hidden_ND: jax.Array, head_UD: jax.Array, cap: float | None) -> jax.Array:
    logits_NU = jnp.einsum("nd,ud->nu", hidden_ND, head_UD, preferred_element_type=jnp.float32)
    return logits_NU if cap is None else cap * jnp.tanh(logits_NU / cap)


def _rule_weights(
    rule: Rule,
    fields: dict[str, jax.Array],
    given: dict[str, jax.Array],
    target_N: jax.Array,
    weight_N: jax.Array,
) -> jax.Array:
    """Returns the rule's weights; 0 for tokens of weight 0, whatever the rule gives there."""
    stats = TokenStats(**fields, **given, mask=(target_N != NO_TARGET) & (weight_N != 0))
    return token_stats.weights(rule, stats)


def _losses(
    logits_NU: jax.Array,
    is_target_NU: jax.Array,
    target_N: jax.Array,
    ids_U: jax.Array,
    vocab: int,
    cap: float | None,
    more: bool,
) -> tuple[dict[str, jax.Array], jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the losses of a chunk, and the softmax of this device's ids as shares of a sum.

    Returns:
      `(fields, share_NU, (max_N, sum_N))`: `nll`, with `more` the other statistics; the
      probabilities are `share_NU / sum_N`, and shares are relative to `max_N`.
    """
    valid_1U = (ids_U < vocab)[None, :]
    if cap is not None and cap <= _LARGEST_CAP and not more:
        max_N = jnp.full(target_N.shape, cap, jnp.float32)  # an upper bound, without a pass
    else:
        max_N = jnp.max(jnp.where(valid_1U, logits_NU, -jnp.inf), axis=1)
        max_N = jax.lax.pmax(max_N, _VOCAB)
    share_NU = jnp.where(valid_1U, jnp.exp(logits_NU - max_N[:, None]), 0.0)
    chosen_N = jnp.sum(jnp.where(is_target_NU, logits_NU, 0.0), axis=1)
    parts = [jnp.sum(share_NU, axis=1), chosen_N]
    if more:
        below_NU = jnp.where(valid_1U, logits_NU - max_N[:, None], 0.0)
        parts += token_stats.more_sums(share_NU, below_NU)
    sum_N, chosen_N, *more_N = jax.lax.psum(parts, _VOCAB)
    in_range_N = (target_N >= 0) & (target_N < vocab)
    # Rounding can give -1e-7 where the model is certain; the loss is non-negative.
    nll_N = (max_N - chosen_N) + jnp.log(sum_N)
    nll_N = jnp.where(in_range_N, jnp.where(nll_N < 0, 0.0, nll_N), jnp.nan)
    has_target_N = target_N != NO_TARGET
    fields = {"nll": jnp.where(has_target_N, nll_N, 0.0)}
    if more:
        derived = token_stats.derived(max_N, chosen_N, sum_N, *more_N)
        fields |= token_stats.masked(derived, has_target_N)
    return fields, share_NU, (max_N, sum_N)


def _chunks(arrays: Any, chunk: int) -> Any:
    """[B, T, ...] -> [chunks, B, C, ...], for every array of a tree."""

    def one(x_BT: jax.Array) -> jax.Array:
        parts = x_BT.reshape(x_BT.shape[0], -1, chunk, *x_BT.shape[2:])
        return jnp.swapaxes(parts, 0, 1)

    return jax.tree.map(one, arrays)


def _joined(x_KBC: jax.Array) -> jax.Array:
    """Concatenates chunks, [chunks, B, C, ...] -> [B, T, ...]."""
    x_BKC = jnp.swapaxes(x_KBC, 0, 1)
    return x_BKC.reshape(x_BKC.shape[0], -1, *x_BKC.shape[3:])


def _gathered(x_BC: jax.Array) -> jax.Array:
    """Gathers a chunk from all devices of the group, [N, ...]."""
    flat = x_BC.reshape(-1, *x_BC.shape[2:])
    return jax.lax.all_gather(flat, "fsdp", axis=0, tiled=True)


def _summed_share(x_ND: jax.Array) -> jax.Array:
    """This device's tokens of a sum over the devices of the group."""
    x_ND = jax.lax.psum_scatter(x_ND, "fsdp", scatter_dimension=0, tiled=True)
    return jax.lax.psum(x_ND, "tensor")


def _own(x_FBC: jax.Array) -> jax.Array:
    """Selects this device's part of an array over all devices of the group."""
    return jax.lax.dynamic_index_in_dim(x_FBC, jax.lax.axis_index("fsdp"), keepdims=False)
