"""The configuration schema: typed dataclasses, validated once, errors that name the field.

A configuration file in `configs/` defines `get_config(arg="") -> ExperimentConfig`
and imports nothing of the package but this module.
"""

import dataclasses
import json
import math
from typing import Any, Literal, get_args, get_origin

Reduction = Literal["token_mean", "example_mean", "weight_mean"]
Weighting = Literal["none", "flow", "uniform", "shuffled", "mean_one"]
Trainable = Literal["all", "head", "bn_head"]
Regularizer = Literal["none", "l1", "l2"]
Averaging = Literal["none", "wise_ft", "sfa"]
HeadStage = Literal["none", "unweighted", "weighted"]


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
            _require(size == -1 or size > 0, f"{path}.{name}", size, "-1 or positive")
        free = [name for name, size in sizes.items() if size == -1]
        _require(len(free) <= 1, path, sizes, "at most one axis of size -1")


@dataclasses.dataclass(slots=True)
class ResNetConfig:
    """A ResNet for small images: 3x3 stem, basic blocks, width doubling per stage."""

    in_channels: int = 1
    width: int = 16
    depths: tuple[int, ...] = (1, 1, 1)

    def validate(self, path: str = "model") -> None:
        _require(self.in_channels > 0, f"{path}.in_channels", self.in_channels, "positive")
        _require(self.width > 0, f"{path}.width", self.width, "positive")
        ok = len(self.depths) > 0 and all(depth > 0 for depth in self.depths)
        _require(ok, f"{path}.depths", self.depths, "one positive number of blocks per stage")


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
        _choice(self, path, "name", "schedule", "anchor")
        _finite_at_least_zero(
            self, path, "learning_rate", "weight_decay", "eps", "clip_norm", "anchor_strength"
        )
        for name in ("momentum", "b1", "b2", "warmup_ratio"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"{path}.{name}", value, "at least 0 and below 1")


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
            _require(getattr(self, name) > 0, f"{path}.{name}", getattr(self, name), "positive")
        _require(
            self.batch_size % self.micro_batches == 0,
            f"{path}.micro_batches",
            self.micro_batches,
            f"a divisor of batch_size = {self.batch_size}",
        )
        _choice(self, path, "reduction")
        self.optimizer.validate(f"{path}.optimizer")


@dataclasses.dataclass(slots=True)
class ScoringConfig:
    """The frozen pass over the fine-tuning set."""

    batch_size: int = 256
    rows_per_part: int = 100_000
    on_bad_example: Literal["error", "drop"] = "error"

    def validate(self, path: str = "scoring") -> None:
        _require(self.batch_size > 0, f"{path}.batch_size", self.batch_size, "positive")
        _require(self.rows_per_part > 0, f"{path}.rows_per_part", self.rows_per_part, "positive")
        _choice(self, path, "on_bad_example")


@dataclasses.dataclass(slots=True)
class MethodConfig:
    """A fine-tuning method is a composition; standard fine-tuning is the empty one.

    Attributes:
      name: the row in the results.
      start: fine-tune from the pre-trained body with a new head, or from the probed model.
      weighting: example weights from the loss table (`flow`) or a control made of them.
      trainable: which parameters move.
      anchor, anchor_strength: l1 or l2 distance to the starting weights, heads left out.
      averaging, alpha: WiSE-FT after training, or SFA during it, and its coefficient: the
        share of the fine-tuned weights (`wise_ft`) or of the starting weights (`sfa`).
      head_stage: a last stage that trains the head alone, with or without the weights.
    """

    name: str = "standard"
    start: Literal["pretrained", "probe"] = "pretrained"
    weighting: Weighting = "none"
    trainable: Trainable = "all"
    anchor: Regularizer = "none"
    anchor_strength: float = 0.0
    averaging: Averaging = "none"
    alpha: float = 0.5
    head_stage: HeadStage = "none"

    def validate(self, path: str) -> None:
        _require(bool(self.name), f"{path}.name", self.name, "a non-empty name")
        _choice(self, path, "start", "weighting", "trainable", "anchor", "averaging", "head_stage")
        _finite_at_least_zero(self, path, "anchor_strength")
        _require(0.0 <= self.alpha <= 1.0, f"{path}.alpha", self.alpha, "between 0 and 1")
        if self.head_stage == "weighted":
            _require(
                self.weighting != "none", f"{path}.weighting", self.weighting,
                "a weighting, because head_stage is 'weighted'",
            )  # fmt: skip


@dataclasses.dataclass(slots=True)
class GlyphDataConfig:
    """Letters rendered from fonts (pre-training) and handwritten digits (fine-tuning)."""

    image_size: int = 16
    pretrain_train: int = 12_000
    pretrain_validation: int = 1_000
    pretrain_test: int = 2_000
    target_train: int = 800
    target_validation: int = 400
    label_noise: tuple[float, ...] = (0.3,)

    def validate(self, path: str = "data") -> None:
        _require(self.image_size >= 8, f"{path}.image_size", self.image_size, "at least 8")
        for name in (
            "pretrain_train", "pretrain_validation", "pretrain_test",
            "target_train", "target_validation",
        ):  # fmt: skip
            _require(getattr(self, name) > 0, f"{path}.{name}", getattr(self, name), "positive")
        used = self.target_train + self.target_validation
        _require(
            used < 1797, f"{path}.target_train + {path}.target_validation", used,
            "below 1,797, the number of digits, to leave a test set",
        )  # fmt: skip
        _require(len(self.label_noise) > 0, f"{path}.label_noise", self.label_noise, "not empty")
        for share in self.label_noise:
            _require(0.0 <= share < 1.0, f"{path}.label_noise", share, "at least 0 and below 1")


