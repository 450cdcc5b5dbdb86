"""Section 7 of the paper, claim by claim, against linear algebra, autodiff and sampling.

Every claim is an error and a bound on it. Run in float64 (`jax.enable_x64(True)`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from easy_jax.theory import beyond, closed_form, simulation
from easy_jax.theory.problem import Problem, pretraining_error, random_problem, total_error

DIM = 8
NUM_PROBLEMS = 200
NUM_SAMPLES = 200_000
STEPS = 7
MAX_STEPS = 1000
NUM_CLAIMS = 22  # for progress bars


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
      source: equation, theorem or remark of the paper, or `docs/theory.md`.
      statement: what is claimed.
      compared: with what.
      value: the largest error, or what the statement says of it.
      bound: what it may be at most.
    """

    source: str
    statement: str
    compared: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound  # False for NaN


def check_claims(
    key: jax.Array,
    weight_fn: simulation.WeightFn,
    convergence: simulation.Convergence,
    num_problems: int = NUM_PROBLEMS,
) -> Iterator[Claim]:
    """Checks every claim on random problems, one after the other.

    Args:
      key: a JAX random key.
      weight_fn: `(loss_N, tau) -> weight_N`: the weighting that is sampled.
      convergence: of `simulation.convergence` with the same weighting.
      num_problems: how many random problems, of 8 dimensions, rho uniform in [0, 0.99) and
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
    problem_P = jax.jit(jax.vmap(lambda one, rho: random_problem(one, DIM, rho)))(
        jax.random.split(keys[2], num_problems), rho_P
    )
    yield from _closed_forms(problem_P, beta_P)
    yield from _against_averaging(problem_P)
    yield from _by_sampling(keys[3], weight_fn)
    yield _rate(convergence)
    yield from _beyond(problem_P, beta_P)


def _closed_forms(problem_P: Problem, beta_P: jax.Array) -> Iterator[Claim]:
    power = jnp.linalg.matrix_power

    def vanilla(problem: Problem, beta: jax.Array) -> jax.Array:
        moved = power(jnp.eye(DIM) - 0.6 * problem.sigma, STEPS) @ problem.e
        ours = closed_form.vanilla_iterate(problem, STEPS, 0.3)
        return _error(ours - problem.theta_ft, moved)

    def even_and_odd(problem: Problem, beta: jax.Array) -> jax.Array:
        scale = problem.rho**STEPS * problem.e_norm
        odd = problem.theta_ft - scale * problem.e_perp
        even = problem.theta_ft + scale * problem.rho * problem.e_bar
        return jnp.maximum(
            _error(closed_form.vanilla_iterate(problem, STEPS), odd),
            _error(closed_form.vanilla_iterate(problem, STEPS + 1), even),
        )

    def covariance(problem: Problem, beta: jax.Array) -> jax.Array:
        ours = closed_form.weighted_covariance(problem, _tau(problem, beta))
        mass, covariance = _tilted(problem, _tau(problem, beta))
        return _error(ours, mass * covariance)

    def descent(problem: Problem, beta: jax.Array) -> jax.Array:
        tau = _tau(problem, beta)
        mass, covariance = _tilted(problem, tau)
        moved = power(jnp.eye(DIM) - 0.6 * mass * covariance, STEPS) @ problem.e
        ours = closed_form.flow_iterate_gd(problem, tau, STEPS, 0.3)
        return _error(ours - problem.theta_ft, moved)

    def spectrum(problem: Problem, beta: jax.Array) -> jax.Array:
        q = jnp.eye(DIM) - _tilted(problem, _tau(problem, beta))[1]
        values = jnp.linalg.eigvalsh(q)
        # In 8 dimensions Q has 6 zeros beside lambda1 > lambda2 >= 0.
        lambda1, lambda2 = closed_form.spectrum(beta, problem.rho)
        v1, v2 = closed_form.eigenvectors(problem, beta)
        return jnp.max(
            jnp.stack(
                [
                    _error(lambda1, values[-1]),
                    jnp.abs(lambda2 - values[-2]),
                    _error(q @ v1, lambda1 * v1),
                    jnp.max(jnp.abs(q @ v2 - lambda2 * v2)),
                ]
            )
        )

    def by_spectrum(problem: Problem, beta: jax.Array) -> jax.Array:
        q = jnp.eye(DIM) - _tilted(problem, _tau(problem, beta))[1]
        ours = closed_form.flow_iterate(problem, beta, STEPS)
        return _error(ours - problem.theta_ft, power(q, STEPS) @ problem.e)

    def stalled(problem: Problem, beta: jax.Array) -> jax.Array:
        # Relative to lambda1^K: what is left is (lambda2 / lambda1)^K, at most rho^(2K).
        lambda1, _ = closed_form.spectrum(beta, problem.rho)
        both = [
            f(problem, beta, STEPS) for f in (closed_form.flow_iterate, closed_form.stalled_iterate)
        ]
        left = jnp.linalg.norm(both[0] - both[1]) / (lambda1**STEPS * problem.e_norm)
        return left - problem.rho ** (2 * STEPS)

    for source, statement, compared, function, bound in (
        (
            "(6), (10)",
            "gradient descent: theta_K",
            "matrix_power of I - 2 eta Sigma",
            vanilla,
            1e-9,
        ),
        ("(12)", "eta = 1/2: even and odd K", "the closed form, K = 7 and 8", even_and_odd, 1e-9),
        (
            "Thm 7.2, (9), Lemma F.1",
            "Sigma' = mu (I - Q)",
            "inv and det of the tilted Gaussian",
            covariance,
            1e-9,
        ),
        ("(8)", "FLOW: theta_K for any eta", "matrix_power of I - 2 eta Sigma'", descent, 1e-9),
        ("Lemma F.3", "eigenvalues and eigenvectors of Q", "eigvalsh, Q v", spectrum, 1e-9),
        ("(11), (14)", "FLOW with eta = 1 / (2 mu)", "matrix_power of Q", by_spectrum, 1e-9),
        (
            "(15)",
            "the rest beside the stalled part is below rho^(2K)",
            "(14), K = 7",
            stalled,
            1e-9,
        ),
    ):
        yield Claim(source, statement, compared, _worst(function, problem_P, beta_P), bound)


def _against_averaging(problem_P: Problem) -> Iterator[Claim]:
    def lemma_f4(problem: Problem) -> jax.Array:
        # A line search in one dimension is a 1 x 1 linear system: the error is quadratic.
        def error(omega: jax.Array) -> jax.Array:
            return total_error(problem, closed_form.averaging(problem, omega))

        zero = jnp.zeros(())
        best = -jax.grad(error)(zero) / jax.grad(jax.grad(error))(zero)
        omega, value = closed_form.optimal_averaging(problem)
        return jnp.maximum(_error(omega, best), _error(value, error(best)))

    def ends(problem: Problem) -> jax.Array:
        # (18): how far averaging is below the better end; negative where it is.
        _, value = closed_form.optimal_averaging(problem)
        better = jnp.minimum(
            total_error(problem, problem.theta_pre), total_error(problem, problem.theta_ft)
        )
        return value - better

    yield Claim(
        "(16), (17), Lemma F.4",
        "the best omega and its error",
        "Newton's step by autodiff",
        _worst(lemma_f4, problem_P),
        1e-9,
    )
    yield Claim(
        "(13), (18)",
        "the best average minus the better of theta_pre and theta_ft is below 0",
        "errors by definition",
        _worst(ends, problem_P),
        0.0,
    )

    betas = jnp.geomspace(1e-3, 1.0, 100)

    def ratio(problem: Problem) -> jax.Array:
        _, _, error = closed_form.optimal_flow(problem, betas, MAX_STEPS)
        return error / closed_form.optimal_averaging(problem)[1]

    ratio_P = jax.lax.map(ratio, problem_P)
    advantage_P = jax.vmap(beyond.flow_advantage)(problem_P)
    better = ratio_P < 1 - 1e-9
    yield Claim(
        "section 7",
        "best FLOW / best average - 1: never worse, up to the grid",
        f"{betas.size} betas, K up to {MAX_STEPS}",
        float(jnp.max(ratio_P) - 1),
        2e-3,
    )
    yield Claim(
        "docs/theory.md",
        f"strictly better ({float(better.mean()):.1%} of the problems) if and "
        "only if rho > 0 and rho a > c: share where this fails",
        "the same grid",
        float(jnp.mean(better != (advantage_P > 0))),
        0.0,
    )

    def is_averaging(problem: Problem) -> jax.Array:
        uncorrelated = problem.replace(rho=0.0)  # type: ignore[attr-defined]
        ours = closed_form.flow_iterate(uncorrelated, 0.3, STEPS)
        return _error(ours, closed_form.averaging(uncorrelated, 1.3**-STEPS))

    yield Claim(
        "section 7",
        "rho = 0: FLOW is model averaging, omega = (1 + beta)^-K",
        "(16)",
        _worst(is_averaging, problem_P),
        1e-12,
    )


def _by_sampling(key: jax.Array, weight_fn: simulation.WeightFn) -> Iterator[Claim]:
    keys = jax.random.split(key, 4)
    problem = random_problem(keys[0], 4, 0.6)
    tau = beyond.median_temperature(problem.e_norm)

    def weighted_sample(key: jax.Array, noise_std: float) -> tuple[jax.Array, ...]:
        x_ND, y_N = simulation.sample(problem, key, NUM_SAMPLES, noise_std)
        return x_ND, y_N, weight_fn(jnp.square(y_N - x_ND @ problem.theta_pre), tau)

    @jax.jit
    def standard_errors(x_ND: jax.Array, weight_N: jax.Array, expected: jax.Array) -> jax.Array:
        return _z(weight_N[:, None, None] * x_ND[:, :, None] * x_ND[:, None, :], expected)

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
        float(_z(residual_N[:, None] * x_ND, jnp.zeros(4))),
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


def _beyond(problem_P: Problem, beta_P: jax.Array) -> Iterator[Claim]:
    z = jnp.linspace(-12.0, 12.0, 4001)
    density = jnp.exp(-(z**2) / 2.0) / jnp.sqrt(2.0 * jnp.pi)

    def median(problem: Problem, noise_std: jax.Array) -> jax.Array:
        # The residual at theta_pre is N(0, |e|^2 + s^2): half of it is within sqrt(tau).
        tau = beyond.median_temperature(problem.e_norm, noise_std)
        scale = jnp.sqrt(problem.e_norm**2 + noise_std**2)
        within = jax.scipy.special.erf(jnp.sqrt(tau) / scale / jnp.sqrt(2.0))
        weight = jnp.exp(-((scale * z) ** 2) / tau)
        mean = jnp.trapezoid(weight * density, z)
        noiseless = beyond.median_temperature(problem.e_norm)
        beta = closed_form.beta_from_temperature(noiseless, problem.rho, problem.e_norm)
        largest = 1.0 - jnp.linalg.eigvalsh(_tilted(problem, noiseless)[1])[0]
        errors = [
            jnp.abs(within - 0.5),
            _error(closed_form.mu(tau, scale), mean),
            _error(closed_form.spectrum(beta, problem.rho)[0], largest),
        ]
        return jnp.max(jnp.stack(errors))

    def kl_dro(problem: Problem, beta: jax.Array) -> jax.Array:
        tau = (2.0 + 4.0 * beta) * problem.e_norm**2
        return _error(beyond.kl_dro_covariance(problem, tau), _tilted(problem, -tau)[1])

    def existence(problem: Problem) -> jax.Array:
        # The weighted density is integrable where its precision is positive definite.
        smallest = [
            jnp.linalg.eigvalsh(_precision(problem, -tau))[0]
            for tau in (jnp.array([1.0 - 1e-6, 1.0 + 1e-6]) * 2.0 * problem.e_norm**2)
        ]
        return jnp.maximum(smallest[0], -smallest[1])

    def rates(problem: Problem, beta: jax.Array) -> jax.Array:
        # What a step learns along the direction that FLOW stalls: the Rayleigh quotient of
        # C = E[w x x^T] / E[w]; larger is faster.
        tau = (2.0 + 4.0 * beta) * problem.e_norm**2
        own_beta = closed_form.beta_from_temperature(tau, problem.rho, problem.e_norm)
        v, _ = closed_form.eigenvectors(problem, own_beta)
        speeds = [v @ covariance @ v / (v @ v) for covariance in _mean_one(problem, tau)]
        return jnp.maximum(speeds[0] - speeds[1], speeds[1] - speeds[2])

    yield Claim(
        "docs/theory.md",
        "tau = median: m (|e|^2 + s^2), and mu and beta from it",
        "erf, quadrature, eigvalsh",
        _worst(median, problem_P, beta_P),
        1e-9,
    )
    yield Claim(
        "docs/theory.md",
        "KL-DRO: its covariance for tau > 2 |e|^2",
        "inv",
        _worst(kl_dro, problem_P, beta_P),
        1e-9,
    )
    yield Claim(
        "docs/theory.md",
        "KL-DRO: the precision is positive definite just above tau = 2 |e|^2, "
        "and not just below; largest eigenvalue of the wrong sign",
        "eigvalsh",
        _worst(existence, problem_P),
        0.0,
    )
    yield Claim(
        "docs/theory.md",
        "one step: FLOW learns its stalled direction slowest, KL-DRO fastest; "
        "largest gap the wrong way round",
        "Rayleigh quotients",
        _worst(rates, problem_P, beta_P),
        0.0,
    )

    def mirror(problem: Problem, beta: jax.Array) -> jax.Array:
        errors = []
        for covariance in _mean_one(problem, 4.0 * problem.e_norm**2):
            matrix = jnp.eye(DIM) - 0.2 * covariance
            theta = problem.theta_ft + jnp.linalg.matrix_power(matrix, STEPS) @ problem.e
            errors.append(pretraining_error(problem, theta))
        return jnp.maximum(errors[0] / errors[1], errors[1] / errors[2]) - 1

    yield Claim(
        "docs/theory.md",
        "err1 after K steps: FLOW < vanilla < KL-DRO, weights of mean one; "
        "largest ratio of neighbours - 1",
        "tau = 4 |e|^2, K = 7, eta = 0.1",
        _worst(mirror, problem_P, beta_P),
        0.0,
    )

    def forgetting(problem: Problem, beta: jax.Array) -> jax.Array:
        tau = beyond.median_temperature(problem.e_norm)
        mean = closed_form.mu(tau, problem.e_norm)
        paper = closed_form.flow_iterate_gd(problem, tau, STEPS, 0.25)
        mean_one = closed_form.flow_iterate_gd(problem, tau, STEPS, 0.25 / mean)
        uniform = closed_form.vanilla_iterate(problem, STEPS, 0.25 * mean)
        vanilla = closed_form.vanilla_iterate(problem, STEPS, 0.25)
        return jnp.stack(
            [pretraining_error(problem, t) for t in (paper, mean_one, uniform, vanilla)]
        )

    errors_PM = jax.jit(jax.vmap(forgetting))(problem_P, beta_P)
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


def _worst(function: Callable[..., jax.Array], *arguments: Any) -> float:
    """The largest value over problems; jitted, since compiling single operations takes longer."""
    return float(jnp.max(jax.jit(jax.vmap(function))(*arguments)))


def _precision(problem: Problem, temperature: jax.Array) -> jax.Array:
    """Of exp(-<e, x>^2 / tau) N(x; 0, Sigma); a negative temperature is KL-DRO's."""
    return jnp.linalg.inv(problem.sigma) + 2.0 / temperature * jnp.outer(problem.e, problem.e)


