"""Prop. 4.3: normalised FLOW weights minimise the entropic objective over the simplex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import easy_jax as ej

SIZE = 12


@pytest.fixture
def losses():
    return np.random.default_rng(0).exponential(2.0, size=SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(5))
def test_mirror_descent_reaches_the_weights(losses, start):
    tau = float(ej.temperature(losses))
    weight_N = np.asarray(ej.flow_weights(losses))
    pi_N = jnp.asarray(np.random.default_rng(start).dirichlet(np.ones(SIZE)))
    gradient = jax.jit(jax.grad(lambda pi: ej.entropic_objective(pi, losses, tau)))
    for _ in range(200):  # exponentiated gradient: a step of 1 / (2 tau) halves the distance
        pi_N = pi_N * jnp.exp(-gradient(pi_N) / (2 * tau))
        pi_N = pi_N / pi_N.sum()
    np.testing.assert_allclose(pi_N, weight_N / weight_N.sum(), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("concentration", [0.05, 1.0, 50.0])
def test_no_random_point_is_lower(losses, concentration):
    tau = float(ej.temperature(losses))
    weight_N = np.asarray(ej.flow_weights(losses))
    best = float(ej.entropic_objective(weight_N / weight_N.sum(), losses, tau))
    np.testing.assert_allclose(best, -tau * np.log(np.exp(-losses / tau).sum()), rtol=1e-12)
    points = np.random.default_rng(1).dirichlet(np.full(SIZE, concentration), size=2000)
    values = jax.vmap(lambda pi: ej.entropic_objective(pi, losses, tau))(jnp.asarray(points))
    assert float(values.min()) > best
    # Nor is any near the minimiser.
    nearby = weight_N / weight_N.sum() * np.exp(1e-3 * np.log(points + 1e-300))
    nearby = nearby / nearby.sum(axis=1, keepdims=True)
    values = jax.vmap(lambda pi: ej.entropic_objective(pi, losses, tau))(jnp.asarray(nearby))
    assert float(values.min()) >= best
