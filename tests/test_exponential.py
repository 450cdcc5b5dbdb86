"""Weights and temperature against NumPy in float64 and against a numerical minimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from easy_jax.core import weightings

# Zero or normal: XLA flushes what is denormal in float32 to zero.
LOSSES = st.lists(st.just(0.0) | st.floats(2.0**-100, 50.0, width=32), min_size=1, max_size=60)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(LOSSES)
def test_temperature_and_weights_equal_numpy(losses):
    loss = np.array(losses, np.float64)
    tau = np.median(loss)
    if np.float32(tau) <= 0:
        with pytest.raises(ValueError, match="temperature must be positive"):
            weightings.temperature(np.float32(loss))
        return
    np.testing.assert_allclose(weightings.temperature(np.float32(loss)), tau, rtol=1e-6)
    weights = weightings.flow_weights(np.float32(loss))
    np.testing.assert_allclose(weights, np.exp(-loss / tau), rtol=2e-4, atol=1e-37)


def test_weights_fall_with_the_loss_and_are_one_over_e_at_the_median():
    weights = np.asarray(weightings.flow_weights([3.0, 0.0, 1.0, 2.0, 100.0]))
    assert weights[1] == 1.0
    np.testing.assert_allclose(weights[3], np.exp(-1), rtol=1e-6)
    assert np.all(np.argsort(weights) == [4, 0, 3, 2, 1])


def test_normalised_weights_minimise_the_entropic_objective():
    # Prop. 4.3, by a constrained minimiser that knows nothing of the closed form.
    rng = np.random.default_rng(0)
    loss = rng.exponential(1.0, 7)
    tau = float(np.median(loss))

    def objective(pi):
        return float(pi @ loss + tau * np.sum(pi * np.log(np.maximum(pi, 1e-300))))

    result = scipy.optimize.minimize(
        objective,
        rng.dirichlet(np.ones(7)),
        bounds=[(1e-12, 1.0)] * 7,
        constraints={"type": "eq", "fun": lambda pi: pi.sum() - 1.0},
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    weights = np.asarray(weightings.flow_weights(loss), np.float64)
    np.testing.assert_allclose(weights / weights.sum(), result.x, atol=1e-5)


@pytest.mark.slow
def test_no_random_point_of_the_simplex_is_lower():
    rng = np.random.default_rng(1)
    loss = rng.exponential(1.0, 20).astype(np.float32)
    tau = float(np.median(loss))
    weights = weightings.flow_weights(loss)
    best = float(weightings.entropic_objective(weights / weights.sum(), loss, tau))
    np.testing.assert_allclose(
        best, -tau * np.log(np.exp(-np.float64(loss) / tau).sum()), rtol=1e-5
    )
    points = rng.dirichlet(np.ones(20), 500)
    direct = points @ loss + tau * np.sum(points * np.log(points), axis=1)
    library = jax.vmap(lambda pi: weightings.entropic_objective(pi, loss, tau))(jnp.array(points))
    np.testing.assert_allclose(library, direct, rtol=1e-4)
    assert (direct > best).all()


def test_entropic_objective_at_a_corner():
    assert float(weightings.entropic_objective([1.0, 0.0], [2.0, 5.0], 3.0)) == 2.0


def test_kl_dro_is_the_mirror_image():
    loss = np.array([0.5, 1.0, 2.0])
    tau = 1.5
    expected = np.exp(loss / tau) / np.exp(loss / tau).sum()
    np.testing.assert_allclose(weightings.kl_dro_weights(loss, tau), expected, rtol=1e-6)
    flow = np.asarray(weightings.flow_weights(loss, tau))
    # Up to scale, one is the reciprocal of the other.
    np.testing.assert_allclose(flow * expected, (flow * expected)[0], rtol=1e-6)
    assert np.isfinite(np.asarray(weightings.kl_dro_weights([0.0, 1e4], 1.0))).all()


def test_token_weights_use_the_median_over_target_tokens():
    rng = np.random.default_rng(2)
    loss = rng.exponential(1.0, (4, 9)).astype(np.float32)
    mask = rng.random((4, 9)) < 0.6
    tau = np.median(loss[mask].astype(np.float64))
    expected = np.where(mask, np.exp(-loss.astype(np.float64) / tau), 0.0)
    loss_with_junk = np.where(mask, loss, np.nan)
    weights = weightings.flow_weights_token(loss_with_junk, mask)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    given_tau = weightings.flow_weights_token(loss_with_junk, mask, tau=2.0)
    np.testing.assert_allclose(given_tau, np.where(mask, np.exp(-loss / 2.0), 0.0), rtol=1e-5)


def test_works_under_jit_vmap_and_grad():
    loss = jnp.array([[0.5, 1.0, 2.0], [3.0, 1.0, 2.0]])
    rows = jax.jit(jax.vmap(weightings.flow_weights))(loss)
    for row, one in zip(rows, loss, strict=True):
        np.testing.assert_allclose(row, weightings.flow_weights(one), rtol=1e-6)
    slope = jax.grad(lambda tau: weightings.flow_weights(loss[0], tau).sum())(2.0)
    h = 1e-3
    numeric = np.exp(-np.array([0.5, 1, 2]) / (2 + h)) - np.exp(-np.array([0.5, 1, 2]) / (2 - h))
    np.testing.assert_allclose(slope, numeric.sum() / (2 * h), rtol=1e-3)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ([], "there are no losses"),
        ([1.0, np.nan, np.inf], r"2 of 3 losses are not finite, at positions \[1, 2\]"),
        ([1.0, -0.5], r"1 of 2 losses are negative, at positions \[1\]"),
        ([0.0, 0.0, 1.0], "the median loss is 0.0; the temperature must be positive"),
    ],
)
def test_bad_losses(loss, message):
    with pytest.raises(ValueError, match=message):
        weightings.flow_weights(np.array(loss, np.float32))


@pytest.mark.parametrize("tau", [0.0, -1.0, np.nan, np.inf])
def test_bad_temperatures(tau):
    for function in (weightings.flow_weights, weightings.kl_dro_weights):
        with pytest.raises(ValueError, match="temperature must be positive"):
            function([1.0], tau)


def test_token_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shape \(1, 2\), target_mask \(1, 3\)"):
        weightings.flow_weights_token(np.ones((1, 2)), np.ones((1, 3), bool))


def test_controls():
    weights = np.random.default_rng(3).random(101).astype(np.float32)
    mean = weights.astype(np.float64).mean()
    uniform = weightings.control_weights(weights, "uniform", seed=0)
    np.testing.assert_allclose(uniform, np.full(101, mean), rtol=1e-6)
    shuffled = weightings.control_weights(weights, "shuffled", seed=0)
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(weights))
    assert (shuffled != weights).mean() > 0.9
    np.testing.assert_array_equal(shuffled, weightings.control_weights(weights, "shuffled", seed=0))
    mean_one = weightings.control_weights(weights, "mean_one", seed=0)
    np.testing.assert_allclose(mean_one, weights / mean, rtol=1e-6)
    # The annotation check of the tests' import hook answers before the function's own.
    with pytest.raises((ValueError, TypeError), match="'uniform', 'shuffled'"):
        weightings.control_weights(weights, "mean", seed=0)


def test_a_concrete_temperature_is_checked_under_jit():
    for tau in (2.0, jnp.float32(2.0)):
        inside = jax.jit(lambda loss, tau=tau: weightings.flow_weights(loss, tau))(jnp.ones(3))
        np.testing.assert_allclose(inside, np.exp(-0.5), rtol=1e-6)
    zero = jnp.float32(0.0)
    with pytest.raises(ValueError, match=r"tau is 0\.0"):
        jax.jit(lambda loss: weightings.flow_weights(loss, zero))(jnp.ones(3))
