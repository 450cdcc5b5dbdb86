"""Experiments with images: letters, then handwritten digits, by every method."""

import dataclasses
import math
from typing import Literal

from easy_jax.config.base import (
    Averaging,
    MeshConfig,
    Regularizer,
    ScoringConfig,
    StageConfig,
    check_types,
    choice,
    finite_at_least_zero,
    require,
)

Weighting = Literal["none", "flow", "uniform", "shuffled", "mean_one"]
Trainable = Literal["all", "head", "bn_head"]
HeadStage = Literal["none", "unweighted", "weighted"]


@dataclasses.dataclass(slots=True)
class ResNetConfig:
    """A ResNet for small images: 3x3 stem, basic blocks, width doubling per stage."""

    in_channels: int = 1
    width: int = 16
    depths: tuple[int, ...] = (1, 1, 1)

    def validate(self, path: str = "model") -> None:
        require(self.in_channels > 0, f"{path}.in_channels", self.in_channels, "positive")
        require(self.width > 0, f"{path}.width", self.width, "positive")
        ok = len(self.depths) > 0 and all(depth > 0 for depth in self.depths)
        require(ok, f"{path}.depths", self.depths, "one positive number of blocks per stage")


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
        require(bool(self.name), f"{path}.name", self.name, "a non-empty name")
        choice(self, path, "start", "weighting", "trainable", "anchor", "averaging", "head_stage")
        finite_at_least_zero(self, path, "anchor_strength")
        require(0.0 <= self.alpha <= 1.0, f"{path}.alpha", self.alpha, "between 0 and 1")
        if self.head_stage == "weighted":
            require(
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
        require(self.image_size >= 8, f"{path}.image_size", self.image_size, "at least 8")
        for name in (
            "pretrain_train", "pretrain_validation", "pretrain_test",
            "target_train", "target_validation",
        ):  # fmt: skip
            require(getattr(self, name) > 0, f"{path}.{name}", getattr(self, name), "positive")
        used = self.target_train + self.target_validation
        require(
            used < 1797, f"{path}.target_train + {path}.target_validation", used,
            "below 1,797, the number of digits, to leave a test set",
        )  # fmt: skip
        require(len(self.label_noise) > 0, f"{path}.label_noise", self.label_noise, "not empty")
        for share in self.label_noise:
            require(0.0 <= share < 1.0, f"{path}.label_noise", share, "at least 0 and below 1")


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
      keep_checkpoints, keep_best: of a stage, how many checkpoints to keep, the latest; and
        whether to keep the one with the lowest training loss, too.
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
    keep_checkpoints: int = 1
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
        self.scoring.validate("config.scoring")
        for stage in ("pretrain", "probe", "finetune", "head"):
            getattr(self, stage).validate(f"config.{stage}")
        require(len(self.learning_rates) > 0, "config.learning_rates", (), "not empty")
        for rate in self.learning_rates:
            ok = math.isfinite(rate) and rate >= 0
            require(ok, "config.learning_rates", rate, "finite and at least 0")
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

    def _only(self) -> list[str]:
        # On the command line `--config.only=a,b` arrives as one string.
        return [name for entry in self.only for name in entry.split(",")]
