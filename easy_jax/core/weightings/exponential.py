"""Exponential weights of losses: temperature, FLOW, KL-DRO, and the objective FLOW minimises.

Pure functions of arrays (arXiv:2502.02797, algorithm 1 and proposition 4.3). Concrete values are
checked; under `jit`, where values are not concrete, the caller must check them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Values = ArrayLike | Sequence[Any]
_ORDINARY = 1e-30, 1e30  # outside, XLA may round a value, or its reciprocal, to 0
_LARGEST = 87.0  # exp(-87) is 1.6e-38


def temperature(loss_N: Values) -> jax.Array:
    """Returns the temperature tau: the exact median of the losses.

    Args:
      loss_N: per-example losses in nats, at least one, finite and non-negative.

    Returns:
      The median, a positive scalar; the mean of the two middle values if N is even.

    Raises:
      ValueError: there are no losses, some are non-finite or negative (the message lists their
        positions), or the median is zero, for which the weights are undefined.

    Example:
      >>> float(temperature([0.5, 4.0, 1.0]))
      1.0
    """
    loss_N = _as_losses(loss_N)
    median = jnp.median(loss_N)
    if _is_concrete(median) and not _is_ordinary(median):
        median = jnp.asarray(np.median(np.asarray(loss_N, np.float64)).astype(loss_N.dtype))
    return _check_temperature(median, "the median loss")


def flow_weights(loss_N: Values, tau: ArrayLike | None = None) -> jax.Array:
    """Returns FLOW's weights, w = exp(-loss / tau): 1 for a loss of 0, 1/e at the median.

    Args:
      loss_N: per-example losses of the frozen model, in nats.
      tau: the temperature; default: `temperature(loss_N)`.

    Returns:
      w_N in (0, 1], of the losses' dtype. Not normalised (arXiv:2502.02797 section 1).

    Raises:
      ValueError: as `temperature`; or `tau` is not positive and finite.

    Example:
      >>> [round(float(w), 4) for w in flow_weights([0.0, 1.0, 2.0])]
      [1.0, 0.3679, 0.1353]
    """
    loss_N = _as_losses(loss_N)
    return _exponential(loss_N, temperature(loss_N) if tau is None else tau)


def flow_weights_token(
    token_loss: Values, target_mask: Values, tau: ArrayLike | None = None
) -> jax.Array:
    """Returns token-wise FLOW's weights: w_it = exp(-nll_it / tau_tok).

    Args:
      token_loss: per-token losses in nats, any shape.
      target_mask: boolean, of the same shape; True for target tokens.
      tau: the temperature tau_tok; default: the median over the target tokens.

    Returns:
      Weights of the same shape; 0 where the mask is False.

    Raises:
      ValueError: as `flow_weights`, over the target tokens; or the shapes differ.

    Example:
      >>> w = flow_weights_token([[1.0, 1.0, 9.0]], [[True, True, False]])
      >>> [round(float(x), 4) for x in w[0]]
      [0.3679, 0.3679, 0.0]
    """
    token_loss = jnp.asarray(token_loss)
    target_mask = jnp.asarray(target_mask, bool)
    if token_loss.shape != target_mask.shape:
        raise ValueError(
            f"token_loss has shape {token_loss.shape}, target_mask {target_mask.shape}"
        )
    if tau is None:
        tau = temperature(token_loss[target_mask])
    elif _is_concrete(token_loss):
        _as_losses(token_loss[target_mask])
    safe = jnp.where(target_mask, token_loss, 0.0)
    return jnp.where(target_mask, _exponential(safe, tau), 0.0)


def kl_dro_weights(loss_N: Values, tau: ArrayLike) -> jax.Array:
    """Returns KL-DRO's weights, softmax(+loss / tau), which favour hard examples.

    They are the opposite of FLOW's (Qi et al. 2021): the maximiser over the simplex of
    `sum pi f - tau sum pi log pi`. In KL-DRO f is the loss of the *current* model.

    Args:
      loss_N: per-example losses.
      tau: the temperature, positive.

    Returns:
      pi_N, on the simplex.

    Raises:
      ValueError: as `flow_weights`.

    Example:
      >>> [round(float(p), 4) for p in kl_dro_weights([0.0, 1.0], tau=1.0)]
      [0.2689, 0.7311]
    """
    loss_N = _as_losses(loss_N)
    # Subtract the largest first, otherwise the quotient may overflow.
    return jax.nn.softmax((loss_N - jnp.max(loss_N)) / _check_temperature(tau, "tau"))


def entropic_objective(pi_N: Values, loss_N: Values, tau: ArrayLike) -> jax.Array:
    """Computes the objective of normalised FLOW weights: sum pi f + tau sum pi log pi (Prop. 4.3).

    Args:
      pi_N: a point of the probability simplex; 0 log 0 counts as 0.
      loss_N: per-example losses.
      tau: the temperature.

    Returns:
      The objective, a scalar in nats. Its minimum is -tau log sum exp(-f / tau).

    Raises:
      ValueError: `pi_N` has a negative or NaN entry.

    Example:
      >>> round(float(entropic_objective([0.5, 0.5], [0.0, 0.0], tau=1.0)), 4)  # -log 2
      -0.6931
    """
    pi_N, loss_N = jnp.asarray(pi_N), jnp.asarray(loss_N)
    if _is_concrete(pi_N) and not (np.asarray(pi_N) >= 0).all():
        raise ValueError("pi_N has negative or NaN entries; it must be a point of the simplex")
    return jnp.sum(pi_N * loss_N) + tau * jnp.sum(jax.scipy.special.xlogy(pi_N, pi_N))


def _is_concrete(x: object) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _as_losses(loss_N: Values) -> jax.Array:
    loss_N = jnp.asarray(loss_N)
    loss_N = loss_N.astype(jnp.promote_types(loss_N.dtype, jnp.float32))
    if loss_N.size == 0:
        raise ValueError("there are no losses: the temperature of an empty set is undefined")
    if _is_concrete(loss_N):
        values = np.asarray(loss_N).ravel()
        for bad, what in ((~np.isfinite(values), "not finite"), (values < 0, "negative")):
            if bad.any():
                where = np.flatnonzero(bad)
                raise ValueError(
                    f"{where.size} of {values.size} losses are {what}, at positions "
                    f"{where[:10].tolist()}{' ...' if where.size > 10 else ''}"
                )
    return loss_N


def _is_ordinary(tau: ArrayLike) -> bool:
    return bool(_ORDINARY[0] < np.asarray(tau) < _ORDINARY[1])


def _exponential(loss: jax.Array, tau: ArrayLike) -> jax.Array:
    """Returns exp(-loss / tau), also where XLA would round tau, 1 / tau or the result to 0."""
    checked = _check_temperature(tau, "tau")
    weight = jnp.exp(-loss / checked)
    if not (_is_concrete(loss) and _is_concrete(tau)):
        return weight
    with np.errstate(over="ignore", under="ignore"):
        ratio = np.asarray(loss, np.float64) / np.asarray(tau, np.float64)
        is_extreme = (ratio > _LARGEST) | (not _is_ordinary(tau))
        if not is_extreme.any():
            return weight
        return jnp.asarray(np.where(is_extreme, np.exp(-ratio), weight).astype(loss.dtype))


def _check_temperature(tau: ArrayLike, what: str) -> jax.Array:
    # NumPy, not jnp: under jit, jnp comparisons are traced even if tau is concrete.
    if _is_concrete(tau) and not (np.isfinite(tau) and np.asarray(tau) > 0):
        advice = (
            ". If the median is zero, so are at least half of the losses: give a temperature of "
            "your own, or check that the model has not been trained on these examples"
        )
        value = float(np.asarray(tau))
        raise ValueError(
            f"{what} is {value}; the temperature must be positive and finite"
            f"{advice if value == 0 else ''}"
        )
    return jnp.asarray(tau)
