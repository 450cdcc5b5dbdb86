"""Claims on the closed forms of arXiv:2502.02797, section 7, compared with `jnp.linalg`."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from easy_jax.theory import claim_checks as checks
from easy_jax.theory import closed_form
from easy_jax.theory.claim_checks import Claim
from easy_jax.theory.problem import Problem

power = jnp.linalg.matrix_power


def check(problem_P: Problem, beta_P: jax.Array) -> Iterator[Claim]:
    """Checks the closed forms on problems whose temperatures are given by beta."""
    for source, statement, compared, function, bound in (
        (
            "(6), (10)",
            "gradient descent: theta_K",
            "matrix_power of I - 2 eta Sigma",
            _vanilla,
            1e-9,
        ),
        ("(12)", "eta = 1/2: even and odd K", "the closed form, K = 7 and 8", _even_and_odd, 1e-9),
        (
            "Thm 7.2, (9), Lemma F.1",
            "Sigma' = mu (I - Q)",
            "inv and det of the tilted Gaussian",
            _covariance,
            1e-9,
        ),
        ("(8)", "FLOW: theta_K for any eta", "matrix_power of I - 2 eta Sigma'", _descent, 1e-9),
        ("Lemma F.3", "eigenvalues and eigenvectors of Q", "eigvalsh, Q v", _spectrum, 1e-9),
        ("(11), (14)", "FLOW with eta = 1 / (2 mu)", "matrix_power of Q", _by_spectrum, 1e-9),
        (
            "(15)",
            "the rest beside the stalled part is below rho^(2K)",
            "(14), K = 7",
            _stalled,
            1e-9,
        ),
    ):
        yield Claim(source, statement, compared, checks.worst(function, problem_P, beta_P), bound)


def _vanilla(problem: Problem, beta: jax.Array) -> jax.Array:
    moved = power(jnp.eye(checks.DIM) - 0.6 * problem.sigma, checks.STEPS) @ problem.e
    ours = closed_form.vanilla_iterate(problem, checks.STEPS, 0.3)
    return checks.error(ours - problem.theta_ft, moved)


def _even_and_odd(problem: Problem, beta: jax.Array) -> jax.Array:
    scale = problem.rho**checks.STEPS * problem.e_norm
    odd = problem.theta_ft - scale * problem.e_perp
    even = problem.theta_ft + scale * problem.rho * problem.e_bar
    return jnp.maximum(
        checks.error(closed_form.vanilla_iterate(problem, checks.STEPS), odd),
        checks.error(closed_form.vanilla_iterate(problem, checks.STEPS + 1), even),
    )


def _covariance(problem: Problem, beta: jax.Array) -> jax.Array:
    ours = closed_form.weighted_covariance(problem, checks.tau(problem, beta))
    mass, covariance = checks.tilted(problem, checks.tau(problem, beta))
    return checks.error(ours, mass * covariance)


def _descent(problem: Problem, beta: jax.Array) -> jax.Array:
    tau = checks.tau(problem, beta)
    mass, covariance = checks.tilted(problem, tau)
    moved = power(jnp.eye(checks.DIM) - 0.6 * mass * covariance, checks.STEPS) @ problem.e
    ours = closed_form.flow_iterate_gd(problem, tau, checks.STEPS, 0.3)
    return checks.error(ours - problem.theta_ft, moved)


def _spectrum(problem: Problem, beta: jax.Array) -> jax.Array:
    q = jnp.eye(checks.DIM) - checks.tilted(problem, checks.tau(problem, beta))[1]
    values = jnp.linalg.eigvalsh(q)
    # In 8 dimensions Q has 6 zero eigenvalues besides lambda1 > lambda2 >= 0.
    lambda1, lambda2 = closed_form.spectrum(beta, problem.rho)
    v1, v2 = closed_form.eigenvectors(problem, beta)
    return jnp.max(
        jnp.stack(
            [
                checks.error(lambda1, values[-1]),
                jnp.abs(lambda2 - values[-2]),
                checks.error(q @ v1, lambda1 * v1),
                jnp.max(jnp.abs(q @ v2 - lambda2 * v2)),
            ]
        )
    )


def _by_spectrum(problem: Problem, beta: jax.Array) -> jax.Array:
    q = jnp.eye(checks.DIM) - checks.tilted(problem, checks.tau(problem, beta))[1]
    ours = closed_form.flow_iterate(problem, beta, checks.STEPS)
    return checks.error(ours - problem.theta_ft, power(q, checks.STEPS) @ problem.e)


def _stalled(problem: Problem, beta: jax.Array) -> jax.Array:
    # Relative to lambda1^K, the remaining part is (lambda2 / lambda1)^K, at most rho^(2K).
    lambda1, _ = closed_form.spectrum(beta, problem.rho)
    both = [
        f(problem, beta, checks.STEPS)
        for f in (closed_form.flow_iterate, closed_form.stalled_iterate)
    ]
    left = jnp.linalg.norm(both[0] - both[1]) / (lambda1**checks.STEPS * problem.e_norm)
    return left - problem.rho ** (2 * checks.STEPS)
