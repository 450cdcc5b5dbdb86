"""Weightings that read the current model: computed in every step, between loss and gradient.

Throughout, p is the current model's probability of the target, p0 the frozen model's, H the
entropy of the current model's distribution and C its collision probability. No gradient passes
through the weights. Losses are divided by the number of target tokens, not by the sum of the
weights, so smaller weights give smaller steps; the control `mean_one` separates the two effects.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from easy_jax.core.weightings import reductions
from easy_jax.core.weightings.frozen import check_share, frozen, require_probability
from easy_jax.core.weightings.rule import WEIGHTINGS, Level, Weighting
from easy_jax.io.checks import require
from easy_jax.kernels.token_stats import TokenStats

_TINY = 1e-6  # nats; lower limit of the median, for a model that is certain of all targets


def _check_positive(name: str, value: float) -> None:
    ok = bool(np.isfinite(value)) and value > 0
    require(ok, f"the option {name}", value, "positive and finite")


@WEIGHTINGS.register("dft")
@dataclasses.dataclass(frozen=True)
class Dft(Weighting):
    """Dynamic fine-tuning: w = p.

    Its only option is `floor`. The gradient is that of minimising -p. It harms models that do not
    know the task yet: where all targets are improbable, little is learnt. Source:
    arXiv:2508.05629.

    Example:
      >>> [round(float(w), 2) for w in Dft()(TokenStats(-jnp.log(jnp.array([0.9, 0.1]))))]
      [0.9, 0.1]
    """

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        return jnp.exp(-stats.nll)


@WEIGHTINGS.register("power")
@dataclasses.dataclass(frozen=True)
class Power(Weighting):
    """A power of the probability: w = p^exponent.

    The gradient is that of minimising (1 - p^a) / a, where a is the exponent; 0 is plain
    fine-tuning and 1 is `dft`. Source: arXiv:2510.00526, which recommends large exponents for
    strong base models and small ones for weak base models.

    Attributes:
      exponent: a, at least 0.

    Example:
      >>> [round(float(w), 2) for w in Power(0.5)(TokenStats(-jnp.log(jnp.array([0.81, 0.04]))))]
      [0.9, 0.2]
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = bool(np.isfinite(self.exponent)) and self.exponent >= 0
        require(ok, "the option exponent", self.exponent, "finite and at least 0")

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        return jnp.exp(-self.exponent * stats.nll)


