"""Plan of an experiment: pure functions from a configuration to its stages and runs."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from easy_jax.core import weightings
from easy_jax.core.anchors import stored_name
from easy_jax.core.merge import AVERAGINGS
from easy_jax.core.weightings import Weighting
from easy_jax.experiments.config import ExperimentConfig, MethodConfig, Trainable
from easy_jax.train.config import StageConfig


@dataclasses.dataclass(frozen=True, slots=True)
class StageKey:
    """Identity of a training stage.

    Attributes:
      name: name of the stage, such as `probe`; contains all options that are not listed below.
      seed, label_noise, learning_rate: the setting; None if the stage does not depend on it.
    """

    name: str
    seed: int | None = None
    label_noise: float | None = None
    learning_rate: float | None = None

    @property
    def path(self) -> str:
        """Directory of the stage's checkpoints below `checkpoints/`, also its displayed name.

        Example:
          >>> StageKey("probe", seed=0, label_noise=0.3).path
          'seed0/noise0.3/probe'
        """
        parts = [] if self.seed is None else [f"seed{self.seed}"]
        for name, value in (("noise", self.label_noise), ("lr", self.learning_rate)):
            parts += [] if value is None else [f"{name}{value:g}"]
        return "/".join([*parts, self.name])


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage of the plan.

    Attributes:
      key: the stage's identity.
      seed: random seed of data, initialisation and order of examples.
      start: the stage whose model it continues; None for a random initialisation.
      new_head: whether the head is replaced by a randomly initialised one for the target task.
      config: configuration of the training; None if pre-trained weights are read from files.
      weighting, weighting_options, trainable, frozen_norm, sfa_beta: as in `MethodConfig` and
        `ExperimentConfig`.
    """

    key: StageKey
    seed: int
    start: StageKey | None
    new_head: bool
    config: StageConfig | None
    weighting: str = "none"
    weighting_options: tuple[tuple[str, Any], ...] = ()
    trainable: Trainable = "all"
    frozen_norm: bool = False
    sfa_beta: float | None = None

    @property
    def label_noise(self) -> float | None:
        """Share of wrong labels in the training data; None for the pre-training task."""
        return self.key.label_noise


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the grid: a method at a learning rate, with a label noise and a seed."""

    seed: int
    label_noise: float
    learning_rate: float
    method: MethodConfig

    @property
    def key(self) -> tuple[int, float, float, str]:
        return self.seed, self.label_noise, self.learning_rate, self.method.name


def plan(config: ExperimentConfig) -> dict[StageKey, Stage]:
    """Returns all training stages without repetition, each after the one that it starts from."""
    stages: dict[StageKey, Stage] = {}
    for run in runs(config):
        for stage in (*shared_stages(config, run.seed, run.label_noise), *run_stages(config, run)):
            stages.setdefault(stage.key, stage)
    return stages


def runs(config: ExperimentConfig) -> Iterator[Run]:
    """Yields the runs of the grid in the order in which they are carried out."""
    rates_of = {
        method.name: method.learning_rates or config.learning_rates
        for method in config.selected_methods()
    }
    for seed in config.seeds:
        for noise in config.data.label_noise:
            # Rates in the outer loop: a stage that methods share is then still in memory.
            for rate in dict.fromkeys(rate for rates in rates_of.values() for rate in rates):
                for method in config.selected_methods():
                    if rate in rates_of[method.name]:
                        yield Run(seed, noise, rate, method)


def shared_stages(config: ExperimentConfig, seed: int, label_noise: float) -> tuple[Stage, Stage]:
    """Returns pre-training and linear probe, which runs of equal seed and label noise share."""
    pretrain = Stage(
        key=pretrain_key(config, seed),
        seed=seed,
        start=None,
        new_head=False,
        config=None if config.model.path else config.pretrain,
    )
    probe = Stage(
        key=probe_key(seed, label_noise),
        seed=seed,
        start=pretrain.key,
        new_head=True,
        config=config.probe,
        trainable="head",
        frozen_norm="probe" in config.frozen_stages(),
    )
    return pretrain, probe


def run_stages(config: ExperimentConfig, run: Run) -> list[Stage]:
    """Returns a run's own stages: fine-tuning and, if the method has one, the head stage.

    If fine-tuning is identical to the experiment's linear probe, the probe's stage is returned.
    """
    method, seed, noise, rate = run.method, run.seed, run.label_noise, run.learning_rate
    pretrain, probe = shared_stages(config, seed, noise)
    from_probe = method.start == "probe"
    name = f"{method.start}-{path_of(method)}"
    finetune = Stage(
        key=StageKey(name, seed, noise, rate),
        seed=seed,
        start=probe.key if from_probe else pretrain.key,
        new_head=not from_probe,
        config=_at_rate(config.finetune, rate, method),
        weighting=method.weighting,
        weighting_options=method.weighting_options,
        trainable=method.trainable,
        frozen_norm=("probe" if method.trainable == "head" else "finetune")
        in config.frozen_stages(),
        sfa_beta=sfa_beta(method),
    )
    if dataclasses.replace(finetune, key=probe.key) == probe:
        finetune = probe
    if method.head_stage == "none":
        return [finetune]
    head_rate = method.head_learning_rate or rate
    own_rate = f"-lr{head_rate:g}" if head_rate != rate else ""
    head = Stage(
        key=StageKey(f"{name}-head-{method.head_stage}{own_rate}", seed, noise, rate),
        seed=seed,
        start=finetune.key,
        new_head=False,
        config=_at_rate(config.head, head_rate),
        weighting=method.weighting if method.head_stage == "weighted" else "none",
        weighting_options=method.weighting_options if method.head_stage == "weighted" else (),
        trainable="head",
        frozen_norm="head" in config.frozen_stages(),
    )
    return [finetune, head]


def weighting_of(method: MethodConfig | Stage) -> Weighting:
    """Returns the weighting of a method or a stage, with its options."""
    return weightings.get(method.weighting, **dict(method.weighting_options))


def path_of(method: MethodConfig) -> str:
    """Returns a method's options as a part of a directory's name."""
    anchored = method.anchor != "none"
    anchor = f"{stored_name(method.anchor)}{method.anchor_strength:g}" if anchored else ""
    during = sfa_beta(method) is not None or ema_decay(method) > 0
    averaging = f"{method.averaging}{method.alpha:g}" if during else ""
    options = "".join(f"-{name}{value}" for name, value in method.weighting_options)
    parts = [method.trainable, method.weighting + options, anchor, averaging]
    return "-".join(part for part in parts if part and part != "none")


def sfa_beta(method: MethodConfig) -> float | None:
    """Returns the share of the starting weights, or None if no averaging occurs in training."""
    return method.alpha if AVERAGINGS.find(method.averaging).when == "during" else None


def ema_decay(method: MethodConfig) -> float:
    """Returns the decay of a method's average over the steps; 0 for none."""
    return method.alpha if AVERAGINGS.find(method.averaging).when == "every_step" else 0.0


