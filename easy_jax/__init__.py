"""easy_jax: fine-tuning without forgetting, in JAX (FLOW, ICML 2025).

Score every fine-tuning example once with the frozen pre-trained model, turn the losses into
weights, fine-tune with the weighted loss, and show what was learnt against what was forgotten.

  import easy_jax as ej

  table = ej.score(model, source, "loss_table", loss_fn=ej.classification_loss)
  weight_N = table.flow_weights()
  step = ej.make_train_step(graphdef, ej.classification_loss, optimizer, reduction="example_mean")
"""

import warnings
from typing import TYPE_CHECKING, Any

from etils import epy

# Each name is imported when it is first used: `easy-jax --help` needs none of JAX.
with epy.lazy_api_imports(globals()):
    from easy_jax.config import (
        ExperimentConfig,
        ImageDataConfig,
        LanguageConfig,
        MeshConfig,
        MethodConfig,
        OptimizerConfig,
        ResNetConfig,
        StageConfig,
    )
    from easy_jax.core import weightings
    from easy_jax.core.anchors import anchor
    from easy_jax.core.causal_lm import causal_lm_loss, causal_lm_token_losses
    from easy_jax.core.held_params import hold_old
    from easy_jax.core.losses import (
        classification_loss,
        softmax_cross_entropy,
        squared_error,
    )
    from easy_jax.core.merge import interpolate, wise_ft
    from easy_jax.core.optim import make_optimizer
    from easy_jax.core.step import make_train_step
    from easy_jax.core.train_state import TrainState, init_train_state
    from easy_jax.core.weightings import (
        control_weights,
        entropic_objective,
        flow_weights,
        flow_weights_token,
        kl_dro_weights,
        temperature,
    )
    from easy_jax.data import (
        ArraySource,
        DataError,
        DataWarning,
        ImageSource,
        PackedSource,
        Ragged,
        Reading,
        TfdsSource,
        TokenSource,
        load_images,
        scoring_loader,
        text,
        training_loader,
    )
    from easy_jax.kernels.linear_cross_entropy import (
        linear_cross_entropy,
        linear_cross_entropy_and_kl,
        linear_cross_entropy_stats,
    )
    from easy_jax.kernels.token_stats import TokenStats
    from easy_jax.models import lora
    from easy_jax.models.classifier import ClassifierInfo, new_head
    from easy_jax.models.modes import eval_mode, train_mode
    from easy_jax.models.resnet import ResNet
    from easy_jax.models.transformer import Transformer
    from easy_jax.models.transformer_config import TransformerConfig
    from easy_jax.parallel.sharding import make_mesh, shard_batch
    from easy_jax.pipeline import run
    from easy_jax.pretrained import hugging_face, timm_weights
    from easy_jax.train.evaluate import classification, with_task_parts
    from easy_jax.train.fitting import Fit, fit
    from easy_jax.train.loss_table import LossTable
    from easy_jax.train.scoring import score
    from easy_jax.train.weights_file import export_weights

# Names of earlier versions, which still work for one version.
_FORMER = {
    "LanguageMethodConfig": "MethodConfig",
    "eval_view": "eval_mode",
    "train_view": "train_mode",
}
_lazy = globals()["__getattr__"]  # of `lazy_api_imports`

if not TYPE_CHECKING:  # to a type checker it would say that every name exists

    def __getattr__(name: str) -> Any:
        if name in _FORMER:
            message = f"easy_jax.{name} is now easy_jax.{_FORMER[name]}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            name = _FORMER[name]
        return _lazy(name)


__all__ = [
    "ArraySource",
    "ClassifierInfo",
    "DataError",
    "DataWarning",
    "ExperimentConfig",
    "Fit",
    "ImageDataConfig",
    "ImageSource",
    "LanguageConfig",
    "LossTable",
    "MeshConfig",
    "MethodConfig",
    "OptimizerConfig",
    "PackedSource",
    "Ragged",
    "Reading",
    "ResNet",
    "ResNetConfig",
    "StageConfig",
    "TfdsSource",
    "TokenSource",
    "TokenStats",
    "TrainState",
    "Transformer",
    "TransformerConfig",
    "anchor",
    "causal_lm_loss",
    "causal_lm_token_losses",
    "classification",
    "classification_loss",
    "control_weights",
    "entropic_objective",
    "eval_mode",
    "export_weights",
    "fit",
    "flow_weights",
    "flow_weights_token",
    "hold_old",
    "hugging_face",
    "init_train_state",
    "interpolate",
    "kl_dro_weights",
    "linear_cross_entropy",
    "linear_cross_entropy_and_kl",
    "linear_cross_entropy_stats",
    "load_images",
    "lora",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "new_head",
    "run",
    "score",
    "scoring_loader",
    "shard_batch",
    "softmax_cross_entropy",
    "squared_error",
    "temperature",
    "text",
    "timm_weights",
    "train_mode",
    "training_loader",
    "weightings",
    "wise_ft",
    "with_task_parts",
]
