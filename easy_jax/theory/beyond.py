"""Results beyond the paper: label noise, tau as the median, KL-DRO, and FLOW against averaging.

The derivations are in docs/theory.md, under the names of these functions.
"""

import functools
import statistics

import chex
import jax
import jax.numpy as jnp
import numpy as np

from easy_jax.theory.closed_form import (
    flow_iterate_gd,
    optimal_averaging,
    optimal_flow,
    weighted_covariance_gaussian,
)
from easy_jax.theory.problem import Problem

# Label noise: y = <theta_ft, x> + eps, eps ~ N(0, sigma^2).


def noisy_weighted_covariance(
    sigma: chex.Array, e: chex.Array, temperature: chex.Numeric, noise_std: chex.Numeric
) -> jax.Array:
    """E[w x x^T] for w = exp(-(<e, x> - eps)^2 / tau), x ~ N(0, sigma), eps ~ N(0, s^2).

    The noise adds 2 s^2 to the temperature and multiplies by sqrt(tau / (tau + 2 s^2)).

    Args:
      sigma: [d, d], positive definite.
      e: [d].
      temperature: tau, positive.
      noise_std: s, at least 0.

    Returns:
      [d, d].
    """
    softened = temperature + 2.0 * jnp.square(jnp.asarray(noise_std))
    return jnp.sqrt(temperature / softened) * weighted_covariance_gaussian(sigma, e, softened)


def noise_pull(temperature: chex.Numeric, noise_std: chex.Numeric) -> jax.Array:
    """kappa = 2 s^2 / (tau + 2 s^2) in [0, 1), theta_pre's share in FLOW's limit under label noise.

    Example:
      >>> float(noise_pull(temperature=2.0, noise_std=1.0))
      0.5
    """
    twice = 2.0 * jnp.square(jnp.asarray(noise_std))
    return twice / (temperature + twice)


def noisy_minimiser(
    problem: Problem, temperature: chex.Numeric, noise_std: chex.Numeric
) -> jax.Array:
    """The minimiser of the weighted loss under label noise, theta_ft + kappa e, [d].

    With label noise, FLOW converges to model averaging with omega = kappa: of two examples with
    opposite noise, the one closer to theta_pre's prediction has the larger weight.
    """
    return problem.theta_ft + noise_pull(temperature, noise_std) * problem.e


def noisy_flow_iterate_gd(
    problem: Problem,
    temperature: chex.Numeric,
    noise_std: chex.Numeric,
    steps: chex.Numeric,
    learning_rate: chex.Numeric,
) -> jax.Array:
    """theta_K of FLOW under label noise, on the population loss, [d].

    The iterates go from theta_pre towards `noisy_minimiser`, by the iteration (8) at the
    temperature tau + 2 s^2.
    """
    kappa = noise_pull(temperature, noise_std)
    softened = temperature + 2.0 * jnp.square(jnp.asarray(noise_std))
    slowed = learning_rate * jnp.sqrt(temperature / softened)
    moved = flow_iterate_gd(problem, softened, steps, slowed)
    return moved + kappa * (problem.theta_pre - moved)


# The temperature used in practice.


def median_factor() -> float:
    """m = (3/4 quantile of N(0, 1))^2 = 0.4549..., the median of chi^2, one degree of freedom.

    Example:
      >>> round(median_factor(), 4)
      0.4549
    """
    return statistics.NormalDist().inv_cdf(0.75) ** 2


def median_temperature(e_norm: chex.Numeric, noise_std: chex.Numeric = 0.0) -> jax.Array:
    """The median of the squared loss at theta_pre: tau = m (|e|^2 + s^2), a scalar.

    The residual is N(0, |e|^2 + s^2). Hence the mean weight is sqrt(m / (m + 2)) = 0.4305... for
    every problem and every noise level, and
    `beta_from_temperature` gives beta = m / (1 - rho^2 + sqrt((1 - rho^2)^2 + (m rho)^2)) at s = 0.

    Example:
      >>> round(float(median_temperature(e_norm=2.0)), 4)
      1.8197
    """
    return median_factor() * (jnp.square(jnp.asarray(e_norm)) + jnp.square(jnp.asarray(noise_std)))


