"""The plan of an experiment: which stages and cells a configuration asks for. Pure functions."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easy_jax.config import ExperimentConfig, MethodConfig, StageConfig, Trainable, Weighting


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage of the plan. Its name is its directory below `checkpoints/`.

    `start` is the name of the stage it continues, None for a random initialisation;
    `new_head` replaces the head by a fresh one for the target task.
    """

    name: str
    seed: int
    label_noise: float | None
    start: str | None
    new_head: bool
    stage: StageConfig
    weighting: Weighting = "none"
    trainable: Trainable = "all"
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
        for stage in _chain(config, cell):
            stages.setdefault(stage.name, stage)
    return stages


def cells(config: ExperimentConfig) -> Iterator[Cell]:
    """The grid, in the order in which it is run."""
    for seed in config.seeds:
        for noise in config.data.label_noise:
            for rate in config.learning_rates:
                for method in config.selected_methods():
                    yield Cell(seed, noise, rate, method)


def cell_stages(config: ExperimentConfig, cell: Cell) -> list[Stage]:
    """A method's own stages: fine-tuning and, if it has one, the head alone."""
    return _chain(config, cell)[2:]


def pretrain_name(seed: int) -> str:
    """The stage that all of a seed's stages start from."""
    return f"seed{seed}/pretrain"


def probe_name(seed: int, label_noise: float) -> str:
    """The linear probe whose losses give the weights."""
    return f"seed{seed}/noise{label_noise:g}/probe"


def _chain(config: ExperimentConfig, cell: Cell) -> list[Stage]:
    """Pre-training, probe, fine-tuning, head: the stages that a cell rests on."""
    method, seed, noise = cell.method, cell.seed, cell.label_noise
    pretrain = Stage(pretrain_name(seed), seed, None, None, False, config.pretrain)
    probe = Stage(
        probe_name(seed, noise), seed, noise, pretrain.name, True, config.probe, trainable="head"
    )
    from_probe = method.start == "probe"
    anchor = f"{method.anchor}{method.anchor_strength:g}" if method.anchor != "none" else ""
    sfa = f"sfa{method.alpha:g}" if method.averaging == "sfa" else ""
    parts = [method.start, method.trainable, method.weighting, anchor, sfa]
    text = "-".join(part for part in parts if part and part != "none")
    name = f"seed{seed}/noise{noise:g}/lr{cell.learning_rate:g}/{text}"
    finetune = Stage(
        name, seed, noise, probe.name if from_probe else pretrain.name, not from_probe,
        _at_rate(config.finetune, cell.learning_rate, method),
        weighting=method.weighting, trainable=method.trainable,
        sfa_beta=method.alpha if method.averaging == "sfa" else None,
    )  # fmt: skip
    chain = [pretrain, probe, finetune]
    if method.head_stage != "none":
        weighted = method.head_stage == "weighted"
        chain.append(
            Stage(
                f"{name}-head-{method.head_stage}", seed, noise, name, False,
                _at_rate(config.head, cell.learning_rate),
                weighting=method.weighting if weighted else "none", trainable="head",
            )
        )  # fmt: skip
    return chain


def _at_rate(
    stage: StageConfig, learning_rate: float, method: MethodConfig | None = None
) -> StageConfig:
    optimizer = dataclasses.replace(stage.optimizer, learning_rate=learning_rate)
    if method is not None and method.anchor != "none":
        optimizer = dataclasses.replace(
            optimizer, anchor=method.anchor, anchor_strength=method.anchor_strength
        )
    return dataclasses.replace(stage, optimizer=optimizer)


def loss_table_path(workdir: Path, seed: int, label_noise: float) -> Path:
    """Where a setting's loss table is."""
    return workdir / "loss_table" / f"seed{seed}-noise{label_noise:g}"


def row_key(row: dict[str, Any]) -> tuple[int, float, float, str]:
    """The key of the cell that a row of results belongs to."""
    return row["seed"], row["label_noise"], row["learning_rate"], row["method"]
