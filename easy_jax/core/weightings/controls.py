"""Controls: weights made of FLOW's that lack one of its properties."""

import dataclasses
from typing import Literal

import numpy as np

from easy_jax.core.weightings.rule import WEIGHTINGS, Scored, Weighting, Weights

Kind = Literal["uniform", "shuffled", "mean_one"]


@dataclasses.dataclass(frozen=True)
class Control(Weighting):
    """A control of FLOW: `control_weights` of its weights.

    `uniform` keeps the size of the steps and not which examples count; `shuffled` keeps the
    distribution of the weights too; `mean_one` keeps which examples count and not the smaller
    steps.
    """

    kind: Kind

    def __call__(self, table: Scored, seed: int = 0) -> Weights:
        return Weights(control_weights(table.flow_weights(), self.kind, seed))


def control_weights(
    weight_N: np.ndarray, kind: Literal["uniform", "shuffled", "mean_one"], seed: int
) -> np.ndarray:
    """Controls that separate which examples FLOW favours from the smaller step it takes.

    Args:
      weight_N: FLOW's weights.
      kind: `uniform`, their mean for every example: the smaller step alone; `shuffled`,
        the same weights on random examples; `mean_one`, divided by their mean: the choice
        of examples without the smaller step.
      seed: of the shuffle.

    Returns:
      Weights of the same shape and dtype.

    Raises:
      ValueError: an unknown kind; `mean_one` of weights whose mean is not positive.

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


WEIGHTINGS.register("uniform")(Control("uniform"))
WEIGHTINGS.register("shuffled")(Control("shuffled"))
WEIGHTINGS.register("mean_one")(Control("mean_one"))
