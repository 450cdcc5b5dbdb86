"""KL(p0 || p) from a frozen distribution p0 to the current p, streamed over the vocabulary.

With logits z0 and z, and m0 the largest z0 so far, three numbers are carried: m0,
S0 = sum e^(z0 - m0) and G = sum e^(z0 - m0) (z0 - z). At the end
KL(p0 || p) = G / S0 + lse(z) - lse(z0). Its gradient for the logits z is p - p0.

Shape suffixes: N positions of any shape, D features, V vocabulary, U logits of a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Frozen(NamedTuple):
    """The frozen model's hidden states and head, whose distribution is p0.

    Attributes:
      hidden_ND: of the shape and dtype of the current model's.
      head_VD: as the current model's; may be the same array.
    """

    hidden_ND: jax.Array
    head_VD: jax.Array


def update(
    carry: Sequence[jax.Array],
    new_max_N: jax.Array,
    frozen_NU: jax.Array,
    logits_NU: jax.Array,
    valid_NU: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds a block's logits to m0, S0 and G.

    Args:
      carry: m0, S0 and G so far; -inf, 0 and 0 before the first block.
      new_max_N: the largest z0, this block's included.
      frozen_NU, logits_NU: z0 and z of the block.
      valid_NU: which of them belong to the vocabulary.
    """
    max_N, sum_N, gap_N = carry
    scale_N = jnp.exp(max_N - new_max_N)
    share_NU = jnp.where(valid_NU, jnp.exp(frozen_NU - new_max_N[..., None]), 0.0)
    gap_NU = jnp.where(valid_NU, frozen_NU - logits_NU, 0.0)  # -inf - -inf would be NaN
    return (
        new_max_N,
        scale_N * sum_N + jnp.sum(share_NU, axis=-1),
        scale_N * gap_N + jnp.sum(share_NU * gap_NU, axis=-1),
    )


def divergence(frozen_N: Sequence[jax.Array], max_N: jax.Array, sum_N: jax.Array) -> jax.Array:
    """Returns KL(p0 || p) in nats from m0, S0 and G, and the largest z and sum of e^(z - m)."""
    frozen_max_N, frozen_sum_N, gap_N = frozen_N
    shift_N = jnp.log(sum_N / frozen_sum_N)
    return gap_N / frozen_sum_N + (max_N - frozen_max_N) + shift_N


def over_devices(
    frozen_NU: jax.Array,
    logits_NU: jax.Array,
    valid_1U: jax.Array,
    max_N: jax.Array,
    sum_N: jax.Array,
    axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Returns KL(p0 || p), and p0 of this device's ids; the vocabulary is split over mesh axes."""
    frozen_max_N = jnp.max(jnp.where(valid_1U, frozen_NU, -jnp.inf), axis=1)
    frozen_max_N = jax.lax.pmax(frozen_max_N, axes)
    zero_N = jnp.zeros_like(frozen_max_N)
    start = (frozen_max_N, zero_N, zero_N)
    _, *parts = update(start, frozen_max_N, frozen_NU, logits_NU, valid_1U)
    frozen_sum_N, gap_N = jax.lax.psum(parts, axes)
    kl_N = divergence((frozen_max_N, frozen_sum_N, gap_N), max_N, sum_N)
    share_NU = jnp.exp(frozen_NU - frozen_max_N[:, None]) / frozen_sum_N[:, None]
    return kl_N, jnp.where(valid_1U, share_NU, 0.0)
