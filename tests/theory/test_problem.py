"""Problems: their errors, and what is refused at construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easy_jax import theory

GOOD = {
    "theta_pre": np.array([1.0, 2.0, 0.0]),
    "theta_ft": np.array([1.0, 0.0, 0.0]),
    "e_perp": np.array([0.0, 0.0, 1.0]),
    "rho": 0.5,
    "sigma_pre": np.diag([1.0, 2.0, 3.0]),
}


def test_errors_by_hand():
    problem = theory.Problem(**GOOD)
    assert float(problem.e_norm) == 2.0
    np.testing.assert_allclose(problem.sigma, [[1, 0, 0], [0, 1, 0.5], [0, 0.5, 1]])
    np.testing.assert_array_equal(theory.fine_tuning_covariance(problem), problem.sigma)
    theta = jnp.array([1.0, 1.0, 1.0])
    assert float(theory.pretraining_error(problem, theta)) == 2.0 + 3.0
    assert float(theory.fine_tuning_error(problem, theta)) == 1.0 + 1.0 + 2 * 0.5
    assert float(theory.total_error(problem, theta)) == 8.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta_ft": np.zeros(2)}, r"theta_ft has shape \(2,\)"),
        ({"sigma_pre": np.eye(2)}, r"sigma_pre has shape \(2, 2\)"),
        ({"theta_pre": np.zeros((3, 1))}, r"theta_pre has shape \(3, 1\)"),
        ({"rho": np.zeros(3)}, r"rho has shape \(3,\)"),
        ({"rho": 1.0}, r"rho is 1\.0; it must be at least 0 and below 1"),
        ({"rho": -0.1}, r"rho is -0\.1"),
        ({"rho": np.nan}, r"rho has NaN"),
        ({"theta_ft": GOOD["theta_pre"]}, "theta_pre equals theta_ft"),
        ({"e_perp": np.array([0.0, 0.0, 2.0])}, "e_perp has length 2; it must be a unit vector"),
        ({"e_perp": np.array([0.0, 0.6, 0.8])}, r"not orthogonal .* cosine is 0\.6"),
        ({"sigma_pre": np.diag([1.0, 0.5, 1.0])}, r"smallest eigenvalue is 0\.5"),
        ({"sigma_pre": np.eye(3) + np.eye(3, k=1)}, "not symmetric: entries differ by up to 1"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        theory.Problem(**{**GOOD, **changes})


@pytest.mark.slow
def test_random_problems_are_valid_and_differ():
    keys = jax.random.split(jax.random.key(0), 20)
    problems = [theory.random_problem(key, 2 + i % 5, 0.05 * i) for i, key in enumerate(keys)]
    assert len({float(problem.theta_pre[0]) for problem in problems}) == 20
    with pytest.raises(ValueError, match="dim is 1"):
        theory.random_problem(keys[0], 1, 0.5)
    with pytest.raises(ValueError, match="rho is"):
        theory.random_problem(keys[0], 3, 1.5)


@pytest.mark.slow
def test_random_problems_close_to_the_pretrained_model_in_float32():
    with jax.enable_x64(False):
        for key in jax.random.split(jax.random.key(1), 10):
            problem = theory.random_problem(key, 16, 0.5, e_norm=1e-4)
            assert problem.e.dtype == jnp.float32
            assert abs(float(problem.e_bar @ problem.e_perp)) < 1e-5
