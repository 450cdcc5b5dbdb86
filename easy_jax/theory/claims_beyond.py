"""Claims of docs/theory.md that are not in the paper, on the median, KL-DRO and forgetting."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from easy_jax.theory import beyond, closed_form
from easy_jax.theory import claim_checks as checks
from easy_jax.theory.claim_checks import Claim
from easy_jax.theory.problem import Problem, pretraining_error


def check(problem_P: Problem, beta_P: jax.Array) -> Iterator[Claim]:
    """Checks the claims on problems; beta determines the temperature or the label noise."""
    yield Claim(
        "docs/theory.md",
        "tau = median: m (|e|^2 + s^2), and mu and beta from it",
        "erf, quadrature, eigvalsh",
        checks.worst(_median, problem_P, beta_P),
        1e-9,
    )
    yield Claim(
        "docs/theory.md",
        "KL-DRO: its covariance for tau > 2 |e|^2",
        "inv",
        checks.worst(_kl_dro, problem_P, beta_P),
        1e-9,
    )
    yield Claim(
        "docs/theory.md",
        "KL-DRO: the precision is positive definite just above tau = 2 |e|^2, "
        "and not just below; largest eigenvalue of the wrong sign",
        "eigvalsh",
        checks.worst(_existence, problem_P),
        0.0,
    )
    yield Claim(
        "docs/theory.md",
        "one step: FLOW learns its stalled direction slowest, KL-DRO fastest; "
        "largest gap the wrong way round",
        "Rayleigh quotients",
        checks.worst(_rates, problem_P, beta_P),
        0.0,
    )
    yield Claim(
        "docs/theory.md",
        "err1 after K steps: FLOW < vanilla < KL-DRO, weights of mean one; "
        "largest ratio of neighbours - 1",
        "tau = 4 |e|^2, K = 7, eta = 0.1",
        checks.worst(_mirror, problem_P, beta_P),
        0.0,
    )
    errors_PM = jax.jit(jax.vmap(_forgetting))(problem_P, beta_P)
    share = jnp.mean(errors_PM[:, 1:] / errors_PM[:, 3:], axis=0)
    paper = float(jnp.mean(errors_PM[:, 0] / errors_PM[:, 3]))
    yield Claim(
        "docs/theory.md",
        f"forgetting (err1) at equal eta and K, vanilla = 1: FLOW {paper:.2f}, "
        f"FLOW with weights of mean one {float(share[0]):.2f}, uniform weights of FLOW's mean "
        f"{float(share[1]):.2f}; FLOW / each of them - 1",
        "(8) and (6), K = 7, eta = 1/4",
        float(jnp.max(errors_PM[:, 0] / jnp.min(errors_PM[:, 1:], axis=1) - 1)),
        0.0,
    )


def _median(problem: Problem, noise_std: jax.Array) -> jax.Array:
    # The residual at theta_pre is N(0, |e|^2 + s^2): half of it is within sqrt(tau).
    tau = beyond.median_temperature(problem.e_norm, noise_std)
    scale = jnp.sqrt(problem.e_norm**2 + noise_std**2)
    within = jax.scipy.special.erf(jnp.sqrt(tau) / scale / jnp.sqrt(2.0))
    z = jnp.linspace(-12.0, 12.0, 4001)
    density = jnp.exp(-(z**2) / 2.0) / jnp.sqrt(2.0 * jnp.pi)
    weight = jnp.exp(-((scale * z) ** 2) / tau)
    mean = jnp.trapezoid(weight * density, z)
    noiseless = beyond.median_temperature(problem.e_norm)
    beta = closed_form.beta_from_temperature(noiseless, problem.rho, problem.e_norm)
    largest = 1.0 - jnp.linalg.eigvalsh(checks.tilted(problem, noiseless)[1])[0]
    errors = [
        jnp.abs(within - 0.5),
        checks.error(closed_form.mu(tau, scale), mean),
        checks.error(closed_form.spectrum(beta, problem.rho)[0], largest),
    ]
    return jnp.max(jnp.stack(errors))


def _kl_dro(problem: Problem, beta: jax.Array) -> jax.Array:
    tau = (2.0 + 4.0 * beta) * problem.e_norm**2
    return checks.error(beyond.kl_dro_covariance(problem, tau), checks.tilted(problem, -tau)[1])


def _existence(problem: Problem) -> jax.Array:
    # The weighted density is integrable where its precision is positive definite.
    smallest = [
        jnp.linalg.eigvalsh(checks.precision(problem, -tau))[0]
        for tau in (jnp.array([1.0 - 1e-6, 1.0 + 1e-6]) * 2.0 * problem.e_norm**2)
    ]
    return jnp.maximum(smallest[0], -smallest[1])


def _rates(problem: Problem, beta: jax.Array) -> jax.Array:
    # The speed along FLOW's stalled direction is the Rayleigh quotient of C = E[w x x^T] / E[w].
    tau = (2.0 + 4.0 * beta) * problem.e_norm**2
    own_beta = closed_form.beta_from_temperature(tau, problem.rho, problem.e_norm)
    v, _ = closed_form.eigenvectors(problem, own_beta)
    speeds = [v @ covariance @ v / (v @ v) for covariance in checks.mean_one(problem, tau)]
    return jnp.maximum(speeds[0] - speeds[1], speeds[1] - speeds[2])


def _mirror(problem: Problem, beta: jax.Array) -> jax.Array:
    errors = []
    for covariance in checks.mean_one(problem, 4.0 * problem.e_norm**2):
        matrix = jnp.eye(checks.DIM) - 0.2 * covariance
        theta = problem.theta_ft + jnp.linalg.matrix_power(matrix, checks.STEPS) @ problem.e
        errors.append(pretraining_error(problem, theta))
    return jnp.maximum(errors[0] / errors[1], errors[1] / errors[2]) - 1


def _forgetting(problem: Problem, beta: jax.Array) -> jax.Array:
    tau = beyond.median_temperature(problem.e_norm)
    mean = closed_form.mu(tau, problem.e_norm)
    paper = closed_form.flow_iterate_gd(problem, tau, checks.STEPS, 0.25)
    mean_one = closed_form.flow_iterate_gd(problem, tau, checks.STEPS, 0.25 / mean)
    uniform = closed_form.vanilla_iterate(problem, checks.STEPS, 0.25 * mean)
    vanilla = closed_form.vanilla_iterate(problem, checks.STEPS, 0.25)
    return jnp.stack([pretraining_error(problem, t) for t in (paper, mean_one, uniform, vanilla)])
