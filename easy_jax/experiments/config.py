"""Configuration of experiments with images: one task, then another, by every method."""

import dataclasses
import math
from typing import Literal

from easy_jax.core.config import Averaging, Regularizer
from easy_jax.data.config import GlyphDataConfig, TransferDataConfig
from easy_jax.io.checks import check_types, choice, finite_at_least_zero, require
from easy_jax.models.config import ResNetConfig
from easy_jax.parallel.config import MeshConfig
from easy_jax.train.config import ScoringConfig, StageConfig

Weighting = Literal["none", "flow", "flow_online", "uniform", "shuffled", "mean_one"]


Trainable = Literal["all", "head", "bn_head"]


HeadStage = Literal["none", "unweighted", "weighted"]


@dataclasses.dataclass(frozen=True, slots=True)
class MethodConfig:
    """A fine-tuning method is a composition; standard fine-tuning is the empty one.

    Attributes:
      name: the row in the results.
      start: fine-tune from the pre-trained body with a new head, or from the probed model.
      weighting: example weights from the loss table (`flow`), or a control made of them; or, as
        the authors' code does, from the frozen probed model's loss on the very view that is
        trained on (`flow_online`), at the loss table's temperature.
      trainable: which parameters move.
      anchor, anchor_strength: l1 or l2 distance to the starting weights, heads left out.
      averaging, alpha: WiSE-FT after training, or SFA during it, and its coefficient: the
        share of the fine-tuned weights (`wise_ft`) or of the starting weights (`sfa`).
      head_stage: a last stage that trains the head alone, with or without the weights.
      learning_rates: of this method, in place of the experiment's.
      head_learning_rate: of its last stage; 0: the fine-tuning's.

    Example:
      >>> flow = MethodConfig("flow", start="probe", weighting="flow", head_stage="unweighted")
      >>> flow.validate("methods[flow]")
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
    learning_rates: tuple[float, ...] = ()
    head_learning_rate: float = 0.0

    def validate(self, path: str) -> None:
        require(bool(self.name), f"{path}.name", self.name, "a non-empty name")
        choice(self, path, "start", "weighting", "trainable", "anchor", "averaging", "head_stage")
        finite_at_least_zero(self, path, "anchor_strength", "head_learning_rate")
        _check_rates(self.learning_rates, f"{path}.learning_rates")
        require(0.0 <= self.alpha <= 1.0, f"{path}.alpha", self.alpha, "between 0 and 1")
        anchored = self.anchor != "none"
        require(
            anchored == (self.anchor_strength > 0),
            f"{path}.anchor_strength",
            self.anchor_strength,
            f"positive, because anchor is {self.anchor!r}"
            if anchored
            else "0, because anchor is 'none'",
        )
        require(
            self.head_learning_rate == 0 or self.head_stage != "none",
            f"{path}.head_learning_rate",
            self.head_learning_rate,
            "0, because there is no head_stage",
        )
        if self.head_stage == "weighted":
            require(
                self.weighting != "none",
                f"{path}.weighting",
                self.weighting,
                "a weighting, because head_stage is 'weighted'",
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ExperimentConfig:
    """Everything that decides an experiment's numbers, plus how often to save and print.

    Attributes:
      name: names the default workdir, `runs/<name>`.
      seeds: one full repetition each: data split, label noise, initialisation and order.
      learning_rates: every method is trained at each, but those that have rates of their own; the
        choice uses validation data only.
      pretrain, probe, finetune, head: the stages (arXiv:2502.02797). The peak
        learning rate of `finetune` and `head` comes from the grid. Weights that are given
        (`model.path`) are not trained: `pretrain` is not read.
      frozen_batch_norm: stages, of `probe`, `finetune` and `head`, in which BatchNorm normalises
        by its running statistics and leaves them; in the others by the batch's, as in the
        authors' code.
      only: names of methods to run; empty means all.
      eval_every_epochs: points of the learning curves.
      save_every_steps: how often a running stage is saved.
      keep_checkpoints, keep_best: of a stage, how many checkpoints to keep, the latest (if one is
        damaged, the one before it is continued from; each holds the model and the optimiser's
        state); and whether to keep the one with the lowest training loss, too.

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
    eval_batch_size: int = 256
    eval_every_epochs: int = 1
    save_every_steps: int = 100
    keep_checkpoints: int = 2
    keep_best: bool = False
    log_every_steps: int = 10

    def validate(self) -> "ExperimentConfig":
        """Checks every field; returns the configuration itself.

        Raises:
          ConfigError: names the field, its value and what it should be.
        """
        check_types(self, "config")
        require(
            bool(self.name) and "/" not in self.name, "config.name", self.name, "a name without /"
        )
        require(len(self.seeds) > 0, "config.seeds", self.seeds, "not empty")
        require(len(set(self.seeds)) == len(self.seeds), "config.seeds", self.seeds, "distinct")
        require(all(seed >= 0 for seed in self.seeds), "config.seeds", self.seeds, "at least 0")
        self.mesh.validate("config.mesh")
        self.model.validate("config.model")
        self.data.validate("config.data")
        channels = 1 if isinstance(self.data, GlyphDataConfig) else 3
        require(
            self.model.in_channels == channels,
            "config.model.in_channels",
            self.model.in_channels,
            f"{channels}, as the images have",
        )
        if isinstance(self.data, GlyphDataConfig):
            ok = not self.model.path
            require(ok, "config.model.path", self.model.path, "empty: letters are trained on first")
        for name in self.frozen_stages():
            ok = name in ("probe", "finetune", "head")
            require(ok, "config.frozen_batch_norm", name, "one of probe, finetune, head")
        self.scoring.validate("config.scoring")
        for stage in ("pretrain", "probe", "finetune", "head"):
            getattr(self, stage).validate(f"config.{stage}")
        rateless = [method.name for method in self.methods if not method.learning_rates]
        require(
            bool(self.learning_rates) == bool(rateless),
            "config.learning_rates",
            self.learning_rates,
            f"not empty: {', '.join(rateless)} have none of their own"
            if rateless
            else "empty: every method has learning rates of its own",
        )
        _check_rates(self.learning_rates, "config.learning_rates")
        names = [method.name for method in self.methods]
        require(len(names) > 0, "config.methods", names, "not empty")
        require(len(set(names)) == len(names), "config.methods", names, "distinct names")
        for method in self.methods:
            method.validate(f"config.methods[{method.name}]")
        for name in self._only():
            require(name in names, "config.only", name, f"one of {names}")
        for name in (
            "eval_batch_size",
            "eval_every_epochs",
            "save_every_steps",
            "keep_checkpoints",
            "log_every_steps",
        ):
            require(getattr(self, name) > 0, f"config.{name}", getattr(self, name), "positive")
        return self

    def selected_methods(self) -> tuple[MethodConfig, ...]:
        """The methods to run: `only`, or all of them."""
        return tuple(m for m in self.methods if not self.only or m.name in self._only())

    def frozen_stages(self) -> list[str]:
        """The stages of `frozen_batch_norm`."""
        return _names(self.frozen_batch_norm)

    def _only(self) -> list[str]:
        return _names(self.only)


def _names(entries: tuple[str, ...]) -> list[str]:
    # On the command line `--config.only=a,b` arrives as one string.
    return [name for entry in entries for name in entry.split(",")]


def _check_rates(rates: tuple[float, ...], path: str) -> None:
    for rate in rates:
        require(math.isfinite(rate) and rate >= 0, path, rate, "finite and at least 0")
