"""Train mode and eval mode of a model."""

from typing import TypeVar

from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def eval_mode(model: M) -> M:
    """Returns the model in eval mode: BatchNorm uses running statistics, dropout is off.

    Args:
      model: a Flax NNX module. It is not changed, and the result shares its variables.

    Example:
      >>> eval_mode(nnx.Dropout(0.5)).deterministic
      True
    """
    return nnx.view(model, use_running_average=True, deterministic=True, raise_if_not_found=False)


def train_mode(model: M) -> M:
    """Returns the model in train mode: BatchNorm uses batch statistics, dropout is on.

    Args:
      model: a Flax NNX module. It is not changed, and the result shares its variables.

    Example:
      >>> train_mode(nnx.BatchNorm(2, rngs=nnx.Rngs(0))).use_running_average
      False
    """
    return nnx.view(model, use_running_average=False, deterministic=False, raise_if_not_found=False)
