"""The causal language-model loss on packed text, computed without storing logits.

Shape suffixes: R rows, T positions of a row, S examples of a row.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easy_jax.core.losses import ContractError, PerExampleLoss
from easy_jax.kernels.divergence import Frozen
from easy_jax.kernels.linear_cross_entropy import (
    NO_TARGET,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    weighted_linear_cross_entropy,
    weighted_sum,
)
from easy_jax.kernels.token_stats import TokenStats

_OTHER_LOSSES = ("frozen_nll", "old_nll")  # of other models, as fields of a batch


class CausalLMLoss:
    """Causal LM loss that also provides a fused weighted sum with a cheaper gradient.

    `causal_lm_loss` is its only instance.

    Args:
      model: a model with `hidden_states`, `head_VD` and `config.final_cap`, like `Transformer`.
      batch: a batch of a packed source; see `__call__`.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> import easy_jax as ej
      >>> config = ej.TransformerConfig("llama", vocab=8, embed=8, mlp=8, layers=1, heads=2,
      ...                               kv_heads=1, head_dim=4)
      >>> examples = ej.TokenSource(tokens=[1, 2, 3], offsets=[0, 3], target_start=[1])
      >>> loader = ej.scoring_loader(ej.PackedSource(examples, row_length=4), 1, rows=np.arange(1))
      >>> model = ej.Transformer(config, rngs=nnx.Rngs(0))
      >>> batch = jax.tree.map(jnp.asarray, next(iter(loader)))
      >>> nll_sum_RS, count_RS = causal_lm_loss(model, batch)
      >>> nll_sum_RS.shape, count_RS.tolist()
      ((1, 1), [[2.0]])
    """

    def __init__(self) -> None:
        self.__qualname__ = "causal_lm_loss"  # its name in loss tables

    def __call__(self, model: Any, batch: Mapping[str, jax.Array]) -> PerExampleLoss:
        """Sums the target tokens' negative log-likelihood over each segment of packed rows.

        Args:
          model: a model with `hidden_states`, `head_VD` and `config.final_cap`.
          batch: a batch of a packed source (`easy_jax.data.packing`). With `token_weight`, every
            token's term is multiplied by its weight, while the count remains the number of
            tokens: the reduction `token_mean` then is FLOW's token-wise objective
            (arXiv:2502.02797).

        Returns:
          `(nll_sum_RS, count_RS)`, float32: sums in nats, and numbers of target tokens.
        """
        nll_sum_RS, count_RS, _ = causal_lm_token_losses(model, batch)
        return nll_sum_RS, count_RS

    def weighted_sum(
        self,
        model: Any,
        batch: Mapping[str, jax.Array],
        coefficients: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    ) -> tuple[jax.Array, jax.Array]:
        """See `WeightedSumLoss`."""
        coefficient_RS, size = coefficients(_count(batch))
        total = weighted_linear_cross_entropy(
            _hidden_states(model, batch),
            model.head_VD(),
            batch["targets"],
            _token_factors(batch, coefficient_RS),
            soft_cap=model.config.final_cap,
        )
        return total, size

    def sums(
        self,
        model: Any,
        batch: Mapping[str, jax.Array],
        coefficients: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
        *,
        rule: Callable[[TokenStats], jax.Array] | None = None,
        more: bool = False,
        frozen: Any = None,
        kl_coefficients: Callable[[jax.Array], jax.Array] | None = None,
        kl_strength: jax.Array | float = 0.0,
    ) -> "TokenSums":
        """Computes the weighted sum with a weighting rule, or a divergence from a frozen model.

        Args:
          model, batch, coefficients: as in `weighted_sum`; the batch may have `frozen_nll`
            and `old_nll`.
          rule: `TokenStats -> w`, which treats each token separately; hashable.
          more: whether the rule reads any of `token_stats.OF_DISTRIBUTION`.
          frozen: the frozen model; None for no divergence.
          kl_coefficients: function from the number of each example's target tokens, [R, S], to the
            factor of the divergence at each of them.
          kl_strength: a further factor of the divergence in the total.
        """
        count_RS = _count(batch)
        coefficient_RS, denominator = coefficients(count_RS)
        factor_RT = _token_factors(batch, coefficient_RS)
        options: dict[str, Any] = {}
        if rule is not None:
            given = {name: batch[name] for name in _OTHER_LOSSES if name in batch}
            options = {"rule": rule, "given": given, "more": more}
        kl_factor_RT = None
        if frozen is not None:
            assert kl_coefficients is not None
            kl_factor_RT = _example_factors(batch, kl_coefficients(count_RS))
            pair = Frozen(_hidden_states(frozen, batch), frozen.head_VD())
            options |= {
                "frozen": jax.lax.stop_gradient(pair),
                "kl_weight_N": kl_strength * kl_factor_RT,
            }
        found = weighted_sum(
            _hidden_states(model, batch),
            model.head_VD(),
            batch["targets"],
            factor_RT,
            soft_cap=model.config.final_cap,
            **options,
        )
        seen_RT = (factor_RT != 0) & (batch["targets"] != NO_TARGET)
        kl = None
        if found.kl_N is not None and kl_factor_RT is not None:
            kl = jnp.sum(jnp.where(kl_factor_RT != 0, kl_factor_RT * found.kl_N, 0.0))
        return TokenSums(found.total, found.loss, denominator, found.rule_N, seen_RT, kl)

    def token_stats(
        self, model: Any, batch: Mapping[str, jax.Array], more: bool = True
    ) -> TokenStats:
        """Returns statistics [R, T] of the target tokens, without tokens of weight 0."""
        factor_RT = _token_factors(batch, jnp.where(batch["mask"], batch["weight"], 0.0))
        target_RT = jnp.where(factor_RT != 0, batch["targets"], NO_TARGET)
        names = (*_OTHER_LOSSES, "segment_ids")
        given = {name: batch[name] for name in names if name in batch}
        arguments = (_hidden_states(model, batch), model.head_VD(), target_RT)
        cap = model.config.final_cap
        if more:
            stats = linear_cross_entropy_stats(*arguments, cap)
            return dataclasses.replace(stats, **given)
        nll_RT = linear_cross_entropy(*arguments, soft_cap=cap)
        return TokenStats(nll_RT, mask=target_RT != NO_TARGET, **given)


class TokenSums(NamedTuple):
    """Result of `CausalLMLoss.sums`.

    Attributes:
      total: sum of weighted losses and divergences, scalar.
      loss: the part of the losses in the total, a constant.
      denominator: number by which the reduction divides `total`.
      rule_RT: the rule's weights; None without a rule.
      seen_RT: target tokens whose weight is not 0, bool.
      kl: sum of the divergences times their coefficients; None without a frozen model.
    """

    total: jax.Array
    loss: jax.Array
    denominator: jax.Array
    rule_RT: jax.Array | None
    seen_RT: jax.Array
    kl: jax.Array | None


causal_lm_loss = CausalLMLoss()


def causal_lm_token_losses(
    model: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `causal_lm_loss` and its terms, the losses of all target tokens.

    Args:
      model: as in `causal_lm_loss`.
      batch: as in `causal_lm_loss`; R rows of T tokens with at most S examples.

    Returns:
      `(nll_sum_RS, count_RS, nll_RT)`, float32, in nats; nll_RT is 0 where there is no target.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> import easy_jax as ej
      >>> config = ej.TransformerConfig("llama", vocab=8, embed=8, mlp=8, layers=1, heads=2,
      ...                               kv_heads=1, head_dim=4)
      >>> examples = ej.TokenSource(tokens=[1, 2, 3], offsets=[0, 3], target_start=[1])
      >>> loader = ej.scoring_loader(ej.PackedSource(examples, row_length=4), 1, rows=np.arange(1))
      >>> model = ej.Transformer(config, rngs=nnx.Rngs(0))
      >>> batch = jax.tree.map(jnp.asarray, next(iter(loader)))
      >>> nll_sum_RS, count_RS, nll_RT = causal_lm_token_losses(model, batch)
      >>> count_RS.tolist(), nll_RT.shape, bool(jnp.allclose(nll_sum_RS[0, 0], nll_RT.sum()))
      ([[2.0]], (1, 4), True)
    """
    nll_RT = linear_cross_entropy(
        _hidden_states(model, batch),
        model.head_VD(),
        batch["targets"],
        soft_cap=model.config.final_cap,
    )
    if "token_weight" in batch:
        weight_RT = batch["token_weight"]
        nll_RT = jnp.where(weight_RT != 0, nll_RT * weight_RT, 0.0)  # 0 removes an infinite loss
    # Masked sums, not a one-hot product, so that a NaN only affects its own example.
    nll_sum_RS = jnp.sum(jnp.where(_in_segment(batch), nll_RT[:, :, None], 0.0), axis=1)
    return nll_sum_RS, _count(batch), nll_RT


