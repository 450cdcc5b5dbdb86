"""Averaging of weights: WiSE-FT after training, SFA during it.

A new averaging is one function of the starting and the tuned weights and a coefficient,
registered here or in a file of its own that is imported here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from easy_jax.io.registry import Registry


def interpolate(start: chex.ArrayTree, end: chex.ArrayTree, alpha: float) -> Any:
    """`(1 - alpha) * start + alpha * end`, leaf by leaf.

    WiSE-FT (Wortsman et al. 2022) with `start` the pre-trained and `end` the fine-tuned
    weights; SFA averages during training with `end` the pre-trained weights.

    Args:
      start, end: trees of equal structure, shapes and dtypes. Floating leaves are
        interpolated in float32 and cast back; other leaves are taken from `end`.
      alpha: between 0 and 1; exactly `start` at 0 and `end` at 1.

    Returns:
      A tree like `end`.

    Raises:
      ValueError: alpha outside [0, 1].
      AssertionError: trees that differ in structure, shape or dtype.

    Example:
      >>> interpolate({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, 0.25)["w"].tolist()
      [0.25]
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be between 0 and 1")
    chex.assert_trees_all_equal_shapes_and_dtypes(start, end)

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(b.dtype, jnp.floating):
            return b
        wide = jnp.promote_types(b.dtype, jnp.float32)
        mixed = (1.0 - alpha) * a.astype(wide) + alpha * b.astype(wide)
        return mixed.astype(b.dtype)

    return jax.tree.map(one, start, end)


def wise_ft(pretrained: chex.ArrayTree, finetuned: chex.ArrayTree, alpha: float = 0.5) -> Any:
    """WiSE-FT: `alpha` is the share of the fine-tuned weights (arXiv:2502.02797).

    Example:
      >>> wise_ft({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, alpha=1.0)["w"].tolist()
      [1.0]

    Args:
      pretrained: the weights before fine-tuning.
      finetuned: the weights after it, with the same structure and shapes.
      alpha: in [0, 1]; 0 gives the pre-trained weights.
    """
    return interpolate(pretrained, finetuned, alpha)


def sfa(pretrained: chex.ArrayTree, current: chex.ArrayTree, beta: float = 0.5) -> Any:
    """SFA: `beta` is the share of the pre-trained weights (arXiv:2502.02797).

    Example:
      >>> sfa({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, beta=0.25)["w"].tolist()
      [0.75]
    """
    return interpolate(current, pretrained, beta)


def sfa_steps(total_steps: int, times: int = 4) -> tuple[int, ...]:
    """The steps after which SFA averages: every quarter of the run (arXiv:2502.02797).

    Example:
      >>> sfa_steps(10)
      (2, 5, 8, 10)
    """
    return tuple(round(total_steps * part / times) for part in range(1, times + 1))


@dataclasses.dataclass(frozen=True)
class Averaging:
    """A way to average the starting and the tuned weights.

    Attributes:
      when: once after training, several times during it, or never.
      merge: `(start, tuned, alpha) -> weights`.
    """

    when: Literal["never", "after", "during"]
    merge: Callable[[Any, Any, float], Any]


AVERAGINGS: Registry[Averaging] = Registry("averaging")
AVERAGINGS.register("none")(Averaging("never", lambda start, tuned, alpha: tuned))
AVERAGINGS.register("wise_ft")(Averaging("after", wise_ft))
AVERAGINGS.register("sfa")(Averaging("during", sfa))
