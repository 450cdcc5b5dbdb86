"""What a weighting is, and the registry of those that a configuration can name."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from easy_jax.io.registry import Registry


@runtime_checkable
class Scored(Protocol):
    """A complete loss table, as `easy_jax.LossTable` is."""

    def loss_N(self) -> np.ndarray: ...

    def flow_weights(self, tau: float | None = None) -> np.ndarray: ...

    def flow_token_weights(self, tau: float | None = None) -> Any: ...


class Weights(NamedTuple):
    """Weights of a data set, as `easy_jax.fit` takes them.

    Attributes:
      weight_N: of examples, by id, float32; NaN leaves an example out. None: all 1.
      token_weight: of target tokens, by example id (`easy_jax.Ragged`). None: all 1.
    """

    weight_N: np.ndarray | None = None
    token_weight: Any = None


@dataclasses.dataclass(frozen=True)
class Weighting:
    """A rule that gives examples or tokens their weights; its options are its fields.

    The docstring of an entry has the formula, its source, and when it hurts.

    Attributes:
      level: what is weighted, examples or the tokens of packed text; none: nothing.
      needs: `table`: the frozen model's losses, scored once before training; `batch`: the frozen
        model itself, on every batch of training.
    """

    level: ClassVar[Literal["none", "example", "token"]] = "example"
    needs: ClassVar[frozenset[str]] = frozenset({"table"})

    def __call__(self, table: Scored, seed: int = 0) -> Weights:
        """Returns the weights of a scored data set; `seed` is of what is drawn at random."""
        raise NotImplementedError


WEIGHTINGS: Registry[Weighting] = Registry("weighting")


@dataclasses.dataclass(frozen=True)
class Unweighted(Weighting):
    """Plain fine-tuning: w = 1 for every example."""

    level = "none"
    needs = frozenset()

    def __call__(self, table: Scored | None = None, seed: int = 0) -> Weights:
        return Weights()


WEIGHTINGS.register("none")(Unweighted())
