"""Weights that a weighting computes from the current model in a training step.

A weighting that treats each token separately is applied between loss and gradient, in `core.step`
and the fused head. One that reads the global batch, or means over examples, needs an additional
forward pass; `weighted_batch` then multiplies its weights into those of the batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from easy_jax.core import contract
from easy_jax.core.causal_lm import CausalLMLoss
from easy_jax.core.losses import (
    ContractError,
    LossFn,
    classification_loss,
    classification_stats,
)
from easy_jax.core.weightings import reductions
from easy_jax.core.weightings.rule import Weighting
from easy_jax.io.checks import ConfigError
from easy_jax.io.code_fingerprint import name_of
from easy_jax.kernels.token_stats import TokenStats

Sums = dict[str, jax.Array]


def check(weighting: Weighting, loss_fn: LossFn) -> None:
    """Checks that a step with a loss function can compute what a weighting needs.

    Raises:
      ConfigError: the weighting does not read the current model.
      ContractError: the weighting reads the distribution, but the loss function returns only
        losses.
    """
    if not weighting.reads_model():
        raise ConfigError(
            f"{weighting} does not read the current model: give `fit` the loss table, or "
            "multiply weighting.of_table(table) into the batches"
        )
    has_logits = isinstance(loss_fn, CausalLMLoss) or loss_fn is classification_loss
    if weighting.reads_distribution() and not has_logits:
        raise ContractError(
            f"{weighting} reads the model's distribution, and {name_of(loss_fn)} gives losses "
            "only: take causal_lm_loss or classification_loss, or a weighting of the loss alone"
        )


def losses_and_stats(
    loss_fn: LossFn, more: bool, model: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, TokenStats]:
    """Returns `(loss_sum_B, count_B, stats)` for a loss function with one value per example.

    Args:
      more: whether the statistics include those of the distribution.
      loss_fn, model, batch: as in the training step.
    """
    if loss_fn is classification_loss:
        stats = classification_stats(model, batch, more)
        stats = dataclasses.replace(stats, old_nll=batch.get("old_nll"))
        return stats.nll, jnp.ones_like(stats.nll), stats
    loss_sum_B, count_B = contract.call(loss_fn, model, batch)
    nll_B = loss_sum_B / jnp.where(count_B > 0, count_B, 1.0)
    seen_B = batch["mask"] & (batch["weight"] != 0)
    stats = TokenStats(nll_B, batch.get("frozen_nll"), mask=seen_B, old_nll=batch.get("old_nll"))
    return loss_sum_B, count_B, stats


def statistics(
    loss_fn: LossFn, more: bool, model: Any, batch: Mapping[str, jax.Array]
) -> TokenStats:
    """Returns the statistics of a batch, `[B]`, or of packed text `[R, T]`."""
    if isinstance(loss_fn, CausalLMLoss):
        return loss_fn.token_stats(model, batch, more)
    return losses_and_stats(loss_fn, more, model, batch)[2]


def with_old_losses(
    loss_fn: LossFn, old_model: Any, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Adds `old_nll` to a batch: the losses of the model of some steps ago, as constants."""
    old = statistics(loss_fn, False, old_model, batch)
    return {**batch, "old_nll": jax.lax.stop_gradient(old.nll)}


def weighted_batch(
    weighting: Weighting, stats: TokenStats, batch: Mapping[str, jax.Array]
) -> tuple[dict[str, jax.Array], Sums]:
    """Multiplies a weighting's weights into those of a global batch.

    Args:
      weighting: the weighting to evaluate.
      stats: statistics of the global batch, `[B]` or `[R, T]`.
      batch: the global batch, whose `weight` is `[B]` or `[R, S]`.

    Returns:
      `(batch, sums)`: a copy of the batch with the new weights, and the result of `measured`.
    """
    batch = dict(batch)
    if weighting.level == "token" and stats.nll.ndim == 2:
        weight_RT = weighting(stats)
        batch["token_weight"] = weight_RT * batch.get("token_weight", jnp.ones_like(weight_RT))
        return batch, measured(weight_RT, reductions.mask(stats))
    if stats.nll.ndim == 2:
        stats = _example_means(stats, batch["weight"].shape[1])
    weight = weighting(stats)
    batch["weight"] = batch["weight"] * weight
    return batch, measured(weight, reductions.mask(stats))


def _example_means(stats: TokenStats, segments: int) -> TokenStats:
    """Returns the means of statistics over each example's target tokens, [R, S]."""
    fields = {}
    there = None
    for field in dataclasses.fields(TokenStats):
        value = getattr(stats, field.name)
        if value is None or field.name in ("mask", "segment_ids", "step"):
            continue
        mean, there = reductions.example_means(value, stats)
        fields[field.name] = mean[:, 1 : segments + 1]  # segment 0 is the padding
    assert there is not None
    return TokenStats(**fields, mask=there[:, 1 : segments + 1], step=stats.step)


def measured(weight: jax.Array, where: jax.Array) -> Sums:
    """Returns sums over the targets' weights, which can be added up over micro-batches."""
    weight = jnp.where(where, weight, 0.0)
    is_bad = ~(jnp.isfinite(weight) & (weight >= 0))
    values = {
        "sum": weight,
        "squares": weight * weight,
        "zeros": where & (weight == 0),
        "count": where,
        "bad": is_bad,
    }
    return {name: jnp.sum(value, dtype=jnp.float32) for name, value in values.items()}


def metrics(sums: Sums) -> dict[str, jax.Array]:
    """Returns the metrics of a step's weights; empty without a weighting.

    They are `weight_mean`, `weight_effective` (the effective sample size (sum w)^2 / sum w^2 as a
    share of the targets), `weight_zero` (the share of targets with weight 0), and `weight_bad`
    (the number of weights that are negative or not finite; `fit` stops if there are any).
    """
    if not sums:
        return {}
    count = jnp.maximum(sums["count"], 1.0)
    squares = jnp.where(sums["squares"] > 0, sums["squares"], 1.0)
    return {
        "weight_mean": sums["sum"] / count,
        "weight_effective": sums["sum"] * sums["sum"] / squares / count,
        "weight_zero": sums["zeros"] / count,
        "weight_bad": sums["bad"],
    }


def over_micro_batches(
    function: Callable[[dict[str, jax.Array]], TokenStats], split: dict[str, jax.Array]
) -> TokenStats:
    """Computes statistics of each micro-batch, and restores the order of the rows.

    Args:
      function: returns the statistics of a micro-batch.
      split: a batch as `[parts, rows, ...]`; micro-batch m has the rows m, m + parts, ...
    """
    stats = jax.lax.map(function, split)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), stats)
