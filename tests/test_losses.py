"""Per-example losses against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easy_jax.core import losses


def _log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.slow
def test_softmax_cross_entropy_equals_float64():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 8, (50, 11)).astype(np.float32)
    label = rng.integers(0, 11, 50).astype(np.int32)
    nll, count = losses.softmax_cross_entropy(jnp.array(logits), jnp.array(label))
    expected = -_log_softmax(logits.astype(np.float64))[np.arange(50), label]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(count, np.ones(50))
    assert nll.dtype == count.dtype == jnp.float32


@pytest.mark.slow
def test_softmax_cross_entropy_gradient_is_softmax_minus_one_hot():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (6, 5)).astype(np.float32)
    label = rng.integers(0, 5, 6).astype(np.int32)
    grad = jax.grad(lambda x: losses.softmax_cross_entropy(x, jnp.array(label))[0].sum())(
        jnp.array(logits)
    )
    expected = np.exp(_log_softmax(logits.astype(np.float64))) - np.eye(5)[label]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


@pytest.mark.slow
def test_extreme_logits_stay_finite_and_non_negative():
    logits = jnp.array([[1e4, -1e4], [1e4, -1e4], [0.0, 0.0]])
    nll, _ = losses.softmax_cross_entropy(logits, jnp.array([0, 1, 0]))
    np.testing.assert_allclose(nll, [0.0, 2e4, np.log(2)], rtol=1e-6)


def test_bfloat16_logits_are_reduced_in_float32():
    logits = jnp.zeros((1, 1000), jnp.bfloat16)
    nll, _ = losses.softmax_cross_entropy(logits, jnp.array([3]))
    np.testing.assert_allclose(nll, [np.log(1000)], rtol=1e-6)
    assert nll.dtype == jnp.float32


@pytest.mark.slow
def test_labels_out_of_range_are_nan_and_never_clipped():
    nll, _ = losses.softmax_cross_entropy(jnp.zeros((4, 3)), jnp.array([-1, 0, 2, 3]))
    assert np.isnan(np.asarray(nll)).tolist() == [True, False, False, True]


def test_squared_error_equals_numpy():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 8, 3))
    loss, count = losses.squared_error(jnp.array(a), jnp.array(b))
    np.testing.assert_allclose(loss, ((a - b) ** 2).sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(count, np.ones(8))
