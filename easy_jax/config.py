"""The configuration schema: typed dataclasses, validated once, errors that name the field.

A configuration file in `configs/` defines `get_config(arg="")`, which returns an
`ExperimentConfig` (images) or a `LanguageConfig`, and imports nothing of the package but this.
"""

import warnings
from typing import Any

from etils import epy

# Each name is imported when it is first used.
with epy.lazy_api_imports(globals()):
    from easy_jax.core.config import OptimizerConfig, Reduction
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
    )
    from easy_jax.experiments.language_config import (
        LanguageConfig,
        LanguageModelConfig,
    )
    from easy_jax.io.checks import ConfigError, differences, replace, to_json
    from easy_jax.models.config import RESNETS, ResNetConfig
    from easy_jax.parallel.config import MeshConfig
    from easy_jax.train.config import ScoringConfig, StageConfig

_FORMER = {"LanguageMethodConfig": "MethodConfig"}  # of the version before
_lazy = globals()["__getattr__"]  # of `lazy_api_imports`


def __getattr__(name: str) -> Any:
    if name in _FORMER:
        message = f"easy_jax.config.{name} is now easy_jax.config.{_FORMER[name]}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        name = _FORMER[name]
    return _lazy(name)


__all__ = [
    "ALPACA",
    "ALPACA_INPUT",
    "RESNETS",
    "ConfigError",
    "ExperimentConfig",
    "GlyphDataConfig",
    "HeadStage",
    "ImageDataConfig",
    "ImageDataName",
    "InstructionsConfig",
    "LanguageConfig",
    "LanguageModelConfig",
    "MeshConfig",
    "MethodConfig",
    "OptimizerConfig",
    "Reduction",
    "ResNetConfig",
    "ScoringConfig",
    "StageConfig",
    "TextConfig",
    "Trainable",
    "TransferDataConfig",
    "differences",
    "replace",
    "to_json",
]