def _tilted(problem: Problem, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mass and covariance of that Gaussian, by det and inv."""
    precision = _precision(problem, temperature)
    mass = 1.0 / jnp.sqrt(jnp.linalg.det(precision) * jnp.linalg.det(problem.sigma))
    return mass, jnp.linalg.inv(precision)


def _mean_one(problem: Problem, temperature: jax.Array) -> tuple[jax.Array, ...]:
    """E[w x x^T] / E[w] of FLOW, vanilla and KL-DRO, by the closed forms."""
    mass = closed_form.mu(temperature, problem.e_norm)
    flow = closed_form.weighted_covariance(problem, temperature) / mass
    return flow, problem.sigma, beyond.kl_dro_covariance(problem, temperature)


def _tau(problem: Problem, beta: chex.Numeric) -> jax.Array:
    return closed_form.temperature_from_beta(beta, problem.rho, problem.e_norm)


def _error(ours: jax.Array, expected: jax.Array) -> jax.Array:
    """The largest difference, relative to the largest expected entry."""
    return jnp.max(jnp.abs(ours - expected)) / jnp.max(jnp.abs(expected))


def _z(terms_N: jax.Array, expected: jax.Array) -> jax.Array:
    """The largest distance of a mean over the first axis from `expected`, in standard errors."""
    standard_error = jnp.std(terms_N, axis=0) / jnp.sqrt(terms_N.shape[0])
    return jnp.max(jnp.abs(jnp.mean(terms_N, axis=0) - expected) / standard_error)
