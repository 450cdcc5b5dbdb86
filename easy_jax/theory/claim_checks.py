"""The type of a claim about FLOW in linear regression, and helpers to check several claims."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from easy_jax.theory import beyond, closed_form
from easy_jax.theory.problem import Problem

DIM = 8
STEPS = 7


@dataclasses.dataclass(frozen=True)
class Claim:
    """A checked claim, one row of the report's table.

    Attributes:
      source: equation, theorem or remark of the paper, or `docs/theory.md`.
      statement: the claim in words and formulas.
      compared: what the claim is compared with.
      value: the largest error, or the quantity that the statement names.
      bound: the largest value for which the claim holds.
    """

    source: str
    statement: str
    compared: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound  # False for NaN


def worst(function: Callable[..., jax.Array], *arguments: Any) -> float:
    """Returns a function's largest value over problems.

    The function is jitted, since compiling its operations one by one takes longer.
    """
    return float(jnp.max(jax.jit(jax.vmap(function))(*arguments)))


def precision(problem: Problem, temperature: jax.Array) -> jax.Array:
    """Precision of exp(-<e, x>^2 / tau) N(x; 0, Sigma); a negative temperature is KL-DRO's."""
    return jnp.linalg.inv(problem.sigma) + 2.0 / temperature * jnp.outer(problem.e, problem.e)


def tilted(problem: Problem, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mass and covariance of the Gaussian in `precision`, by det and inv."""
    matrix = precision(problem, temperature)
    mass = 1.0 / jnp.sqrt(jnp.linalg.det(matrix) * jnp.linalg.det(problem.sigma))
    return mass, jnp.linalg.inv(matrix)


def mean_one(problem: Problem, temperature: jax.Array) -> tuple[jax.Array, ...]:
    """E[w x x^T] / E[w] of FLOW, vanilla and KL-DRO, by the closed forms."""
    mass = closed_form.mu(temperature, problem.e_norm)
    flow = closed_form.weighted_covariance(problem, temperature) / mass
    return flow, problem.sigma, beyond.kl_dro_covariance(problem, temperature)


def tau(problem: Problem, beta: chex.Numeric) -> jax.Array:
    """Returns the temperature of a problem that corresponds to beta."""
    return closed_form.temperature_from_beta(beta, problem.rho, problem.e_norm)


def error(ours: jax.Array, expected: jax.Array) -> jax.Array:
    """Returns the largest difference, relative to the largest expected entry."""
    return jnp.max(jnp.abs(ours - expected)) / jnp.max(jnp.abs(expected))


def z(terms_N: jax.Array, expected: jax.Array) -> jax.Array:
    """Returns the largest distance of the mean over axis 0 from `expected`, in standard errors."""
    standard_error = jnp.std(terms_N, axis=0) / jnp.sqrt(terms_N.shape[0])
    return jnp.max(jnp.abs(jnp.mean(terms_N, axis=0) - expected) / standard_error)