@WEIGHTINGS.register("talr")
@dataclasses.dataclass(frozen=True)
class Talr(Weighting):
    """Token-adaptive loss reweighting: w = max(p^(1 / tau), floor), with a floor of 0.01.

    By default, tau (`temperature`) is the median, over the sequences of the global batch, of their
    mean loss under the current model; a step then needs a forward pass over the whole batch before
    its gradient. Source: arXiv:2509.20758.

    Attributes:
      temperature: tau, nats; None: the batch's median.
      floor: see `Weighting`.

    Example:
      >>> [round(float(w), 2) for w in Talr(1.0)(TokenStats(-jnp.log(jnp.array([0.9, 0.001]))))]
      [0.9, 0.01]
    """

    temperature: float | None = None
    floor: float = dataclasses.field(default=0.01, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None:
            _check_positive("temperature", self.temperature)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Needs of the rule: includes the whole batch unless the temperature is given."""
        return frozenset({"current"} | ({"batch"} if self.temperature is None else set()))

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        tau: jax.Array | float
        if self.temperature is None:
            means, is_there = reductions.example_means(stats.nll, stats)
            tau = jnp.maximum(reductions.median(means, is_there), _TINY)
        else:
            tau = self.temperature
        return jnp.exp(-stats.nll / tau)


@WEIGHTINGS.register("deft")
@dataclasses.dataclass(frozen=True)
class Deft(Weighting):
    """Dynamic entropy fine-tuning: w = p^C, C the collision probability of the distribution.

    Its only option is `floor`. The gradient is that of minimising (1 - p^C) / C with C fixed:
    close to plain fine-tuning where the model is uncertain, and to `dft` where it is certain.
    Source: arXiv:2602.11424.

    Example:
      >>> stats = TokenStats(-jnp.log(jnp.array([0.25, 0.25])), collision=jnp.array([0.5, 1.0]))
      >>> [round(float(w), 2) for w in Deft()(stats)]
      [0.5, 0.25]
    """

    needs = frozenset({"current", "collision"})

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        assert stats.collision is not None
        return jnp.exp(-stats.collision * stats.nll)


@WEIGHTINGS.register("eaft")
@dataclasses.dataclass(frozen=True)
class Eaft(Weighting):
    """Entropy-adaptive fine-tuning: w = min(1, H / ln 20).

    Its only option is `floor`. It gives small weights to tokens where the model is certain, which
    the data may contradict. Source: arXiv:2601.02151. The authors use the entropy of the 20
    largest logits, renormalised, over ln 20; this rule uses the entropy of the full distribution,
    which the fused head computes without an extra pass. LLaMA-Factory divides by 3.0, which is
    ln 20 rounded; axolotl does not divide.

    Example:
      >>> stats = TokenStats(jnp.ones(2), entropy=jnp.log(jnp.array([1.0, 400.0])))
      >>> Eaft()(stats).tolist()
      [0.0, 1.0]
    """

    needs = frozenset({"current", "entropy"})

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        assert stats.entropy is not None
        return jnp.minimum(stats.entropy / math.log(20.0), 1.0)


@WEIGHTINGS.register("profit")
@dataclasses.dataclass(frozen=True)
class ProFit(Weighting):
    """Trains on probable tokens only: w = [p >= threshold].

    Source: arXiv:2601.09195. A token below the threshold gets no gradient; its probability can
    only rise through training on other tokens.

    Attributes:
      threshold: minimum probability of the tokens that are trained on.

    Example:
      >>> ProFit(threshold=0.1)(TokenStats(-jnp.log(jnp.array([0.9, 0.01])))).tolist()
      [1.0, 0.0]
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_probability(self.threshold)

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        return (jnp.exp(-stats.nll) >= self.threshold).astype(jnp.float32)


@WEIGHTINGS.register("iw")
@dataclasses.dataclass(frozen=True)
class Iw(Weighting):
    """Importance-weighted fine-tuning by sequence: w_i = clip(exp(scale * mean(log p/p0)), 0, limit).

    The mean is over an example's target tokens. Weights grow for examples that have been learnt,
    so that training sharpens the distribution. Source: arXiv:2507.12856; the defaults of scale and
    limit are those of the authors' runs.

    Attributes:
      scale: factor of the mean log ratio.
      limit: maximum weight.

    Example:
      >>> stats = TokenStats(jnp.array([1.0, 0.0]), frozen_nll=jnp.array([1.0, 9.0]))
      >>> [round(float(w), 2) for w in Iw()(stats)]
      [1.0, 16.0]
    """  # noqa: E501

    scale: float = 1.0
    limit: float = 16.0
    level: ClassVar[Level] = "example"
    needs = frozenset({"current", "frozen", "batch"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("scale", self.scale)
        _check_positive("limit", self.limit)

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        ratio = self.scale * (frozen(stats) - stats.nll)
        return jnp.exp(jnp.minimum(ratio, math.log(self.limit)))


@WEIGHTINGS.register("iw_token")
@dataclasses.dataclass(frozen=True)
class IwToken(Weighting):
    """Importance-weighted fine-tuning by token: w = clip(p / p0, low, high).

    Source: arXiv:2507.12856, with the authors' limits.

    Attributes:
      low, high: minimum and maximum weight.

    Example:
      >>> stats = TokenStats(jnp.array([1.0, 0.0]), frozen_nll=jnp.array([1.0, 9.0]))
      >>> [round(float(w), 2) for w in IwToken()(stats)]
      [1.0, 1.8]
    """

    low: float = 0.2
    high: float = 1.8
    needs = frozenset({"current", "frozen"})

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = 0.0 <= self.low <= self.high < math.inf
        require(ok, "the option low", self.low, f"between 0 and high, which is {self.high}")

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        ratio = jnp.minimum(frozen(stats) - stats.nll, 80.0)  # e^80 is above any limit, and finite
        return jnp.clip(jnp.exp(ratio), self.low, self.high)


@WEIGHTINGS.register("excess")
@dataclasses.dataclass(frozen=True)
class Excess(Weighting):
    """Rho-1's selective language modelling: w = 1 for the largest excess losses of the batch.

    The excess is the current model's loss minus that of a reference model trained on high-quality
    data, so `frozen_nll` must be that of the reference model. A share of the global batch's target
    tokens is selected, rounded up; of equal ones, the first. Source: arXiv:2404.07965.

    Attributes:
      share: share of the target tokens that are trained on.

    Example:
      >>> stats = TokenStats(jnp.array([1.0, 3.0]), frozen_nll=jnp.array([1.0, 1.0]))
      >>> Excess(share=0.5)(stats).tolist()
      [0.0, 1.0]
    """

    share: float = 0.7
    needs = frozenset({"current", "frozen", "batch"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        where = reductions.mask(stats).reshape(-1)
        excess = jnp.where(where, (stats.nll - frozen(stats)).reshape(-1), -jnp.inf)
        count = jnp.sum(where, dtype=jnp.float32)
        chosen = jnp.ceil(self.share * count - 1e-3)
        rank = jnp.argsort(jnp.argsort(-excess, stable=True))  # equal ones by position
        return (rank < chosen).astype(jnp.float32).reshape(stats.nll.shape)


@WEIGHTINGS.register("psft")
@dataclasses.dataclass(frozen=True)
class Psft(Weighting):
    """Proximal fine-tuning: w = r [r <= limit], r = p / p_old.

    p_old is the target's probability under the model some steps ago. The gradient is that of
    minimising -min(r, clip(r, 0.8, limit)): a token's probability is not raised further once its
    ratio r exceeds the limit. Source: arXiv:2508.17784.

    Attributes:
      limit: the largest ratio r with a weight.
      refresh_steps: after how many steps the current model becomes the old one, at least 1. With 1
        all ratios are 1, and training is plain.

    Example:
      >>> stats = TokenStats(jnp.array([1.0, 0.5]), old_nll=jnp.array([1.0, 1.0]))
      >>> Psft()(stats).tolist()
      [1.0, 0.0]
    """

    limit: float = 1.28
    refresh_steps: int = 8
    needs = frozenset({"current", "old"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("limit", self.limit)
        ok = isinstance(self.refresh_steps, int) and self.refresh_steps >= 1
        require(ok, "the option refresh_steps", self.refresh_steps, "a whole number of at least 1")

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        assert stats.old_nll is not None
        ratio = stats.old_nll - stats.nll
        below = ratio <= math.log(self.limit)
        return jnp.where(below, jnp.exp(jnp.where(below, ratio, 0.0)), 0.0)
