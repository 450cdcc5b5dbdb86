"""Statistics of the model's distribution at every token, from which weightings compute weights.

They are computed in one pass over blocks of the vocabulary. With m the largest logit so far, the
pass updates three sums: S1 = sum e^(z - m), S2 = sum e^2(z - m) and E = sum (z - m) e^(z - m).
When a block raises m to m', S1 becomes e^(m - m') S1, S2 becomes e^2(m - m') S2, and E becomes
e^(m - m') (E + (m - m') S1).

Shape suffixes: N positions of any shape, U logits of a block, K classes, B examples.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Per-token statistics from which a weighting computes weights; a JAX pytree.

    All arrays have one shape: `[N]`, or `[rows, tokens]`. For images a "token" is an example, and
    for weightings of level `example` each entry is the mean over an example's target tokens.
    Fields that the weighting does not need are None. Entries where `mask` is False are 0.

    Attributes:
      nll: negative log-likelihood of the target under the current model, nats, float32.
      frozen_nll: as `nll`, under the frozen pre-trained model (from the loss table).
      entropy: H of the current model's distribution, nats, in [0, log V].
      collision: C = sum_v p_v^2, the collision probability, in [1/V, 1].
      max_prob: the largest probability of any token.
      mask: bool, which entries are targets; None: all.
      lse: log-sum-exp of the (soft-capped) logits.
      is_argmax: bool, whether no token is more probable than the target.
      old_nll: as `nll`, under the model of some steps ago.
      segment_ids: int, the number of a token's example in its row: 1, 2, ...; None: each row
        is one example.
      step: int scalar, the number of the training step, for rules that use random numbers.

    Example:
      >>> stats = TokenStats(nll=jnp.array([0.0, 1.0]), mask=jnp.array([True, False]))
      >>> stats.entropy is None
      True
    """

    nll: jax.Array
    frozen_nll: jax.Array | None = None
    entropy: jax.Array | None = None
    collision: jax.Array | None = None
    max_prob: jax.Array | None = None
    mask: jax.Array | None = None
    lse: jax.Array | None = None
    is_argmax: jax.Array | None = None
    old_nll: jax.Array | None = None
    segment_ids: jax.Array | None = None
    step: jax.Array | None = None


OF_DISTRIBUTION = ("entropy", "collision", "max_prob", "lse", "is_argmax")


def of_logits(
    logits_BK: Float[Array, "B K"], target_B: Int[Array, " B"]
) -> dict[str, Float[Array, " B"] | Bool[Array, " B"]]:
    """Returns the fields of `OF_DISTRIBUTION` for logits over all classes, as in classifiers.

    Example:
      >>> fields = of_logits(jnp.zeros((1, 4)), jnp.array([2]))
      >>> [round(float(fields[name][0]), 4) for name in ("entropy", "collision")]
      [1.3863, 0.25]
    """
    logits_BK = jax.lax.stop_gradient(logits_BK.astype(jnp.float32))
    is_target_BK = jnp.arange(logits_BK.shape[1])[None, :] == target_B[:, None]
    chosen_B = jnp.sum(jnp.where(is_target_BK, logits_BK, 0.0), axis=1)
    max_B = jnp.max(logits_BK, axis=1)
    below_BK = logits_BK - max_B[:, None]
    share_BK = jnp.exp(below_BK)
    return derived(max_B, chosen_B, jnp.sum(share_BK, axis=1), *more_sums(share_BK, below_BK))


def update(
    carry: Sequence[jax.Array],
    max_N: jax.Array,
    new_max_N: jax.Array,
    logits_NU: jax.Array,
    valid_NU: Bool[Array, "*N U"],
) -> tuple[jax.Array, ...]:
    """Adds a block's logits to S1, S2 and E.

    Args:
      carry: S1, S2 and E of the earlier blocks, relative to `max_N`.
      max_N: the largest logit before this block; -inf before the first.
      new_max_N: the largest logit including this block.
      logits_NU: the block's logits.
      valid_NU: which of these logits belong to the vocabulary, not to its padding.
    """
    sum_N, square_N, energy_N = carry
    shift_N = jnp.where(jnp.isneginf(max_N), 0.0, max_N - new_max_N)  # before the first: sums are 0
    scale_N = jnp.exp(shift_N)
    below_NU = jnp.where(valid_NU, logits_NU - new_max_N[..., None], 0.0)  # -inf * 0 would be NaN
    share_NU = jnp.where(valid_NU, jnp.exp(below_NU), 0.0)
    more_square_N, more_energy_N = more_sums(share_NU, below_NU)
    return (
        scale_N * sum_N + jnp.sum(share_NU, axis=-1),
        scale_N * scale_N * square_N + more_square_N,
        scale_N * (energy_N + shift_N * sum_N) + more_energy_N,
    )


def derived(
    max_N: jax.Array,
    chosen_N: jax.Array,
    sum_N: jax.Array,
    square_N: jax.Array,
    energy_N: jax.Array,
) -> dict[str, jax.Array]:
    """Returns the fields of `OF_DISTRIBUTION` from largest and target's logit, S1, S2 and E."""
    log_sum_N = jnp.log(sum_N)
    return {
        # lse - sum z e^(z - m) / S1 would be the difference of two large numbers.
        "entropy": jnp.maximum(log_sum_N - energy_N / sum_N, 0.0),
        "collision": square_N / (sum_N * sum_N),
        "max_prob": 1.0 / sum_N,
        "lse": max_N + log_sum_N,
        "is_argmax": chosen_N == max_N,
    }


def more_sums(share_NU: jax.Array, below_NU: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a block's S2 and E from its e^(z - m) and z - m, which are 0 in the padding."""
    return jnp.sum(share_NU * share_NU, axis=-1), jnp.sum(below_NU * share_NU, axis=-1)


def weights(rule: Callable[[TokenStats], jax.Array], stats: TokenStats) -> jax.Array:
    """Returns a rule's weights, float32 in the shape of `stats.nll`; 0 where there is no target.

    Raises:
      ValueError: the rule returns an array of another shape.
    """
    weight_N = jnp.asarray(rule(stats), jnp.float32)
    if weight_N.shape not in ((), stats.nll.shape):
        raise ValueError(
            f"the weighting {getattr(rule, '__qualname__', rule)} returned an array of shape "
            f"{weight_N.shape}; it must return one weight for every token, here {stats.nll.shape}"
        )
    weight_N = jnp.broadcast_to(weight_N, stats.nll.shape)
    return weight_N if stats.mask is None else jnp.where(stats.mask, weight_N, 0.0)


def masked(fields: dict[str, jax.Array], mask_N: jax.Array) -> dict[str, jax.Array]:
    """Sets the entries of all fields to 0 where there is no target."""
    return {name: jnp.where(mask_N, array, jnp.zeros_like(array)) for name, array in fields.items()}
