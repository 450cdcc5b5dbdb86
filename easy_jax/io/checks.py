"""Checks of configurations, whose errors name the field, its value and the values allowed."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

T = TypeVar("T")


class ConfigError(ValueError):
    """Error for an invalid value of a configuration field; the message names the field."""


def to_json(config: Any) -> str:
    """Converts a dataclass to indented JSON, with fields in order of declaration."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def differences(ours: Any, theirs: Any, path: str = "config") -> list[str]:
    """Describes the fields in which two JSON-like configurations differ, one line per field."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in ours or key not in theirs:
                where = "only now" if key in ours else "only there"
                lines.append(f"{path}.{key}: {where}")
            else:
                lines += differences(ours[key], theirs[key], f"{path}.{key}")
        return lines
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            line
            for index, (a, b) in enumerate(zip(ours, theirs, strict=True))
            for line in differences(a, b, f"{path}[{index}]")
        ]
    return [] if ours == theirs else [f"{path}: {ours!r} now, {theirs!r} there"]


def replace(config: T, changes: Mapping[str, Any] | None = None, /, **fields: Any) -> T:
    """Returns a copy of a configuration with some fields changed; nested ones by dotted names.

    Args:
      config: a dataclass, which is not changed.
      changes: values by dotted names, such as `{"finetune.optimizer.learning_rate": 0.1}`.
      **fields: values of the configuration's own fields.

    Raises:
      ConfigError: there is no such field.

    Example:
      >>> from easy_jax.config import StageConfig
      >>> stage = replace(StageConfig(), {"optimizer.learning_rate": 0.1}, epochs=3)
      >>> stage.epochs, stage.optimizer.learning_rate
      (3, 0.1)
    """
    for name, value in {**(changes or {}), **fields}.items():
        first, _, rest = name.partition(".")
        if first not in {field.name for field in dataclasses.fields(config)}:  # type: ignore
            raise ConfigError(f"{type(config).__name__} has no field {first}")
        value = replace(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: value})  # type: ignore
    return config


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises a ConfigError with the field, its value and what is expected, unless `condition`."""
    if not condition:
        raise ConfigError(f"{field} is {value!r}; it must be {expected}")


def finite_at_least_zero(config: Any, path: str, *names: str) -> None:
    """Requires fields to be finite and non-negative."""
    for name in names:
        value = getattr(config, name)
        ok = math.isfinite(value) and value >= 0
        require(ok, f"{path}.{name}", value, "finite and at least 0")


def choice(config: Any, path: str, *names: str) -> None:
    """Requires fields that are `Literal`s to be one of their options."""
    hints = {field.name: field.type for field in dataclasses.fields(config)}
    for name in names:
        options = get_args(hints[name])
        value = getattr(config, name)
        require(value in options, f"{path}.{name}", value, f"one of {list(options)}")


def check_types(config: Any, path: str) -> None:
    """Checks field types, so that a bad value fails at start-up with the field's name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        where = f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            check_types(value, where)
        elif get_origin(field.type) is tuple:
            require(isinstance(value, tuple), where, value, "a tuple")
            element_type = get_args(field.type)[0]
            for element in value:
                if dataclasses.is_dataclass(element):
                    check_types(element, f"{where}[]")
                else:
                    _check_scalar(element, element_type, where)
        else:
            _check_scalar(value, field.type, where)


def _check_scalar(value: object, expected: Any, where: str) -> None:
    if get_origin(expected) is Literal or not isinstance(expected, type):
        return  # `choice` checks `Literal` fields and lists their options
    allowed = (int, float) if expected is float else (expected,)
    ok = isinstance(value, allowed) and (expected is bool or not isinstance(value, bool))
    require(ok, where, value, f"of type {expected.__name__}")
