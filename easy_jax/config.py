"""The configuration schema: typed dataclasses, validated once, errors that name the field.

A configuration file in `configs/` defines `get_config(arg="")`, which returns an
`ExperimentConfig` (images) or a `LanguageConfig`, and imports nothing of the package but this.
"""

from etils import epy

# Each name is imported when it is first used.
with epy.lazy_api_imports(globals()):
    from easy_jax.core.config import Averaging, OptimizerConfig, Reduction, Regularizer
    from easy_jax.data.config import (
        ALPACA,
        ALPACA_INPUT,
        GlyphDataConfig,
        ImageDataConfig,
        ImageDataName,
        InstructionsConfig,
        TextConfig,
        TransferDataConfig,
    )
    from easy_jax.experiments.config import (
        ExperimentConfig,
        HeadStage,
        MethodConfig,
        Trainable,
        Weighting,
    )
    from easy_jax.experiments.language_config import (
        LanguageConfig,
        LanguageMethodConfig,
        LanguageModelConfig,
    )
    from easy_jax.io.checks import ConfigError, differences, replace, to_json
    from easy_jax.models.config import RESNETS, ResNetConfig
    from easy_jax.parallel.config import MeshConfig
    from easy_jax.train.config import ScoringConfig, StageConfig

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
    "replace",
    "to_json",
]
