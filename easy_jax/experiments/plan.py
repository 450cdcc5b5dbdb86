"""The plan of an experiment: which stages and cells a configuration asks for. Pure functions."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from easy_jax.core.anchors import stored_name
from easy_jax.core.merge import AVERAGINGS
from easy_jax.experiments.config import ExperimentConfig, MethodConfig, Trainable
from easy_jax.train.config import StageConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage of the plan. Its name is its directory below `checkpoints/`.

    `start` is the name of the stage it continues, None for a random initialisation;
    `new_head` replaces the head by a fresh one for the target task. `stage` is None where there
    is nothing to train: the pre-trained weights are read from files.
    """

    name: str
    seed: int
    label_noise: float | None
    start: str | None
    new_head: bool
    stage: StageConfig | None
    weighting: str = "none"
    trainable: Trainable = "all"
    frozen_norm: bool = False
    sfa_beta: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the grid: a method, at a learning rate, in a setting, with a seed."""

    seed: int
    label_noise: float
    learning_rate: float
    method: MethodConfig

    @property
    def key(self) -> tuple[int, float, float, str]:
        return self.seed, self.label_noise, self.learning_rate, self.method.name


def plan(config: ExperimentConfig) -> dict[str, Stage]:
    """All training stages by name, each after the one it starts from; shared ones once."""
    stages: dict[str, Stage] = {}
    for cell in cells(config):
        for stage in (
            *shared_stages(config, cell.seed, cell.label_noise),
            *cell_stages(config, cell),
        ):
            stages.setdefault(stage.name, stage)
    return stages


def cells(config: ExperimentConfig) -> Iterator[Cell]:
    """The grid, in the order in which it is run."""
    rates_of = {
        method.name: method.learning_rates or config.learning_rates
        for method in config.selected_methods()
    }
    for seed in config.seeds:
        for noise in config.data.label_noise:
            # By rate: what methods share at one is in memory when the next one needs it.
            for rate in dict.fromkeys(rate for rates in rates_of.values() for rate in rates):
                for method in config.selected_methods():
                    if rate in rates_of[method.name]:
                        yield Cell(seed, noise, rate, method)


def shared_stages(config: ExperimentConfig, seed: int, label_noise: float) -> tuple[Stage, Stage]:
    """Pre-training and probe, on which all cells of a seed and setting rest."""
    pretrain = Stage(
        pretrain_name(config, seed),
        seed,
        None,
        None,
        False,
        None if config.model.path else config.pretrain,
    )
    probe = Stage(
        probe_name(seed, label_noise),
        seed,
        label_noise,
        pretrain.name,
        True,
        config.probe,
        trainable="head",
        frozen_norm="probe" in config.frozen_stages(),
    )
    return pretrain, probe


def cell_stages(config: ExperimentConfig, cell: Cell) -> list[Stage]:
    """A method's own stages: fine-tuning and, if it has one, the head alone.

    A linear probe like the experiment's, at its learning rate, is that one.
    """
    method, seed, noise = cell.method, cell.seed, cell.label_noise
    pretrain, probe = shared_stages(config, seed, noise)
    from_probe = method.start == "probe"
    name = f"seed{seed}/noise{noise:g}/lr{cell.learning_rate:g}/{method.start}-{path_of(method)}"
    finetune = Stage(
        name,
        seed,
        noise,
        probe.name if from_probe else pretrain.name,
        not from_probe,
        _at_rate(config.finetune, cell.learning_rate, method),
        weighting=method.weighting,
        trainable=method.trainable,
        frozen_norm=("probe" if method.trainable == "head" else "finetune")
        in config.frozen_stages(),
        sfa_beta=sfa_beta(method),
    )
    if dataclasses.replace(finetune, name=probe.name) == probe:
        finetune = probe
    if method.head_stage == "none":
        return [finetune]
    rate = method.head_learning_rate or cell.learning_rate
    own_rate = f"-lr{rate:g}" if rate != cell.learning_rate else ""
    head = Stage(
        f"{name}-head-{method.head_stage}{own_rate}",
        seed,
        noise,
        finetune.name,
        False,
        _at_rate(config.head, rate),
        weighting=method.weighting if method.head_stage == "weighted" else "none",
        trainable="head",
        frozen_norm="head" in config.frozen_stages(),
    )
    return [finetune, head]


def path_of(method: MethodConfig) -> str:
    """The part of a directory's name that says how a method trains."""
    anchored = method.anchor != "none"
    anchor = f"{stored_name(method.anchor)}{method.anchor_strength:g}" if anchored else ""
    averaging = f"{method.averaging}{method.alpha:g}" if sfa_beta(method) is not None else ""
    parts = [method.trainable, method.weighting, anchor, averaging]
    return "-".join(part for part in parts if part and part != "none")


def sfa_beta(method: MethodConfig) -> float | None:
    """The share of the starting weights, of a method that averages during training."""
    return method.alpha if AVERAGINGS.find(method.averaging).when == "during" else None


def pretrain_name(config: ExperimentConfig, seed: int) -> str:
    """The stage that all of a seed's stages start from; given weights are every seed's."""
    return "pretrained" if config.model.path else f"seed{seed}/pretrain"


def probe_name(seed: int, label_noise: float) -> str:
    """The linear probe whose losses give the weights."""
    return f"seed{seed}/noise{label_noise:g}/probe"


def _at_rate(
    stage: StageConfig, learning_rate: float, method: MethodConfig | None = None
) -> StageConfig:
    optimizer = dataclasses.replace(stage.optimizer, learning_rate=learning_rate)
    if method is not None and method.anchor != "none":
        optimizer = dataclasses.replace(
            optimizer, anchor=method.anchor, anchor_strength=method.anchor_strength
        )
    return dataclasses.replace(stage, optimizer=optimizer)


def loss_table_path(
    workdir: Path, seed: int, label_noise: float, split: Literal["train", "test"] = "train"
) -> Path:
    """Where a setting's loss table is."""
    end = "" if split == "train" else f"-{split}"
    return workdir / "loss_table" / f"seed{seed}-noise{label_noise:g}{end}"


def row_key(row: dict[str, Any]) -> tuple[int, float, float, str]:
    """The key of the cell that a row of results belongs to."""
    return row["seed"], row["label_noise"], row["learning_rate"], row["method"]
