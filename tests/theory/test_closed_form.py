"""Each closed form against `jnp.linalg` on 200 random problems; gradients; edge cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easy_jax import theory

DIMS = (2, 3, 8, 24, 64)  # one compilation each
STEPS = (0, 1, 2, 7, 40)
RATE = 0.3


def problem_of(dim, seed, rho):
    return theory.random_problem(jax.random.key(seed), dim, rho, e_norm=1.7)


def centred(problem):
    """The same problem with theta_ft at 0, so that what is left of e is not drowned in it."""
    return theory.Problem(
        theta_pre=problem.e,
        theta_ft=jnp.zeros_like(problem.e),
        e_perp=problem.e_perp,
        rho=problem.rho,
        sigma_pre=problem.sigma_pre,
    )


@jax.jit
def iterates(problem, beta, covariance, q):
    """Name -> closed form of an iterate and its counterpart by powers of matrices."""
    power, eye = jnp.linalg.matrix_power, jnp.eye(problem.e.shape[0])
    e, sigma = problem.e, problem.sigma
    tau = theory.temperature_from_beta(beta, problem.rho, problem.e_norm)
    values, vectors = jnp.linalg.eigh(q)
    sides = {}
    for steps in STEPS:
        vanilla, flow = eye - 2 * RATE * sigma, eye - 2 * RATE * covariance
        start = problem.theta_ft
        sides |= {
            f"vanilla {steps}": (
                theory.vanilla_iterate(problem, steps, RATE),
                start + power(vanilla, steps) @ e,
            ),
            f"vanilla 1/2 {steps}": (
                theory.vanilla_iterate(problem, steps),
                start + power(eye - sigma, steps) @ e,
            ),
            f"flow {steps}": (
                theory.flow_iterate(problem, beta, steps),
                start + power(q, steps) @ e,
            ),
            f"flow gd {steps}": (
                theory.flow_iterate_gd(problem, tau, steps, RATE),
                start + power(flow, steps) @ e,
            ),
            # The part of e along the first eigenvector alone.
            f"stalled {steps}": (
                theory.stalled_iterate(problem, beta, steps),
                start + values[-1] ** steps * vectors[:, -1] * (vectors[:, -1] @ e),
            ),
        }
    return sides


def both_sides(problem, beta):
    """Name -> closed form and its counterpart, by linear algebra from the definitions."""
    eye = jnp.eye(problem.e.shape[0])
    e, sigma = problem.e, problem.sigma
    tau = theory.temperature_from_beta(beta, problem.rho, problem.e_norm)
    # exp(-<e, x>^2 / tau) N(x; 0, Sigma) is a Gaussian of this precision, times this mass.
    precision = jnp.linalg.inv(sigma) + 2 / tau * jnp.outer(e, e)
    mass = 1 / jnp.sqrt(jnp.linalg.det(precision) * jnp.linalg.det(sigma))
    covariance = mass * jnp.linalg.inv(precision)
    q = eye - covariance / mass
    values, vectors = jnp.linalg.eigh(q)
    v1, v2 = theory.eigenvectors(problem, beta)
    lambda1, lambda2 = theory.spectrum(beta, problem.rho)
    omega, error = theory.optimal_averaging(problem)
    # The best theta_ft + omega e: least squares in one unknown, (e' (S + Sigma) e) omega = e' S e.
    s_pre = problem.sigma_pre
    best = jnp.linalg.solve((e @ (s_pre + sigma) @ e)[None, None], (e @ s_pre @ e)[None])[0]
    sides = {
        "mu": (theory.mu(tau, problem.e_norm), mass),
        "weighted_covariance": (theory.weighted_covariance(problem, tau), covariance),
        "any Gaussian": (
            theory.weighted_covariance_gaussian(s_pre, e, tau),
            jnp.linalg.inv(jnp.linalg.inv(s_pre) + 2 / tau * jnp.outer(e, e))
            / jnp.sqrt(jnp.linalg.det(eye + 2 / tau * s_pre @ jnp.outer(e, e))),
        ),
        "q_matrix": (theory.q_matrix(problem, tau), q),
        "lambda1": (lambda1, values[-1]),
        # The other d - 2 eigenvalues are 0, so the sum is the trace; lambda2 can be far below 1.
        "lambda1 + lambda2": (lambda1 + lambda2, jnp.trace(q)),
        "v1": (v1 * jnp.sign(v1 @ vectors[:, -1]) / jnp.linalg.norm(v1), vectors[:, -1]),
        "q v2": (lambda1 * v2 + q @ v2, (lambda1 + lambda2) * v2),
        "beta": (theory.beta_from_temperature(tau, problem.rho, problem.e_norm), beta),
        "omega": (omega, best),
        "error": (error, theory.total_error(problem, problem.theta_ft + best * e)),
        "err_tot(theta_pre)": (
            theory.total_error(problem, problem.theta_pre),
            problem.e_norm**2,
        ),
        "err_tot(theta_ft)": (theory.total_error(problem, problem.theta_ft), e @ s_pre @ e),
    }
    return sides | iterates(problem, beta, covariance, q)


def rounding_scale(name, rho):
    """For powers that may leave next to nothing of e: |M|^K |e|, and no less than 1e-5, since
    the entries of M = I - ... are known to 1e-16."""
    kind, _, steps = name.rpartition(" ")
    norms = {"vanilla": 1 - 2 * RATE * (1 - rho), "vanilla 1/2": rho}
    return max(norms[kind] ** int(steps) * 1.7, 1e-5) if kind in norms else 0.0


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    dim=st.sampled_from(DIMS),
    seed=st.integers(0, 2**31 - 1),
    rho=st.floats(0, 0.99),
    beta=st.floats(0.01, 1),
)
def test_closed_forms_equal_linear_algebra(dim, seed, rho, beta):
    problem = centred(problem_of(dim, seed, rho))
    for name, (ours, expected) in both_sides(problem, beta).items():
        # A power's rounding is relative to the norm of the matrix, not to what survives in e.
        scale = max(float(jnp.max(jnp.abs(expected))), rounding_scale(name, rho))
        worst = float(jnp.max(jnp.abs(ours - expected)))
        assert worst <= 1e-9 * scale, f"{name}: {worst} of {scale}"


@pytest.mark.slow
def test_the_reference_sees_a_wrong_formula():
    sides = both_sides(problem_of(4, 0, 0.5), 0.3)
    other = both_sides(problem_of(4, 0, 0.5), 0.3 + 1e-6)
    for name in ("mu", "q_matrix", "lambda1", "flow 7", "flow gd 7", "stalled 7"):
        assert jnp.max(jnp.abs(sides[name][0] - other[name][1])) > 1e-9, name


SCALARS = {
    "flow_iterate": lambda p, b: theory.total_error(p, theory.flow_iterate(p, b, 7)),
    "stalled_iterate": lambda p, b: theory.total_error(p, theory.stalled_iterate(p, b, 7)),
    "temperature_from_beta": lambda p, b: theory.temperature_from_beta(b, p.rho, p.e_norm),
    "beta_from_temperature": lambda p, t: theory.beta_from_temperature(t, p.rho, p.e_norm),
    "spectrum": lambda p, b: jnp.dot(jnp.stack(theory.spectrum(b, p.rho)), jnp.array([1.0, 2.0])),
    "eigenvectors": lambda p, b: theory.eigenvectors(p, b)[0].sum(),
    "mu": lambda p, t: theory.mu(t, p.e_norm),
    "weighted_covariance": lambda p, t: theory.weighted_covariance(p, t)[0].sum(),
    "q_matrix": lambda p, t: theory.q_matrix(p, t)[0].sum(),
    "flow_iterate_gd": lambda p, t: theory.total_error(p, theory.flow_iterate_gd(p, t, 7, RATE)),
    "v2": lambda p, b: theory.eigenvectors(p, b)[1].sum(),
    "weighted_covariance_gaussian": lambda p, t: theory.weighted_covariance_gaussian(
        p.sigma_pre, p.e, t
    )[0].sum(),
    "noisy_weighted_covariance": lambda p, t: theory.noisy_weighted_covariance(
        p.sigma, p.e, t, 0.5
    )[0].sum(),
    "noisy_minimiser": lambda p, t: theory.noisy_minimiser(p, t, 0.5).sum(),
    "kl_dro_covariance": lambda p, t: theory.kl_dro_covariance(p, 7 + t)[0].sum(),
    "noisy_flow": lambda p, t: theory.total_error(
        p, theory.noisy_flow_iterate_gd(p, t, 0.5, 7, RATE)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("function", "rho", "at"),
    [
        (lambda p, k, b: theory.flow_iterate(p, b, k), 0.6, 1.0),  # lambda2 = 0
        (lambda p, k, rate: theory.vanilla_iterate(p, k, rate), 0.5, 1.0),  # an eigenvalue 0
        (lambda p, k, rate: theory.flow_iterate_gd(p, 0.7, k, rate), 0.6, 0.0),  # M = I
        (lambda p, k, rate: theory.flow_iterate_gd(p, jnp.inf, k, rate), 0.0, 0.2),
        (lambda p, k, b: theory.beta_from_temperature(b, 0.0, p.e_norm), 0.0, 0.5),
    ],
    ids=["beta one", "rate one", "rate zero", "double eigenvalue", "no correlation"],
)
def test_gradients_at_the_edges(function, rho, at, steps):
    problem = problem_of(4, 0, rho)
    one = lambda value: jnp.sum(function(problem, steps, value))  # noqa: E731
    step = 1e-5
    expected = (one(at + step) - one(at - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(one)(at), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_beta_of_extreme_temperatures(rho):
    beta = functools.partial(theory.beta_from_temperature, rho=rho, e_norm=1.0)
    assert float(beta(jnp.float32(0.0))) == 0.0
    for tau in (1e18, 1e30, jnp.inf):
        expected = 1 / rho if rho else tau / 2
        np.testing.assert_allclose(beta(jnp.float32(tau)), expected, rtol=1e-6)


@pytest.mark.slow
def test_float32_gradient_near_a_double_eigenvalue():
    def leftover(rho, dtype, tau):
        leaves = {"theta_pre": [1.0, 0.0], "theta_ft": [0.0, 0.0], "e_perp": [0.0, 1.0]}
        arrays = {name: jnp.array(value, dtype) for name, value in leaves.items()}
        sigma_pre = jnp.eye(2, dtype=dtype)
        problem = theory.Problem(**arrays, rho=jnp.asarray(rho, dtype), sigma_pre=sigma_pre)
        return theory.flow_iterate_gd(problem, jnp.asarray(tau, dtype), 5, 0.1)[1]

    for tau in (1e4, 1e6, 1e7, 1e9):
        single = jax.grad(leftover)(jnp.float32(0.0), jnp.float32, tau)
        double = jax.grad(leftover)(0.0, jnp.float64, tau)
        np.testing.assert_allclose(single, double, rtol=1e-2)
        np.testing.assert_allclose(double, -5 * 0.2 * 0.8**4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("at", [0.05, 0.4, 0.95])
def test_gradients_equal_finite_differences(name, at):
    function = functools.partial(SCALARS[name], problem_of(5, 3, 0.6))
    step = 1e-5
    expected = (function(at + step) - function(at - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(function)(at), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_gradient_with_respect_to_the_problem():
    problem = problem_of(4, 1, 0.5)
    gradient = jax.grad(lambda p: theory.total_error(p, theory.flow_iterate(p, 0.3, 5)))(problem)
    direction = np.random.default_rng(0).normal(size=4)
    step = 1e-6

    def moved(size):
        # e_perp stays orthogonal to first order only; the formula does not ask for it.
        theta_ft = problem.theta_ft + size * direction
        leaves = (problem.theta_pre, theta_ft, problem.e_perp, problem.rho, problem.sigma_pre)
        other = jax.tree.unflatten(jax.tree.structure(problem), _in_order(problem, leaves))
        return theory.total_error(other, theory.flow_iterate(other, 0.3, 5))

    expected = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(gradient.theta_ft @ direction, expected, rtol=1e-6)


def _in_order(problem, leaves):
    """Leaves given in the order of the fields, in the order of the tree."""
    paths = [path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(problem)]
    names = ("theta_pre", "theta_ft", "e_perp", "rho", "sigma_pre")
    return [leaves[names.index(name)] for name in paths]


# Edge cases.


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 7])
def test_without_correlation_flow_is_averaging(dim):
    problem = problem_of(dim, 0, 0.0)
    for beta in (0.01, 0.4, 1.0):
        for steps in (0, 1, 9):
            average = theory.averaging(problem, (1 + beta) ** -steps)
            np.testing.assert_allclose(
                theory.flow_iterate(problem, beta, steps), average, rtol=0, atol=1e-14
            )


@pytest.mark.slow
def test_zero_steps_are_the_pretrained_model():
    problem = problem_of(3, 0, 0.7)
    tau = theory.temperature_from_beta(0.2, 0.7, problem.e_norm)
    for theta in (
        theory.vanilla_iterate(problem, 0),
        theory.flow_iterate(problem, 0.2, 0),
        theory.flow_iterate_gd(problem, tau, 0, RATE),
        theory.noisy_flow_iterate_gd(problem, tau, 0.5, 0, RATE),
    ):
        np.testing.assert_allclose(theta, problem.theta_pre, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_a_high_temperature_is_vanilla_and_a_low_one_learns_nothing():
    problem = problem_of(4, 0, 0.7)
    hot = theory.flow_iterate_gd(problem, 1e14, 6, RATE)
    np.testing.assert_allclose(hot, theory.vanilla_iterate(problem, 6, RATE), atol=1e-12)
    cold = theory.flow_iterate_gd(problem, 1e-14, 6, RATE)
    np.testing.assert_allclose(cold, problem.theta_pre, atol=1e-6)
    # beta = 1 / rho is an infinite temperature with eta = 1 / 2.
    limit = theory.flow_iterate(problem, 1 / 0.7, 5)
    np.testing.assert_allclose(limit, theory.vanilla_iterate(problem, 5), atol=1e-14)


@pytest.mark.slow
def test_works_under_jit_and_vmap_and_in_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    problems = jax.vmap(lambda key: theory.random_problem(key, 4, 0.5))(keys)
    flow = functools.partial(theory.flow_iterate, beta=0.3)
    together = jax.jit(jax.vmap(lambda p: flow(p, steps=5)))(problems)
    for index in range(3):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], problems)
        np.testing.assert_allclose(together[index], flow(one, steps=5), rtol=1e-12)
        single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), one)
        result = flow(single, steps=jnp.int32(5))
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, together[index], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_best_flow_against_best_averaging():
    keys = jax.random.split(jax.random.key(5), 40)
    rho = jnp.linspace(0.0, 0.95, 40)
    problems = jax.vmap(lambda key, rho: theory.random_problem(key, 5, rho))(keys, rho)
    betas = jnp.geomspace(1e-3, 1, 100)
    beta, steps, flow = jax.vmap(lambda p: theory.optimal_flow(p, betas, 1000))(problems)
    averaging = jax.vmap(lambda p: theory.optimal_averaging(p)[1])(problems)
    assert (flow <= averaging * (1 + 1e-3)).all()
    better = np.asarray(flow < averaging * (1 - 1e-9))
    advantage = np.asarray(jax.vmap(theory.flow_advantage)(problems))
    np.testing.assert_array_equal(better, advantage > 1e-12)
    assert 0.5 < better.mean() < 1.0
    # The error is that of the iterate it names, and no other point of the grid is lower.
    one = jax.tree.map(lambda leaf: leaf[20], problems)
    found = theory.total_error(one, theory.flow_iterate(one, beta[20], steps[20]))
    np.testing.assert_allclose(found, flow[20], rtol=1e-12)
    for index in np.random.default_rng(0).integers(100, size=20):
        for k in (1, 3, 20, 500):
            other = theory.total_error(one, theory.flow_iterate(one, betas[index], k))
            assert other >= flow[20] - 1e-12
