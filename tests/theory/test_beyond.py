"""Label noise, the median temperature, KL-DRO and the phase diagram, by independent means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import easy_jax as ej
from easy_jax import theory

NUM = 200_000


@pytest.fixture
def problem():
    return theory.random_problem(jax.random.key(2), 3, 0.6, e_norm=1.3)


def draws(problem, noise_std, seed=0):
    """Examples by NumPy, from the definition of the problem."""
    rng = np.random.default_rng(seed)
    x_ND = rng.multivariate_normal(np.zeros(3), np.asarray(problem.sigma), size=NUM)
    y_N = x_ND @ np.asarray(problem.theta_ft) + noise_std * rng.normal(size=NUM)
    return x_ND, y_N


def within_four_standard_errors(terms_N, expected):
    standard_error = terms_N.std(axis=0) / np.sqrt(len(terms_N))
    assert (np.abs(terms_N.mean(axis=0) - np.asarray(expected)) <= 4 * standard_error).all()
    assert (standard_error < 0.02).all()


@pytest.mark.slow
@pytest.mark.parametrize("noise_std", [0.0, 0.4, 1.5])
def test_weighted_covariance_and_minimiser_by_sampling(problem, noise_std):
    tau = theory.median_temperature(problem.e_norm, noise_std)
    x_ND, y_N = draws(problem, noise_std)
    weight_N = np.asarray(ej.flow_weights(np.square(y_N - x_ND @ problem.theta_pre), tau))
    terms = weight_N[:, None, None] * x_ND[:, :, None] * x_ND[:, None, :]
    expected = theory.noisy_weighted_covariance(problem.sigma, problem.e, tau, noise_std)
    within_four_standard_errors(terms, expected)
    minimiser = np.asarray(theory.noisy_minimiser(problem, tau, noise_std))
    within_four_standard_errors((weight_N * (y_N - x_ND @ minimiser))[:, None] * x_ND, np.zeros(3))
    # The mean weight at the median temperature is the same for every problem and noise.
    mean = np.sqrt(theory.median_factor() / (theory.median_factor() + 2))
    within_four_standard_errors(weight_N[:, None], [mean])


@pytest.mark.slow
def test_noisy_descent_converges_to_the_minimiser(problem):
    tau = theory.median_temperature(problem.e_norm, 0.5)
    end = theory.noisy_flow_iterate_gd(problem, tau, 0.5, 5000, 0.3)
    np.testing.assert_allclose(end, theory.noisy_minimiser(problem, tau, 0.5), atol=1e-9)
    # Gradient descent step by step on the population loss.
    covariance = theory.noisy_weighted_covariance(problem.sigma, problem.e, tau, 0.5)
    theta = problem.theta_pre
    for _ in range(6):
        gradient = 2 * covariance @ (theta - theory.noisy_minimiser(problem, tau, 0.5))
        theta = theta - 0.3 * gradient
    np.testing.assert_allclose(theory.noisy_flow_iterate_gd(problem, tau, 0.5, 6, 0.3), theta)


def test_median_temperature_is_the_median():
    factor = float(theory.median_factor())
    np.testing.assert_allclose(factor, scipy.stats.chi2(df=1).median(), rtol=1e-12)
    temperature = theory.median_temperature(3.0, 4.0)
    np.testing.assert_allclose(temperature, 25 * scipy.stats.chi2(df=1).median(), rtol=1e-12)
    mean, _ = scipy.integrate.quad(
        lambda z: np.exp(-(z**2) / factor) * scipy.stats.norm.pdf(z), -np.inf, np.inf
    )
    np.testing.assert_allclose(theory.mu(theory.median_temperature(2.0), 2.0), mean, rtol=1e-9)
    # beta: the top eigenvalue of Q at that temperature is Lemma F.3's.
    problem = theory.random_problem(jax.random.key(0), 3, 0.6, e_norm=2.0)
    tau = theory.median_temperature(2.0)
    beta = theory.beta_from_temperature(tau, 0.6, 2.0)
    precision = np.linalg.inv(problem.sigma) + 2 / tau * np.outer(problem.e, problem.e)
    values = np.linalg.eigvalsh(np.eye(3) - np.linalg.inv(precision))
    np.testing.assert_allclose(theory.spectrum(beta, 0.6)[0], values[-1], rtol=1e-9)
    assert theory.median_temperature(jnp.float32(2.0)).dtype == jnp.float32


@pytest.mark.slow
def test_simulated_label_noise_has_the_closed_form(problem):
    tau = theory.median_temperature(problem.e_norm, 0.5)
    simulated = theory.simulate_flow(
        problem,
        jax.random.key(1),
        num_examples=NUM,
        temperature=tau,
        steps=8,
        learning_rate=0.4,
        weight_fn=ej.flow_weights,
        noise_std=0.5,
    )
    noisy = theory.noisy_flow_iterate_gd(problem, tau, 0.5, 8, 0.4)
    np.testing.assert_allclose(simulated, noisy, atol=0.01)
    assert np.abs(noisy - theory.flow_iterate_gd(problem, tau, 8, 0.4)).max() > 0.05


def test_kl_dro_covariance_by_sampling(problem):
    tau = 8.0 * problem.e_norm**2  # the fourth moment of the weighted examples exists
    x_ND, _ = draws(problem, 0.0)
    weight_N = np.asarray(ej.kl_dro_weights(np.square(x_ND @ problem.e), tau)) * NUM
    terms = weight_N[:, None, None] * x_ND[:, :, None] * x_ND[:, None, :]
    within_four_standard_errors(terms, theory.kl_dro_covariance(problem, tau))


def test_kl_dro_covariance_needs_a_high_temperature(problem):
    bound = 2 * float(problem.e_norm) ** 2
    with pytest.raises(ValueError, match=r"above 2 \|e\|\^2 = 3\.38; this one is 3\.38"):
        theory.kl_dro_covariance(problem, bound)
    with pytest.raises(ValueError, match="this one is 1"):
        theory.kl_dro_covariance(problem, jnp.array([1.0, 9.0]))
    assert np.isfinite(theory.kl_dro_covariance(problem, bound * 1.001)).all()
    assert np.isnan(jax.jit(theory.kl_dro_covariance)(problem, bound)).all()
    # The mirror image: FLOW's formula at the temperature -tau, divided by its mass.
    tau = 2 * bound
    mirrored = theory.weighted_covariance(problem, -tau) / theory.mu(-tau, problem.e_norm)
    np.testing.assert_allclose(theory.kl_dro_covariance(problem, tau), mirrored, rtol=1e-12)


def test_kl_dro_continues_the_family_of_flow(problem):
    # Q at -tau has Lemma F.3's spectrum at a beta in (1 / rho, 1 / rho^2).
    rho = float(problem.rho)
    for factor in (2.05, 3.0, 50.0):
        tau = factor * problem.e_norm**2
        beta = theory.beta_from_temperature(-tau, rho, problem.e_norm)
        assert 1 / rho < beta < 1 / rho**2
        values = np.linalg.eigvalsh(np.eye(3) - np.asarray(theory.kl_dro_covariance(problem, tau)))
        expected = sorted([*map(float, theory.spectrum(beta, rho)), 0.0])
        np.testing.assert_allclose(values, expected, atol=1e-12)
        # The stalled direction is learnt faster than by vanilla descent, that faster than by FLOW.
        flow_beta = theory.beta_from_temperature(tau, rho, problem.e_norm)
        rates = [theory.spectrum(b, rho)[0] for b in (flow_beta, 1 / rho, beta)]
        assert rates[0] > rates[1] > rates[2]


@pytest.mark.slow
def test_phase_diagram():
    rhos, angles = jnp.linspace(0, 0.9, 7), jnp.linspace(0, np.pi, 9)
    betas = jnp.geomspace(1e-3, 1, 60)
    ratio, advantage = theory.phase_diagram(rhos, angles, 10.0, 1.0, betas, 600)
    other, _ = theory.phase_diagram(rhos, angles, 10.0, 3.0, betas, 600)
    np.testing.assert_allclose(ratio, other, rtol=1e-9)  # |e| does not matter
    assert (ratio <= 1 + 5e-3).all()
    # rho (rho a - c) for Sigma_pre = I + s u u^T, written out.
    s, cos, sin, rho = 10.0, np.cos(angles), np.sin(angles), np.asarray(rhos)[:, None]
    expected = rho * (rho * (1 + s * cos**2) - s * cos * sin)
    np.testing.assert_allclose(advantage, expected, atol=1e-12)
    assert (np.asarray(ratio)[expected > 0.02] < 1 - 1e-6).all()
    assert (np.asarray(ratio)[expected <= 0] >= 1 - 1e-9).all()
    assert (expected > 0.02).any() and (expected < -0.02).any()


@pytest.mark.slow
def test_simulation_converges_like_one_over_root_n(problem):
    tau = theory.median_temperature(problem.e_norm)
    convergence = theory.convergence(
        problem,
        jax.random.key(0),
        (256, 1024, 4096),
        repeats=64,
        temperature=tau,
        steps=10,
        learning_rate=0.4,
        weight_fn=ej.flow_weights,
    )
    assert abs(convergence.slope + 0.5) < 0.1
    assert convergence.rms[0] < 0.2
    # Another closed form is not what it converges to.
    far = theory.flow_iterate_gd(problem, 2 * tau, 10, 0.4)
    near = theory.flow_iterate_gd(problem, tau, 10, 0.4)
    assert jnp.linalg.norm(far - near) > 3 * convergence.rms[-1]
