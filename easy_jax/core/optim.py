"""Optimizers as optax chains, with schedule, clipping and an anchor to the starting weights."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from easy_jax.core.anchors import anchor
from easy_jax.core.config import OptimizerConfig
from easy_jax.core.held_params import hold_old
from easy_jax.core.merge import ema


def make_optimizer(
    config: OptimizerConfig,
    total_steps: int,
    anchored: Callable[[Any, Any], bool] | None = None,
    refresh_steps: int = 0,
) -> optax.GradientTransformation:
    """Returns SGD or AdamW with a schedule, clipping, an anchor, and an average of the weights.

    The peak learning rate is part of the optimiser's *state* (`optax.inject_hyperparams`), so
    that a sweep over learning rates compiles the training step only once.

    Args:
      config: configuration of the optimiser.
      total_steps: length of the schedule.
      anchored: NNX filter `(path, variable) -> bool` of the parameters that `config.anchor`
        pulls to their starting values; default: all.
      refresh_steps: hold the parameters of up to so many steps ago (`held_params.hold_old`); 0: no.

    Returns:
      A gradient transformation whose state holds `hyperparams["learning_rate"]`.

    Example:
      >>> make = make_optimizer(OptimizerConfig(learning_rate=0.5), total_steps=10)
      >>> state = make.init({"w": jnp.ones(2)})
      >>> float(state.hyperparams["learning_rate"])
      0.5
    """
    shape = schedule_shape(config, total_steps)

    def chain(learning_rate: jax.Array) -> optax.GradientTransformation:
        parts = []
        if config.clip_norm > 0:
            parts.append(optax.clip_by_global_norm(config.clip_norm))
        if config.anchor != "none":
            parts.append(
                anchor(
                    config.anchor,
                    config.anchor_strength,
                    per_parameter=config.anchor_per_parameter,
                    anchored=anchored,
                )
            )
        if config.name == "sgd":
            if config.weight_decay > 0:
                parts.append(optax.add_decayed_weights(config.weight_decay))
            if config.momentum > 0:
                parts.append(optax.trace(decay=config.momentum))
        else:
            parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
            if config.weight_decay > 0:
                parts.append(optax.add_decayed_weights(config.weight_decay))
        parts.append(optax.scale_by_schedule(lambda count: -learning_rate * shape(count)))
        if config.ema_decay > 0:
            parts.append(ema(config.ema_decay))
        if refresh_steps > 0:
            parts.append(hold_old(refresh_steps))
        return optax.chain(*parts)

    return optax.inject_hyperparams(chain)(learning_rate=config.learning_rate)


class LostUpdatesWarning(UserWarning):
    """Warning that the parameters' precision is too low for most updates."""


def warn_of_lost_updates(params: Any, learning_rate: float) -> None:
    """Warns if a change as large as the learning rate is rounded away in most parameters.

    This happens to parameters in bfloat16, which has 8 significant bits, at the learning rates
    of fine-tuning: an update of Adam is about as large as the learning rate.

    Args:
      params: the parameters to train, of any dtypes.
      learning_rate: the optimiser's peak learning rate.

    Example:
      >>> warn_of_lost_updates({"w": jnp.full(4, 0.02, jnp.float32)}, learning_rate=1e-5)
    """
    total, lost = 0, 0
    dtypes = set()
    for leaf in jax.tree.leaves(params):
        total += leaf.size
        if leaf.dtype != jnp.float32:
            share = jnp.mean(leaf + jnp.asarray(learning_rate, leaf.dtype) == leaf)
            lost += int(float(share) * leaf.size)
            dtypes.add(leaf.dtype.name)
    if learning_rate > 0 and lost > 0.5 * total:
        warnings.warn(
            f"{lost / total:.0%} of the parameters to train are too coarse ({', '.join(dtypes)}) "
            f"for a change as large as the learning rate, {learning_rate:g}: most updates are "
            "rounded away. Keep them in float32 (param_dtype='float32'); the computation may "
            "stay in bfloat16 (dtype='bfloat16')",
            LostUpdatesWarning,
            stacklevel=3,
        )


def schedule_shape(config: OptimizerConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """Returns the schedule with a peak of 1: linear warm-up, then cosine to 0 or constant.

    Args:
      config: configuration with `schedule` and `warmup_ratio`, the share of warm-up steps.
      total_steps: length of the schedule.

    Returns:
      A function from the step, counted from 0, to the factor of the peak learning rate.

    Example:
      >>> shape = schedule_shape(OptimizerConfig(warmup_ratio=0.5), total_steps=4)
      >>> [round(float(shape(step)), 2) for step in range(5)]
      [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)

    def shape(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rising = (count + 1.0) / max(warmup, 1)
        done = jnp.clip((count - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        falling = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if config.schedule == "cosine" else 1.0
        return jnp.where(count < warmup, rising, falling)

    return shape
