"""The closed forms of the paper's section 7, by equation and lemma number.

All functions work under `jit`, `vmap` and `grad`, in the dtype of their inputs. `steps` may be
traced, as powers are taken of eigenvalues and not by repeated multiplication.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from easy_jax.theory.problem import Problem, total_error


def vanilla_iterate(
    problem: Problem, steps: chex.Numeric, learning_rate: chex.Numeric = 0.5
) -> jax.Array:
    """theta_K of plain gradient descent from theta_pre: theta_ft + (I - 2 eta Sigma)^K e (6).

    With eta = 1/2 this is theta_ft + P^K e, P = -rho (e_bar e_perp^T + e_perp e_bar^T) (10),
    theta_ft + rho^K e for even K and theta_ft - rho^K |e| e_perp for odd K (12).

    Sigma's eigenvectors in the plane of e are (e_bar +- e_perp) / sqrt 2, with eigenvalues
    1 +- rho, so the power needs no matrix.

    Args:
      problem: the problem.
      steps: K, an integer of at least 0.
      learning_rate: eta.

    Returns:
      theta_K, [d].

    Example:
      >>> from easy_jax.theory.problem import random_problem
      >>> problem = random_problem(jax.random.key(0), 4, rho=0.5)
      >>> bool(jnp.allclose(vanilla_iterate(problem, 0), problem.theta_pre))
      True
    """
    plus = _power(1.0 - 2.0 * learning_rate * (1.0 + problem.rho), steps)
    minus = _power(1.0 - 2.0 * learning_rate * (1.0 - problem.rho), steps)
    along, across = (plus + minus) / 2.0, (plus - minus) / 2.0
    return problem.theta_ft + problem.e_norm * (along * problem.e_bar + across * problem.e_perp)


def mu(temperature: chex.Numeric, e_norm: chex.Numeric) -> jax.Array:
    """The mean of the weights, mu = E[w] = sqrt(tau / (tau + 2 |e|^2)), a scalar in (0, 1).

    Example:
      >>> round(float(mu(2.0, 1.0)), 4)  # sqrt(1/2)
      0.7071
    """
    ratio = 2.0 * jnp.square(jnp.asarray(e_norm)) / jnp.asarray(temperature)
    return jax.lax.rsqrt(1.0 + ratio)


def weighted_covariance_gaussian(
    sigma: chex.Array, e: chex.Array, temperature: chex.Numeric
) -> jax.Array:
    """E[w x x^T] for x ~ N(0, sigma), w = exp(-<e, x>^2 / tau), any covariance (Lemma F.1).

    The tilted Gaussian has precision sigma^-1 + (2 / tau) e e^T and mass
    (1 + 2 e^T sigma e / tau)^(-1/2). Sherman and Morrison's formula gives its covariance
    without an inverse.

    Args:
      sigma: [d, d], positive definite.
      e: [d].
      temperature: tau. Negative values are KL-DRO's weights exp(+<e, x>^2 / |tau|), for
        which the expectation exists if |tau| > 2 e^T sigma e; NaN otherwise.

    Returns:
      [d, d].
    """
    sigma_e = sigma @ e
    mass = jax.lax.rsqrt(1.0 + 2.0 * (e @ sigma_e) / temperature)
    shrink = 2.0 / (temperature + 2.0 * (e @ sigma_e))
    return mass * (sigma - shrink * jnp.outer(sigma_e, sigma_e))


def weighted_covariance(problem: Problem, temperature: chex.Numeric) -> jax.Array:
    """Sigma' = E[w x x^T] = mu (I - Q) (Theorem 7.2), [d, d]."""
    q = q_matrix(problem, temperature)
    return mu(temperature, problem.e_norm) * (jnp.eye(q.shape[0], dtype=q.dtype) - q)


def q_matrix(problem: Problem, temperature: chex.Numeric) -> jax.Array:
    """Q of eq. (9), [d, d]:

    (1 - mu^2) e_bar e_bar^T + rho^2 (1 - mu^2) e_perp e_perp^T
      - rho mu^2 (e_bar e_perp^T + e_perp e_bar^T).
    """
    twice = 2.0 * jnp.square(problem.e_norm)
    rest = twice / (temperature + twice)  # 1 - mu^2, without cancellation
    mu_squared = 1.0 - rest
    e_bar, e_perp, rho = problem.e_bar, problem.e_perp, problem.rho
    cross = jnp.outer(e_bar, e_perp)
    return (
        rest * jnp.outer(e_bar, e_bar)
        + jnp.square(rho) * rest * jnp.outer(e_perp, e_perp)
        - rho * mu_squared * (cross + cross.T)
    )


