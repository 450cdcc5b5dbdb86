"""Checks of the claims in section 7 of arXiv:2502.02797 by linear algebra, autodiff and sampling.

Every check computes an error and compares it with a bound, in float64 (`jax.enable_x64(True)`).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from easy_jax.theory import (
    beyond,
    claims_averaging,
    claims_beyond,
    claims_closed_form,
    closed_form,
    simulation,
)
from easy_jax.theory import claim_checks as checks
from easy_jax.theory.claim_checks import Claim
from easy_jax.theory.problem import random_problem

NUM_PROBLEMS = 200
NUM_SAMPLES = 200_000
NUM_CLAIMS = 22  # for progress bars


def check_claims(
    key: jax.Array,
    weight_fn: simulation.WeightFn,
    convergence: simulation.Convergence,
    num_problems: int = NUM_PROBLEMS,
) -> Iterator[Claim]:
    """Checks every claim on random problems, one claim after the other.

    Args:
      key: a JAX random key.
      weight_fn: `(loss_N, tau) -> weight_N`, the weighting whose expectations are sampled.
      convergence: the result of `simulation.convergence` with the same weighting.
      num_problems: number of random problems, in 8 dimensions, with rho uniform in [0, 0.99) and
        beta in [0.01, 1].

    Yields:
      Claims, in the order of the paper.

    Raises:
      RuntimeError: float64 is not enabled.
    """
    if jnp.result_type(float) != jnp.float64:
        raise RuntimeError("the claims are checked in float64; call under jax.enable_x64(True)")
    keys = jax.random.split(key, 4)
    rho_P = jax.random.uniform(keys[0], (num_problems,), maxval=0.99)
    beta_P = jax.random.uniform(keys[1], (num_problems,), minval=0.01)
    problem_P = jax.jit(jax.vmap(lambda one, rho: random_problem(one, checks.DIM, rho)))(
        jax.random.split(keys[2], num_problems), rho_P
    )
    yield from claims_closed_form.check(problem_P, beta_P)
    yield from claims_averaging.check(problem_P)
    yield from _by_sampling(keys[3], weight_fn)
    yield _rate(convergence)
    yield from claims_beyond.check(problem_P, beta_P)


def _by_sampling(key: jax.Array, weight_fn: simulation.WeightFn) -> Iterator[Claim]:
    keys = jax.random.split(key, 4)
    problem = random_problem(keys[0], 4, 0.6)
    tau = beyond.median_temperature(problem.e_norm)

    def weighted_sample(key: jax.Array, noise_std: float) -> tuple[jax.Array, ...]:
        x_ND, y_N = simulation.sample(problem, key, NUM_SAMPLES, noise_std)
        return x_ND, y_N, weight_fn(jnp.square(y_N - x_ND @ problem.theta_pre), tau)

    @jax.jit
    def standard_errors(x_ND: jax.Array, weight_N: jax.Array, expected: jax.Array) -> jax.Array:
        return checks.z(weight_N[:, None, None] * x_ND[:, :, None] * x_ND[:, None, :], expected)

    x_ND, _, weight_N = weighted_sample(keys[1], 0.0)
    expected = closed_form.weighted_covariance(problem, tau)
    yield Claim(
        "Thm 7.2",
        "E[w x x^T] by sampling, in standard errors",
        f"{NUM_SAMPLES:,} examples",
        float(standard_errors(x_ND, weight_N, expected)),
        4.0,
    )
    x_ND, y_N, weight_N = weighted_sample(keys[2], 0.7)
    expected = beyond.noisy_weighted_covariance(problem.sigma, problem.e, tau, 0.7)
    yield Claim(
        "docs/theory.md",
        "label noise: E[w x x^T] by sampling, in standard errors",
        f"{NUM_SAMPLES:,} examples, s = 0.7",
        float(standard_errors(x_ND, weight_N, expected)),
        4.0,
    )
    # The gradient of the weighted loss vanishes at the minimiser.
    residual_N = weight_N * (y_N - x_ND @ beyond.noisy_minimiser(problem, tau, 0.7))
    yield Claim(
        "docs/theory.md",
        "label noise: the minimiser is theta_ft + kappa e, in standard errors",
        "the gradient there",
        float(checks.z(residual_N[:, None] * x_ND, jnp.zeros(4))),
        4.0,
    )


def _rate(convergence: simulation.Convergence) -> Claim:
    sizes, slope = convergence.sizes, convergence.slope
    return Claim(
        "(8)",
        f"FLOW on N examples, optax: distance to (8) ~ N^{slope:.3f}; |slope + 1/2|",
        f"N = {sizes[0]} to {sizes[-1]}",
        abs(slope + 0.5),
        0.05,
    )
