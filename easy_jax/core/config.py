"""Configuration of the optimizer, the names of reductions, and former names of anchors."""

import dataclasses
import warnings
from typing import Literal

from easy_jax.io.checks import choice, finite_at_least_zero, require

Reduction = Literal["token_mean", "example_mean", "weight_mean"]


FORMER_ANCHORS = {"l1": "l1_sp", "l2": "l2_sp"}


def current_anchor(name: str) -> str:
    """Returns the current name of an anchor; warns if a former name is given.

    Example:
      >>> current_anchor("l2_sp")
      'l2_sp'
    """
    now = FORMER_ANCHORS.get(name, name)
    if now != name:
        message = f"anchor {name!r} is now {now!r}"
        warnings.warn(message, DeprecationWarning, stacklevel=4)
    return now


@dataclasses.dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Configuration of the optimizer, its schedule and an anchor to the starting weights.

    Attributes:
      name: `sgd` (with `momentum`) or `adamw` (with `b1`, `b2` and `eps`).
      learning_rate: peak learning rate.
      schedule: course of the learning rate after the warm-up: cosine to 0, or constant.
      warmup_ratio: share of the steps in which the learning rate rises linearly.
      weight_decay: added to the gradient for SGD, decoupled for AdamW.
      clip_norm: maximum global norm of the gradient; 0: no clipping.
      anchor: a distance to the model at the start (`easy_jax.core.anchors`): `none`, `l1_sp` or
        `l2_sp` to its weights, `kl` to its distribution.
      anchor_strength: the anchor's factor lambda in the loss (arXiv:2502.02797).
      anchor_per_parameter: whether to divide lambda by the number of trainable parameters, as the
        paper does for language models; not for `kl`, which is a mean over tokens.
      ema_decay: decay of an exponential moving average of the parameters, which replaces them in
        the result (`easy_jax.core.merge.ema`); 0: no average.

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
    anchor: str = "none"
    anchor_strength: float = 0.0
    anchor_per_parameter: bool = False
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchor", current_anchor(self.anchor))

    def validate(self, path: str = "optimizer") -> None:
        choice(self, path, "name", "schedule")
        finite_at_least_zero(
            self, path, "learning_rate", "weight_decay", "eps", "clip_norm", "anchor_strength"
        )
        for name in ("momentum", "b1", "b2", "warmup_ratio", "ema_decay"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{path}.{name}", value, "at least 0 and below 1")
