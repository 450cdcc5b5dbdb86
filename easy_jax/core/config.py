"""Configuration of the optimizer, and the names of reductions, anchors and averagings."""

import dataclasses
from typing import Literal

from easy_jax.io.checks import choice, finite_at_least_zero, require

Reduction = Literal["token_mean", "example_mean", "weight_mean"]


Regularizer = Literal["none", "l1", "l2"]


Averaging = Literal["none", "wise_ft", "sfa"]


@dataclasses.dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Optimiser, schedule and the pull towards the starting weights.

    `weight_decay` is added to the gradient for SGD and decoupled for AdamW.
    `anchor_strength` is the lambda of the l1 or l2 distance to the starting weights
    (arXiv:2502.02797); `anchor_per_parameter` divides it by the number of trainable
    parameters, as the paper does for language models.

    Example:
      >>> OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_ratio=0.1).schedule
      'cosine'
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0
    anchor: Regularizer = "none"
    anchor_strength: float = 0.0
    anchor_per_parameter: bool = False

    def validate(self, path: str = "optimizer") -> None:
        choice(self, path, "name", "schedule", "anchor")
        finite_at_least_zero(
            self, path, "learning_rate", "weight_decay", "eps", "clip_norm", "anchor_strength"
        )
        for name in ("momentum", "b1", "b2", "warmup_ratio"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{path}.{name}", value, "at least 0 and below 1")
