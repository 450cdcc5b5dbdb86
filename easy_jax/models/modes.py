"""The train and eval modes of a model."""

from typing import TypeVar

from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def eval_view(model: M) -> M:
    """The same variables, with BatchNorm on running statistics and dropout off."""
    return nnx.view(model, use_running_average=True, deterministic=True, raise_if_not_found=False)


def train_view(model: M) -> M:
    """The same variables, with BatchNorm on batch statistics and dropout on."""
    return nnx.view(model, use_running_average=False, deterministic=False, raise_if_not_found=False)
