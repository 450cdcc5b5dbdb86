"""The configuration schema: typed dataclasses, validated once, errors that name the field.

A configuration file in `configs/` defines `get_config(arg="")`, which returns an
`ExperimentConfig` (images) or a `LanguageConfig`, and imports nothing of the package but this.
"""

from easy_jax.config.base import (
    Averaging,
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    Reduction,
    Regularizer,
    ScoringConfig,
    StageConfig,
    differences,
    to_json,
)
from easy_jax.config.images import (
    GlyphDataConfig,
    ImageDataConfig,
    ImageDataName,
    TransferDataConfig,
)
from easy_jax.config.language import (
    ALPACA,
    ALPACA_INPUT,
    InstructionsConfig,
    LanguageConfig,
    LanguageMethodConfig,
    LanguageModelConfig,
    TextConfig,
)
from easy_jax.config.vision import (
    RESNETS,
    ExperimentConfig,
    HeadStage,
    MethodConfig,
    ResNetConfig,
    Trainable,
    Weighting,
)

__all__ = [
    "ALPACA",
    "ALPACA_INPUT",
    "RESNETS",
    "Averaging",
    "ConfigError",
    "ExperimentConfig",
    "GlyphDataConfig",
    "HeadStage",
    "ImageDataConfig",
    "ImageDataName",
    "InstructionsConfig",
    "LanguageConfig",
    "LanguageMethodConfig",
    "LanguageModelConfig",
    "MeshConfig",
    "MethodConfig",
    "OptimizerConfig",
    "Reduction",
    "Regularizer",
    "ResNetConfig",
    "ScoringConfig",
    "StageConfig",
    "TextConfig",
    "Trainable",
    "TransferDataConfig",
    "Weighting",
    "differences",
    "to_json",
]