def temperature_from_beta(beta: chex.Numeric, rho: chex.Numeric, e_norm: chex.Numeric) -> jax.Array:
    """tau = 2 beta (1 - rho^2) |e|^2 / (1 - beta^2 rho^2) (Lemma F.3), beta in (0, 1]."""
    beta, rho, e_norm = jnp.asarray(beta), jnp.asarray(rho), jnp.asarray(e_norm)
    return 2.0 * beta * (1.0 - rho**2) * e_norm**2 / (1.0 - (beta * rho) ** 2)


def beta_from_temperature(
    temperature: chex.Numeric, rho: chex.Numeric, e_norm: chex.Numeric
) -> jax.Array:
    """The positive root beta of tau rho^2 beta^2 + 2 b beta - tau = 0, b = (1 - rho^2) |e|^2.

    This is the inverse of `temperature_from_beta`, continued beyond Lemma F.3 (docs/theory.md):
    beta in (0, 1] means tau <= 2 |e|^2, beta = 1 / rho means tau = inf (vanilla), and negative
    temperatures (KL-DRO's weights) give beta in (1 / rho, 1 / rho^2), infinite at rho = 0.

    Example:
      >>> round(float(beta_from_temperature(temperature_from_beta(0.3, 0.5, 2.0), 0.5, 2.0)), 6)
      0.3
    """
    temperature, rho = jnp.asarray(temperature), jnp.asarray(rho)
    # In terms of x = b / |tau| nothing overflows, and neither form of the root cancels. The
    # denominators of the branch not taken are 1, so that its gradient is not NaN.
    positive = temperature > 0
    size = jnp.where(temperature == 0, 1.0, jnp.abs(temperature))
    x = (1.0 - rho**2) * jnp.square(jnp.asarray(e_norm)) / size
    root = x + jnp.hypot(x, rho)
    # The root is zero for tau = inf at rho = 0, where every beta gives the same iteration.
    flow = 1.0 / jnp.where(positive, root, 1.0)
    kl_dro = root / jnp.where(positive, 1.0, rho**2)
    return jnp.where(positive, flow, jnp.where(temperature == 0, 0.0, kl_dro))


def spectrum(beta: chex.Numeric, rho: chex.Numeric) -> tuple[jax.Array, jax.Array]:
    """Q's eigenvalues in the plane of e (Lemma F.3), lambda1 > lambda2, scalars:

    lambda1 = (1 + beta rho^2) / (1 + beta), lambda2 = rho^2 (1 - beta) / (1 - beta rho^2).

    For beta <= 1 also rho^2 lambda1 > lambda2 >= 0 (rho > 0).

    Example:
      >>> [float(eigenvalue) for eigenvalue in spectrum(1.0, 0.5)]
      [0.625, 0.0]
    """
    beta, rho_squared = jnp.asarray(beta), jnp.square(jnp.asarray(rho))
    lambda1 = (1.0 + beta * rho_squared) / (1.0 + beta)
    lambda2 = rho_squared * (1.0 - beta) / (1.0 - beta * rho_squared)
    return lambda1, lambda2


def eigenvectors(problem: Problem, beta: chex.Numeric) -> tuple[jax.Array, jax.Array]:
    """Q's eigenvectors of lambda1 and lambda2, [d] each, not normalised (Lemma F.3):

    e_bar - beta rho e_perp and beta rho e_bar + e_perp.
    """
    tilt = beta * problem.rho
    return problem.e_bar - tilt * problem.e_perp, tilt * problem.e_bar + problem.e_perp


def flow_iterate(problem: Problem, beta: chex.Numeric, steps: chex.Numeric) -> jax.Array:
    """theta_K of FLOW with eta = 1 / (2 mu) (11), from Q's spectrum (14), [d]:

    theta_ft + (l1^K + l2^K beta^2 rho^2) / (1 + beta^2 rho^2) e
             - beta rho (l1^K - l2^K) / (1 + beta^2 rho^2) |e| e_perp.

    At this learning rate the iteration diverges for beta above (1 + rho^2) / (2 rho^2). FLOW never
    does, as its beta is below 1 / rho; KL-DRO does near its bound.
    """
    lambda1, lambda2 = spectrum(beta, problem.rho)
    power1, power2 = _power(lambda1, steps), _power(lambda2, steps)
    tilt = beta * problem.rho
    scale = problem.e_norm / (1.0 + tilt**2)
    along, across = power1 + power2 * tilt**2, tilt * (power1 - power2)
    return problem.theta_ft + scale * (along * problem.e_bar - across * problem.e_perp)


