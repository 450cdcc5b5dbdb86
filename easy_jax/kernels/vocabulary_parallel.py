"""Cross-entropy of a linear head that is shared out over devices by rows.

Every device holds V / (fsdp * tensor) rows of the head. The tokens of a data-parallel group are
gathered chunk by chunk, each device computes its share of their logits, and maximum, sum and
target's logit are combined over the group: neither the logits nor the head are ever in one
place. Where the weight of every token's loss is known in advance, the gradients of hidden states
and head follow at once from the same logits.

Shape suffixes: B rows, T positions, D features, V vocabulary, C positions of a chunk, N tokens of
a chunk over all devices of a group, U rows of the head on a device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from easy_jax.kernels import token_stats
from easy_jax.kernels.token_stats import TokenStats
from easy_jax.parallel import sharding

Rule = Callable[[TokenStats], jax.Array]
NO_TARGET = -1
_VOCAB = ("tensor", "fsdp")
_LARGEST_CAP = 40.0  # exp(-2 * cap) is still a normal float32
_ROWS = PartitionSpec(sharding.BATCH, None)
_ROWS_D = PartitionSpec(sharding.BATCH, None, None)
_HEAD = PartitionSpec("tensor", "fsdp")  # as the parameter is kept


def divides(mesh: AbstractMesh | None, rows: int, head_VD: jax.Array) -> bool:
    """Whether there is a head to share out, and all devices get as much of everything."""
    if mesh is None or not sharding.splits_parameters(mesh):
        return False
    vocab, features = head_VD.shape
    spare = rows % sharding.num_shares(mesh)
    return spare == vocab % mesh.shape["tensor"] == features % mesh.shape["fsdp"] == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def losses(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    cap: float | None,
    chunk: int,
    more: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihoods [B, T], float32, as `linear_cross_entropy`.

    With `more`, the second output has the fields of `token_stats.OF_DISTRIBUTION`, which are
    constants to a gradient; else it is empty.
    """
    fields, _ = _sharded(hidden_BTD, head_VD, target_BT, {}, cap, chunk, more=more)
    return fields.pop("nll"), fields


def _losses_forward(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    cap: float | None,
    chunk: int,
    more: bool,
) -> tuple[Any, Any]:
    found = losses(hidden_BTD, head_VD, target_BT, cap, chunk, more)
    return found, (hidden_BTD, head_VD, target_BT)


def _losses_backward(
    cap: float | None, chunk: int, more: bool, residuals: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None]:
    del more
    hidden_BTD, head_VD, target_BT = residuals
    given = {"weight": cotangents[0]}
    _, (hidden_bar_BTD, head_bar_VD) = _sharded(hidden_BTD, head_VD, target_BT, given, cap, chunk)
    return hidden_bar_BTD, head_bar_VD, None