def pretrain_key(config: ExperimentConfig, seed: int) -> StageKey:
    """Returns the key of pre-training; one for all seeds if the weights are read from files."""
    return StageKey("pretrained") if config.model.path else StageKey("pretrain", seed)


def probe_key(seed: int, label_noise: float) -> StageKey:
    """Returns the key of the linear probe, whose losses give the weights."""
    return StageKey("probe", seed, label_noise)


def _at_rate(
    stage: StageConfig, learning_rate: float, method: MethodConfig | None = None
) -> StageConfig:
    optimizer = dataclasses.replace(stage.optimizer, learning_rate=learning_rate)
    if method is not None and method.anchor != "none":
        optimizer = dataclasses.replace(
            optimizer, anchor=method.anchor, anchor_strength=method.anchor_strength
        )
    if method is not None and ema_decay(method):
        optimizer = dataclasses.replace(optimizer, ema_decay=ema_decay(method))
    return dataclasses.replace(stage, optimizer=optimizer)


def loss_table_path(
    workdir: Path, seed: int, label_noise: float, split: Literal["train", "test"] = "train"
) -> Path:
    """Returns the directory of a loss table of the probed model."""
    end = "" if split == "train" else f"-{split}"
    return workdir / "loss_table" / f"seed{seed}-noise{label_noise:g}{end}"


def row_key(row: dict[str, Any]) -> tuple[int, float, float, str]:
    """Returns the key of the run that a row of results belongs to."""
    return row["seed"], row["label_noise"], row["learning_rate"], row["method"]
