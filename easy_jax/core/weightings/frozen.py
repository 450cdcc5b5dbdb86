"""Weightings that only read the frozen model's losses; computed once, from the loss table."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from easy_jax.core.weightings import reductions
from easy_jax.core.weightings.rule import (
    WEIGHTINGS,
    Level,
    Scored,
    Weighting,
    Weights,
    all_but_dropped,
)
from easy_jax.io.checks import require
from easy_jax.kernels.token_stats import TokenStats


def frozen(stats: TokenStats) -> jax.Array:
    """Returns the frozen model's losses, which must not be None."""
    assert stats.frozen_nll is not None
    return stats.frozen_nll


def check_share(share: float) -> None:
    """Raises ConfigError unless a share is in (0, 1]."""
    require(0.0 < share <= 1.0, "the option share", share, "above 0 and at most 1")


@WEIGHTINGS.register("flow")
@dataclasses.dataclass(frozen=True)
class Flow(Weighting):
    """FLOW by example: w_i = exp(-f_i / tau).

    f_i is the frozen model's mean loss of example i, and tau (`temperature`) is by default the
    median over all examples. Source: arXiv:2502.02797, algorithm 1. It is harmful if only examples
    of high loss contain what the model should learn.

    Attributes:
      temperature: tau, in nats; None: the median.

    Example:
      >>> losses = jnp.array([0.0, 1.0, 2.0])
      >>> [round(float(w), 4) for w in Flow()(TokenStats(losses, frozen_nll=losses))]
      [1.0, 0.3679, 0.1353]
    """

    temperature: float | None = None
    level: ClassVar[Level] = "example"
    needs = frozenset({"frozen"})

    def __post_init__(self) -> None:
        super().__post_init__()
        tau = self.temperature
        ok = tau is None or (np.isfinite(tau) and tau > 0)
        require(bool(ok), "the option temperature", tau, "positive and finite, in nats")

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`; without a temperature, uses the median of these statistics."""
        loss = frozen(stats)
        if self.temperature is None:
            return jnp.exp(-loss / reductions.median(loss, reductions.mask(stats)))
        return jnp.exp(-loss / jnp.asarray(self.temperature, loss.dtype))

    def fit(self, table: Any) -> "Flow":
        """See `Weighting.fit`."""
        tau = table.temperature if self.temperature is None else self.temperature
        return dataclasses.replace(self, temperature=tau)

    def of_table(self, table: Scored, seed: int = 0) -> Weights:
        """See `Weighting.of_table`; warns if all weights are equal, or some are 0."""
        return Weights(np.maximum(table.flow_weights(self.temperature), np.float32(self.floor)))


@WEIGHTINGS.register("flow_token")
@dataclasses.dataclass(frozen=True)
class FlowToken(Flow):
    """FLOW by token: w_t = exp(-f_t / tau).

    f_t is the frozen model's loss of token t, and tau (`temperature`) is by default the median over
    all target tokens. Source: arXiv:2502.02797. Losses are divided by the number of tokens, not by
    the sum of the weights.

    Attributes:
      temperature: tau, in nats; None: the median.

    Example:
      >>> losses = jnp.array([0.0, 1.0])
      >>> [round(float(w), 4) for w in FlowToken(1.0)(TokenStats(losses, frozen_nll=losses))]
      [1.0, 0.3679]
    """

    level = "token"

    def fit(self, table: Any) -> "FlowToken":
        """See `Weighting.fit`."""
        tau = table.token_temperature if self.temperature is None else self.temperature
        return dataclasses.replace(self, temperature=tau)

    def of_table(self, table: Scored, seed: int = 0) -> Weights:
        """See `Weighting.of_table`; warns of examples whose token weights are all 0."""
        weights = table.flow_token_weights(self.temperature)
        if self.floor:
            values = np.maximum(weights.values, np.float32(self.floor))
            weights = dataclasses.replace(weights, values=values)
        return Weights(all_but_dropped(table), weights)


@WEIGHTINGS.register("flow_online")
@dataclasses.dataclass(frozen=True)
class FlowOnline(Flow):
    """FLOW on each training batch: w_i = exp(-f(x_i) / tau), x_i the transformed image.

    The frozen model computes f in every step, on the transformed images; tau is the median of the
    loss table. Source: the authors' code (`vision/FLOW_ft.py`). Each step needs an additional
    forward pass.

    Attributes:
      temperature: tau, in nats; None: the median.

    Example:
      >>> FlowOnline().needs == {"frozen", "frozen_model"}
      True
    """

    needs = frozenset({"frozen", "frozen_model"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.floor == 0.0, "the option floor", self.floor, "0 for flow_online")

    def of_table(self, table: Scored, seed: int = 0) -> Weights:
        """Returns 1 for every example; the weights are computed in each step (`OnlineWeights`)."""
        return Weights(all_but_dropped(table))


@WEIGHTINGS.register("stm")
@dataclasses.dataclass(frozen=True)
class Stm(Weighting):
    """Selective token masking: w_t = [p0_t >= threshold], p0 the frozen model's probability.

    The default, 0.4, is the authors' perplexity of 2.5. Source: arXiv:2501.14315. It is harmful if
    the new task's words are improbable under the frozen model: they are never learnt.

    Attributes:
      threshold: minimum probability of the tokens that are trained on.

    Example:
      >>> losses = -jnp.log(jnp.array([0.5, 0.3]))
      >>> Stm()(TokenStats(losses, frozen_nll=losses)).tolist()
      [1.0, 0.0]
    """

    threshold: float = 0.4
    needs = frozenset({"frozen"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_probability(self.threshold)

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        return (jnp.exp(-frozen(stats)) >= self.threshold).astype(jnp.float32)


def require_probability(threshold: float) -> None:
    """Raises ConfigError unless a threshold is in [0, 1]."""
    require(0.0 <= threshold <= 1.0, "the option threshold", threshold, "a probability")


@WEIGHTINGS.register("easiest")
@dataclasses.dataclass(frozen=True)
class Easiest(Weighting):
    """Trains on the share of examples of lowest frozen loss: w_i = [f_i <= q].

    q is the quantile `share` of the losses f in the loss table. This is FLOW with a hard
    threshold; examples that are not selected are never trained on.

    Attributes:
      share: share of the examples or tokens that are trained on.
      by: what is selected, `example` or `token`.
      threshold: q, in nats, instead of the share.

    Example:
      >>> losses = jnp.array([0.5, 3.0, 1.0])
      >>> Easiest(share=0.5)(TokenStats(losses, frozen_nll=losses)).tolist()
      [1.0, 0.0, 1.0]
    """

    share: float = 0.7
    by: Literal["example", "token"] = "example"
    threshold: float | None = dataclasses.field(default=None, kw_only=True)
    needs = frozenset({"frozen"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)
        ok = self.by in ("example", "token")
        require(ok, "the option by", self.by, "'example' or 'token'")

    @property
    def level(self) -> Level:  # type: ignore[override]
        """Level of the weights, `by`."""
        return self.by

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`; without `fit`, uses the quantile of these statistics."""
        loss = frozen(stats)
        if self.threshold is None:
            limit = reductions.quantile(loss, reductions.mask(stats), self._quantile())
        else:
            limit = jnp.asarray(self.threshold, loss.dtype)
        return self._chosen(loss, limit).astype(jnp.float32)

    def fit(self, table: Any) -> "Easiest":
        """See `Weighting.fit`."""
        if self.threshold is not None:
            return self
        loss = table.loss_N() if self.by == "example" else table.token_losses().values
        limit = float(np.nanquantile(loss, self._quantile()))
        return dataclasses.replace(self, threshold=limit)

    def _quantile(self) -> float:
        return self.share

    @staticmethod
    def _chosen(loss: jax.Array, limit: jax.Array) -> jax.Array:
        return loss <= limit


@WEIGHTINGS.register("hardest")
@dataclasses.dataclass(frozen=True)
class Hardest(Easiest):
    """Trains on the share of examples of highest frozen loss: w_i = [f_i >= q].

    q is the quantile `1 - share` of the losses. It is the opposite of `easiest`, for comparison.

    Attributes:
      share, by, threshold: as in `Easiest`.

    Example:
      >>> losses = jnp.array([0.5, 3.0, 1.0])
      >>> Hardest(share=0.5)(TokenStats(losses, frozen_nll=losses)).tolist()
      [0.0, 1.0, 1.0]
    """

    def _quantile(self) -> float:
        return 1.0 - self.share

    @staticmethod
    def _chosen(loss: jax.Array, limit: jax.Array) -> jax.Array:
        return loss >= limit
