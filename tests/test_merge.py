"""Weight averaging against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from easy_jax.core import merge


def _tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {"a": jnp.array(rng.normal(size=(3, 2)), dtype), "n": jnp.array(seed)}


def test_interpolation_equals_numpy():
    start, end = _tree(1), _tree(2)
    for alpha in (0.1, 0.5, 0.9):
        result = merge.interpolate(start, end, alpha)
        expected = (1 - alpha) * np.float64(start["a"]) + alpha * np.float64(end["a"])
        np.testing.assert_allclose(result["a"], expected, rtol=1e-6)
        assert int(result["n"]) == 2  # integers are not averaged


def test_ends_are_exact():
    start, end = _tree(1), _tree(2)
    np.testing.assert_array_equal(merge.wise_ft(start, end, 0.0)["a"], start["a"])
    np.testing.assert_array_equal(merge.wise_ft(start, end, 1.0)["a"], end["a"])


def test_bfloat16_is_averaged_in_float32_and_cast_back():
    start, end = _tree(1, jnp.bfloat16), _tree(2, jnp.bfloat16)
    result = merge.interpolate(start, end, 0.3)["a"]
    expected = 0.7 * np.float32(start["a"]) + np.float32(0.3) * np.float32(end["a"])
    np.testing.assert_array_equal(result, jnp.array(expected).astype(jnp.bfloat16))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*; it must be between 0 and 1"):
        merge.interpolate(_tree(1), _tree(2), alpha)


def test_trees_must_agree():
    with pytest.raises(AssertionError):
        merge.interpolate({"a": jnp.ones(2)}, {"a": jnp.ones(3)}, 0.5)


@pytest.mark.parametrize("total", [4, 10, 195, 1000])
def test_sfa_averages_every_quarter_and_at_the_end(total):
    steps = merge.sfa_steps(total)
    assert len(steps) == 4 and steps[-1] == total
    np.testing.assert_allclose(np.diff([0, *steps]), total / 4, atol=1.0)
