"""The theory of FLOW in linear regression (section 7 of the paper): closed forms and simulation.

`beyond` adds results that are not in the paper. This package imports nothing else of easy_jax. Its
functions work under `jit`, `vmap` and `grad`, in float32 and, with `jax.enable_x64(True)`, in
float64. docs/theory.md has the derivations.
"""

from easy_jax.theory.beyond import (
    flow_advantage,
    kl_dro_covariance,
    median_factor,
    median_temperature,
    noise_pull,
    noisy_flow_iterate_gd,
    noisy_minimiser,
    noisy_weighted_covariance,
    phase_diagram,
)
from easy_jax.theory.closed_form import (
    averaging,
    beta_from_temperature,
    eigenvectors,
    flow_iterate,
    flow_iterate_gd,
    mu,
    optimal_averaging,
    optimal_flow,
    q_matrix,
    spectrum,
    stalled_iterate,
    temperature_from_beta,
    vanilla_iterate,
    weighted_covariance,
    weighted_covariance_gaussian,
)
from easy_jax.theory.problem import (
    Problem,
    fine_tuning_covariance,
    fine_tuning_error,
    pretraining_error,
    random_problem,
    total_error,
)
from easy_jax.theory.simulation import Convergence, convergence, sample, simulate_flow

__all__ = [
    "Convergence",
    "Problem",
    "averaging",
    "beta_from_temperature",
    "convergence",
    "eigenvectors",
    "fine_tuning_covariance",
    "fine_tuning_error",
    "flow_advantage",
    "flow_iterate",
    "flow_iterate_gd",
    "kl_dro_covariance",
    "median_factor",
    "median_temperature",
    "mu",
    "noise_pull",
    "noisy_flow_iterate_gd",
    "noisy_minimiser",
    "noisy_weighted_covariance",
    "optimal_averaging",
    "optimal_flow",
    "phase_diagram",
    "pretraining_error",
    "q_matrix",
    "random_problem",
    "sample",
    "simulate_flow",
    "spectrum",
    "stalled_iterate",
    "temperature_from_beta",
    "total_error",
    "vanilla_iterate",
    "weighted_covariance",
    "weighted_covariance_gaussian",
]
