"""Controls: another weighting's weights, changed so that they lack one of their properties."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from easy_jax.core.weightings import reductions
from easy_jax.core.weightings.rule import WEIGHTINGS, Level, Scored, Weighting, Weights, get
from easy_jax.io.checks import ConfigError
from easy_jax.kernels.token_stats import TokenStats

Kind = Literal["uniform", "shuffled", "mean_one"]


@dataclasses.dataclass(frozen=True)
class Control(Weighting):
    """Control of another weighting: its weights without one of their properties.

    `uniform` keeps the mean weight, and so the size of the steps, but favours no examples or
    tokens; `shuffled` keeps the distribution of the weights as well, but assigns them at random;
    `mean_one` keeps the ratios of the weights, but not the smaller steps. Means and permutations
    are over the data set for rules of frozen losses, and over the target tokens (or examples) of
    the global batch for rules that read the current model.

    Attributes:
      kind: the control, `uniform`, `shuffled` or `mean_one`.
      of: the weighting whose weights are changed.
      seed: random seed of the permutations; for a data set, the experiment's seed is added.

    Example:
      >>> stats = TokenStats(-jnp.log(jnp.array([0.25, 0.75])))
      >>> [round(float(w), 2) for w in get("uniform", of="dft")(stats)]
      [0.5, 0.5]
      >>> [round(float(w), 2) for w in get("mean_one", of="dft")(stats)]
      [0.5, 1.5]
    """

    kind: Kind
    of: Weighting
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if "frozen_model" in self.of.needs:
            raise ConfigError(f"there is no control of {self.of}, whose weights no table has")

    @property
    def level(self) -> Level:  # type: ignore[override]
        """Level of the other weighting."""
        return self.of.level

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Needs of the other weighting, and the whole batch if it reads the current model."""
        return self.of.needs | ({"batch"} if self.of.reads_model() else set())

    def old_steps(self) -> int:
        """See `Weighting.old_steps`."""
        return self.of.old_steps()

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        weight = self.of(stats)
        where = reductions.mask(stats)
        if self.kind == "shuffled":
            key = jax.random.key(self.seed)
            if stats.step is not None:
                key = jax.random.fold_in(key, stats.step)
            return _shuffled(weight, where, key)
        mean = reductions.mean(weight, where)
        if self.kind == "uniform":
            return jnp.where(where, mean, 0.0)
        return weight / jnp.where(mean > 0, mean, 1.0)

    def fit(self, table: Any) -> "Control":
        """See `Weighting.fit`."""
        return dataclasses.replace(self, of=self.of.fit(table))

    def of_table(self, table: Scored, seed: int = 0) -> Weights:
        """See `Weighting.of_table`."""
        weight_N, token_weight = self.of.of_table(table, seed)
        seed += self.seed
        if token_weight is not None:
            values = control_weights(token_weight.values, self.kind, seed)
            return Weights(weight_N, dataclasses.replace(token_weight, values=values))
        assert weight_N is not None
        scored_N = ~np.isnan(weight_N)  # dropped examples keep NaN
        weight_N[scored_N] = control_weights(weight_N[scored_N], self.kind, seed)
        return Weights(weight_N)


def _shuffled(weight: jax.Array, where: jax.Array, key: jax.Array) -> jax.Array:
    """Permutes the weights of the targets among themselves."""
    where, shape = where.reshape(-1), weight.shape
    random = jax.random.uniform(key, where.shape)
    drawn = jnp.argsort(jnp.where(where, random, 2.0))  # targets first, in random order
    places = jnp.argsort(~where, stable=True)  # targets first, in their order
    shuffled = jnp.zeros_like(weight.reshape(-1)).at[places].set(weight.reshape(-1)[drawn])
    return shuffled.reshape(shape)


def _control(kind: Kind, of: str = "flow", seed: int = 0, **options: Any) -> Control:
    """Returns a control of a weighting that is given by its name and its options."""
    return Control(kind, get(of, **options), seed)


def control_weights(
    weight_N: np.ndarray, kind: Literal["uniform", "shuffled", "mean_one"], seed: int
) -> np.ndarray:
    """Returns control weights that separate FLOW's choice of examples from its smaller steps.

    Args:
      weight_N: FLOW's weights.
      kind: `uniform`, the mean weight for every example: only the smaller steps; `shuffled`, the
        same weights on random examples; `mean_one`, the weights divided by their mean: the choice
        of examples without the smaller steps.
      seed: random seed of the shuffle.

    Returns:
      Weights of the same shape and dtype.

    Raises:
      ValueError: the kind is unknown; or, for `mean_one`, the mean of the weights is not positive.

    Example:
      >>> control_weights(np.array([1.0, 3.0]), "uniform", seed=0)
      array([2., 2.])
    """
    weight_N = np.asarray(weight_N)
    if kind == "mean_one" and not weight_N.mean(dtype=np.float64) > 0:
        raise ValueError("the mean of the weights is 0 or NaN: they cannot be divided by it")
    if kind == "uniform":
        return np.full_like(weight_N, weight_N.mean(dtype=np.float64))
    if kind == "shuffled":
        return np.random.default_rng(seed).permutation(weight_N)
    if kind == "mean_one":
        return (weight_N / weight_N.mean(dtype=np.float64)).astype(weight_N.dtype)
    raise ValueError(f"kind is {kind!r}; it must be 'uniform', 'shuffled' or 'mean_one'")


WEIGHTINGS.register("uniform")(functools.partial(_control, "uniform"))
WEIGHTINGS.register("shuffled")(functools.partial(_control, "shuffled"))
WEIGHTINGS.register("mean_one")(functools.partial(_control, "mean_one"))