@dataclasses.dataclass(slots=True)
class ExperimentConfig:
    """Everything that decides an experiment's numbers, plus how often to save and print.

    Attributes:
      name: names the default workdir, `runs/<name>`.
      seeds: one full repetition each: data split, label noise, initialisation and order.
      learning_rates: every method is trained at each; the choice uses validation data only.
      pretrain, probe, finetune, head: the stages (paper.md section 2, a to d). The peak
        learning rate of `finetune` and `head` comes from the grid.
      only: names of methods to run; empty means all.
      eval_every_epochs: points of the learning curves.
      save_every_steps: how often a running stage is saved.
    """

    name: str = "experiment"
    seeds: tuple[int, ...] = (0,)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    model: ResNetConfig = dataclasses.field(default_factory=ResNetConfig)
    data: GlyphDataConfig = dataclasses.field(default_factory=GlyphDataConfig)
    pretrain: StageConfig = dataclasses.field(default_factory=StageConfig)
    probe: StageConfig = dataclasses.field(default_factory=StageConfig)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    finetune: StageConfig = dataclasses.field(default_factory=StageConfig)
    head: StageConfig = dataclasses.field(default_factory=StageConfig)
    learning_rates: tuple[float, ...] = (0.03,)
    methods: tuple[MethodConfig, ...] = ()
    only: tuple[str, ...] = ()
    eval_batch_size: int = 256
    eval_every_epochs: int = 1
    save_every_steps: int = 100
    log_every_steps: int = 10

    def validate(self) -> "ExperimentConfig":
        """Checks every field; returns the configuration itself.

        Raises:
          ConfigError: names the field, its value and what it should be.
        """
        _check_types(self, "config")
        _require(
            bool(self.name) and "/" not in self.name, "config.name", self.name, "a name without /"
        )
        _require(len(self.seeds) > 0, "config.seeds", self.seeds, "not empty")
        _require(len(set(self.seeds)) == len(self.seeds), "config.seeds", self.seeds, "distinct")
        _require(all(seed >= 0 for seed in self.seeds), "config.seeds", self.seeds, "at least 0")
        self.mesh.validate("config.mesh")
        self.model.validate("config.model")
        self.data.validate("config.data")
        self.scoring.validate("config.scoring")
        for stage in ("pretrain", "probe", "finetune", "head"):
            getattr(self, stage).validate(f"config.{stage}")
        _require(len(self.learning_rates) > 0, "config.learning_rates", (), "not empty")
        for rate in self.learning_rates:
            ok = math.isfinite(rate) and rate >= 0
            _require(ok, "config.learning_rates", rate, "finite and at least 0")
        names = [method.name for method in self.methods]
        _require(len(names) > 0, "config.methods", names, "not empty")
        _require(len(set(names)) == len(names), "config.methods", names, "distinct names")
        for method in self.methods:
            method.validate(f"config.methods[{method.name}]")
        for name in self._only():
            _require(name in names, "config.only", name, f"one of {names}")
        for name in ("eval_batch_size", "eval_every_epochs", "save_every_steps", "log_every_steps"):
            _require(getattr(self, name) > 0, f"config.{name}", getattr(self, name), "positive")
        return self

    def selected_methods(self) -> tuple[MethodConfig, ...]:
        """The methods to run: `only`, or all of them."""
        return tuple(m for m in self.methods if not self.only or m.name in self._only())

    def _only(self) -> list[str]:
        # On the command line `--config.only=a,b` arrives as one string.
        return [name for entry in self.only for name in entry.split(",")]


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


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{field} is {value!r}; it must be {expected}")


def _finite_at_least_zero(config: Any, path: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = math.isfinite(value) and value >= 0
        _require(ok, f"{path}.{name}", value, "finite and at least 0")


def _choice(config: Any, path: str, *names: str) -> None:
    hints = {field.name: field.type for field in dataclasses.fields(config)}
    for name in names:
        options = get_args(hints[name])
        value = getattr(config, name)
        _require(value in options, f"{path}.{name}", value, f"one of {list(options)}")


def _check_types(config: Any, path: str) -> None:
    """Types of every field, so that a string where a number belongs is named, not run."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        where = f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            _check_types(value, where)
        elif get_origin(field.type) is tuple:
            _require(isinstance(value, tuple), where, value, "a tuple")
            element_type = get_args(field.type)[0]
            for element in value:
                if dataclasses.is_dataclass(element):
                    _check_types(element, f"{where}[]")
                else:
                    _check_scalar(element, element_type, where)
        else:
            _check_scalar(value, field.type, where)


def _check_scalar(value: object, expected: Any, where: str) -> None:
    if get_origin(expected) is Literal or not isinstance(expected, type):
        return  # _choice names the options
    allowed = (int, float) if expected is float else (expected,)
    ok = isinstance(value, allowed) and (expected is bool or not isinstance(value, bool))
    _require(ok, where, value, f"of type {expected.__name__}")