# KL-DRO, which weights examples the opposite way.


def kl_dro_covariance(problem: Problem, temperature: chex.Numeric) -> jax.Array:
    """E[w x x^T] / E[w] for KL-DRO's weights w = exp(+<e, x>^2 / tau), [d, d].

    The closed form is FLOW's at the temperature -tau. The expectations exist if and only if
    tau > 2 |e|^2.

    Raises:
      ValueError: the temperature is concrete and the expectations do not exist; under `jit` and
        `vmap` the result is NaN.
    """
    bound = 2.0 * jnp.square(problem.e_norm)
    concrete = not any(isinstance(x, jax.core.Tracer) for x in (bound, temperature))
    if concrete and not np.all(temperature > bound):
        raise ValueError(
            f"KL-DRO's weighted covariance exists for temperatures above 2 |e|^2 = "
            f"{float(bound):.6g}; this one is {float(np.min(temperature)):.6g}"
        )
    exists = temperature > bound
    ratio = bound / jnp.where(exists, temperature, jnp.nan)
    sigma_e = problem.sigma @ problem.e
    return problem.sigma + (2.0 / (temperature * (1.0 - ratio))) * jnp.outer(sigma_e, sigma_e)


# FLOW compared with the best model averaging.


def flow_advantage(problem: Problem) -> jax.Array:
    """rho (rho a - c), a = e_bar^T Sigma_pre e_bar, c = e_bar^T Sigma_pre e_perp, a scalar.

    It is positive if and only if FLOW with the best (beta, K) has a strictly smaller total error
    than the best model averaging; otherwise averaging's error is the infimum over (beta, K).
    """
    along = problem.sigma_pre @ problem.e_bar
    return problem.rho * (problem.rho * (along @ problem.e_bar) - along @ problem.e_perp)


@functools.partial(jax.jit, static_argnames="max_steps")
def phase_diagram(
    rhos: chex.Array,
    angles: chex.Array,
    strength: chex.Numeric,
    e_norm: chex.Numeric,
    betas: chex.Array,
    max_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes FLOW's best total error divided by the best averaging's, on a grid of problems.

    The problems are two-dimensional, because both errors depend only on the plane of e_bar and
    e_perp.

    Args:
      rhos: [r], the correlations, in [0, 1).
      angles: [a], in radians, the angles of u = cos(angle) e_bar + sin(angle) e_perp in
        Sigma_pre = I + strength u u^T.
      strength: the strength in Sigma_pre, at least 0.
      e_norm: |e|; if FLOW may choose beta, the ratio does not depend on it.
      betas, max_steps: FLOW's grid, as in `optimal_flow`.

    Returns:
      `(ratio, advantage)`, [r, a] each; `advantage` is `flow_advantage`.
    """

    def one(rho: jax.Array, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        problem = Problem(
            theta_pre=jnp.stack([jnp.asarray(e_norm, u.dtype), jnp.zeros((), u.dtype)]),
            theta_ft=jnp.zeros(2, u.dtype),
            e_perp=jnp.array([0.0, 1.0], u.dtype),
            rho=rho,
            sigma_pre=jnp.eye(2, dtype=u.dtype) + strength * jnp.outer(u, u),
        )
        _, _, flow_error = optimal_flow(problem, betas, max_steps)
        return flow_error / optimal_averaging(problem)[1], flow_advantage(problem)

    # One row at a time: the whole grid at once would take gigabytes if it is fine.
    row = jax.vmap(one, (None, 0))
    return jax.lax.map(lambda rho: row(rho, jnp.asarray(angles)), jnp.asarray(rhos))
