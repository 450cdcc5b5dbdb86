"""Configuration of experiments with images: a pre-training task, then fine-tuning on a target."""

import dataclasses
import math
import re
from typing import Any, Literal

from easy_jax.core.config import current_anchor
from easy_jax.data.config import GlyphDataConfig, TransferDataConfig
from easy_jax.io.checks import ConfigError, check_types, choice, finite_at_least_zero, require
from easy_jax.models.config import ResNetConfig
from easy_jax.parallel.config import MeshConfig
from easy_jax.train.config import ScoringConfig, StageConfig

Trainable = Literal["all", "head", "bn_head", "lora"]
HeadStage = Literal["none", "unweighted", "weighted"]
Kind = Literal["images", "language"]
_TRAINABLE: dict[Kind, tuple[Trainable, ...]] = {
    "images": ("all", "head", "bn_head"),
    "language": ("all", "head", "lora"),
}
_IMAGES_ONLY = ("start", "head_stage", "learning_rates", "head_learning_rate")


@dataclasses.dataclass(frozen=True, slots=True)
class MethodConfig:
    """A fine-tuning method, composed of the options below; the defaults are plain fine-tuning.

    Attributes:
      name: the method's name in the results.
      start: for images: fine-tune from the pre-trained body with a new head, or from the probed
        model.
      weighting, weighting_options: name of a weighting of examples or tokens
        (`easy_jax.weightings.names()`), and its options, such as `{"exponent": 0.5}`;
        `flow_online` is for images only.
      trainable: parameters that are trained: all, the head, BatchNorm and head (images only), or
        low-rank adapters (language only).
      anchor, anchor_strength: name of a distance to the model at the start
        (`easy_jax.core.anchors`), and its factor in the loss: `none`; `l1_sp` or `l2_sp` to its
        weights (for images, without the head); or, for language, `kl` to its distribution.
      averaging, alpha: name of an averaging of weights (`easy_jax.core.merge`): after training
        `wise_ft` or `lines` (LiNeS), during it `sfa` or `ema`; and the share of the fine-tuned
        weights (`wise_ft`; `lines`: in the first layer) or of the starting weights (`sfa`), or
        the decay (`ema`).
      head_stage: for images: a last stage that trains the head only, with or without weights.
      learning_rates: for images: learning rates of this method instead of the experiment's.
      head_learning_rate: for images: learning rate of the last stage; 0: that of fine-tuning.

    Example:
      >>> flow = MethodConfig("flow", start="probe", weighting="flow", head_stage="unweighted")
      >>> flow.validate("methods[flow]")
    """

    name: str = "standard"
    start: Literal["pretrained", "probe"] = "pretrained"
    weighting: str = "none"
    weighting_options: tuple[tuple[str, Any], ...] = ()  # mappings are converted to this type
    trainable: Trainable = "all"
    anchor: str = "none"
    anchor_strength: float = 0.0
    averaging: str = "none"
    alpha: float = 0.5
    head_stage: HeadStage = "none"
    learning_rates: tuple[float, ...] = ()
    head_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchor", current_anchor(self.anchor))
        options = tuple(sorted(dict(self.weighting_options).items()))
        object.__setattr__(self, "weighting_options", options)

    def validate(self, path: str, kind: Kind = "images") -> None:
        """Checks every field, including whether weighting, anchor and averaging are registered.

        Raises:
          ConfigError: a field is invalid; the message gives its name, value and valid values.
        """
        require(bool(self.name), f"{path}.name", self.name, "a non-empty name")
        choice(self, path, "start", "head_stage")
        options = list(_TRAINABLE[kind])
        require(self.trainable in options, f"{path}.trainable", self.trainable, f"one of {options}")
        finite_at_least_zero(self, path, "anchor_strength", "head_learning_rate")
        check_rates(self.learning_rates, f"{path}.learning_rates")
        require(0.0 <= self.alpha <= 1.0, f"{path}.alpha", self.alpha, "between 0 and 1")
        ok = self.averaging != "ema" or 0.0 < self.alpha < 1.0
        because = "above 0 and below 1, because it is the decay of the average"
        require(ok, f"{path}.alpha", self.alpha, because)
        self._check_names(path, kind)
        anchored = self.anchor != "none"
        wanted = "positive" if anchored else "0"
        ok = anchored == (self.anchor_strength > 0)
        because = f"{wanted}, because anchor is {self.anchor!r}"
        require(ok, f"{path}.anchor_strength", self.anchor_strength, because)
        if kind == "language":
            self._check_language(path)
        ok = self.head_learning_rate == 0 or self.head_stage != "none"
        because = "0, because there is no head_stage"
        require(ok, f"{path}.head_learning_rate", self.head_learning_rate, because)
        ok = self.head_stage != "weighted" or self.weighting != "none"
        because = "a weighting, because head_stage is 'weighted'"
        require(ok, f"{path}.weighting", self.weighting, because)

    def _check_names(self, path: str, kind: Kind) -> None:
        # Imported here, because these need JAX.
        from easy_jax.core.anchors import ANCHORS
        from easy_jax.core.merge import AVERAGINGS
        from easy_jax.core.weightings import WEIGHTINGS, get

        ANCHORS.find(self.anchor, f"{path}.anchor")
        ok = kind == "language" or self.anchor != "kl"
        because = "a distance of weights, such as 'l2_sp', in an experiment with images"
        require(ok, f"{path}.anchor", self.anchor, because)
        AVERAGINGS.find(self.averaging, f"{path}.averaging")
        WEIGHTINGS.find(self.weighting, f"{path}.weighting")
        for name, value in self.weighting_options:  # they are part of a folder's name
            ok = isinstance(value, int | float) or bool(re.fullmatch(r"[\w.-]+", str(value)))
            wanted = "a number or a plain word"
            require(ok, f"{path}.weighting_options[{name}]", value, wanted)
        try:
            weighting = get(self.weighting, **dict(self.weighting_options))
        except ConfigError as error:
            raise ConfigError(f"{path}.weighting_options: {error}") from error
        by_token = weighting.level == "token" and not weighting.reads_model()
        because = "a weighting of examples: images have no tokens"
        require(not by_token or kind == "language", f"{path}.weighting", self.weighting, because)
        ok = "frozen_model" not in weighting.needs or kind == "images"
        because = "one that needs only the loss table, in a language experiment"
        require(ok, f"{path}.weighting", self.weighting, because)

    def _check_language(self, path: str) -> None:
        for name in _IMAGES_ONLY:
            value, default = getattr(self, name), getattr(MethodConfig(), name)
            ok = value == default
            require(ok, f"{path}.{name}", value, f"{default!r} in a language experiment")
        of_weights = self.anchor not in ("none", "kl")
        if self.trainable == "lora" and (of_weights or self.averaging != "none"):
            raise ConfigError(
                f"{path}: adapters start at no change, so anchor must be 'none' or 'kl' and "
                "averaging 'none' with trainable='lora'"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ExperimentConfig:
    """Configuration of an experiment with images.

    Attributes:
      name: name of the experiment; the default workdir is `runs/<name>`.
      seeds: random seeds; the experiment is repeated for each, with its own data split, label
        noise, initialisation and order of examples.
      mesh, model, data: device mesh, network, and the data of both tasks.
      learning_rates: learning rates at which every method without `learning_rates` is trained;
        one of them is selected on validation data only.
      pretrain, probe, finetune, head: the training stages (arXiv:2502.02797). The peak learning
        rate of `finetune` and `head` comes from `learning_rates`. With given weights
        (`model.path`), there is no stage `pretrain`.
      scoring: the pass of the probed model over the target's training data.
      frozen_batch_norm: stages out of `probe`, `finetune` and `head` in which BatchNorm uses its
        running statistics and does not update them; in other stages it uses the batch's
        statistics, as in the authors' code.
      methods: the fine-tuning methods to compare.
      only: names of methods to run; empty means all.
      metrics: names of metrics (`easy_jax.train.metrics`) that are measured on both tasks in
        addition to accuracy, such as `loss`.
      eval_batch_size: examples per batch of an evaluation.
      eval_every_epochs: epochs between two points of the learning curves.
      save_every_steps, log_every_steps: steps between two checkpoints and two log entries.
      keep_checkpoints, keep_best: number of each stage's latest checkpoints to keep (if the last
        is damaged, the one before it is used; each holds the model and the optimiser's state);
        and whether to keep the one with the lowest training loss, too.

    Example:
      >>> config = ExperimentConfig(name="mine", seeds=(0, 1), learning_rates=(0.01, 0.03))
      >>> config.finetune.batch_size
      64
    """

    name: str = "experiment"
    seeds: tuple[int, ...] = (0,)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    model: ResNetConfig = dataclasses.field(default_factory=ResNetConfig)
    data: GlyphDataConfig | TransferDataConfig = dataclasses.field(default_factory=GlyphDataConfig)
    pretrain: StageConfig = dataclasses.field(default_factory=StageConfig)
    probe: StageConfig = dataclasses.field(default_factory=StageConfig)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    finetune: StageConfig = dataclasses.field(default_factory=StageConfig)
    head: StageConfig = dataclasses.field(default_factory=StageConfig)
    frozen_batch_norm: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = (0.03,)
    methods: tuple[MethodConfig, ...] = ()
    only: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    eval_batch_size: int = 256
    eval_every_epochs: int = 1
    save_every_steps: int = 100
    keep_checkpoints: int = 2
    keep_best: bool = False
    log_every_steps: int = 10

    def validate(self) -> "ExperimentConfig":
        """Checks every field; returns the configuration itself.

        Raises:
          ConfigError: a field is invalid; the message gives its name, value and valid values.
        """
        check_types(self, "config")
        check_name(self.name)
        require(len(self.seeds) > 0, "config.seeds", self.seeds, "not empty")
        require(len(set(self.seeds)) == len(self.seeds), "config.seeds", self.seeds, "distinct")
        require(all(seed >= 0 for seed in self.seeds), "config.seeds", self.seeds, "at least 0")
        self.mesh.validate("config.mesh")
        self.model.validate("config.model")
        self.data.validate("config.data")
        self._check_model_for_data()
        for name in self.frozen_stages():
            ok = name in ("probe", "finetune", "head")
            require(ok, "config.frozen_batch_norm", name, "one of probe, finetune, head")
        self.scoring.validate("config.scoring")
        for stage in ("pretrain", "probe", "finetune", "head"):
            getattr(self, stage).validate(f"config.{stage}")
        self._check_learning_rates()
        check_methods(self.methods, self._only(), "images")
        self._check_metrics()
        check_positive(self, "eval_batch_size", "eval_every_epochs", "save_every_steps")
        check_positive(self, "keep_checkpoints", "log_every_steps")
        return self

    def _check_model_for_data(self) -> None:
        channels = 1 if isinstance(self.data, GlyphDataConfig) else 3
        ok = self.model.in_channels == channels
        wanted = f"{channels}, as the images have"
        require(ok, "config.model.in_channels", self.model.in_channels, wanted)
        if isinstance(self.data, GlyphDataConfig):
            ok = not self.model.path
            require(ok, "config.model.path", self.model.path, "empty: letters are trained on first")

    def _check_learning_rates(self) -> None:
        rateless = [method.name for method in self.methods if not method.learning_rates]
        ok = bool(self.learning_rates) == bool(rateless)
        wanted = "empty: every method has learning rates of its own"
        if rateless:
            wanted = f"not empty: {', '.join(rateless)} have none of their own"
        require(ok, "config.learning_rates", self.learning_rates, wanted)
        check_rates(self.learning_rates, "config.learning_rates")

    def _check_metrics(self) -> None:
        if self.metrics:
            from easy_jax.train.metrics import METRICS  # needs JAX

            for name in self.metrics:
                METRICS.find(name, "config.metrics")
        unique = len(set(self.metrics)) == len(self.metrics)
        require(unique, "config.metrics", self.metrics, "distinct")

    def selected_methods(self) -> tuple[MethodConfig, ...]:
        """Returns the methods to run: those of `only`, or all."""
        return tuple(m for m in self.methods if not self.only or m.name in self._only())

    def frozen_stages(self) -> list[str]:
        """Returns the names in `frozen_batch_norm`, also if given as one string."""
        return _names(self.frozen_batch_norm)

    def _only(self) -> list[str]:
        return _names(self.only)


def _names(entries: tuple[str, ...]) -> list[str]:
    # On the command line `--config.only=a,b` arrives as one string.
    return [name for entry in entries for name in entry.split(",")]


def check_rates(rates: tuple[float, ...], path: str) -> None:
    """Raises ConfigError unless all learning rates are finite and not negative."""
    for rate in rates:
        require(math.isfinite(rate) and rate >= 0, path, rate, "finite and at least 0")


def check_name(name: str) -> None:
    """Raises ConfigError unless a name can be used for a folder."""
    require(bool(name) and "/" not in name, "config.name", name, "a name without /")


def check_positive(config: Any, *names: str) -> None:
    """Raises ConfigError unless the fields of these names are positive."""
    for name in names:
        require(getattr(config, name) > 0, f"config.{name}", getattr(config, name), "positive")


def check_methods(methods: tuple[MethodConfig, ...], only: list[str], kind: Kind) -> None:
    """Checks the methods of an experiment, and the names of the methods to run."""
    names = [method.name for method in methods]
    require(len(names) > 0, "config.methods", names, "not empty")
    require(len(set(names)) == len(names), "config.methods", names, "distinct names")
    for method in methods:
        method.validate(f"config.methods[{method.name}]", kind)
    for name in only:
        require(name in names, "config.only", name, f"one of {names}")
