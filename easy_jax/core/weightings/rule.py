"""Base class of weightings, their registry, and custom weightings.

A weighting is a pure function of `TokenStats` to weights. One that reads only the frozen model's
losses is evaluated once, on the loss table (`of_table`); one that reads the current model is
evaluated in every training step, between the loss and its gradient (`easy_jax.core.step`).
"""

import dataclasses
import difflib
import inspect
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from easy_jax.io.checks import ConfigError, require
from easy_jax.io.registry import Registry
from easy_jax.kernels import token_stats
from easy_jax.kernels.token_stats import TokenStats

Level = Literal["none", "example", "token"]
# Possible needs of a weighting: losses of the current model, the frozen model and the model some
# steps ago; statistics of the current model's distribution; the whole global batch at once; and,
# for random transforms of images, the frozen model itself in every step.
STATISTICS = {"current": "nll", "frozen": "frozen_nll", "old": "old_nll"} | {
    name: name for name in token_stats.OF_DISTRIBUTION
}
NEEDS = (*STATISTICS, "batch", "frozen_model")


@runtime_checkable
class Scored(Protocol):
    """Protocol of a complete loss table, such as `easy_jax.LossTable`; it also has the medians
    `temperature` and, with token losses, `token_temperature`."""

    def loss_N(self) -> np.ndarray: ...

    def token_losses(self) -> Any: ...

    def flow_weights(self, tau: float | None = None) -> np.ndarray: ...

    def flow_token_weights(self, tau: float | None = None) -> Any: ...


class Weights(NamedTuple):
    """Weights of a data set, in the form of the arguments of `easy_jax.fit`.

    Attributes:
      weight_N: float32 weights by example id; NaN leaves an example out. None: all 1.
      token_weight: weights of target tokens by example id (`easy_jax.Ragged`). None: all 1.
    """

    weight_N: np.ndarray | None = None
    token_weight: Any = None


@dataclasses.dataclass(frozen=True)
class Weighting:
    """Base class of rules that compute weights of examples or tokens; its fields are options.

    A subclass defines `rule`. Its docstring gives the formula, the source, and when it is harmful.
    Instances must be hashable, because they are compiled into the training step.

    Attributes:
      floor: minimum weight.
      level: what is weighted: examples, from means over their target tokens, or tokens.
      needs: the inputs that `rule` reads, out of `NEEDS`.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Half(Weighting):
      ...     def rule(self, stats):
      ...         return jnp.full_like(stats.nll, 0.5)
      >>> (Half() * Half())(TokenStats(jnp.array([3.0]))).tolist()
      [0.25]
    """

    floor: float = dataclasses.field(default=0.0, kw_only=True)
    level: ClassVar[Level] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"current"})

    def __post_init__(self) -> None:
        ok = np.isfinite(self.floor) and self.floor >= 0
        require(bool(ok), "the option floor", self.floor, "finite and at least 0")

    def __call__(self, stats: TokenStats) -> jax.Array:
        """Returns the weights, float32 in the shape of `stats.nll`; 0 where the mask is False.

        No gradient passes through them.

        Raises:
          ConfigError: statistics that the rule needs are None.
        """
        missing = [
            STATISTICS[name]
            for name in sorted(self.needs & STATISTICS.keys())
            if getattr(stats, STATISTICS[name]) is None
        ]
        if missing:
            raise ConfigError(f"{self} needs the statistics {', '.join(missing)}, which are None")
        stats = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, stats))
        weight = token_stats.weights(self._floored, stats)
        return jax.lax.stop_gradient(weight)

    def _floored(self, stats: TokenStats) -> jax.Array:
        weight = self.rule(stats)
        return jnp.maximum(weight, self.floor) if self.floor else weight

    def rule(self, stats: TokenStats) -> jax.Array:
        """Returns the weight of every entry, before `floor` and mask are applied."""
        raise NotImplementedError

    def fit(self, table: Any) -> "Weighting":
        """Returns the weighting with options computed from the loss table, such as a median."""
        del table
        return self

    def of_table(self, table: Scored, seed: int = 0) -> Weights:
        """Returns the weights of a scored data set; for rules that only read frozen losses.

        Args:
          table: the loss table of the frozen model.
          seed: random seed, for rules that draw at random.
        """
        del seed
        fitted = self.fit(table)
        if self.level == "example":
            loss_N = table.loss_N()
            weight_N = np.asarray(fitted(_frozen(np.nan_to_num(loss_N))))
            bad = np.flatnonzero(~np.isfinite(weight_N))  # NaN would leave an example out
            if bad.size:
                ids = f"{bad[:10].tolist()}{' ...' if bad.size > 10 else ''}"
                raise ConfigError(f"{self} gives weights that are not finite, example ids {ids}")
            return Weights(np.where(np.isnan(loss_N), np.nan, weight_N).astype(np.float32))
        losses = table.token_losses()
        values = np.asarray(fitted(_frozen(losses.values)))
        return Weights(all_but_dropped(table), dataclasses.replace(losses, values=values))

    def reads_model(self) -> bool:
        """Returns whether weights depend on the current model and are computed in every step."""
        return bool(self.needs - {"frozen", "frozen_model"})

    def old_steps(self) -> int:
        """Returns after how many steps `old_nll` refers to a newer model; 0 if it is not read."""
        return getattr(self, "refresh_steps", 8) if "old" in self.needs else 0

    def needs_pass(self) -> bool:
        """Returns whether a step needs a forward pass over the global batch before its gradient."""
        return self.reads_model() and ("batch" in self.needs or self.level == "example")

    def reads_distribution(self) -> bool:
        """Returns whether the rule reads statistics of the current model's distribution."""
        return not self.needs.isdisjoint(token_stats.OF_DISTRIBUTION)

    def __mul__(self, other: "Weighting") -> "Weighting":
        """Returns the weighting whose weights are the products of both."""
        return Product(self, other)