def _hidden_states(model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    missing = [name for name in ("hidden_states", "head_VD", "config") if not hasattr(model, name)]
    if missing:
        raise ContractError(
            "causal_lm_loss calls model.hidden_states(tokens, positions, segment_ids) and "
            f"model.head_VD(), and reads model.config.final_cap; {type(model).__name__} has no "
            f"{' and no '.join(missing)}: give a loss function of your own"
        )
    hidden: jax.Array = model.hidden_states(
        batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    return hidden


def _in_segment(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns whether a token belongs to the row's example 1, 2, ..., bool [R, T, S]."""
    segments_S = jnp.arange(1, batch["mask"].shape[1] + 1)
    return batch["segment_ids"][:, :, None] == segments_S[None, None, :]


def _token_factors(batch: Mapping[str, jax.Array], coefficient_RS: jax.Array) -> jax.Array:
    """Returns each token's coefficient times `token_weight`, [R, T]; 0 for padding."""
    factor_RT = _example_factors(batch, coefficient_RS)
    return factor_RT * batch["token_weight"] if "token_weight" in batch else factor_RT


def _example_factors(batch: Mapping[str, jax.Array], coefficient_RS: jax.Array) -> jax.Array:
    """Returns the coefficient of each token's example, [R, T]; 0 for padding."""
    none_R1 = jnp.zeros((coefficient_RS.shape[0], 1), coefficient_RS.dtype)  # for padding
    coefficient_RS = jnp.concatenate([none_R1, coefficient_RS], axis=1)
    return jnp.take_along_axis(coefficient_RS, batch["segment_ids"], axis=1)


def _count(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the number of each example's target tokens, float32 [R, S]."""
    is_target_RT1 = (batch["targets"] != NO_TARGET)[:, :, None]
    return jnp.sum(_in_segment(batch) & is_target_RT1, axis=1, dtype=jnp.float32)
