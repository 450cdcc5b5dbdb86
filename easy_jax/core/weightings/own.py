"""Custom weightings: functions of `TokenStats`, registered by a decorator."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from easy_jax.core.weightings.rule import NEEDS, STATISTICS, WEIGHTINGS, Level, Weighting
from easy_jax.io.checks import ConfigError, require
from easy_jax.kernels.token_stats import TokenStats

Entry = TypeVar("Entry", bound=Callable[..., Any])


def register(
    entry: Entry | str | None = None,
    *,
    name: str | None = None,
    level: Level | None = None,
    needs: tuple[str, ...] | None = None,
) -> Any:
    """Registers a custom weighting: a function of `TokenStats`, or a subclass of `Weighting`.

    A function's keyword-only parameters are its options. This can be used as a decorator, with or
    without arguments, for example in a configuration file.

    Args:
      entry: the function or class; or its name, as in `@register("confident")`.
      name: the weighting's name; default: the function's name, or the class's in snake_case.
      level: what a function weights, `token` (the default) or `example`.
      needs: inputs that a function reads, out of `NEEDS`; default: the statistics that it reads in
        a trace. For a function that reduces over the batch, `needs=("current", "batch")` is
        required.

    Returns:
      The function or class itself.

    Raises:
      ValueError: the name is one of easy_jax's own weightings; custom ones are replaced.
      ConfigError: an entry of `needs` is unknown; a class is not a subclass of `Weighting`, or its
        level and needs are given here instead of as attributes.

    Example:
      >>> from easy_jax.core.weightings import get
      >>> @register
      ... def confident(stats, *, limit=0.5):
      ...     return (jnp.exp(-stats.nll) > limit) * 1.0
      >>> get("confident", limit=0.2)(TokenStats(jnp.array([0.1, 3.0]))).tolist()
      [1.0, 0.0]
      >>> get("confident").needs
      frozenset({'current'})
    """
    if isinstance(entry, str):
        entry, name = None, entry
    if entry is None:
        return lambda entry: register(entry, name=name, level=level, needs=needs)
    for need in needs or ():
        require(need in NEEDS, "needs", need, f"one of {', '.join(NEEDS)}")
    function: Any = entry
    made: Callable[..., Weighting] = entry
    if inspect.isclass(entry):
        if not issubclass(entry, Weighting) or level is not None or needs is not None:
            raise ConfigError(
                f"{entry.__name__} must be a subclass of Weighting, with level and needs as its "
                "attributes; or register a function"
            )
    else:
        name = name or function.__name__
        read = None if needs is None else frozenset(needs)
        made = _constructor(function, name, level or "token", read)
    name = name or re.sub(r"(?<!^)(?=[A-Z])", "_", function.__name__).lower()
    WEIGHTINGS.register(name, replaceable=True)(made)
    return entry


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class OwnRule(Weighting):
    """Weighting that `register` creates from a function."""

    function: Callable[..., jax.Array]
    name: str
    options: tuple[tuple[str, Any], ...]
    level: Level  # type: ignore[misc]
    needs: frozenset[str]  # type: ignore[misc]

    def rule(self, stats: TokenStats) -> jax.Array:
        """See `Weighting.rule`."""
        return self.function(stats, **dict(self.options))

    def __repr__(self) -> str:
        options = {**dict(self.options), "floor": self.floor}
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def _constructor(
    function: Callable[..., jax.Array], name: str, level: Level, needs: frozenset[str] | None
) -> Callable[..., Weighting]:
    """Returns a constructor of a function's weighting, with the options as its signature."""
    parameters = list(inspect.signature(function).parameters.values())
    options = [each for each in parameters[1:] if each.kind is each.KEYWORD_ONLY]

    def make(*, floor: float = 0.0, **given: Any) -> Weighting:
        found = _read_by(function, given) if needs is None else needs
        return OwnRule(
            function=function,
            name=name,
            options=tuple(sorted(given.items())),
            level=level,
            needs=found,
            floor=floor,
        )

    floor = inspect.Parameter("floor", inspect.Parameter.KEYWORD_ONLY, default=0.0)
    make.__signature__ = inspect.Signature([*options, floor])  # type: ignore[attr-defined]
    return make


class _Recorder(TokenStats):
    """Statistics that record which of their fields are read."""

    def __init__(self) -> None:
        object.__setattr__(self, "read", set())

    def __getattribute__(self, name: str) -> Any:
        if name not in _FIELDS:
            return object.__getattribute__(self, name)
        self.read.add(name)
        dtype = {"mask": bool, "is_argmax": bool, "segment_ids": int}.get(name, jnp.float32)
        return jnp.ones((1, 1), dtype)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"TokenStats has no field {name!r}")


_FIELDS = frozenset(field.name for field in dataclasses.fields(TokenStats))
# Registered as a node, since a leaf could not pass through weightings that a custom rule calls.
jax.tree_util.register_pytree_node(_Recorder, lambda each: ((), each), lambda each, _: each)


def _read_by(function: Callable[..., Any], options: Mapping[str, Any]) -> frozenset[str]:
    recorder = _Recorder()
    jax.eval_shape(lambda: function(recorder, **options))
    return frozenset(need for need, field in STATISTICS.items() if field in recorder.read)