def _frozen(loss: np.ndarray) -> TokenStats:
    return TokenStats(jnp.asarray(loss), frozen_nll=jnp.asarray(loss))


def all_but_dropped(table: Scored) -> np.ndarray:
    """Returns a weight of 1 for each example, and NaN for those that scoring dropped."""
    return np.where(np.isnan(table.loss_N()), np.nan, 1.0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Product(Weighting):
    """The product of two weightings of one level: w = w_first * w_second."""

    first: Weighting
    second: Weighting

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = (self.first.level, self.second.level)
        if levels[0] != levels[1]:
            raise ConfigError(
                f"{self.first} weighs by {levels[0]} and {self.second} by {levels[1]}; only "
                "weightings of one level have a product"
            )

    @property
    def level(self) -> Level:  # type: ignore[override]
        """Level of both weightings."""
        return self.first.level

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Union of the needs of both weightings."""
        return self.first.needs | self.second.needs

    def old_steps(self) -> int:
        """See `Weighting.old_steps`."""
        return self.first.old_steps() or self.second.old_steps()

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        return self.first(stats) * self.second(stats)

    def fit(self, table: Any) -> "Product":
        """See `Weighting.fit`."""
        return dataclasses.replace(self, first=self.first.fit(table), second=self.second.fit(table))


WEIGHTINGS: Registry[Callable[..., Weighting]] = Registry("weighting")
Entry = TypeVar("Entry", bound=Callable[..., Any])


@WEIGHTINGS.register("none")
@dataclasses.dataclass(frozen=True)
class Unweighted(Weighting):
    """Plain fine-tuning: w = 1 for every example."""

    level = "none"
    needs = frozenset()

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        return jnp.ones_like(stats.nll)

    def of_table(self, table: Scored | None = None, seed: int = 0) -> Weights:
        """Returns no weights: all are 1."""
        return Weights()


def names() -> tuple[str, ...]:
    """Returns the names of all weightings.

    Example:
      >>> "flow" in names()
      True
    """
    return tuple(WEIGHTINGS)


def get(name: str, /, **options: Any) -> Weighting:
    """Returns a weighting by its name.

    Args:
      name: one of `names()`.
      **options: fields of the weighting; each has a default.

    Raises:
      ConfigError: the name is unknown (the message gives the nearest one), the weighting does not
        have an option, or a value is not a number or out of range.

    Example:
      >>> get("power", exponent=0.5)
      Power(floor=0.0, exponent=0.5)
      >>> get("dft", exponent=0.5)
      Traceback (most recent call last):
      easy_jax.io.checks.ConfigError: weighting 'dft' has no option 'exponent'; it has floor
    """
    entry = WEIGHTINGS.find(name)
    known = inspect.signature(entry).parameters
    if any(each.kind is each.VAR_KEYWORD for each in known.values()):
        return entry(**options)  # the entry passes options to `get`, which checks them
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            has = ", ".join(sorted(known)) or "none"
            raise ConfigError(
                f"weighting {name!r} has no option {option!r}{meant or f'; it has {has}'}"
            )
        _check_number(name, known[option], options[option])
    try:
        return entry(**options)
    except TypeError as error:
        raise ConfigError(f"the options of weighting {name!r}, {options}: {error}") from error


def _check_number(name: str, option: inspect.Parameter, value: object) -> None:
    """Raises ConfigError if an option that takes a number has another value."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if option.annotation in (float | None, int | None):
        is_number |= value is None
    elif not isinstance(option.default, float | int) or isinstance(option.default, bool):
        return
    require(is_number, f"the option {option.name} of weighting {name!r}", value, "a number")