def flow_iterate_gd(
    problem: Problem,
    temperature: chex.Numeric,
    steps: chex.Numeric,
    learning_rate: chex.Numeric,
) -> jax.Array:
    """theta_K of FLOW by (8), theta_ft + (I - 2 eta Sigma')^K e, for any learning rate, [d].

    The power is that of a symmetric 2x2 matrix, in the basis e_bar, e_perp.
    """
    m = mu(temperature, problem.e_norm)
    mu_squared, rho = jnp.square(m), problem.rho
    scale = 2.0 * learning_rate * m
    along = 1.0 - scale * mu_squared
    across = 1.0 - scale * (1.0 - rho**2 * (1.0 - mu_squared))
    mixed = -scale * rho * mu_squared
    # M = [[a, c], [c, b]] has the eigenvalues m +- r, and M^K = mean I + slope (M - m I) with
    # mean = (high^K + low^K) / 2 and slope = (high^K - low^K) / (2 r), which tends to K m^(K-1).
    middle, half = (along + across) / 2.0, (along - across) / 2.0
    squared = half**2 + mixed**2
    limit = jnp.sqrt(jnp.finfo(squared.dtype).eps) * jnp.maximum(jnp.abs(middle), 1e-3)
    is_double = squared <= jnp.square(limit)
    radius = jnp.sqrt(jnp.where(is_double, 1.0, squared))  # no gradient of a root at 0
    high, low = _power(middle + radius, steps), _power(middle - radius, steps)
    at_middle, whole = _power(middle, steps), jnp.asarray(steps, middle.dtype)
    derivative = whole * _power(middle, jnp.maximum(whole - 1.0, 0.0))
    mean = jnp.where(is_double, at_middle, (high + low) / 2.0)
    slope = jnp.where(is_double, derivative, (high - low) / (2.0 * radius))
    first, second = mean + slope * half, slope * mixed
    return problem.theta_ft + problem.e_norm * (first * problem.e_bar + second * problem.e_perp)


def stalled_iterate(problem: Problem, beta: chex.Numeric, steps: chex.Numeric) -> jax.Array:
    """theta_K for large K (15): theta_ft + gamma (e - beta rho |e| e_perp), [d],

    gamma = lambda1^K / (1 + beta^2 rho^2). Learning stalls along e - beta rho |e| e_perp.
    """
    lambda1, _ = spectrum(beta, problem.rho)
    gamma = _power(lambda1, steps) / (1.0 + (beta * problem.rho) ** 2)
    direction = problem.e - beta * problem.rho * problem.e_norm * problem.e_perp
    return problem.theta_ft + gamma * direction


def averaging(problem: Problem, omega: chex.Numeric) -> jax.Array:
    """Model averaging, theta_ft + omega e (16), [d]; omega is the share of theta_pre."""
    return problem.theta_ft + omega * problem.e


def optimal_averaging(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """The omega with the smallest total error, and that error (Lemma F.4, 17), scalars:

    omega = s / (s + |e|^2), error = |e|^2 s / (s + |e|^2) with s = e^T Sigma_pre e.
    """
    s = problem.e @ problem.sigma_pre @ problem.e
    omega = s / (s + jnp.square(problem.e_norm))
    return omega, jnp.square(problem.e_norm) * omega


@functools.partial(jax.jit, static_argnames="max_steps")
def optimal_flow(
    problem: Problem, betas: chex.Array, max_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the (beta, K) with the smallest total error on the grid betas x (0, ..., max_steps).

    Args:
      problem: the problem.
      betas: [n], in (0, 1].
      max_steps: the largest K.

    Returns:
      `(beta, steps, error)`, scalars; `error` is the total error there.
    """
    steps = jnp.arange(max_steps + 1)

    def error(beta: jax.Array, step: jax.Array) -> jax.Array:
        return total_error(problem, flow_iterate(problem, beta, step))

    errors = jax.vmap(jax.vmap(error, (None, 0)), (0, None))(jnp.asarray(betas), steps)
    best = jnp.argmin(errors)
    row, column = jnp.unravel_index(best, errors.shape)
    return jnp.asarray(betas)[row], steps[column], errors[row, column]


def _power(base: jax.Array, exponent: chex.Numeric) -> jax.Array:
    """base ** K for integer K, also for negative bases, with the right derivative at base 0."""
    exponent = jnp.asarray(exponent, jnp.result_type(base))
    zero = base == 0
    magnitude = jnp.exp(exponent * jnp.log(jnp.where(zero, 1.0, jnp.abs(base))))
    sign = jnp.where((base < 0) & (jnp.mod(exponent, 2) == 1), -1.0, 1.0)
    at_zero = jnp.where(exponent == 0, 1.0, jnp.where(exponent == 1, base, 0.0))
    return jnp.where(zero, at_zero, sign * magnitude).astype(jnp.result_type(base))
