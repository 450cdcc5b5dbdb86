"""Samples of the regression problem, and gradient descent on the empirical weighted loss.

The weighting function is an argument: with `easy_jax.flow_weights` the simulation uses the
library's own weights.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from easy_jax.theory.closed_form import flow_iterate_gd
from easy_jax.theory.problem import Problem

WeightFn = Callable[[jax.Array, chex.Numeric], jax.Array]


class Convergence(NamedTuple):
    """The distance between simulated FLOW and its closed form, by number of examples.

    Attributes:
      sizes: numbers of examples N.
      rms: root mean square over the samples of |theta_K - closed form|, one per size.
      slope: slope of the least-squares line of log rms against log N.
    """

    sizes: tuple[int, ...]
    rms: tuple[float, ...]
    slope: float


def sample(
    problem: Problem, key: jax.Array, num_examples: int, noise_std: chex.Numeric = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Draws fine-tuning examples: x ~ N(0, Sigma), y = <theta_ft, x> + noise.

    Args:
      problem: the problem.
      key: a JAX random key.
      num_examples: N.
      noise_std: standard deviation of the Gaussian label noise.

    Returns:
      `(x_ND, y_N)`.
    """
    key_x, key_y = jax.random.split(key)
    dtype = problem.e.dtype
    root = jnp.linalg.cholesky(problem.sigma)
    x_ND = jax.random.normal(key_x, (num_examples, root.shape[0]), dtype) @ root.T
    y_N = x_ND @ problem.theta_ft + noise_std * jax.random.normal(key_y, (num_examples,), dtype)
    return x_ND, y_N


@functools.partial(jax.jit, static_argnames=("num_examples", "steps", "weight_fn"))
def simulate_flow(
    problem: Problem,
    key: jax.Array,
    *,
    num_examples: int,
    temperature: chex.Numeric,
    steps: int,
    learning_rate: chex.Numeric,
    weight_fn: WeightFn,
    noise_std: chex.Numeric = 0.0,
) -> jax.Array:
    """Runs FLOW on a sample: scores it with theta_pre, weights it, and takes K gradient steps.

    Args:
      problem: the problem.
      key: a JAX random key.
      num_examples: N.
      temperature: tau.
      steps: K.
      learning_rate: eta, the learning rate of optax's SGD.
      weight_fn: `(loss_N, tau) -> weight_N`.
      noise_std: standard deviation of the label noise.

    Returns:
      theta_K, [d].
    """
    x_ND, y_N = sample(problem, key, num_examples, noise_std)
    weight_N = weight_fn(jnp.square(y_N - x_ND @ problem.theta_pre), temperature)

    def weighted_loss(theta: jax.Array) -> jax.Array:
        return jnp.mean(weight_N * jnp.square(y_N - x_ND @ theta))

    optimizer = optax.sgd(learning_rate)

    def one(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[chex.ArrayTree, None]:
        theta, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(weighted_loss)(theta), opt_state)
        return (optax.apply_updates(theta, updates), opt_state), None

    start = (problem.theta_pre, optimizer.init(problem.theta_pre))
    (theta, _), _ = jax.lax.scan(one, start, length=steps)
    return theta


def convergence(
    problem: Problem,
    key: jax.Array,
    sizes: tuple[int, ...],
    *,
    repeats: int,
    temperature: chex.Numeric,
    steps: int,
    learning_rate: chex.Numeric,
    weight_fn: WeightFn,
) -> Convergence:
    """Measures how fast FLOW on N examples approaches its closed form (8) as N grows.

    Args:
      sizes: the values of N.
      repeats: number of independent samples for each N.
      problem, key, temperature, steps, learning_rate, weight_fn: as in `simulate_flow`.

    Returns:
      The distances and their slope against N; the theory predicts -1/2.
    """
    exact = flow_iterate_gd(problem, temperature, steps, learning_rate)
    rms = []
    for index, size in enumerate(sizes):
        keys = jax.random.split(jax.random.fold_in(key, index), repeats)
        theta_RD = jax.vmap(
            lambda one, size=size: simulate_flow(
                problem,
                one,
                num_examples=size,
                temperature=temperature,
                steps=steps,
                learning_rate=learning_rate,
                weight_fn=weight_fn,
            )
        )(keys)
        squared_R = jnp.sum(jnp.square(theta_RD - exact[None, :]), axis=1)
        rms.append(jnp.sqrt(jnp.mean(squared_R)))
    log_rms = np.log(np.array(jax.device_get(rms)))
    slope = np.polyfit(np.log(np.array(sizes)), log_rms, 1)[0]
    return Convergence(tuple(sizes), tuple(np.exp(log_rms).tolist()), float(slope))
