"""What experiments share: mesh, optimiser, stages; checks whose errors name the field."""

import dataclasses
import json
import math
from typing import Any, Literal, get_args, get_origin

Reduction = Literal["token_mean", "example_mean", "weight_mean"]
Regularizer = Literal["none", "l1", "l2"]
Averaging = Literal["none", "wise_ft", "sfa"]


class ConfigError(ValueError):
    """A configuration field has a value that cannot work; the message names the field."""


@dataclasses.dataclass(slots=True)
class MeshConfig:
    """Axis sizes of the device mesh; one of them may be -1, "all remaining devices"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def validate(self, path: str = "mesh") -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"{path}.{name}", size, "-1 or positive")
        free = [name for name, size in sizes.items() if size == -1]
        require(len(free) <= 1, path, sizes, "at most one axis of size -1")


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
    """Optimiser, schedule and the pull towards the starting weights.

    `weight_decay` is added to the gradient for SGD and decoupled for AdamW.
    `anchor_strength` is the lambda of the l1 or l2 distance to the starting weights
    (paper.md section 3); `anchor_per_parameter` divides it by the number of trainable
    parameters, as the paper does for language models.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0
    anchor: Regularizer = "none"
    anchor_strength: float = 0.0
    anchor_per_parameter: bool = False

    def validate(self, path: str = "optimizer") -> None:
        choice(self, path, "name", "schedule", "anchor")
        finite_at_least_zero(
            self, path, "learning_rate", "weight_decay", "eps", "clip_norm", "anchor_strength"
        )
        for name in ("momentum", "b1", "b2", "warmup_ratio"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{path}.{name}", value, "at least 0 and below 1")


@dataclasses.dataclass(slots=True)
class StageConfig:
    """One training stage: how long, in what batches, with which optimiser."""

    epochs: int = 1
    batch_size: int = 64
    micro_batches: int = 1
    reduction: Reduction = "example_mean"
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def validate(self, path: str) -> None:
        for name in ("epochs", "batch_size", "micro_batches"):
            require(getattr(self, name) > 0, f"{path}.{name}", getattr(self, name), "positive")
        require(
            self.batch_size % self.micro_batches == 0,
            f"{path}.micro_batches",
            self.micro_batches,
            f"a divisor of batch_size = {self.batch_size}",
        )
        choice(self, path, "reduction")
        self.optimizer.validate(f"{path}.optimizer")


@dataclasses.dataclass(slots=True)
class ScoringConfig:
    """The frozen pass over the fine-tuning set."""

    batch_size: int = 256
    rows_per_part: int = 100_000
    on_bad_example: Literal["error", "drop"] = "error"

    def validate(self, path: str = "scoring") -> None:
        require(self.batch_size > 0, f"{path}.batch_size", self.batch_size, "positive")
        require(self.rows_per_part > 0, f"{path}.rows_per_part", self.rows_per_part, "positive")
        choice(self, path, "on_bad_example")


def to_json(config: Any) -> str:
    """A dataclass as indented JSON, fields in order of declaration."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def differences(ours: Any, theirs: Any, path: str = "config") -> list[str]:
    """The fields in which two JSON-like configurations differ, as readable lines."""
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


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises ConfigError, naming field, value and what it must be, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field} is {value!r}; it must be {expected}")


def finite_at_least_zero(config: Any, path: str, *names: str) -> None:
    """Requires finite, non-negative fields."""
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
    """Types of every field, so that a string where a number belongs is named, not run."""
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
        return  # _choice names the options
    allowed = (int, float) if expected is float else (expected,)
    ok = isinstance(value, allowed) and (expected is bool or not isinstance(value, bool))
    require(ok, where, value, f"of type {expected.__name__}")
