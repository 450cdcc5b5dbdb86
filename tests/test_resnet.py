"""The residual network's batch norm, against NumPy in float64 and against NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easy_jax.models import resnet

FEATURES = 3
MASKS = {"all": [True] * 5, "some": [True, False, True, True, False], "one": [False] * 4 + [True]}


def batch_norm():
    norm = resnet.BatchNorm(FEATURES, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for name in ("scale", "bias", "mean"):
        getattr(norm, name)[...] = jnp.asarray(rng.normal(size=FEATURES), jnp.float32)
    norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=FEATURES), jnp.float32)
    return norm


def images():
    return np.random.default_rng(0).normal(1.0, 2.0, size=(5, 2, 4, FEATURES)).astype(np.float32)


def reference(norm, x_BHWC, mask_B):
    """Output and new running statistics, in float64."""
    x_BHWC = np.asarray(x_BHWC, np.float64)
    mean_C, var_C = x_BHWC[mask_B].mean(axis=(0, 1, 2)), x_BHWC[mask_B].var(axis=(0, 1, 2))
    scale_C, bias_C = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias))
    y_BHWC = (x_BHWC - mean_C) / np.sqrt(var_C + 1e-5) * scale_C + bias_C
    return y_BHWC, 0.9 * norm.mean[...] + 0.1 * mean_C, 0.9 * norm.var[...] + 0.1 * var_C


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_batch_norm_with_padding(mask):
    norm, x_BHWC, mask_B = batch_norm(), images(), np.array(mask)
    y_BHWC, mean_C, var_C = reference(norm, x_BHWC, mask_B)
    np.testing.assert_allclose(norm(x_BHWC, mask_B)[mask_B], y_BHWC[mask_B], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], mean_C, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var_C, rtol=1e-5)


def test_without_padding_a_mask_changes_nothing():
    # Without a mask the computation is NNX's own.
    ours, theirs = batch_norm(), batch_norm()
    x_BHWC = images()
    y_BHWC = ours(x_BHWC, np.ones(5, bool))
    np.testing.assert_allclose(y_BHWC, theirs(x_BHWC), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=1e-6)
    np.testing.assert_allclose(ours.var[...], theirs.var[...], rtol=1e-6)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradient_of_batch_norm_equals_finite_differences(mask):
    norm, x_BHWC, mask_B = batch_norm(), images(), np.array(mask)
    graphdef, state = nnx.split(norm)
    # Random cotangents, 0 on padding: no loss depends on what comes out there.
    cotangent_BHWC = np.random.default_rng(2).normal(size=x_BHWC.shape)
    cotangent_BHWC[~mask_B] = 0

    def objective(x_BHWC):
        y_BHWC = nnx.merge(graphdef, state, copy=True)(x_BHWC, mask_B)
        return jnp.sum(y_BHWC * jnp.asarray(cotangent_BHWC, jnp.float32))

    gradient_BHWC = jax.grad(objective)(x_BHWC)
    step = 1e-5
    for index in np.ndindex(x_BHWC.shape):
        shifted = []
        for sign in (1, -1):
            moved_BHWC = x_BHWC.astype(np.float64)
            moved_BHWC[index] += sign * step
            y_BHWC, _, _ = reference(norm, moved_BHWC, mask_B)
            shifted.append(np.sum(y_BHWC * cotangent_BHWC))
        expected = (shifted[0] - shifted[1]) / (2 * step)
        np.testing.assert_allclose(gradient_BHWC[index], expected, rtol=1e-3, atol=1e-4)


def test_statistics_of_padding_alone_are_not_learnt():
    norm, mask_B = batch_norm(), np.zeros(5, bool)
    mean_C, var_C = np.array(norm.mean[...]), np.array(norm.var[...])
    assert np.isfinite(norm(images(), mask_B)).all()
    np.testing.assert_array_equal(norm.mean[...], mean_C)
    np.testing.assert_array_equal(norm.var[...], var_C)
