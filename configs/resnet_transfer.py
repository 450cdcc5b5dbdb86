"""Table 1 of the paper: a ResNet from ImageNet, fine-tuned on one of six data sets, all methods.

  easy-jax compare --config=configs/resnet_transfer.py:resnet50,cifar10

Models: resnet18, resnet34, resnet50, resnet101. Data sets: cifar10, cifar100, oxford_flowers102,
caltech101, cars196, stanford_dogs. Data: TFDS in `data/`, or folders (docs/images.md):

  --config.data.target.format=folder --config.data.target.path=data/cars

Learning rates: the paper's, one for each method. With `,grid` at the end, every method uses five,
and validation data select one. Hardware, hours and the paper's numbers: docs/reproduce.md.
"""

import dataclasses
from typing import cast

from easy_jax.config import (
    RESNETS,
    ConfigError,
    ExperimentConfig,
    ImageDataConfig,
    ImageDataName,
    MethodConfig,
    OptimizerConfig,
    ResNetConfig,
    ScoringConfig,
    StageConfig,
    TransferDataConfig,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The paper's hyper-parameters for a data set, given for ResNet-18 only."""

    epochs: int
    flow: float  # learning rates
    head: float  # of the probe and of FLOW's last stage
    standard: float


RECIPES = {
    "cifar10": Recipe(20, 0.001, 0.005, 0.005),
    "cifar100": Recipe(25, 0.005, 0.005, 0.01),
    "oxford_flowers102": Recipe(25, 0.05, 0.05, 0.05),
    "caltech101": Recipe(30, 0.01, 0.01, 0.005),
    "stanford_dogs": Recipe(30, 0.005, 0.005, 0.001),
    "cars196": Recipe(30, 0.01, 0.05, 0.05),
}
ARGUMENTS = tuple(f"{model},{data}" for model in RESNETS for data in RECIPES)
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
ALPHAS = (0.5, 0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)  # the first is Table 1's
# Weights of the same training recipe for every size.
WEIGHTS = {name: f"hf://timm/{name}.a1_in1k" for name in RESNETS}


def get_config(arg: str = "") -> ExperimentConfig:
    """Returns the configuration of `MODEL,DATA` or `MODEL,DATA,grid`."""
    match (arg or ARGUMENTS[0]).split(","):
        case [model, data, *grid] if (
            model in RESNETS and data in RECIPES and grid in ([], ["grid"])
        ):
            return _config(model, data, bool(grid))
    raise ConfigError(
        f"resnet_transfer.py:{arg} is unknown; use MODEL,DATA or MODEL,DATA,grid; MODEL one of "
        f"{', '.join(RESNETS)}; DATA one of {', '.join(RECIPES)}"
    )


def _config(model: str, data: str, grid: bool) -> ExperimentConfig:
    recipe = RECIPES[data]

    def stage() -> StageConfig:
        optimizer = OptimizerConfig(learning_rate=recipe.head, weight_decay=5e-4)
        return StageConfig(epochs=recipe.epochs, batch_size=128, optimizer=optimizer)

    return ExperimentConfig(
        name=f"{model}-{data}{'-grid' if grid else ''}",
        seeds=(42,),
        model=ResNetConfig.named(model, path=WEIGHTS[model]),
        data=TransferDataConfig(
            pretrain=ImageDataConfig("imagenet2012", path="data"),
            target=ImageDataConfig(cast(ImageDataName, data), path="data"),
        ),
        probe=stage(),
        scoring=ScoringConfig(batch_size=256),
        finetune=stage(),
        head=stage(),
        learning_rates=GRID if grid else (),
        methods=_methods(None if grid else recipe),
        eval_every_epochs=recipe.epochs,
        save_every_steps=500,
    )


def _methods(recipe: Recipe | None) -> tuple[MethodConfig, ...]:
    """Returns Table 1's methods, and WiSE-FT with and without FLOW (Table 3) at every alpha."""
    standard, head, flow = (
        ((recipe.standard,), (recipe.head,), (recipe.flow,)) if recipe else ((), (), ())
    )
    head_rate = recipe.head if recipe else 0.0
    wise_ft = [
        MethodConfig(
            "wise_ft" if alpha == ALPHAS[0] else f"wise_ft_{alpha:g}",
            start="probe",
            averaging="wise_ft",
            alpha=alpha,
            learning_rates=standard,
        )
        for alpha in ALPHAS
    ]
    return (
        MethodConfig("standard", learning_rates=standard),
        # The paper does not state its lambda for images.
        MethodConfig(
            "l2", start="probe", anchor="l2_sp", anchor_strength=0.01, learning_rates=standard
        ),
        *wise_ft,
        MethodConfig("linear_probe", trainable="head", learning_rates=head),
        MethodConfig(
            "flow",
            start="probe",
            weighting="flow",
            head_stage="unweighted",
            learning_rates=flow,
            head_learning_rate=head_rate,
        ),
        *(
            dataclasses.replace(
                method, name=f"flow_{method.name}", weighting="flow", learning_rates=flow
            )
            for method in wise_ft
        ),
    )