losses.defvjp(_losses_forward, _losses_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def weighted_sum(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    given: dict[str, jax.Array],
    cap: float | None,
    chunk: int,
    rule: Rule | None = None,
    more: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The sum of `weight * rule(stats) * losses(...)` and the rule's weights [B, T].

    Args:
      given: further fields of the rule's `TokenStats`, as in `rule_linear_cross_entropy`.
      rule: None for 1.
      more: whether the rule reads any of `token_stats.OF_DISTRIBUTION`.
    """
    nll_BT, fields = losses(hidden_BTD, head_VD, target_BT, cap, chunk, more)
    if rule is None:
        return _total(nll_BT, weight_BT), None
    rule_BT = _rule_weights(rule, {"nll": nll_BT, **fields}, given, target_BT)
    return _total(nll_BT, weight_BT * rule_BT), rule_BT


def _sum_forward(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    given: dict[str, jax.Array],
    cap: float | None,
    chunk: int,
    rule: Rule | None,
    more: bool,
) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
    given = {**given, "weight": weight_BT}
    options: Any = {"more": more, "rule": rule}
    found, gradients = _sharded(hidden_BTD, head_VD, target_BT, given, cap, chunk, **options)
    rule_BT = found.get("rule")
    factor_BT = weight_BT if rule_BT is None else weight_BT * rule_BT
    return (_total(found["nll"], factor_BT), rule_BT), gradients


def _sum_backward(
    cap: float | None, chunk: int, rule: Rule | None, more: bool, gradients: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None, None]:
    del cap, chunk, rule, more
    hidden_bar_BTD, head_bar_VD = (cotangents[0].astype(g.dtype) * g for g in gradients)
    return hidden_bar_BTD, head_bar_VD, None, None, None


weighted_sum.defvjp(_sum_forward, _sum_backward)


def _total(nll_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(weight_BT != 0, weight_BT * nll_BT, 0.0))


def _sharded(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    given: dict[str, jax.Array],
    cap: float | None,
    chunk: int,
    *,
    more: bool = False,
    rule: Rule | None = None,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """Losses and what else is asked for, and gradients for hidden states and head.

    Args:
      given: `weight`, [B, T], if gradients of the weighted sum are wanted; with it, what the rule
        reads beside the statistics.

    Returns:
      `(found, gradients)`: `nll`, with `more` the statistics, or with a rule its weights, `rule`;
      no gradients without weights.
    """
    mesh = sharding.current_mesh()
    assert mesh is not None
    length = target_BT.shape[1]
    rows = target_BT.shape[0] // sharding.num_shares(mesh)
    chunk = max(1, min(length, chunk // rows))
    padding = ((0, 0), (0, -length % chunk))
    hidden_BTD = jnp.pad(hidden_BTD, (*padding, (0, 0)))
    target_BT = jnp.pad(target_BT, padding, constant_values=NO_TARGET)
    # A NaN where there is no target would reach the head's gradient.
    hidden_BTD = jnp.where((target_BT != NO_TARGET)[:, :, None], hidden_BTD, 0)
    given = {
        name: jnp.where(target_BT == NO_TARGET, 0.0, jnp.pad(array_BT, padding))
        for name, array_BT in given.items()
    }
    run: Callable[..., Any] = functools.partial(
        _on_device, vocab=head_VD.shape[0], cap=cap, chunk=chunk, more=more, rule=rule
    )
    found, gradients = jax.shard_map(
        run,
        in_specs=(_ROWS_D, _HEAD, _ROWS, _ROWS),
        check_vma=False,
        out_specs=(_ROWS, (_ROWS_D, _HEAD) if given else ()),
    )(hidden_BTD, head_VD, target_BT, given)
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
    *,
    vocab: int,
    cap: float | None,
    chunk: int,
    more: bool,
    rule: Rule | None,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """One device's part: its rows of the batch; its features of the head, exchanged for rows."""
    rows = head_VD.shape[0]  # of all devices along fsdp together
    head_VD = jnp.pad(head_VD, ((0, -rows % jax.lax.axis_size("fsdp")), (0, 0)))
    head_UD = jax.lax.all_to_all(head_VD, "fsdp", split_axis=0, concat_axis=1, tiled=True)
    place_U = head_UD.shape[0] * jax.lax.axis_index("fsdp") + jnp.arange(head_UD.shape[0])
    # A row of the padding has an id that is no target's.
    ids_U = jnp.where(place_U < rows, place_U + rows * jax.lax.axis_index("tensor"), vocab)
    chunks = jax.tree.map(lambda x: _chunks(x, chunk), (hidden_BTD, target_BT, given))

    def one_chunk(head_bar_UD: jax.Array | None, chunk: Any) -> tuple[Any, Any]:
        hidden_ND, target_N, given_N = jax.tree.map(_gathered, chunk)
        logits_NU = jnp.einsum("nd,ud->nu", hidden_ND, head_UD, preferred_element_type=jnp.float32)
        if cap is not None:
            logits_NU = cap * jnp.tanh(logits_NU / cap)
        is_target_NU = ids_U[None, :] == target_N[:, None]
        stats, share_NU, sum_N = _losses(logits_NU, is_target_NU, target_N, ids_U, vocab, cap, more)
        weight_N = given_N.pop("weight", None)
        if rule is not None:
            rule_N = _rule_weights(rule, stats, given_N, target_N)
            stats, weight_N = {"nll": stats["nll"], "rule": rule_N}, weight_N * rule_N
        found_BC = {name: _own(x.reshape(-1, *chunk[1].shape)) for name, x in stats.items()}
        if head_bar_UD is None:
            return None, (found_BC,)
        bar_NU = (share_NU / sum_N[:, None] - is_target_NU) * weight_N[:, None]
        if cap is not None:
            bar_NU = bar_NU * (1.0 - jnp.square(logits_NU / cap))
        bar_NU = bar_NU.astype(hidden_ND.dtype)
        head_bar_UD += jnp.einsum(
            "nu,nd->ud", bar_NU, hidden_ND, preferred_element_type=jnp.float32
        )
        hidden_bar_ND = jnp.einsum("nu,ud->nd", bar_NU, head_UD)
        hidden_bar_ND = jax.lax.psum_scatter(hidden_bar_ND, "fsdp", scatter_dimension=0, tiled=True)
        hidden_bar_BCD = jax.lax.psum(hidden_bar_ND, "tensor").reshape(chunk[0].shape)
        return head_bar_UD, (found_BC, hidden_bar_BCD)

    start = jnp.zeros(head_UD.shape, jnp.float32) if given else None
    head_bar_UD, parts = jax.lax.scan(one_chunk, start, chunks)
    found, *hidden_bar_BTD = jax.tree.map(_joined, parts)
    if head_bar_UD is None:
        return found, ()
    head_bar_UD = jax.lax.psum(head_bar_UD, "data").astype(head_UD.dtype)
    head_bar_VD = jax.lax.all_to_all(head_bar_UD, "fsdp", split_axis=1, concat_axis=0, tiled=True)
    return found, (hidden_bar_BTD[0], head_bar_VD[:rows])


def _rule_weights(
    rule: Rule, fields: dict[str, jax.Array], given: dict[str, jax.Array], target_N: jax.Array
) -> jax.Array:
    stats = TokenStats(**fields, **given, mask=target_N != NO_TARGET)
    return token_stats.weights(rule, stats)


def _losses(
    logits_NU: jax.Array,
    is_target_NU: jax.Array,
    target_N: jax.Array,
    ids_U: jax.Array,
    vocab: int,
    cap: float | None,
    more: bool,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Returns the losses of a chunk, and the softmax of this device's ids as shares of a sum.

    Returns:
      `(fields, share_NU, sum_N)`: `nll`, with `more` the other statistics; the probabilities are
      `share_NU / sum_N`.
    """
    valid_1U = (ids_U < vocab)[None, :]
    if cap is not None and cap <= _LARGEST_CAP and not more:
        max_N = jnp.full(target_N.shape, cap, jnp.float32)  # known: one pass less
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
    # Rounding can leave -1e-7 where the model is certain; the loss is non-negative.
    nll_N = (max_N - chosen_N) + jnp.log(sum_N)
    nll_N = jnp.where(in_range_N, jnp.where(nll_N < 0, 0.0, nll_N), jnp.nan)
    has_target_N = target_N != NO_TARGET
    fields = {"nll": jnp.where(has_target_N, nll_N, 0.0)}
    if more:
        derived = token_stats.derived(max_N, chosen_N, sum_N, *more_N)
        fields |= token_stats.masked(derived, has_target_N)
    return fields, share_NU, sum_N


def _chunks(x_BT: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, C, ...]."""
    parts = x_BT.reshape(x_BT.shape[0], -1, chunk, *x_BT.shape[2:])
    return jnp.swapaxes(parts, 0, 1)


def _joined(x_KBC: jax.Array) -> jax.Array:
    """[chunks, B, C, ...] -> [B, T, ...]."""
    x_BKC = jnp.swapaxes(x_KBC, 0, 1)
    return x_BKC.reshape(x_BKC.shape[0], -1, *x_BKC.shape[3:])


def _gathered(x_BC: jax.Array) -> jax.Array:
    """A chunk of all devices of the group, [N, ...]."""
    flat = x_BC.reshape(-1, *x_BC.shape[2:])
    return jax.lax.all_gather(flat, "fsdp", axis=0, tiled=True)


def _own(x_FBC: jax.Array) -> jax.Array:
    """This device's part of what every device of the group has."""
    return jax.lax.dynamic_index_in_dim(x_FBC, jax.lax.axis_index("fsdp"), keepdims=False)
